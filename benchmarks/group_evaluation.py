#!/usr/bin/env python3
"""An evaluation set with many responses to a prompt: K forwards behind one prompt against a forward per side of a pair.

    python benchmarks/group_evaluation.py [--responses 32] [--pairs 16,64,256] [--output RESULT.json]

Records as PPE Correctness has them: random tokens of a prompt and K responses, half of them right, and conflict pairs
drawn among right and wrong ones. On the same token ids, turn by turn in one process: `embed`, as
eval/run_preference_benchmarks.py scores a record, and the chosen and the rejected side of every pair with its own copy
of the prompt, both sides of a pair as one padded batch with transformers' own attention. Random Llama (8 layers, hidden
size 384), Bradley-Terry head. What the second way takes for the largest number of pairs is measured for the smallest
and counted, as it does the same for every pair. Writes RESULT.json.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for scripts/

import torch

from benchmarks.evaluation_throughput import by_padding, timed
from benchmarks.machine import describe_machine, numbers
from general_preference.cli import exit_code, format_table
from general_preference.cpu_settings import restart_with_cpu_settings
from general_preference.errors import InputError
from general_preference.files import replace_text


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=32, help="K")
    parser.add_argument("--pairs", default="16,64,256", help="conflict pairs of a record; the smallest number is run")
    parser.add_argument("--records", type=int, default=3, help="records, each timed in both ways")
    parser.add_argument("--prompt", type=int, default=300, help="tokens of the prompt")
    parser.add_argument("--response", type=int, default=100, help="tokens of a response on average, half to 1.5 times")
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("group_evaluation.json"))
    arguments = parser.parse_args(argv)
    return exit_code(lambda: measure(arguments), kept="nothing was written")


def measure(arguments: argparse.Namespace) -> None:
    """Records in turns, the table, the JSON."""
    from general_preference.inference.embedding import embed
    from general_preference.models.device import choose_device
    from general_preference.models.reward_model import get_reward_model
    from scripts.make_tiny_model import make_tiny_model

    counts = numbers("pairs", arguments.pairs)
    most = (arguments.responses // 2) * (arguments.responses - arguments.responses // 2)
    if max(counts) > most or min(arguments.records, arguments.prompt, arguments.response - 1) < 1:
        raise InputError(f"{arguments.responses} responses, half of them right, have {most} conflict pairs at most")
    with tempfile.TemporaryDirectory() as folder:
        heads = 6 if arguments.hidden_size % 12 == 0 else 4
        size = {"hidden_size": arguments.hidden_size, "num_layers": arguments.layers, "num_heads": heads}
        make_tiny_model(Path(folder) / "base", vocab_size=2048, **size)
        ours, theirs = (
            get_reward_model(f"{folder}/base", bf16=False, attn_implementation=kernel).eval().to(choose_device())
            for kernel in ("auto", "sdpa")
        )
    ours.layout_on(choose_device())
    generator = random.Random(0)
    print(describe_machine())
    seconds: dict[str, list[float]] = {"group": [], "pair": []}
    apart, tokens = 0.0, 0
    for number in range(arguments.records + 1):
        record, pairs = make_record(generator, arguments, ours.vocabulary_size, min(counts))
        took, found = timed(lambda record=record: next(one.scores() for _, one in embed(ours, [record])))
        rows = [side_by_side(record, *pair) for pair in pairs]
        padded_took, padded = timed(lambda rows=rows: by_padding(theirs, rows, 1))
        if number:  # what is done once is not timed
            seconds["group"].append(took)
            seconds["pair"].append(padded_took / len(pairs))
            tokens = len(record["prompt_ids"]) + sum(map(len, record["response_ids"]))
        apart = max(apart, *((found[i, j] - s).abs().item() for (i, j), s in zip(pairs, padded, strict=True)))
    group, pair = (statistics.median(times) for times in seconds.values())
    ratios = {
        count: statistics.median(p * count / g for g, p in zip(*seconds.values(), strict=True)) for count in counts
    }
    lines = {
        str(count): {
            f"{arguments.responses} behind one prompt, s": f"{group:.2f}",
            "each side of a pair, s": f"{pair * count:.2f}",
            "ratio": f"{ratios[count]:.1f}",
        }
        for count in counts
    }
    print(f"\n{tokens} tokens in the last record\n\n{format_table(lines, 'pairs', None)}")
    print(f"\nscores differ by {apart:.1e} at most")
    result = {"machine": describe_machine(), "seconds": seconds, "ratios": ratios, "largest_difference": apart}
    replace_text(arguments.output, json.dumps(result, indent=2))
    print(f"Result: {arguments.output}")


def make_record(generator: random.Random, arguments: argparse.Namespace, vocabulary: int, count: int):
    """(a prompt with K responses as token ids, `count` conflict pairs of them)."""

    def ids(length: int) -> list[int]:
        return [generator.randrange(6, vocabulary) for _ in range(length)]

    half, average = arguments.responses // 2, arguments.response
    responses = [ids(generator.randint(average // 2, 3 * average // 2)) for _ in range(arguments.responses)]
    conflicts = [(i, j) for i in range(half) for j in range(half, arguments.responses)]
    return {"prompt_ids": ids(arguments.prompt), "response_ids": responses}, generator.sample(conflicts, count)


def side_by_side(record: dict, first: int, second: int) -> dict:
    """A pair of a record as a record of its own."""
    return record | {"response_ids": [record["response_ids"][first], record["response_ids"][second]]}


if __name__ == "__main__":
    restart_with_cpu_settings()
    torch.manual_seed(0)
    sys.exit(main())
