#!/usr/bin/env python3
"""Several training runs side by side: held-out accuracy as a table and a bar chart, and one cycle as each run sees it.

python scripts/compare_runs.py RUN_FOLDER [RUN_FOLDER ...] [--output comparison.png] [--cycle test.jsonl]
"""

import argparse
import json
import sys
from pathlib import Path

HEAD_NAMES = {"bt": "Bradley-Terry", "gpm": "GPM", "hybrid": "hybrid"}


def read_run(folder: Path) -> tuple[str, dict[str, float]]:
    """(name of the head, {set: accuracy}) of a finished run."""
    preference = json.loads((folder / "config.json").read_text(encoding="utf-8"))["preference"]
    results = json.loads((folder / "eval_metrics.json").read_text(encoding="utf-8"))
    size = "" if preference["head"] == "bt" else f" D={preference['dim']}"
    gate = " gate" if preference["prompt_gate"] else ""
    return f"{HEAD_NAMES[preference['head']]}{size}{gate}", {name: row["accuracy"] for name, row in results.items()}


def format_table(runs: list[tuple[str, dict[str, float]]]) -> str:
    """Markdown: one row per run, one column per evaluation set."""
    sets = list(dict.fromkeys(name for _, accuracies in runs for name in accuracies))
    width = max(len(name) for name, _ in runs)
    lines = [f"| {'accuracy':<{width}} | " + " | ".join(sets) + " |"]
    lines.append(f"|{'-' * (width + 2)}|" + "|".join("-" * (len(name) + 1) + ":" for name in sets) + "|")
    for name, accuracies in runs:
        cells = (f"{accuracies[key]:.3f}".rjust(len(key)) if key in accuracies else "-".rjust(len(key)) for key in sets)
        lines.append(f"| {name:<{width}} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(runs: list[tuple[str, dict[str, float]]], path: Path) -> None:
    """Grouped bars, one group per evaluation set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sets = list(dict.fromkeys(name for _, accuracies in runs for name in accuracies))
    figure, axis = pyplot.subplots(figsize=(2.2 + 2.4 * len(sets), 4.2), constrained_layout=True)
    width = 0.8 / len(runs)
    for number, (name, accuracies) in enumerate(runs):
        places = [index + (number - (len(runs) - 1) / 2) * width for index in range(len(sets))]
        bars = axis.bar(places, [accuracies.get(key, 0) for key in sets], 0.92 * width, label=name)
        axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axis.set(ylim=(0, 1.22), ylabel="held-out accuracy")
    axis.set_xticks(range(len(sets)), sets)
    axis.axhline(1, color="0.8", lw=0.8, zorder=0)
    axis.legend(fontsize=8, frameon=False, ncols=len(runs), loc="upper center")
    figure.savefig(path, dpi=130)


def draw_one_cycle(folders: list[Path], names: list[str], file: Path, path: Path) -> None:
    """The first comparison of `file` whose preferences go round, embedded by each run's model."""
    import torch

    from general_preference import RewardModel
    from general_preference.datasets.packing import Collator, Comparisons
    from general_preference.datasets.preparation import load_tokenized
    from general_preference.datasets.sources import Source
    from general_preference.datasets.tokenization import ComparisonTokenizer, load_tokenizer
    from general_preference.trainer.pictures import draw_cycles, embedded_cycle

    cycles = []
    for folder, name in zip(folders, names, strict=True):
        model, tokenizer = RewardModel.from_pretrained(str(folder)), load_tokenizer(str(folder))
        encoder = ComparisonTokenizer(tokenizer, model.preference.max_length, model.preference.input_format)
        comparisons = Comparisons(load_tokenized([Source(name, str(file))], encoder)[0][0])
        for index in range(len(comparisons)):
            batch = Collator(tokenizer.pad_token_id, model.layout_on())([comparisons[index, 1.0]])
            with torch.no_grad():
                cycle = embedded_cycle(name, batch, model(**batch.model_inputs()), tokenizer)
            if cycle is not None:
                cycles.append(cycle)
                break
    draw_cycles(cycles, path)


def main() -> int:
    """Read the runs, print the table, draw the picture."""
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
    print(f"\n{format_table(runs)}\n")
    draw(runs, arguments.output)
    print(f"Picture: {arguments.output}")
    if arguments.cycle is not None:
        picture = arguments.output.with_name("cycle.png")
        draw_one_cycle(arguments.runs, [name for name, _ in runs], arguments.cycle, picture)
        print(f"Picture: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
