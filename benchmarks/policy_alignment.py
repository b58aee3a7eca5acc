#!/usr/bin/env python3
"""Policies aligned by a GPM and by a Bradley-Terry model: do they win by the rules of the games, which neither sees?

    bash scripts/run_quickstart.sh
    python benchmarks/policy_alignment.py [--seeds 0 1] [--output results/policy_alignment]

For each seed a tiny policy learns to answer the bundled prompts: in `mixed` it names every member as often, in `cyclic`
the first one more often, which leaves it open to another. Then scripts/run_align_general_preference.sh aligns it, on
each set with each preference model. The samples on held-out prompts that the loop leaves are judged by the rules: win
rate against the start, share of invalid replies (which name no member of the game, or several), exploitability of the
last policy and of the mixture of all but the start (wins less losses of the best member; 0 where nothing beats it). A
preference model that saw whole replies alone need not prefer them to broken ones: "mended" is the GPM after some more
training, on the bundled comparisons and on samples of the start, whose winners the rules name. What is finished is not
run again. Writes a folder for each run, table, numbers and picture.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for scripts/ and data/

from benchmarks.game_rules import beats, exploitability, game_of, rank
from benchmarks.machine import describe_machine
from data.make_data import GAMES, TRAIN_WORDING, Writer
from general_preference import GPMPipeline
from general_preference.cli import exit_code, format_table
from general_preference.datasets.tokenization import stable_hash
from general_preference.errors import InputError, RunError
from general_preference.files import read_object, replace_lines, replace_text
from general_preference.models.config import checkpoint_identity
from general_preference.plots import load_pyplot

ROOT = Path(__file__).resolve().parents[1]
ITERATIONS = {"mixed": 4, "cyclic": 10}
MODELS = ("GPM", "mended", "Bradley-Terry")
TEMPERATURES = (1.0, 1.5, 2.0)  # of the samples that mend: the hotter, the more of them are broken
REPLIES, FAVOR = 4, 4  # of each prompt that the start imitates; how much more often it names a circle's first member
FLAGS = ["--beta", "2", "--learning_rate", "3e-4", "--max_epochs", "2", "--lr_schedule", "constant"]
FLAGS += ["--zero_stage", "0", "--logging_steps", "10"]


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn what can go wrong into one line and an exit code."""
    parser = argparse.ArgumentParser(description="Align tiny policies and judge them by the rules of the games.")
    parser.add_argument("--gpm", default="checkpoint/quickstart/gpm_d4_gate", help="preference model with cycles")
    parser.add_argument("--bt", default="checkpoint/quickstart/bt", help="Bradley-Terry model")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--sets", nargs="+", choices=list(ITERATIONS), default=list(ITERATIONS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["GPM", "Bradley-Terry"])
    parser.add_argument("--iterations", type=int, help=f"default {ITERATIONS}")
    parser.add_argument("--output", type=Path, default=Path("results/policy_alignment"))
    parser.add_argument("flags", nargs="*", help="after --: flags of train_policy_general_preference.py, which win")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: run(arguments), kept="run it again to continue")


def run(arguments: argparse.Namespace) -> None:
    """All policies, then table, numbers and picture."""
    given = {"GPM": arguments.gpm, "Bradley-Terry": arguments.bt}
    for path in given.values():
        if not Path(path, "config.json").is_file():
            raise InputError(f"{path} is no model: run scripts/run_quickstart.sh, or name another")
    found, preferred = {}, {}
    for seed in arguments.seeds:
        folder = arguments.output / f"seed_{seed}"
        write_replies(folder / "replies.jsonl", seed)
        start = folder / "start"
        call(sys.executable, ROOT / "scripts/make_tiny_policy.py", start, "--data", folder / "replies.jsonl",
             "--seed", seed)  # fmt: skip
        if "mended" in arguments.models:
            given["mended"] = mend(folder, arguments.gpm)
        models = {name: given[name] for name in arguments.models}
        for kind in arguments.sets:
            for name, model in models.items():
                place = folder / f"{kind}_{name}"
                data = {part: ROOT / "data" / kind / f"{part}.jsonl" for part in ("train", "test")}
                settings = {
                    "POLICY": start / "policy", "PREFERENCE": model, "SAVE_PATH": place, "SAMPLES": 8, "TOKENS": 48,
                    "PROMPTS": data["train"], "EVAL_PROMPTS": data["test"], "OMP_NUM_THREADS": 1,
                    "ITERATIONS": arguments.iterations or ITERATIONS[kind],
                }  # fmt: skip
                call("bash", ROOT / "scripts/run_align_general_preference.sh", "--seed", seed, *FLAGS,
                     *arguments.flags, **settings)  # fmt: skip
                case = f"{kind}, {name}, seed {seed}"
                found[case], preferred[case] = measure(place), whole_preferred(model, place)
                print(f"\n{case}; prefers a whole to a broken reply of the start: {preferred[case]:.3f}")
                print(format_table(found[case], "policy", None), flush=True)
    numbers = {"machine": describe_machine(), "whole_preferred": preferred, "runs": found}
    replace_text(arguments.output / "numbers.json", json.dumps(numbers, indent=2))
    print(f"\nNumbers: {arguments.output / 'numbers.json'}")
    if draw(found, arguments.output / "policy_alignment.png"):
        print(f"Picture: {arguments.output / 'policy_alignment.png'}")


