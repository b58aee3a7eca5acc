"""Run inside real DeepSpeed processes by test_resume.py: checkpoints written and read by different engines.

    python tests/checkpoint_worker.py JOB.json     JOB: {"pretrain", "comparisons", "save", "load": [{...}], "output"}

Each entry names a folder, a ZeRO stage and flags. Saving trains two steps, then writes; loading reads, then takes one
more step. What is kept of each: weights and Adam's moments, gathered whole; and the loss of the step that follows.
"""

import json
import sys
from pathlib import Path

import datasets
import torch
from deepspeed.utils import safe_get_full_fp32_param

from general_preference.models.reward_model import get_reward_model
from general_preference.trainer import deepspeed_engine
from general_preference.trainer.arguments import parse_arguments
from general_preference.trainer.deepspeed_engine import DeepSpeedEngine
from general_preference.trainer.objectives import PreferenceObjective
from general_preference.trainer.shards import FIELDS
from general_preference.trainer.trainer import Trainer
from general_preference.trainer.zero_layout import own_shard
from scripts.train_rm_general_preference import make_tokenizer

GLOBAL_BATCH = 4
deepspeed_engine.has_fast_bf16 = lambda device: True  # slow here, but tiny


def make_trainer(job: dict, run: dict, load: bool) -> Trainer:
    """A trainer on `run`'s checkpoint folder."""
    flags = ["--pretrain", job["pretrain"], "--dataset", "none", "--save_path", run["folder"], "--max_epochs", "3"]
    flags += ["--learning_rate", "1e-2", "--is_general_preference", "--value_head_dim", "4", "--add_prompt_head"]
    flags += ["--learnable_temperature", "--l2", "0.1", "--zero_stage", str(run["stage"]), *run.get("flags", [])]
    arguments = parse_arguments([*flags, *(["--load_checkpoint"] if load else [])])
    engine = DeepSpeedEngine(arguments.engine, arguments.optimizer)
    arguments.optimizer.micro_train_batch_size = GLOBAL_BATCH // engine.context.world_size
    config = engine.config()
    config["zero_optimization"]["stage3_param_persistence_threshold"] = run.get("persistence", 0)
    engine.config = lambda: config
    model = get_reward_model(
        job["pretrain"], bf16=arguments.engine.bf16, preference=arguments.model.preference(None), seed=7,
        ds_config=config, lora_rank=arguments.model.lora_rank, lora_alpha=32,
    )  # fmt: skip
    model.freeze_unused(language_model_head=False)
    table, tokenizer = datasets.Dataset.from_list(job["comparisons"]), make_tokenizer(arguments)
    objective = PreferenceObjective(arguments.loss, model, tokenizer, engine.device)
    return Trainer(arguments, engine, model, tokenizer, objective, table, {})


def tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Whole weights and moments by name, put together from what every process owns; weights as DeepSpeed has them."""
    engine, found = trainer.engine, {}
    shard = own_shard(engine.engine, engine.context.rank)
    mine = [
        (part, {field: shard.flats[part.flat][field][part.offset :][: part.count].clone() for field in FIELDS})
        for part in shard.fragments
    ]
    for part, values in (entry for some in engine.context.gather_objects(mine) for entry in some):
        for field in FIELDS:
            empty = torch.full((torch.Size(part.shape).numel(),), float("nan"))
            found.setdefault(f"{part.name}/{field}", empty)[part.start :][: part.count] = values[field]
    for name, weight in engine.model.named_parameters():
        whole = safe_get_full_fp32_param(weight) if weight.requires_grad else None
        assert whole is None or torch.equal(whole.flatten(), found[f"{name}/weight"]), name
    return found


def train(trainer: Trainer, steps: int) -> list[float]:
    """Losses of the next `steps` steps."""
    batches, losses = trainer.batches(), []
    for _ in range(steps):
        trainer.train_step(batches)
        losses.append(trainer.window.reduce()["train/loss"])
    return losses


def main() -> None:
    """Do the job; the main process writes what it found."""
    job = json.loads(Path(sys.argv[-1]).read_text())
    results = {}
    for run in job["save"]:
        trainer = make_trainer(job, run, load=False)
        losses = train(trainer, 2)
        trainer.store.save(trainer.state)
        kept = tensors(trainer)
        results[run["name"]] = {"tensors": kept, "losses": losses, "after": train(trainer, 2)}
    for run in job["load"]:
        trainer = make_trainer(job, run, load=True)
        rate, kept = trainer.engine.learning_rate(), tensors(trainer)
        after = train(trainer, 2)
        results[run["name"]] = {"step": trainer.state.step, "rate": rate, "tensors": kept, "after": after}
    if torch.distributed.get_rank() == 0:
        torch.save(results, job["output"])
    torch.distributed.destroy_process_group()  # its threads must not outlive the interpreter


if __name__ == "__main__":
    main()
