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
from general_preference.trainer.checkpoint import publish_model
from general_preference.trainer.deepspeed_engine import DeepSpeedEngine
from general_preference.trainer.metrics import Window
from general_preference.trainer.trainer import Trainer, batch_loss
from scripts.train_rm_general_preference import make_tokenizer


def one_step(job: dict, run: dict) -> dict:
    """Gradients (before clipping), loss and changed parameters of the first step of one configuration."""
    pretrain = run.get("pretrain", job["pretrain"])
    flags = ["--pretrain", pretrain, "--dataset", "none", "--save_path", job["output"], "--warmup_ratio", "0"]
    arguments = parse_arguments([*flags, "--learning_rate", "1e-3", *run["flags"]])
    strategy = DeepSpeedEngine(arguments.engine, arguments.optimizer)
    preference = arguments.model.preference(None)
    model = get_reward_model(
        pretrain,
        bf16=False,
        preference=preference,
        seed=arguments.optimizer.seed,
        lora_rank=arguments.model.lora_rank,
        load_in_4bit=arguments.model.load_in_4bit,
        ds_config=strategy.config() if run.get("partitioned") else None,
    )
    # Of the backbone's numbers, the share that this process holds at the end of loading.
    weights = list(model.backbone.parameters())
    held = sum(p.ds_tensor.numel() + p.numel() if hasattr(p, "ds_id") else p.numel() for p in weights)
    held /= sum(getattr(p, "ds_numel", p.numel()) for p in weights)
    model.freeze_unused(language_model_head=arguments.loss.add_pretrain_loss)
    table = datasets.Dataset.from_list(job["comparisons"])
    trainer = Trainer(arguments, strategy, model, make_tokenizer(arguments), table, {"all": table})
    trainable = {name: p for name, p in strategy.model.named_parameters() if p.requires_grad}
    before = {name: safe_get_full_fp32_param(p).clone() for name, p in trainable.items()} if run["stage"] else {}
    window = Window(strategy, True)
    accumulation = arguments.optimizer.accumulated_gradient
    loader = iter(trainer._loader(trainer.train_set, trainer.sampler.micro_batches(1)))
    gradients = {}
    for micro in range(accumulation):
        batch = next(loader)
        losses = batch_loss(strategy.forward(**batch.model_inputs()), batch, arguments.loss)
        strategy.backward(losses.total)
        if micro == accumulation - 1:
            gradients = {name: safe_get_full_grad(p).clone() for name, p in trainable.items()}
        strategy.step()
        window.add(1, batch, losses)
    changed = [name for name in before if not torch.equal(before[name], safe_get_full_fp32_param(trainable[name]))]
    metrics = window.reduce(arguments)
    evaluation = trainer.evaluate("all")
    if run.get("save"):
        folder = Path(job["output"]) / run["save"]
        folder.mkdir(exist_ok=True)
        publish_model(strategy, trainer.tokenizer, folder)
    return {
        "held": max(strategy.gather_objects(held)),
        "saved": sorted(strategy.full_state_dict()),
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


if __name__ == "__main__":
    main()
