#!/usr/bin/env python3
"""Cyclic comparisons from rated responses, each link decided by another criterion (arXiv 2410.02197, section 6.2).

    python scripts/make_cyclic_comparisons.py --ratings openbmb/UltraFeedback --output data/ultrafeedback_cycles
    python scripts/make_cyclic_comparisons.py --ratings rated.jsonl --criteria quality,brevity,variety --output DIR
    python scripts/make_cyclic_comparisons.py --ratings openbmb/UltraFeedback --paper --output DIR

Reads UltraFeedback's layout: instruction, completions[].response, completions[].annotations.CRITERION.Rating. Writes
groups as docs/data.md describes them: train.jsonl, pairs.jsonl (other comparisons of the prompts in train.jsonl, the
paper's test), prompts.jsonl (other prompts), and summary.json. --paper writes four such folders, cyclic_1 to cyclic_4:
those of the paper's Table 1, each without one of four criteria. Exit codes: 0 done, 1 it failed, 2 bad input.
"""

import json
import signal
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # importing takes seconds, in which Ctrl-C should print no traceback

from general_preference.cli import check_seed, exit_code, flag, format_table, parse_flags, quiet_other_libraries
from general_preference.datasets.cycles import (
    RatedPrompt,
    check_criteria,
    find_cycles,
    make_record,
    read_rated,
    scalar_ceiling,
    split_records,
    without_conflicts,
)
from general_preference.datasets.sources import Source, source_records
from general_preference.errors import InputError
from general_preference.files import check_new_folder, new_folder, replace_lines, replace_text

DEFAULT = "honesty,truthfulness,helpfulness"
PAPER = "instruction_following,honesty,truthfulness,helpfulness"


@dataclass
class CycleArguments:
    """What is read, what decides, and where it goes."""

    ratings: str | None = flag(None, "prompts with rated responses: a file, folder or hub name")
    criteria: str | None = flag(None, f"what decides each link, in this order; default {DEFAULT}, of --paper {PAPER}")
    output: str | None = flag(None, "folder to make")
    paper: bool = flag(False, "four sets, each through all --criteria but one: the first is left out, the second, ...")
    train_split_ratio: float = flag(0.9, "share of the prompts to train on; the others are in prompts.jsonl")
    held_out_pairs: float = flag(0.1, "share of the training prompts' comparisons in pairs.jsonl, one a prompt at most")
    seed: int = flag(42, "seed of both splits")

    def check(self) -> None:
        """InputError for what cannot work, before anything is read."""
        if missing := [name for name in ("ratings", "output") if not getattr(self, name)]:
            raise InputError(f"--{missing[0]} is missing")
        for name in ("train_split_ratio", "held_out_pairs"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} must lie between 0 and 1")
        check_seed(self.seed)
        for criteria in self.cycles().values():
            check_criteria(criteria)
        check_new_folder(Path(self.output), [self.ratings])

    def cycles(self) -> dict[str, list[str]]:
        """{folder in the output: criteria of its cycles}; "." is the output itself."""
        names = [name.strip() for name in (self.criteria or (PAPER if self.paper else DEFAULT)).split(",")]
        if not self.paper:
            return {".": names}
        return {f"cyclic_{number + 1}": names[:number] + names[number + 1 :] for number in range(len(names))}


def main(argv: list[str] | None = None) -> int:
    """Parse, write, and turn what can go wrong into one line and an exit code."""
    (arguments,) = parse_flags((CycleArguments,), argv, "Make cyclic comparisons from rated responses.")
    quiet_other_libraries()
    return exit_code(lambda: run(arguments), kept="nothing was written")


def run(arguments: CycleArguments) -> None:
    """From ratings to groups of comparisons."""
    arguments.check()
    source, output, written = Source("ratings", arguments.ratings), Path(arguments.output), {}
    with new_folder(output) as folder:
        for name, criteria in arguments.cycles().items():
            prompts, unrated = read_rated(source_records(source), criteria)
            splits, summary = make_set(arguments, prompts, criteria)
            for split, records in splits.items():
                lines = (json.dumps(record, ensure_ascii=False) for record in records)
                replace_lines(folder / name / f"{split}.jsonl", lines)
            written[name] = {"criteria": criteria, "unrated": unrated, **summary}
            replace_text(folder / name / "summary.json", json.dumps(written[name], indent=2))
    for name, summary in written.items():
        sizes = summary.pop("splits")
        where = output if name == "." else output / name
        print(f"\n{where}: {' > '.join([*summary['criteria'], summary['criteria'][0]])}")
        print("; ".join(f"{key.replace('_', ' ')} {value}" for key, value in summary.items() if key != "criteria"))
        print(
            format_table(sizes, "", {"prompts": "prompts", "comparisons": "comparisons", "ceiling": "scalar ceiling"})
        )


def make_set(arguments: CycleArguments, prompts: list[RatedPrompt], criteria: list[str]) -> tuple[dict, dict]:
    """({split: records}, what the summary says) for cycles through these criteria."""
    rated = [one for one in prompts if sum(None not in ratings for ratings in one.ratings) >= len(criteria)]
    if not rated:
        most = max(len(one.responses) for one in prompts)
        found = f"no prompt has {len(criteria)} responses rated by {', '.join(criteria)} (at most {most} responses)"
        raise InputError(f"{found}: a cycle needs one for each link")
    found = list(map(find_cycles, prompts))
    kept = list(map(without_conflicts, found))
    records = [make_record(one, cycles) for one, cycles in zip(prompts, kept, strict=True) if cycles]
    if len(records) < 2:
        equal = [name for by, name in enumerate(criteria) if _all_equal(prompts, by)]
        why = f"; all responses of a prompt are rated alike by {equal[0]}" if equal else ""
        raise InputError(f"{len(records)} of {len(prompts)} prompts have a cycle through {', '.join(criteria)}{why}")
    cycles = [cycle for some in kept for cycle in some]
    splits = split_records(records, arguments.train_split_ratio, arguments.held_out_pairs, arguments.seed)
    sizes = {
        name: {
            "prompts": len(some),
            "comparisons": sum(len(record["preferences"]) for record in some),
            "ceiling": scalar_ceiling(stated_texts(some)) if some else None,
        }
        for name, some in splits.items()
    }
    margins = [margin for cycle in cycles for margin in cycle.margins]
    summary = {
        "prompts_read": len(prompts),
        "prompts_with_enough_ratings": len(rated),
        "prompts_with_a_cycle": len(records),
        "cycles_found": sum(map(len, found)),
        "cycles_left_out_for_conflicts": sum(map(len, found)) - len(cycles),
        "mean_margin": round(statistics.mean(margins), 4),
        "smallest_margin": min(margins),
        "splits": sizes,
    }
    return splits, summary


def stated_texts(records: list[dict]) -> Iterator[tuple[str, str, str]]:
    """(prompt, winner, loser) of all comparisons: of a prompt with several records the same text has one number."""
    for record in records:
        for pair in record["preferences"]:
            yield record["prompt"], *(record["responses"][side] for side in pair)


def _all_equal(prompts: list[RatedPrompt], by: int) -> bool:
    return all(len({ratings[by] for ratings in one.ratings}) < 2 for one in prompts)


if __name__ == "__main__":
    sys.exit(main())
