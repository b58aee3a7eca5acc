#!/usr/bin/env python3
"""Compare preference models on the same comparisons: is one better than the other, and where do they differ?

    python eval/compare_models.py A.jsonl B.jsonl [MORE.jsonl] [--output comparison.json]

The files are results of eval/batch_inference_rm_general_preference.py or of rewardbench_eval/run_rm_rewardbench.py, in
which every other model is compared with the first. Writes OUTPUT (all numbers, JSON) and a picture beside it. Exit
codes, each with one line: 1 it failed, 2 what was given cannot be used, 130 interrupted.
"""

import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # importing takes seconds, in which Ctrl-C should print no traceback

from general_preference.cli import check_at_least, exit_code, flag, format_table, parse_flags, quiet_other_libraries
from general_preference.errors import InputError
from general_preference.files import check_outputs, read_object, replace_text
from general_preference.inference.batch import ResultStore
from general_preference.inference.comparison import compare_models
from general_preference.inference.results import check_same_rows, model_labels, read_results
from general_preference.plots import draw_comparison

FILES = "two or more result files (.jsonl) of the same rows; the first is what the others are compared with"
COLUMNS = {name: name for name in ("n", "accuracy", "interval", "ties", "file")}
GROUPS = "p and intervals of accuracies take comparisons as independent; intervals of differences keep groups whole"


@dataclass
class CompareArguments:
    """Where the results go, and how many rows are listed."""

    output: str = flag("comparison.json", "file of all numbers; the picture gets its name with .png")
    top: int = flag(10, "list so many comparisons on which a model and the first differ most")


def main(argv: list[str] | None = None) -> int:
    """Parse, compare, and turn what can go wrong into one line and an exit code."""
    arguments, files = parse_flags((CompareArguments,), argv, "Compare preference models.", files=FILES)
    quiet_other_libraries()
    return exit_code(lambda: run(files, arguments), kept="nothing was written")


def run(paths: list[str], arguments: CompareArguments) -> None:
    """From result files to tables, numbers and a picture."""
    check_at_least(arguments, 0, "top")
    if len(paths) < 2:
        raise InputError(f"only {paths[0]} is given: name the result files of two or more models")
    resolved = [Path(path).resolve() for path in paths]
    if twice := [path for path, place in zip(paths, resolved, strict=True) if resolved.count(place) > 1]:
        raise InputError(f"{twice[0]} is given twice: name the result file of another model")
    output = Path(arguments.output)
    if output.suffix != ".json":
        raise InputError(f"--output {arguments.output!r} must end in .json")
    picture = output.with_suffix(".png")
    read = [*paths, *(str(ResultStore(path).summary) for path in resolved)]
    check_outputs({output: "--output", picture: "the picture"}, read)
    ours = "against_baseline" in read_object(output)
    if strange := [path for path in (output, picture) if path.exists() and not ours]:
        raise InputError(f"{strange[0]} is of no comparison and would be replaced: choose another --output")
    files = [read_results(path) for path in paths]
    for other in files[1:]:
        check_same_rows(files[0], other)
    compared = compare_models(dict(zip(model_labels(files), files, strict=True)), arguments.top)
    replace_text(output, json.dumps(compared, indent=2, ensure_ascii=False, allow_nan=False))
    print(f"\n{format_comparison(compared)}\n\nNumbers: {output}")
    if draw_comparison(compared, picture):
        print(f"Picture: {picture}")


def format_comparison(compared: dict) -> str:
    """The tables on screen, from what `compare_models` returns."""
    models, baseline = compared["models"], compared["baseline"]
    *subsets, last = models[baseline]["results"]
    shown = [*subsets, last] if len(subsets) > 1 else [last]
    totals = {label: model["results"][last] | {"file": model["file"]} for label, model in models.items()}
    counts = f"{compared['rows']} rows, {compared['comparisons']} comparisons; {compared['credit']}"
    counts += f"\n{GROUPS}" if compared["rows"] < compared["comparisons"] else ""
    parts = [counts, format_table(totals, "model", COLUMNS)]
    if len(shown) > 1:
        parts.append(format_table({name: _accuracies(models, name) for name in shown}, "accuracy", None))
    for label, other in compared["against_baseline"].items():
        parts.append(f"{label} against {baseline}: difference of accuracies")
        differences = {name: _difference(other["results"][name]) for name in shown}
        parts.append(format_table(differences, "set", None))
        listed = {str(number): _place(row) for number, row in enumerate(other["most_different"], 1)}
        title = "largest differences of the probability of the preferred response, where the models decide otherwise"
        parts += [title, format_table(listed, "", None)] if listed else []
    if len(models) > 2:
        parts += ["agreement: share of comparisons decided alike", format_table(compared["agreement"], "", None)]
    return "\n\n".join(parts)


def _accuracies(models: dict, name: str) -> dict:
    rows = {label: model["results"][name] for label, model in models.items()}
    shown = "{accuracy:.3f} ({accuracy_low:.3f}-{accuracy_high:.3f})"
    return {"n": next(iter(rows.values()))["n"]} | {label: shown.format(**row) for label, row in rows.items()}


def _difference(row: dict) -> dict:
    interval = None if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}"
    found = {"difference": f"{row['difference']:+.4f}", "95 % interval": interval, "better": row["better"]}
    return found | {name: row[name] for name in ("worse", "agreement", "spearman")} | {"p": f"{row['p_value']:.2g}"}


def _place(row: dict) -> dict:
    between = {"preferred": f"{row['preferred']} over {row['other']}"} if "preferred" in row else {}
    probabilities = {f"P of {label}": probability for label, probability in row["probability"].items()}
    return {name: row[name] for name in ("row", "id", "subset") if row[name]} | between | probabilities


if __name__ == "__main__":
    sys.exit(main())
