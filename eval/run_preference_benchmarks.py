#!/usr/bin/env python3
"""Run preference and reward models on the field's evaluation sets and print its table of seven columns.

    python eval/run_preference_benchmarks.py --model M [M ...]                              all sets, from the hub
    python eval/run_preference_benchmarks.py --model M --sets rm_bench,rmb --data COPIES    some, from copies on disk
    python eval/run_preference_benchmarks.py --scores FILE --sets rm_bench                  scores from elsewhere
    torchrun --nproc-per-node 8 eval/run_preference_benchmarks.py --model M                 on 8 devices

Writes, for each model and set, NAME.SET.jsonl (a line per record), .summary.json (all numbers) and .png (reliability)
into --output_dir, and benchmarks.json and .png for all of them together. Started again after a stop, it continues. Exit
codes, each with one line: 1 the run failed, 2 what was given cannot be used, 130 interrupted.
"""

import json
import logging
import sys
from pathlib import Path

if __name__ == "__main__":
    from general_preference.cpu_settings import restart_with_cpu_settings

    restart_with_cpu_settings()

from general_preference.cli import exit_code, parse_flags, quiet_other_libraries
from general_preference.datasets.sources import Source
from general_preference.distributed import DistributedContext
from general_preference.errors import InputError
from general_preference.evaluation.arguments import BenchmarkArguments
from general_preference.evaluation.figures import draw_benchmarks
from general_preference.evaluation.scoring import (
    file_settings,
    model_rows,
    read_score_file,
    write_file_scores,
    write_model_scores,
)
from general_preference.evaluation.sets import LoadedSet, load_set
from general_preference.evaluation.summary import summarize_set
from general_preference.evaluation.tables import Results, format_results
from general_preference.files import check_outputs, read_object, replace_text
from general_preference.inference.arguments import InferenceArguments
from general_preference.inference.batch import ResultStore
from general_preference.models.config import load_config
from general_preference.models.statistics import wilson_interval
from general_preference.plots import draw_reliability

logger = logging.getLogger("benchmarks")

