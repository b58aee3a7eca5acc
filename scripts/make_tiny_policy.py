#!/usr/bin/env python3
"""Make a tiny policy that answers the bundled prompts: a random model, fine-tuned on the bundled responses.

    python scripts/make_tiny_policy.py OUTPUT_DIR [--data FILE ...] [--seed N]

Every response of the comparisons in --data (default the training sets of `mixed` and `cyclic`) counts as often, good or
bad, so that there is something to align. Each is imitated several times, behind its prompt with other tokens put in: a
model that saw each prompt as it is, and nothing else, writes no sentence behind a prompt in other words. Fine-tuned by
train_policy_general_preference.py with the loss `likelihood`. Writes OUTPUT_DIR/policy, and what it is made of beside
it; what is finished is left as it is.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

from general_preference.alignment.samples import summary_path
from general_preference.cli import check_seed, exit_code
from general_preference.datasets.readers import read_records
from general_preference.datasets.reading import Reading
from general_preference.datasets.records import parse_record
from general_preference.datasets.tokenization import ComparisonTokenizer, load_tokenizer
from general_preference.errors import InputError, RunError
from general_preference.files import read_object, replace_lines, replace_text
from scripts.make_tiny_model import DATA_DIR, make_tiny_model
from scripts.train_policy_general_preference import REPORT

DATA = tuple(DATA_DIR / kind / "train.jsonl" for kind in ("mixed", "cyclic"))
FLAGS = {"loss": "likelihood", "learning_rate": 3e-3, "max_epochs": 3, "micro_train_batch_size": 4, "zero_stage": 0}
FLAGS |= {"logging_steps": 20, "any_policy": True, "warmup_ratio": 0.03, "lr_schedule": "linear"}
HIDDEN_SIZE = 96
COPIES, CHANGED = 5, 0.5  # of each prompt, the first as it is; largest share of a copy's tokens that are changed


def main(argv: list[str] | None = None) -> int:
    """Parse, make, and turn what can go wrong into one line and an exit code."""
    parser = argparse.ArgumentParser(description="Make a tiny policy that answers the bundled prompts.")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--data", nargs="+", type=Path, default=DATA, help="comparisons whose responses are imitated")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    return exit_code(
        lambda: make_tiny_policy(arguments.output_dir, arguments.data, arguments.seed), kept="run it again"
    )


def make_tiny_policy(output: Path, data: list[Path], seed: int) -> None:
    """See the module."""
    check_seed(seed)
    asked = {"seed": seed, "samples": [str(output / "imitated.jsonl")], "pretrain": str(output / "random")} | FLAGS
    policy = output / "policy"
    found = read_object(policy / "arguments.json")
    imitated = read_object(summary_path(output / "imitated.jsonl")).get("settings")
    same = imitated == _settings(data) and all(found.get(name) == value for name, value in asked.items())
    if (policy / REPORT).is_file() and same:
        return
    make_tiny_model(output / "random", hidden_size=HIDDEN_SIZE, seed=seed)
    write_samples(output / "imitated.jsonl", data, load_tokenizer(str(output / "random")), seed)
    script = Path(__file__).with_name("train_policy_general_preference.py")
    flags = [f"--{name}={value}" for name, value in asked.items() if name != "samples"]
    command = [sys.executable, script, "--save_path", policy, "--samples", *asked["samples"], *flags]
    if code := subprocess.run(command).returncode:
        raise RunError(f"fine-tuning ended with code {code}")


def write_samples(path: Path, data: list[Path], tokenizer, seed: int) -> None:
    """The responses of comparisons as samples of nobody's."""
    encoder, rows, rng = ComparisonTokenizer(tokenizer), [], random.Random(seed)
    words = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    for file in data:
        if not file.is_file():
            raise InputError(f"--data {file} does not exist: check the path")
        for number, (place, record) in enumerate(read_records(file), 1):
            if isinstance(record, InputError):
                raise record
            try:
                parsed = parse_record(record, Reading())
            except InputError as error:
                raise InputError(f"{place}: {error}") from error
            (row,) = encoder.encode([parsed.prompt], [parsed.responses], [parsed.options])
            texts = [response[-1]["content"] for response in parsed.responses]
            for copy in range(COPIES):
                ids = changed(row["prompt_ids"], words, rng.uniform(0, CHANGED), rng) if copy else row["prompt_ids"]
                rows.append({
                    "id": f"{file.parent.name}-{number}-{copy}", "prompt": record["prompt"], "prompt_ids": ids,
                    "responses": texts, "response_ids": row["response_ids"], "finished": [True] * len(texts),
                })  # fmt: skip
    replace_lines(path, map(json.dumps, rows))
    replace_text(summary_path(path), json.dumps({"settings": _settings(data)}))


def changed(ids: list[int], words: list[int], share: float, rng: random.Random) -> list[int]:
    """`ids` with about this share of tokens replaced, left out, or followed by another; special tokens stay."""
    found, ordinary = [], set(words)
    for token in ids:
        kept = [[rng.choice(words)], [], [token, rng.choice(words)]]
        found += rng.choice(kept) if token in ordinary and rng.random() < share else [token]
    return found


def _settings(data: list[Path]) -> dict:
    return {"data": [str(file) for file in data]}


if __name__ == "__main__":
    sys.exit(main())
