#!/usr/bin/env python3
"""Scoring a file of comparisons: the pipeline's calls against padded pairs, turn by turn in one process.

    python benchmarks/evaluation_throughput.py [--dataset FILE] [--comparisons 1800] [--output RESULT.json]

Both score the same tokens with the same random Llama (8 layers, hidden size 384) and Bradley-Terry head: `embed`, which
batch inference, RewardBench and `GPMPipeline` share, and batches of chosen and rejected as left-padded sequences in the
file's order with transformers' own attention, for every size of batch that --padded_batches names (a batch of one
pair is hardly padded at all). Comparisons are taken in parts; the ratio is that of the sums. Ten minutes on two cores.
Writes RESULT.json.
"""

import argparse
import functools
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for scripts/

import torch

from benchmarks.machine import describe_machine, numbers
from benchmarks.training_steps import left_padded
from general_preference.cli import exit_code, format_table
from general_preference.cpu_settings import restart_with_cpu_settings
from general_preference.errors import InputError
from general_preference.files import replace_text

ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=str(ROOT / "data" / "mixed" / "train.jsonl"), help="comparisons")
    parser.add_argument("--comparisons", type=int, default=1800, help="use at most so many")
    parser.add_argument("--part", type=int, default=300, help="comparisons that one takes before the other's turn")
    parser.add_argument(
        "--padded_batches", default="1,4,16", help="pairs in a padded batch: the fastest in a trial wins"
    )
    parser.add_argument("--max_len", type=int, default=512)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("evaluation_throughput.json"))
    arguments = parser.parse_args(argv)
    return exit_code(lambda: measure(arguments), kept="nothing was written")


def measure(arguments: argparse.Namespace) -> None:
    """Parts of the data in turns, the table, the JSON."""
    from general_preference.datasets.preparation import tokenize
    from general_preference.datasets.sources import load_source, parse_sources
    from general_preference.datasets.tokenization import ComparisonTokenizer, load_tokenizer
    from general_preference.models.device import choose_device
    from general_preference.models.reward_model import get_reward_model
    from scripts.make_tiny_model import make_tiny_model

    if min(arguments.comparisons, arguments.part) < 1:
        raise InputError("--comparisons and --part must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_model(
            Path(folder) / "base",
            text_files=[arguments.dataset] if arguments.dataset.endswith(".jsonl") else None,
            hidden_size=arguments.hidden_size,
            num_layers=arguments.layers,
            num_heads=6 if arguments.hidden_size % 6 == 0 else 4,
            vocab_size=32768,
        )
        ours, theirs = (
            get_reward_model(f"{folder}/base", bf16=False, attn_implementation=kernel).eval()
            for kernel in ("auto", "sdpa")
        )
        ours.to(choose_device()).layout_on(choose_device())
        theirs.to(choose_device())  # stays on transformers' own kernel, with a mask per padded batch
        encoder = ComparisonTokenizer(load_tokenizer(f"{folder}/base"), arguments.max_len)
    (source,) = parse_sources(arguments.dataset)
    table, _ = tokenize(load_source(source)[0], encoder, name=source.name)
    rows = list(itertools.islice(pairs(table), arguments.comparisons))
    tokens = sum(row["length"] for row in rows)
    print(f"{describe_machine()}\n{len(rows)} comparisons, {tokens} unique tokens")
    sizes = numbers("padded_batches", arguments.padded_batches)
    ways = {"embed (this)": functools.partial(by_embed, ours)}
    ways |= {f"padded pairs, {size} a batch": functools.partial(by_padding, theirs, size=size) for size in sizes}
    for way in ways.values():
        way(rows[:4])  # what is done once is not timed
    seconds, apart = dict.fromkeys(ways, 0.0), 0.0
    for start in range(0, len(rows), arguments.part):
        part = rows[start : start + arguments.part]
        scores = []
        for name, way in ways.items():
            took, found = timed(functools.partial(way, part))
            seconds[name] += took
            scores.append(found)
        apart = max(apart, *((scores[0] - other).abs().max().item() for other in scores[1:]))
        print(f"{start + len(part):5} of {len(rows)} done", flush=True)
    own = seconds["embed (this)"]
    lines = {
        name: {
            "seconds": f"{took:.1f}",
            "comparisons/s": f"{len(rows) / took:.1f}",
            "unique tokens/s": f"{tokens / took:.0f}",
            "times this": f"{took / own:.2f}",
        }
        for name, took in seconds.items()
    }
    print(f"\n{format_table(lines, '', None)}\n\nscores differ by {apart:.1e} at most")
    found = {"machine": describe_machine(), "comparisons": len(rows), "tokens": tokens, "seconds": seconds}
    replace_text(arguments.output, json.dumps(found | {"difference": apart}, indent=2))
    print(f"Result: {arguments.output}")


def pairs(table) -> Iterator[dict]:
    """Every preference as a comparison of two responses, the preferred one first."""
    for row in (table[index] for index in range(len(table))):
        for first, second in zip(row["first"], row["second"], strict=True):
            both = [row["response_ids"][first], row["response_ids"][second]]
            yield {
                "prompt_ids": row["prompt_ids"],
                "response_ids": both,
                "length": len(row["prompt_ids"]) + sum(map(len, both)),
            }


def by_embed(model, rows: list[dict]) -> torch.Tensor:
    """(N,) scores of first against second, as batch inference makes them."""
    from general_preference.inference.embedding import embed

    scores = torch.empty(len(rows))
    for index, found in embed(model, rows):
        scores[index] = found.scores()[0, 1]
    return scores


@torch.no_grad()
def by_padding(model, rows: list[dict], size: int) -> torch.Tensor:
    """(N,) scores, from batches that hold all first and all second responses with their prompts, left-padded."""
    scores, device = [], model.value_head.weight.device
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        ids = [row["prompt_ids"] + row["response_ids"][side] for side in (0, 1) for row in some]
        input_ids, mask = left_padded(ids, device)
        hidden = model.language_model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        reward = model.value_head(hidden.last_hidden_state[:, -1])[:, 0]
        scores.append(reward[: len(some)] - reward[len(some) :])
    return torch.cat(scores).cpu()


def timed(work) -> tuple[float, torch.Tensor]:
    """Seconds that `work` took, and its result."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


if __name__ == "__main__":
    restart_with_cpu_settings()
    sys.exit(main())
