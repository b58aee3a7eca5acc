#!/usr/bin/env python3
"""A preference model reads samples of a policy: an embedding for each response. The second stage of policy alignment.

    python scripts/score_responses.py --model PREFERENCE --samples samples.jsonl --output scored.jsonl
    python scripts/launch.py --nproc-per-node 8 scripts/score_responses.py ...               the same on 8 devices

Writes OUTPUT (a JSON line per prompt, in the order of the samples; see general_preference/alignment/samples.py) and
beside it .summary.json. Started again after a stop, it continues. Exit codes, each with one line: 1 the run failed,
2 what was given cannot be used, 130 interrupted.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    from general_preference.cpu_settings import restart_with_cpu_settings

    restart_with_cpu_settings()

from general_preference.alignment.arguments import ScoringArguments
from general_preference.alignment.samples import read_samples, samples_checksum, summary_path
from general_preference.alignment.scoring import PROMPTS, SampleTable, score_row, summarize_scores
from general_preference.cli import exit_code, parse_flags, quiet_other_libraries
from general_preference.datasets.sources import Source
from general_preference.distributed import DistributedContext
from general_preference.inference.arguments import InferenceArguments
from general_preference.inference.batch import ResultStore, run_settings, score_table


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn what can go wrong into one line and an exit code."""
    parsed = parse_flags((ScoringArguments, InferenceArguments), argv, "Embed samples with a preference model.")
    return exit_code(lambda: run(*parsed), kept="finished rows are kept: the same command continues")


def run(arguments: ScoringArguments, inference: InferenceArguments) -> None:
    """From samples to embeddings."""
    arguments.check()
    inference.check()
    store, path = ResultStore(Path(arguments.output)), Path(arguments.samples)
    store.refuse_inputs([Source("samples", str(path))], arguments.model, str(summary_path(path)))
    quiet_other_libraries()
    with DistributedContext.join() as context:
        samples = context.main_process_first(lambda: read_samples(path))
        options = {"max_length": arguments.max_length}
        rm = context.main_process_first(lambda: inference.load(arguments.model, context.local_rank, **options))
        head = {"head": rm.preference.head, "dim": rm.value_head_dim, "planes": rm.preference.planes}
        asked = {"model": arguments.model, "samples_file": arguments.samples}
        settings = run_settings(rm, arguments.model, asked, samples=samples_checksum(samples), **head)
        with store.open(context, len(samples), settings, arguments.overwrite):
            score_table(rm, SampleTable(rm, samples), store, context, score_row, PROMPTS)
            if context.is_main:
                finish(store)


def finish(store: ResultStore) -> None:
    """Sum the rows up, print."""
    summary = summarize_scores(store.rows())
    store.finish(summary)
    for name, value in summary.items():
        if value is not None:
            print(f"{name}: {', '.join(f'{one:.4g}' for one in (value if isinstance(value, list) else [value]))}")
    print(f"Scores: {store.output}\nSummary: {store.summary}")


if __name__ == "__main__":
    sys.exit(main())
