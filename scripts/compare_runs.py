#!/usr/bin/env python3
"""Several training runs side by side: held-out accuracy as a table and a bar chart, and one cycle as each sees it.

Runs with the same head are seeds: their mean is shown, with its 95 % interval over seeds (Student's t).
"""

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
from general_preference.probing.comparing import seed_interval

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
    seeds: dict[str, list[dict[str, float]]] = {}
    for name, found in runs:
        seeds.setdefault(name, []).append(found)
    sets = list(runs[0][1])
    means = {n: {key: seed_interval([one[key] for one in some]) for key in sets} for n, some in seeds.items()}
    cells = {name: {key: _cell(row[key]) for key in sets} for name, row in means.items()}
    width = max(map(len, cells))
    widths = {key: max(len(key), *(len(row[key]) for row in cells.values())) for key in sets}
    print(f"\n| {'accuracy':<{width}} | {' | '.join(key.rjust(widths[key]) for key in sets)} |")
    print(f"|{'-' * (width + 2)}|{'|'.join('-' * (widths[key] + 1) + ':' for key in sets)}|")
    for name, row in cells.items():
        print(f"| {name:<{width}} | {' | '.join(row[key].rjust(widths[key]) for key in sets)} |")
    drawn = [arguments.output] if draw_runs(list(means.items()), arguments.output) else []
    if arguments.cycle is not None:
        first = {name: folder for folder, (name, _) in reversed(list(zip(arguments.runs, runs, strict=True)))}
        cycles = [first_cycle(first[name], name, arguments.cycle) for name in cells]
        picture = arguments.output.with_name("cycle.png")
        drawn += [picture] if draw_cycles(list(filter(None, cycles)), picture) else []
    print("", *(f"Picture: {path}" for path in drawn), sep="\n")
    return 0


def _cell(interval: dict[str, float | None]) -> str:
    spread = "" if interval["low"] is None else f" +-{interval['high'] - interval['mean']:.3f}"
    return f"{interval['mean']:.3f}{spread}"


if __name__ == "__main__":
    sys.exit(main())
