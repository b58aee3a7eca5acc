#!/usr/bin/env python3
"""How the speed of a training step grows with the length of sequences and the size of a micro-batch.

    python benchmarks/growth.py [--lengths 128,256,512,1024,2048] [--micro_batches 1,2,4,8,16,32] [--output RESULT.json]

Random pairs of exactly so many tokens (half of them prompt), a random Llama, this trainer's engine on one process:
forward, loss, backward and optimizer of one micro-batch. Printed are unique tokens per second: flat is good, a cliff is
a fault. Combinations of more than --most_tokens tokens are left out. A few minutes on two cores. Writes RESULT.json and
a picture beside it.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for scripts/

import torch

from benchmarks.machine import describe_machine, matmul_rate, numbers
from general_preference.cli import exit_code, format_table
from general_preference.cpu_settings import restart_with_cpu_settings
from general_preference.datasets.packing import Collator
from general_preference.errors import InputError
from general_preference.files import replace_text
from general_preference.plots import load_pyplot
from scripts.make_tiny_model import make_tiny_model


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags; lists become lists of numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="128,256,512,1024,2048", help="tokens of prompt and one response")
    parser.add_argument("--micro_batches", default="1,2,4,8,16,32", help="pairs of one forward pass")
    parser.add_argument("--most_tokens", type=int, default=32768, help="of one forward pass")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each, after one that is not timed")
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--zero_stage", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--attn_implementation", default="auto")
    parser.add_argument("--output", type=Path, default=Path("growth.json"), help="JSON; a .png beside it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    arguments = parse(argv)
    return exit_code(lambda: measure(arguments), kept="nothing was written")


def measure(arguments: argparse.Namespace) -> None:
    """Every combination once more than it is timed, the table, the JSON, the picture."""
    lengths = numbers("lengths", arguments.lengths)
    sizes = numbers("micro_batches", arguments.micro_batches)
    if min(lengths) < 8:
        raise InputError(f"--lengths {arguments.lengths}: a prompt and a response need 8 tokens")
    if arguments.repeats < 1:
        raise InputError(f"--repeats {arguments.repeats} must be at least 1")
    machine, rate = describe_machine(), matmul_rate()
    print(f"{machine}\nmatrix products: {rate / 1e9:.0f} GFLOP/s in fp32")
    with tempfile.TemporaryDirectory() as folder:
        step = make_step(arguments, Path(folder), max(lengths))
        found = []
        for length in lengths:
            for size in sizes:
                if size * (length + length // 2) <= arguments.most_tokens:
                    found.append(run(step, length, size, arguments.repeats))
    report(found, lengths, sizes, machine, arguments.output)


def make_step(arguments: argparse.Namespace, folder: Path, longest: int):
    """A function that trains on one list of comparisons, through the engine."""
    from general_preference.trainer.arguments import parse_arguments
    from general_preference.trainer.deepspeed_engine import DeepSpeedEngine
    from general_preference.trainer.objectives import batch_loss
    from scripts.train_rm_general_preference import make_model, resolve_preference

    make_tiny_model(
        folder / "base", hidden_size=arguments.hidden_size, num_layers=arguments.layers, num_heads=arguments.heads
    )
    flags = parse_arguments([
        f"--pretrain={folder / 'base'}", "--dataset=none", f"--max_len={longest}", "--micro_train_batch_size=1",
        f"--zero_stage={arguments.zero_stage}", f"--bf16={arguments.bf16}", "--is_general_preference",
        "--value_head_dim=6", "--add_prompt_head", f"--attn_implementation={arguments.attn_implementation}",
    ])  # fmt: skip
    engine = DeepSpeedEngine(flags.engine, flags.optimizer)
    model = make_model(flags, resolve_preference(flags), engine.config())
    engine.prepare(model, 10**6)
    collate = Collator(0, model.layout_on())

    def step(comparisons: list[dict]) -> None:
        engine.train_mode(True)
        batch = collate(comparisons).to(engine.device)
        losses = batch_loss(engine.forward(**batch.model_inputs()), batch, flags.loss)
        engine.backward(losses.total)
        engine.step()
        losses.total.item()  # waits for the device

    return step


def run(step, length: int, size: int, repeats: int) -> dict:
    """Seconds of `repeats` steps on `size` random pairs of `length` tokens."""
    generator = torch.Generator().manual_seed(0)
    half = length // 2

    def ids() -> list[int]:
        return torch.randint(10, 200, (half,), generator=generator).tolist()

    comparisons = [
        {
            "prompt_ids": ids(),
            "response_ids": [ids(), ids()],
            "first": [0],
            "second": [1],
            "label": [1.0],
            "margin": 0.0,
        }
        for _ in range(size)
    ]
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        step(comparisons)
        seconds.append(time.perf_counter() - began)
    tokens = size * 3 * half
    speed = tokens / statistics.median(seconds[1:])
    print(f"{length:5} tokens, micro-batch {size:2}: {speed:8.0f} unique tokens/s", flush=True)
    return {"length": length, "micro_batch": size, "tokens": tokens, "seconds": seconds[1:], "tokens_per_second": speed}


def report(found: list[dict], lengths: list[int], sizes: list[int], machine: str, output: Path) -> None:
    """The table, the JSON, the picture."""
    speeds = {(one["length"], one["micro_batch"]): one["tokens_per_second"] for one in found}
    rows = {
        str(length): {
            f"micro-batch {size}": f"{speeds[length, size]:.0f}" for size in sizes if (length, size) in speeds
        }
        for length in lengths
    }
    print(f"\nunique tokens per second\n{format_table(rows, 'tokens', None)}")
    replace_text(output, json.dumps({"machine": machine, "runs": found}, indent=2))
    picture = output.with_suffix(".png")
    print(f"\nResult: {output}" + (f"\nPicture: {picture}" if draw(speeds, lengths, sizes, picture) else ""))


def draw(speeds: dict[tuple[int, int], float], lengths: list[int], sizes: list[int], path: Path) -> bool:
    """Pairs and tokens per second over length, a line per micro-batch."""
    pyplot = load_pyplot()
    if pyplot is None:
        return False
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), constrained_layout=True)
    colors = pyplot.get_cmap("viridis")
    for number, size in enumerate(sizes):
        known = [length for length in lengths if (length, size) in speeds]
        look = {"label": f"micro-batch {size}", "color": colors(number / max(1, len(sizes) - 1))}
        left.plot(known, [speeds[length, size] / (1.5 * length) for length in known], "o-", **look)
        right.plot(known, [speeds[length, size] for length in known], "o-", **look)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.set_xlabel("tokens of prompt and one response")
        axis.grid(alpha=0.25)
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    left.set_ylabel("pairs per second")
    right.set(ylabel="unique tokens per second", ylim=(0, None))
    right.legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


if __name__ == "__main__":
    restart_with_cpu_settings()
    sys.exit(main())
