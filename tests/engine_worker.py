"""Run inside real DeepSpeed processes by test_first_step.py: one optimizer step per configuration, gradients saved.

    deepspeed --num_gpus 2 tests/engine_worker.py JOB.json         JOB: {"pretrain", "runs": [{...}], "output"}

Each run starts from the same seed and data; what is saved per run are the full gradients of the first step, the loss,
and which parameters changed.
"""

import json
import sys
from pathlib import Path

import datasets
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from general_preference.models.reward_model import get_reward_model
from general_preference.trainer.arguments import parse_arguments
from general_preference.trainer.checkpoint import save_model
from general_preference.trainer.deepspeed_engine import DeepSpeedEngine
from general_preference.trainer.objectives import PreferenceObjective
from general_preference.trainer.trainer import Trainer
from scripts.train_rm_general_preference import make_tokenizer


def one_step(job: dict, run: dict) -> dict:
    """Gradients (before clipping), loss and changed parameters of the first step of one configuration."""
    pretrain = run.get("pretrain", job["pretrain"])
    flags = ["--pretrain", pretrain, "--dataset", "none", "--save_path", job["output"], "--warmup_ratio", "0"]
    arguments = parse_arguments([*flags, "--learning_rate", "1e-3", *run["flags"]])
    engine = DeepSpeedEngine(arguments.engine, arguments.optimizer)
    preference = arguments.model.preference(None)
    model = get_reward_model(
        pretrain,
        bf16=False,
        preference=preference,
        seed=arguments.optimizer.seed,
        lora_rank=arguments.model.lora_rank,
        load_in_4bit=arguments.model.load_in_4bit,
        ds_config=engine.config() if run.get("partitioned") else None,
    )
    # Of the backbone's numbers, the share that this process holds at the end of loading.
    weights = list(model.backbone.parameters())
    held = sum(p.ds_tensor.numel() + p.numel() if hasattr(p, "ds_id") else p.numel() for p in weights)
    held /= sum(getattr(p, "ds_numel", p.numel()) for p in weights)
    model.freeze_unused(language_model_head=arguments.loss.add_pretrain_loss)
    table, tokenizer = datasets.Dataset.from_list(job["comparisons"]), make_tokenizer(arguments)
    objective = PreferenceObjective(arguments.loss, model, tokenizer, engine.device)
    trainer = Trainer(arguments, engine, model, tokenizer, objective, table, {"all": table})
    trainable = {name: p for name, p in engine.model.named_parameters() if p.requires_grad}
    before = {name: safe_get_full_fp32_param(p).clone() for name, p in trainable.items()} if run["stage"] else {}
    window, batches = trainer.window, trainer.batches()
    accumulation = arguments.optimizer.accumulated_gradient
    gradients = {}
    for micro in range(accumulation):
        batch = next(batches)
        loss = objective.loss(engine.forward(**batch.model_inputs()), batch)
        engine.backward(loss.total)
        if micro == accumulation - 1:
            gradients = {name: safe_get_full_grad(p).clone() for name, p in trainable.items()}
        engine.step()
        window.add(1, batch, loss)
    window.end_step(1, engine.gradient_norm())
    changed = [name for name in before if not torch.equal(before[name], safe_get_full_fp32_param(trainable[name]))]
    metrics = window.reduce()
    evaluation = trainer.evaluate("all")
    if run.get("save"):
        folder = Path(job["output"]) / run["save"]
        folder.mkdir(exist_ok=True)
        save_model(engine, trainer.tokenizer, folder)
    return {
        "held": max(engine.context.gather_objects(held)),
        "saved": sorted(engine.full_state_dict()),
        "gradients": gradients,
        "trainable": list(trainable),
        "changed": changed,
        "loss": metrics["train/loss"],
        "metrics": metrics,
        "evaluation": evaluation,
        "partitioned": getattr(next(iter(trainable.values())), "ds_id", None) is not None,
    }


def main() -> None:
    """Do every run of the job; the main process writes the results."""
    with open(next(argument for argument in sys.argv[1:] if argument.endswith(".json")), encoding="utf-8") as file:
        job = json.load(file)
    results = {}
    for run in job["runs"]:
        results[run["name"]] = one_step(job, run)
    if torch.distributed.get_rank() == 0:
        torch.save(results, f"{job['output']}/results.pt")
    torch.distributed.destroy_process_group()  # its threads must not outlive the interpreter


if __name__ == "__main__":
    main()
