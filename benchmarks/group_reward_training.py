#!/usr/bin/env python3
"""A policy trained with group rewards: does it win against the one it started from?

    bash scripts/run_quickstart.sh
    python benchmarks/group_reward_training.py [--steps 300] [--output results/group_reward_training.json]

A tiny language model first learns to write the bundled replies (supervised), then TRL's GRPO trains it on the prompts
of `mixed` with `GroupReward`: once with a GPM's win rates, once with a Bradley-Terry model's. Every --every steps the
policy answers held-out prompts, and its samples are compared with those of the start: by the model that rewarded it, by
the other one, and by the rules of the games, which neither sees. Writes the numbers and a picture. About ten minutes on
two idle cores, most of it sampling.
"""

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow each other down
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for scripts/ and data/

import datasets
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.game_rules import beats, rank
from benchmarks.machine import describe_machine
from general_preference import GPMPipeline
from general_preference.cli import exit_code, format_table
from general_preference.errors import InputError
from general_preference.files import replace_text
from general_preference.plots import load_pyplot
from general_preference.serving import GroupReward
from scripts.make_tiny_model import make_tiny_model

DATA = Path(__file__).resolve().parents[1] / "data" / "mixed"
TOKENS, SAMPLES, GROUP, PROMPTS = 48, 4, 8, 8  # of a reply; per held-out prompt; of a group; in a step
QUIET = {"report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True}


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn what can go wrong into one line and an exit code."""
    parser = argparse.ArgumentParser(description="Train a policy with group rewards and compare it with its start.")
    parser.add_argument("--gpm", default="checkpoint/quickstart/gpm_d4_gate", help="preference model with cycles")
    parser.add_argument("--bt", default="checkpoint/quickstart/bt", help="Bradley-Terry model")
    parser.add_argument("--steps", type=int, default=300, help="of GRPO")
    parser.add_argument("--every", type=int, default=50, help="steps between comparisons with the start")
    parser.add_argument("--beta", type=float, default=0.1, help="weight of the KL divergence from the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/group_reward_training.json"))
    arguments = parser.parse_args(argv)
    return exit_code(lambda: run(arguments), kept="nothing was written")


def run(arguments: argparse.Namespace) -> None:
    """Supervised start, both runs, table, numbers, picture."""
    for path in (arguments.gpm, arguments.bt):
        if not Path(path, "config.json").is_file():
            raise InputError(f"{path} is no model: run scripts/run_quickstart.sh, or name another")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    folder = arguments.output.parent / "group_reward_policies"
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    supervised(folder, arguments.seed)
    judges = {"GPM": GPMPipeline(arguments.gpm), "Bradley-Terry": GPMPipeline(arguments.bt)}
    prompts = [row["prompt"] for row in read("test")]
    start = sample(AutoModelForCausalLM.from_pretrained(folder / "start"), folder, prompts)
    found, examples = {}, {"start": [some[0] for some in start[::20]]}
    for name, reward in (
        ("GPM", GroupReward(judges["GPM"], "win_rate", group_size=GROUP)),
        ("Bradley-Terry", GroupReward(judges["Bradley-Terry"], "win_rate", group_size=GROUP)),
    ):
        found[name], model = train(
            folder, reward, arguments, lambda model: measure(model, folder, prompts, start, judges)
        )
        examples[name] = [some[0] for some in sample(model, folder, prompts[::20])]
        table = {str(row["step"]): {key: row[key] for key in row if key != "step"} for row in found[name]}
        print(f"\npolicy rewarded by {name}\n{format_table(table, 'step', None)}", flush=True)
    seconds = time.perf_counter() - began
    numbers = {name: getattr(arguments, name) for name in ("seed", "steps", "beta")}
    numbers |= {"seconds": seconds, "machine": describe_machine()}
    replace_text(arguments.output, json.dumps(numbers | {"policies": found, "examples": examples}, indent=2))
    print(f"\n{seconds:.0f} s. Numbers: {arguments.output}")
    if draw(found, arguments.output.with_suffix(".png")):
        print(f"Picture: {arguments.output.with_suffix('.png')}")


def read(split: str) -> list[dict]:
    """Groups of `mixed`."""
    return [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def user(prompt: str) -> list[dict]:
    """The prompt as messages."""
    return [{"role": "user", "content": prompt}]


def supervised(folder: Path, seed: int) -> None:
    """A tiny model that writes replies like the training set's, every member of a game as often: the start."""
    from trl import SFTConfig, SFTTrainer

    make_tiny_model(folder / "base", seed=seed)
    rows = [
        {"prompt": user(row["prompt"]), "completion": [{"role": "assistant", "content": reply}]}
        for row in read("train")
        for reply in row["responses"]
    ]
    options = {"per_device_train_batch_size": 32, "max_steps": 400, "learning_rate": 3e-3, "logging_strategy": "no"}
    config = SFTConfig(str(folder / "start"), seed=seed, **options, **QUIET)
    trainer = SFTTrainer(str(folder / "base"), args=config, train_dataset=datasets.Dataset.from_list(rows))
    trainer.train()
    trainer.save_model()


def train(folder: Path, reward: GroupReward, arguments, measured) -> tuple[list[dict], torch.nn.Module]:
    """GRPO from the start: what `measured` finds before and every --every steps, and the policy."""
    from trl import GRPOConfig, GRPOTrainer

    found = []

    class Measure(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **_):
            found.append({"step": 0, **measured(model)})

        def on_step_end(self, args, state, control, model, **_):
            if state.global_step % arguments.every == 0:
                found.append({"step": state.global_step, **measured(model)})

    config = GRPOConfig(
        str(folder / "trained"), per_device_train_batch_size=GROUP * PROMPTS, num_generations=GROUP,
        beta=arguments.beta, max_completion_length=TOKENS, max_steps=arguments.steps,
        learning_rate=3e-4, lr_scheduler_type="constant",
        seed=arguments.seed, logging_strategy="no", **QUIET,
    )  # fmt: skip
    data = datasets.Dataset.from_list([{"prompt": user(row["prompt"])} for row in read("train")])
    tokenizer = AutoTokenizer.from_pretrained(folder / "start", padding_side="left")
    trainer = GRPOTrainer(
        str(folder / "start"), reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer,
        callbacks=[Measure()],
    )  # fmt: skip
    trainer.train()
    return found, trainer.model


@torch.no_grad()
def sample(model, folder: Path, prompts: list[str]) -> list[list[str]]:
    """`SAMPLES` replies to each prompt, with the same random numbers every time."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "start", padding_side="left")
    texts = [tokenizer.apply_chat_template(user(one), tokenize=False, add_generation_prompt=True) for one in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    training = model.training
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"max_new_tokens": TOKENS, "do_sample": True, "num_return_sequences": SAMPLES}
        ids = model.eval().generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id)
    model.train(training)
    replies = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [replies[at : at + SAMPLES] for at in range(0, len(replies), SAMPLES)]


def measure(model, folder: Path, prompts: list[str], start: list[list[str]], judges: dict) -> dict[str, float]:
    """Mean win rate of the model's samples against the start's by each judge and by the rules; shares of replies."""
    replies = sample(model, folder, prompts)
    found = {}
    for name, judge in judges.items():
        embedded = judge.embed(prompts, [new + old for new, old in zip(replies, start, strict=True)])
        wins = [torch.sigmoid(one.scores()[:SAMPLES, SAMPLES:] / judge.tau).mean() for one in embedded]
        found[f"win rate by {name}"] = torch.stack(wins).mean().item()
    ranks = [[[rank(prompt, reply) for reply in some] for some in pair]
             for prompt, *pair in zip(prompts, replies, start, strict=True)]  # fmt: skip
    outcomes = [beats("mixed", 4, new, old) for news, olds in ranks for new in news for old in olds]
    found["win rate by the rules"] = sum(outcomes) / len(outcomes)
    flat = [new for news, _ in ranks for new in news]
    return found | {"best reply": flat.count(0) / len(flat), "invalid": flat.count(None) / len(flat)}


def draw(found: dict, path: Path) -> bool:
    """Win rates over steps, a panel for each policy."""
    if (pyplot := load_pyplot()) is None:
        return False
    figure, axes = pyplot.subplots(1, len(found), figsize=(5.5 * len(found), 3.8), sharey=True)
    for axis, (name, rows) in zip(axes, found.items(), strict=True):
        for key in [key for key in rows[0] if key != "step"]:
            style = {"marker": "o", "ms": 4} if key.startswith("win") else {"ls": "--", "lw": 1}
            axis.plot([row["step"] for row in rows], [row[key] for row in rows], label=key, **style)
        axis.axhline(0.5, color="0.6", lw=0.8)
        axis.set(title=f"policy rewarded by {name}", xlabel="steps of GRPO", ylim=(0, 1))
    axes[0].legend(fontsize=7)
    figure.savefig(path)
    return True


if __name__ == "__main__":
    sys.exit(main())