PICTURE = ".png"
ALL_PAIRS = "all pairs"
TOGETHER = "benchmarks"  # name of the files about all models and sets


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn what can go wrong into one line and an exit code."""
    parsed = parse_flags((BenchmarkArguments, InferenceArguments), argv, "Run models on evaluation sets.")
    return exit_code(lambda: run(*parsed), kept="finished records are kept: the same command continues")


def run(arguments: BenchmarkArguments, inference: InferenceArguments) -> None:
    """From models and sets to tables and a picture."""
    arguments.check()
    inference.check()
    sets = arguments.chosen
    together = check_together(arguments)
    stores = {
        (name, chosen.name): ResultStore(Path(arguments.output_dir) / f"{name}.{chosen.name}.jsonl", PICTURE)
        for name in arguments.names
        for chosen in sets
    }
    for (name, _), store in stores.items():
        copies = [Source("data", arguments.data)] if arguments.data else []
        store.refuse_inputs(copies, arguments.names[name])
    quiet_other_libraries()
    results: Results = {name: {} for name in arguments.names}
    with DistributedContext.join() as context:
        for path in arguments.model:  # before sets are fetched and the models before it score
            context.main_process_first(lambda path=path: load_config(path, inference.trust_remote_code))
        columns = tuple(arguments.ignore_columns)
        loaded = [context.main_process_first(lambda one=one: load_set(one, arguments.data, columns)) for one in sets]
        for name, path in arguments.names.items():
            own = [stores[name, one.set.name] for one in loaded]
            if arguments.scores:
                found = score_from_file(arguments, inference, loaded, own, context)
            else:
                found = score_by_model(arguments, inference, path, loaded, own, context)
            for one, numbers in zip(loaded, found, strict=True):
                results[name][one.set.name] = numbers
        if context.is_main:
            report(arguments, results, together)


def check_together(arguments: BenchmarkArguments) -> dict[str, Path]:
    """{ending: file about all models}; InputError if one of them is of no such run, or would be written into data."""
    ends = (".json", PICTURE, ".md") if arguments.markdown else (".json", PICTURE)
    files = {end: Path(arguments.output_dir) / f"{TOGETHER}{end}" for end in ends}
    read = [*arguments.names.values()]
    check_outputs(dict.fromkeys(files.values(), "the results"), read, [arguments.data] if arguments.data else [])
    ours = "preference_benchmarks" in read_object(files[".json"])
    if strange := [file for file in files.values() if file.exists() and not ours]:
        raise InputError(f"{strange[0]} is of no run of these sets and would be replaced: choose another --output_dir")
    return files


def score_by_model(arguments, inference, path: str, loaded: list[LoadedSet], stores, context) -> list[dict | None]:
    """The numbers of a model on each set, on the main process."""
    options = {"max_length": arguments.max_length}
    rm = context.main_process_first(lambda: inference.load(path, context.local_rank, **options))
    found = []
    for number, (one, store) in enumerate(zip(loaded, stores, strict=True), 1):
        logger.info("%s on %s (%d of %d)", path, one.set.title, number, len(loaded))
        table, read, settings = model_rows(rm, path, one, inference.preprocessing_workers, context)
        with store.open(context, len(table), settings, arguments.overwrite):
            write_model_scores(rm, table, store, context, arguments.batch_size)
            notes = {"cut": {"prompts": read.prompt_cut, "responses": read.response_cut}, "empty": read.empty}
            found.append(finish(one, store, rm.tau, notes) if context.is_main else None)
    return found


def score_from_file(arguments, inference, loaded: list[LoadedSet], stores, context) -> list[dict | None]:
    """The numbers of a file of scores on each set, on the main process."""
    tau = inference.general_preference_tau or 1.0
    columns = tuple(arguments.ignore_columns)
    scores = context.main_process_first(lambda: read_score_file(arguments.scores, loaded, columns))
    found = []
    for one, own, store in zip(loaded, scores, stores, strict=True):
        settings = file_settings(arguments.scores, one, own, tau)
        with store.open(context, len(own), settings, arguments.overwrite):
            if context.is_main:
                write_file_scores(one, own, store)
                found.append(finish(one, store, tau, {}))
            else:
                found.append(None)
    return found


def finish(loaded: LoadedSet, store: ResultStore, tau: float, notes: dict) -> dict:
    """Sum up the scores of a set, draw their reliability, write both; returns the numbers."""
    numbers, bins = summarize_set(loaded, (row["scores"] for row in store.rows()), tau)
    numbers |= notes
    rows = {}
    for name, row in numbers["subsets"].items():
        ends = (row["accuracy"] if row[end] is None else row[end] for end in ("accuracy_low", "accuracy_high"))
        rows[name] = row | dict(zip(("accuracy_low", "accuracy_high"), ends, strict=True))
    total = {"accuracy": numbers["pair_accuracy"], "calibration_error": numbers["ece"], "n": numbers["n"]}
    total["accuracy_low"], total["accuracy_high"] = wilson_interval(numbers["pair_accuracy"], numbers["n"])
    guess = {ALL_PAIRS: 0.5} | ({} if loaded.set.chance is None else dict.fromkeys(rows, loaded.set.chance))
    draw_reliability(bins, rows | {ALL_PAIRS: total}, store.beside(PICTURE), guess)
    store.finish({"tau": tau, **numbers, "reliability": bins})
    return numbers


def report(arguments: BenchmarkArguments, results: Results, files: dict[str, Path]) -> None:
    """Tables on screen, all numbers and the picture on disk."""
    replace_text(files[".json"], json.dumps({"preference_benchmarks": results}, indent=2))
    text = format_results(results, arguments.markdown)
    print(f"\n{text}\n\nNumbers: {files['.json']}")
    if arguments.markdown:
        replace_text(files[".md"], text)
        print(f"Table:   {files['.md']}")
    if draw_benchmarks(results, files[PICTURE]):
        print(f"Picture: {files[PICTURE]}")


if __name__ == "__main__":
    sys.exit(main())
