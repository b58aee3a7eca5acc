#!/usr/bin/env python3
"""Several training runs side by side: held-out accuracy as a table and a bar chart, and one cycle as each sees it."""

import argparse
import json
import sys
from pathlib import Path

import torch

from general_preference import GPMPipeline
from general_preference.datasets.packing import Collator, Comparisons
from general_preference.datasets.preparation import load_tokenized
from general_preference.datasets.sources import Source
from general_preference.plots import EmbeddedCycle, draw_cycles, draw_runs, embedded_cycle

HEAD_NAMES = {"bt": "Bradley-Terry", "gpm": "GPM", "hybrid": "hybrid"}


def read_run(folder: Path) -> tuple[str, dict[str, float]]:
    """(name of the head, {set: accuracy}) of a finished run."""
    config, results = (json.loads((folder / name).read_bytes()) for name in ("config.json", "eval_metrics.json"))
    head, dim, gate = (config["preference"][key] for key in ("head", "dim", "prompt_gate"))
    name = HEAD_NAMES[head] + ("" if head == "bt" else f" D={dim}") + (" gate" if gate else "")
    return name, {key: row["accuracy"] for key, row in results.items()}


def first_cycle(folder: Path, name: str, file: Path) -> EmbeddedCycle | None:
    """The first cycle among the comparisons of `file`, embedded by a run's model."""
    rm = GPMPipeline(str(folder), device="cpu")
    comparisons = Comparisons(load_tokenized([Source(name, str(file))], rm.encoder)[0][0])
    collate = Collator(0, rm.model.layout_on())
    batches = (collate([comparisons[index, 1.0]]) for index in range(len(comparisons)))
    with torch.no_grad():
        found = (embedded_cycle(name, batch, rm.model(**batch.model_inputs()), rm.tokenizer) for batch in batches)
        return next(filter(None, found), None)


def main() -> int:
    """Read the runs, print the table, draw the pictures."""
    parser = argparse.ArgumentParser(description="Compare the held-out accuracy of training runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders that --save_path named")
    parser.add_argument("--output", type=Path, default=Path("comparison.png"), help="where the picture goes")
    parser.add_argument("--cycle", type=Path, help="comparisons; the first cycle among them is drawn beside --output")
    arguments = parser.parse_args()
    try:
        runs = [read_run(folder) for folder in arguments.runs]
    except (OSError, KeyError, ValueError) as error:
        print(f"error: not a finished run with an evaluation: {error}", file=sys.stderr)
        return 2
    sets, width = list(runs[0][1]), max(len(name) for name, _ in runs)
    print(f"\n| {'accuracy':<{width}} | {' | '.join(sets)} |")
    print(f"|{'-' * (width + 2)}|{'|'.join('-' * (len(name) + 1) + ':' for name in sets)}|")
    for name, found in runs:
        print(f"| {name:<{width}} | {' | '.join(f'{found[key]:.3f}'.rjust(len(key)) for key in sets)} |")
    drawn = [arguments.output] if draw_runs(runs, arguments.output) else []
    if arguments.cycle is not None:
        named = zip(arguments.runs, runs, strict=True)
        cycles = [first_cycle(folder, name, arguments.cycle) for folder, (name, _) in named]
        picture = arguments.output.with_name("cycle.png")
        drawn += [picture] if draw_cycles(list(filter(None, cycles)), picture) else []
    print("", *(f"Picture: {path}" for path in drawn), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
