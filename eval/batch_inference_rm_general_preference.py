#!/usr/bin/env python3
"""Run a preference model over your own comparisons: a score for each, a summary, a picture.

    python eval/batch_inference_rm_general_preference.py --pretrain MODEL --dataset FILE --output_path results.jsonl
    torchrun --nproc-per-node 8 eval/batch_inference_rm_general_preference.py ...                the same on 8 devices

Writes OUTPUT (a JSON line per comparison, in the order of the data) and beside it .summary.json (accuracy, loss,
calibration per subset) and .reliability.png. Started again after a stop, it continues. Exit codes, each with one line:
1 the run failed, 2 what was given cannot be used, 130 interrupted.
"""

import logging
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    from general_preference.cpu_settings import restart_with_cpu_settings

    restart_with_cpu_settings()

import datasets
import torch

from general_preference import GPMPipeline
from general_preference.cli import (
    check_at_least,
    check_seed,
    exit_code,
    flag,
    format_table,
    parse_flags,
    quiet_other_libraries,
)
from general_preference.datasets.arguments import ReadingArguments
from general_preference.datasets.preparation import (
    Summary,
    check_known_ids,
    load_tokenized,
    parse_probabilities,
    summarize_table,
)
from general_preference.datasets.sources import parse_sources
from general_preference.distributed import DistributedContext
from general_preference.errors import InputError
from general_preference.inference.arguments import InferenceArguments
from general_preference.inference.batch import ResultStore, result_row, run_settings, score_table, summarize_rows
from general_preference.plots import draw_reliability

logger = logging.getLogger("batch_inference")

PICTURE = ".reliability.png"


@dataclass
class BatchArguments(ReadingArguments):
    """Model, comparisons, and where the results go. Flags of the paper's script keep names and meaning."""

    pretrain: str | None = flag(None, "trained preference model: folder or hub name")
    dataset: str | None = flag(None, "comparisons: files, folders, patterns or hub names, by commas; see docs/data.md")
    output_path: str = flag("./results.jsonl", "file of the results, one JSON object a line")
    dataset_probs: str | None = flag(None, "share of each set, as in 0.4,0.6; default: one set after the other")
    max_samples: int = flag(1000000, "score at most so many, drawn by --seed; with --dataset_probs the first ones")
    seed: int = flag(42, "seed of the draw of --max_samples")
    max_len: int | None = flag(None, "tokens of prompt and one response; default what the model was trained with")
    disable_fast_tokenizer: bool = flag(False, "use the slow (Python) tokenizer where a model has both")
    micro_batch_size: int | None = flag(None, "comparisons in one call at most; default as many as --batch_tokens hold")
    save_embeddings: bool = flag(False, "also write each response's embedding and each prompt's gate")
    overwrite: bool = flag(False, "replace results of another model, other data or other settings in --output_path")

    def check(self) -> None:
        """InputError for what cannot work, before anything is loaded."""
        if missing := [name for name in ("pretrain", "dataset") if not getattr(self, name)]:
            raise InputError(f"--{missing[0]} is missing")
        self.reading()
        check_at_least(self, 1, "max_samples", "micro_batch_size")
        check_seed(self.seed)
        if Path(self.output_path).is_dir():
            raise InputError(f"--output_path {self.output_path} is a folder: name a file in it")


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn what can go wrong into one line and an exit code."""
    parsed = parse_flags((BatchArguments, InferenceArguments), argv, "Score comparisons with a preference model.")
    return exit_code(lambda: run(*parsed), kept="finished rows are kept: the same command continues")


def run(arguments: BatchArguments, inference: InferenceArguments) -> None:
    """From paths to results."""
    arguments.check()
    inference.check()
    store = ResultStore(Path(arguments.output_path), PICTURE)
    store.refuse_inputs(parse_sources(arguments.dataset), arguments.pretrain)
    quiet_other_libraries()
    with DistributedContext.join() as context:
        options = {"max_length": arguments.max_len, "disable_fast_tokenizer": arguments.disable_fast_tokenizer}
        rm = context.main_process_first(lambda: inference.load(arguments.pretrain, context.local_rank, **options))
        table, read = context.main_process_first(lambda: load_table(arguments, rm, inference.preprocessing_workers))
        logger.info("%s", "\n".join(map(str, read)))
        check_known_ids(table, rm.model.vocabulary_size, rm.tokenizer)
        names = ("pretrain", "dataset", "dataset_probs", "max_samples", "seed")
        asked = {name: getattr(arguments, name) for name in names}
        # The fingerprint is of the files' sizes and times, the tokenizer, and the draw.
        others = {"save_embeddings": arguments.save_embeddings, "comparisons": table._fingerprint}
        settings = run_settings(rm, arguments.pretrain, asked, **others)
        with store.open(context, len(table), settings, arguments.overwrite):
            make_row = partial(result_row, tau=rm.tau, save_embeddings=arguments.save_embeddings)
            score_table(rm, table, store, context, make_row, arguments.micro_batch_size)
            if context.is_main:
                report(rm, store, read)


def load_table(arguments: BatchArguments, rm: GPMPipeline, workers: int) -> tuple[datasets.Dataset, list[Summary]]:
    """(tokenized comparisons in the order of the results, what each set held). Without subsets, sets are subsets."""
    sources = parse_sources(arguments.dataset)
    probabilities = parse_probabilities(arguments.dataset_probs, len(sources))
    options = {"reading": arguments.reading(), "skip_bad": arguments.on_bad_record == "skip"}
    tables, summaries = load_tokenized(sources, rm.encoder, workers=workers, **options)
    read = []
    for number, (name, table) in enumerate(zip([source.name for source in sources], tables, strict=True)):
        read.append(summarize_table(name, table, [summaries[number]]))
        if len(tables) > 1:
            subsets = [subset or name for subset in table["subset"][:]]
            tables[number] = table.remove_columns("subset").add_column("subset", subsets)
    order = _order(list(map(len, tables)), probabilities, arguments.max_samples, arguments.seed)
    return datasets.concatenate_datasets(tables).select(order), read


def _order(sizes: list[int], probabilities: list[float] | None, limit: int, seed: int) -> list[int]:
    """Row indices of the concatenated sets: each at most once, alternating by `probabilities`, at most `limit`."""
    total = sum(sizes)
    if probabilities is None:
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit]
        return drawn.sort().values.tolist() if limit < total else list(range(total))
    # The k-th row of a set is due at (k + 1) / probability: every beginning of the order has the shares asked for.
    due = [(k + 1) / share for size, share in zip(sizes, probabilities, strict=True) for k in range(size)]
    return sorted(range(total), key=lambda index: (due[index], index))[:limit]


def report(rm: GPMPipeline, store: ResultStore, read: list[Summary]) -> None:
    """Sum the rows up, draw, print."""
    results, reliability = summarize_rows(store.rows(), rm.tau)
    store.finish({"preference": asdict(rm.preference), "data": list(map(asdict, read)), "results": results})
    shown = results if len(results) > 2 else {"all": results["all"]}
    print(f"\n{format_table(shown)}\n\nResults: {store.output}\nSummary: {store.summary}")
    if draw_reliability(reliability, results, store.beside(PICTURE)):
        print(f"Picture: {store.beside(PICTURE)}")


if __name__ == "__main__":
    sys.exit(main())