def write_replies(path: Path, seed: int) -> None:
    """What the start imitates: replies of `mixed` that name every member as often, of `cyclic` the first by `FAVOR`."""
    writer, lines = Writer(TRAIN_WORDING, random.Random(seed)), []
    for kind in ITERATIONS:
        for line in (ROOT / "data" / kind / "train.jsonl").read_text(encoding="utf-8").splitlines():
            prompt = json.loads(line)["prompt"]
            members = game_of(prompt)[1].members
            weights = [FAVOR if kind == "cyclic" else 1, *[1] * (len(members) - 1)]
            replies = writer.responses(writer.rng.choices(members, weights, k=REPLIES))
            lines.append(json.dumps({"prompt": prompt, "responses": replies, "preferences": [[0, 1]]}))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_lines(path, lines)


def mend(folder: Path, gpm: str) -> Path:
    """The GPM, trained further on bundled comparisons and on labeled samples of the start at several temperatures.

    Those of the games that the policies play count twice: see `label`.
    """
    data = [f"{kind}={ROOT / 'data' / kind / 'train.jsonl'}" for kind in GAMES]
    data += [f"{kind}_again={ROOT / 'data' / kind / 'train.jsonl'}" for kind in ITERATIONS]
    prompts = [json.loads(line) for line in (folder / "replies.jsonl").open(encoding="utf-8")]
    named = [{"id": str(number), "prompt": row["prompt"]} for number, row in enumerate(prompts)]  # ids seed samples
    replace_lines(folder / "prompts.jsonl", map(json.dumps, named))
    labeled = []
    for temperature in TEMPERATURES:
        samples = folder / f"samples_{temperature}.jsonl"
        call(sys.executable, ROOT / "scripts/generate_responses.py", "--policy", folder / "start/policy",
             "--prompts", folder / "prompts.jsonl", "--output", samples, "--samples", 8, "--max_new_tokens", 48,
             "--temperature", temperature, OMP_NUM_THREADS=1)  # fmt: skip
        labeled += [label(json.loads(line)) for line in samples.open(encoding="utf-8")]
    replace_lines(folder / "labeled.jsonl", [json.dumps(row) for row in labeled if row["preferences"]])
    mending, mended = folder / "mending", folder / "mended"
    flags = ["--learning_rate", "3e-4", "--max_epochs", "3"]
    asked = {"gpm": stable_hash(checkpoint_identity(gpm)), "labeled": stable_hash(labeled), "flags": flags}
    if read_object(mended / "asked.json") != asked:
        call("bash", ROOT / "scripts/run_train_rm_general_preference_single.sh",
             "--config", ROOT / "scripts/presets/tiny.yaml", "--eval_steps", 10**6, *flags, PRETRAIN=gpm,
             DATASET=",".join([*data, str(folder / "labeled.jsonl")]), SAVE_PATH=mending, MICRO_BATCH=16,
             GLOBAL_BATCH=16, NPROC=1, OMP_NUM_THREADS=1)  # fmt: skip
        shutil.rmtree(mended, ignore_errors=True)
        mending.rename(mended)
        replace_text(mended / "asked.json", json.dumps(asked))
    return mended


def label(row: dict) -> dict:
    """Sampled replies as a group of comparisons by the rules, each text once; of invalid ones the first alone.

    With all of them most comparisons would be about form, and the model would unlearn the games.
    """
    kind, game = game_of(row["prompt"])
    named = {text: rank(row["prompt"], text) for text in row["responses"]}
    broken = [text for text, member in named.items() if member is None][1:]
    texts = [text for text in named if text not in broken and text.strip()]
    ranks = [named[text] for text in texts]
    wins = [[one, other] for one, first in enumerate(ranks) for other, second in enumerate(ranks)
            if beats(kind, len(game.members), first, second) == 1]  # fmt: skip
    return {"prompt": row["prompt"], "responses": texts, "preferences": wins}


