#!/usr/bin/env python3
"""From a file to a table that can be trained on: how fast, how fast again, and in how much memory.

    python benchmarks/tokenization.py [--dataset FILE] [--comparisons 20000,200000] [--output RESULT.json]

Prepares data as a training run does (read, check, tokenize, split by prompt, count), in processes of its own with an
empty cache: the comparisons of FILE, and synthetic ones in the numbers named. Printed are comparisons per minute and
core, the time of a second start, which reads the cache, and memory that is the process's own: tables are memory-mapped
files, of which the kernel keeps in memory what it has room for. About five minutes on two cores.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for scripts/

from benchmarks.machine import describe_machine, numbers
from general_preference.cli import exit_code, format_table
from general_preference.errors import InputError
from general_preference.files import replace_text

ROOT = Path(__file__).resolve().parents[1]
WORDS = 400  # different ones in synthetic text


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; or be one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="comparisons on disk, beside the synthetic ones")
    parser.add_argument("--tokenizer", help="folder; default one that is trained on this repository's data")
    parser.add_argument(
        "--comparisons", default="20000,200000", help="numbers of synthetic comparisons; empty for none"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    parser.add_argument("--max_len", type=int, default=512)
    parser.add_argument("--output", type=Path, default=Path("tokenization.json"))
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    work = prepare if arguments.run else measure
    return exit_code(lambda: work(arguments), kept="nothing was written")


def measure(arguments: argparse.Namespace) -> None:
    """Each set in two processes, one after the other; the table and the JSON."""
    counts = numbers("comparisons", arguments.comparisons) if arguments.comparisons else []
    if arguments.workers < 1:
        raise InputError(f"--workers {arguments.workers} must be at least 1")
    if arguments.dataset and not Path(arguments.dataset).exists():
        raise InputError(f"--dataset {arguments.dataset} does not exist: check the path")
    print(describe_machine())
    found = []
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.tokenizer:
            from scripts.make_tiny_model import make_tiny_model

            make_tiny_model(Path(folder) / "model")
            arguments.tokenizer = str(Path(folder) / "model")
        files = [Path(arguments.dataset)] if arguments.dataset else []
        files += [write_synthetic(Path(folder) / f"synthetic_{count}.jsonl", count) for count in counts]
        for file in files:
            for start in ("first", "second"):
                found.append({"set": file.name, "start": start} | run_process(arguments, file, Path(folder) / "cache"))
                print(f"{file.name}, {start} start: {found[-1]['seconds']:.1f} s", flush=True)
    report(found, arguments.output)


def write_synthetic(file: Path, count: int) -> Path:
    """Comparisons of random words, about as long as human preferences are."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 9))) for _ in range(WORDS)]

    def text(most: int) -> str:
        return " ".join(generator.choices(words, k=generator.randint(5, most)))

    with file.open("w", encoding="utf-8") as lines:
        for number in range(count):
            record = {"prompt": f"{number} {text(100)}", "chosen": text(60), "rejected": text(60)}
            lines.write(json.dumps(record) + "\n")
    return file


def run_process(arguments: argparse.Namespace, file: Path, cache: Path) -> dict:
    """What one process that prepares `file` found."""
    command = [sys.executable, __file__, "--run", f"--dataset={file}", f"--tokenizer={arguments.tokenizer}"]
    command += [f"--workers={arguments.workers}", f"--max_len={arguments.max_len}"]
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        raise InputError(f"{file.name}: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def prepare(arguments: argparse.Namespace) -> None:
    """Prepare one file as a training run does, then read through it; the last line of the output is JSON."""
    from general_preference.datasets.packing import Comparisons
    from general_preference.datasets.sampler import StepSampler
    from general_preference.datasets.tokenization import ComparisonTokenizer, load_tokenizer
    from general_preference.trainer.arguments import parse_arguments
    from scripts.train_rm_general_preference import prepare_data

    flags = parse_arguments([f"--dataset={arguments.dataset}", f"--preprocessing_workers={arguments.workers}"])
    encoder = ComparisonTokenizer(load_tokenizer(arguments.tokenizer), arguments.max_len)
    before, began = own_memory(), time.perf_counter()
    table, _, (summary, *_) = prepare_data(flags, encoder)
    seconds = time.perf_counter() - began
    rows, read = Comparisons(table), 0
    for batch in StepSampler(table["length"][:], micro_batch_size=8).micro_batches(1):
        read += sum(rows[item]["length"] for item in batch)
    after = own_memory()
    result = {
        "seconds": seconds,
        "comparisons": len(table),
        "tokens": summary.tokens,
        "tokens_read": read,
        "seconds_with_reading": time.perf_counter() - began,
        "table_bytes": table.data.nbytes,
        "memory_before": before,
        "memory_after": after,
        "workers": arguments.workers,
    }
    print("\n" + json.dumps(result))


def own_memory() -> int:
    """Bytes of this process that no file stands behind (Linux)."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def report(found: list[dict], output: Path) -> None:
    """The table and the JSON."""
    rows = {}
    for one in found:
        rate = one["comparisons"] / one["seconds"] * 60 / one["workers"]
        rows[f"{one['set']}, {one['start']}"] = {
            "comparisons": one["comparisons"],
            "tokens": one["tokens"],
            "comparisons/min/core": f"{rate:.0f}" if one["start"] == "first" else "-",
            "seconds": f"{one['seconds']:.1f}",
            "table MiB": f"{one['table_bytes'] / 2**20:.0f}",
            "own memory MiB": f"{one['memory_after'] / 2**20:.0f}",
            "grown by": f"{(one['memory_after'] - one['memory_before']) / 2**20:.0f}",
        }
    print(f"\n{format_table(rows, '', None)}")
    replace_text(output, json.dumps({"machine": describe_machine(), "runs": found}, indent=2))
    print(f"\nResult: {output}")


if __name__ == "__main__":
    sys.exit(main())
