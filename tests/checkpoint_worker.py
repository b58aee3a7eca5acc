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
from general_preference.trainer import deepspeed_engine as strategy_module
from general_preference.trainer.arguments import parse_arguments
from general_preference.trainer.deepspeed_engine import DeepSpeedEngine
from general_preference.trainer.metrics import Window
from general_preference.trainer.shards import FIELDS
from general_preference.trainer.trainer import Trainer
from general_preference.trainer.zero_layout import own_share
from scripts.train_rm_general_preference import make_tokenizer

GLOBAL_BATCH = 4
strategy_module.has_fast_bf16 = lambda device: True  # slow here, but tiny


def make_trainer(job: dict, run: dict, load: bool) -> Trainer:
    """A trainer on `run`'s checkpoint folder."""
    flags = ["--pretrain", job["pretrain"], "--dataset", "none", "--save_path", run["folder"], "--max_epochs", "3"]
    flags += ["--learning_rate", "1e-2", "--is_general_preference", "--value_head_dim", "4", "--add_prompt_head"]
    flags += ["--learnable_temperature", "--l2", "0.1", "--zero_stage", str(run["stage"]), *run.get("flags", [])]
    arguments = parse_arguments([*flags, *(["--load_checkpoint"] if load else [])])
    strategy = DeepSpeedEngine(arguments.engine, arguments.optimizer)
    arguments.optimizer.micro_train_batch_size = GLOBAL_BATCH // strategy.world_size
    config = strategy.config()
    config["zero_optimization"]["stage3_param_persistence_threshold"] = run.get("persistence", 0)
    strategy.config = lambda: config
    model = get_reward_model(
        job["pretrain"], bf16=arguments.engine.bf16, preference=arguments.model.preference(None), seed=7,
        ds_config=config, lora_rank=arguments.model.lora_rank, lora_alpha=32,
    )  # fmt: skip
    model.freeze_unused(language_model_head=False)
    table = datasets.Dataset.from_list(job["comparisons"])
    return Trainer(arguments, strategy, model, make_tokenizer(arguments), table, {})


def tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Whole weights and moments by name, put together from what every process owns; weights as DeepSpeed has them."""
    strategy, found = trainer.strategy, {}
    share = own_share(strategy.engine, strategy.rank)
    mine = [
        (piece, {field: share.flats[piece.flat][field][piece.offset :][: piece.count].clone() for field in FIELDS})
        for piece in share.pieces
    ]
    for piece, values in (entry for part in strategy.gather_objects(mine) for entry in part):
        for field in FIELDS:
            empty = torch.full((torch.Size(piece.shape).numel(),), float("nan"))
            found.setdefault(f"{piece.name}/{field}", empty)[piece.start :][: piece.count] = values[field]
    for name, weight in strategy.model.named_parameters():
        whole = safe_get_full_fp32_param(weight) if weight.requires_grad else None
        assert whole is None or torch.equal(whole.flatten(), found[f"{name}/weight"]), name
    return found


def train(trainer: Trainer, steps: int) -> list[float]:
    """Losses of the next `steps` steps."""
    window, losses = Window(trainer.strategy, False), []
    for _, _ in zip(range(steps), trainer.train_steps(window), strict=False):
        losses.append(window.reduce(trainer.arguments)["train/loss"])
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
        rate, kept = trainer.strategy.learning_rate(), tensors(trainer)
        after = train(trainer, 2)
        results[run["name"]] = {"step": trainer.state.step, "rate": rate, "tensors": kept, "after": after}
    if torch.distributed.get_rank() == 0:
        torch.save(results, job["output"])


if __name__ == "__main__":
    main()