def whole_preferred(model: str | Path, folder: Path) -> float:
    """Of pairs of a valid and an invalid held-out reply of the start, the share whose valid one the model prefers."""
    rows = [json.loads(line) for line in (folder / "start/held_out.jsonl").open(encoding="utf-8")]
    embedded = GPMPipeline(model).embed([row["prompt"] for row in rows], [row["responses"] for row in rows])
    found = []
    for row, one in zip(rows, embedded, strict=True):
        broken = torch.tensor([rank(row["prompt"], reply) is None for reply in row["responses"]])
        found.append((one.scores()[~broken][:, broken] > 0).flatten())
    return torch.cat(found).float().mean().item()


def call(*command, **settings) -> None:
    """Run a command of the repository with these environment variables."""
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    if code := subprocess.run([str(part) for part in command], env=environment).returncode:
        raise RunError(f"{Path(str(command[1])).name} ended with code {code}")


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """What the rules say of each policy of a run, from its samples on held-out prompts."""
    files = {"start": folder / "start", **{file.name: file for file in folder.glob("iter_*")}}
    files = sorted(files.items(), key=lambda item: int(item[0].partition("_")[2] or 0))
    read = {
        name: [json.loads(line) for line in (file / "held_out.jsonl").open(encoding="utf-8")] for name, file in files
    }
    named = {name: [[rank(row["prompt"], reply) for reply in row["responses"]] for row in rows]
             for name, rows in read.items()}  # fmt: skip
    games = [game_of(row["prompt"]) for row in read["start"]]
    shares, found = [], {}
    for name, members in named.items():
        wins = [beats(kind, len(game.members), one, other)
                for (kind, game), ours, theirs in zip(games, members, named["start"], strict=True)
                for one in ours for other in theirs]  # fmt: skip
        flat = [one for some in members for one in some]
        shares.append(_shares(games, members))
        mixture = {game: Counter() for game in shares[0]}
        for each in shares[1:] or shares:
            for game, counts in each.items():
                mixture[game].update(counts)
        found[name] = {
            "win rate": sum(wins) / len(wins),
            "invalid": flat.count(None) / len(flat),
            "first member": flat.count(0) / len(flat),
            "exploitability": _mean_exploitability(shares[-1]),
            "of the mixture": _mean_exploitability(mixture),
        }
    return found


def _shares(games: list, members: list[list[int | None]]) -> dict:
    """How often each game's members are named: {(set, game): counts}."""
    found = {}
    for game, named in zip(games, members, strict=True):
        found.setdefault(game, Counter()).update(named)
    return found


def _mean_exploitability(counts: dict) -> float:
    """Mean over games."""
    each = [
        exploitability(kind, len(game.members), {one: n / some.total() for one, n in some.items()})
        for (kind, game), some in counts.items()
    ]
    return sum(each) / len(each)


def draw(found: dict, path: Path) -> bool:
    """A row for each set: win rate, exploitability of the last policy and of the mixture, invalid replies."""
    if (pyplot := load_pyplot()) is None:
        return False
    sets = list(dict.fromkeys(name.split(", ")[0] for name in found))
    panels = ("win rate", "exploitability", "of the mixture", "invalid")
    titles = ("win rate against the start", "exploitability, last policy", "exploitability, mixture of policies",
              "share of invalid replies")  # fmt: skip
    figure, axes = pyplot.subplots(len(sets), len(panels), figsize=(13, 3 * len(sets)), squeeze=False)
    for line, kind in zip(axes, sets, strict=True):
        for axis, panel, title in zip(line, panels, titles, strict=True):
            for name, rows in found.items():
                if name.startswith(f"{kind},"):
                    _, model, seed = name.split(", ")
                    color = f"C{MODELS.index(model)}"
                    label = model if seed == next(iter(found)).split(", ")[2] else None
                    axis.plot([row[panel] for row in rows.values()], color=color, marker="o", ms=3, label=label)
            axis.set(title=f"{kind}: {title}", xlabel="iteration")
            axis.set_ylim(0, 1 if panel == "win rate" else None)
    axes[0][0].legend(title="aligned by", fontsize=8)
    figure.savefig(path)
    return True


if __name__ == "__main__":
    sys.exit(main())
