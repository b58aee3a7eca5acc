#!/usr/bin/env python3
"""One training step, side by side: this trainer, a padded two-sequence step, and TRL's RewardTrainer.

    python benchmarks/train_throughput.py [--dataset FILE] [--output RESULT.json] [--micro_batches 2,8,32]
    python benchmarks/train_throughput.py --responses 8 --global_batch 8 --micro_batches 1,4,8 --peer_micro_batches 4,16

All train the same random Llama on the same comparisons in the same order, a global batch per optimizer step, each in
processes of its own and at its own best micro-batch, by default all in the environment of this project's launchers
(--plain_peers gives it to this trainer alone). Comparisons longer than --max_len are left out beforehand: TRL skips
them, the others would cut them. Printed for each: comparisons and unique tokens per second, peak memory, and the share
of the arithmetic limit, 6 * non-embedding parameters * unique tokens (each prompt once) at the rate of large matrix
products that its own process shows before and after. Writes RESULT.json and a picture beside it.

With --responses K every prompt has K responses, of which all K (K - 1) / 2 pairs are compared: groups for this trainer,
that many pairs for the others. Prompts that have fewer are filled up with responses to other prompts, and the order of
the responses decides. --global_batch then counts prompts, and so does a micro-batch of this trainer; of the others it
counts pairs.

`regularized` is this trainer with --add_pretrain_loss; what it takes more is compared with its logits' arithmetic,
6 * hidden size * vocabulary per regularized token.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for scripts/

import torch

from benchmarks.machine import describe_machine, numbers
from benchmarks.training_steps import pairs_of_prompt, run_one
from general_preference.cli import exit_code, format_table
from general_preference.cpu_settings import CPU_SETTINGS
from general_preference.errors import InputError
from general_preference.files import replace_lines, replace_text
from general_preference.plots import load_pyplot
from scripts.make_tiny_model import CHAT_TEMPLATE, read_texts, train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TITLES = {
    "this": "this trainer",
    "regularized": "this, regularized",
    "padded": "padded pairs, eager",
    "trl": "TRL RewardTrainer",
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags; the last ones are for the processes that this script starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=str(ROOT / "data" / "mixed" / "train.jsonl"), help="comparisons")
    parser.add_argument("--output", type=Path, default=Path("train_throughput.json"), help="JSON; a .png beside it")
    parser.add_argument("--implementations", default="this,padded,trl", help=f"of {', '.join(TITLES)}")
    parser.add_argument("--micro_batches", default="2,8,32", help="tried for each; the fastest one is reported")
    parser.add_argument("--peer_micro_batches", help="tried for padded and trl; default --micro_batches")
    parser.add_argument("--global_batch", type=int, default=32, help="comparisons (--responses: prompts) per step")
    parser.add_argument(
        "--responses", type=int, help="K responses a prompt, all pairs compared; default the data's pairs"
    )
    parser.add_argument("--steps", type=int, default=2, help="timed optimizer steps of a run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each at its best micro-batch, taking turns")
    parser.add_argument("--max_len", type=int, default=512)
    parser.add_argument("--head", choices=["bt", "gpm"], default="bt", help="TRL knows bt alone")
    parser.add_argument("--plain_peers", action="store_true", help="run the others without the launchers' CPU settings")
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--intermediate_size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--key_value_heads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--zero_stage", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="all in bfloat16, the rate of matrix products too")
    parser.add_argument("--attn_implementation", default="auto", help="of this trainer")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="in this trainer and in TRL")
    parser.add_argument("--selective_checkpointing", action="store_true", help="in this trainer")
    parser.add_argument("--torch_compile", action="store_true", help="in this trainer")
    parser.add_argument("--use_liger_kernel", action="store_true", help="in this trainer and in TRL")
    parser.add_argument("--run", choices=list(TITLES), help=argparse.SUPPRESS)
    parser.add_argument("--micro_batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--backbone", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure all, or be one of the measured processes."""
    arguments = parse(argv)
    work = (lambda: run_one(arguments)) if arguments.run else (lambda: measure(arguments))
    return exit_code(work, kept="nothing was written")


def measure(arguments: argparse.Namespace) -> None:
    """Find each implementation's best micro-batch, run the best in turns, print, write."""
    names = arguments.implementations.split(",")
    if unknown := [name for name in names if name not in TITLES]:
        raise InputError(f"--implementations {unknown[0]} is none of {', '.join(TITLES)}")
    if "trl" in names and (find_spec("trl") is None or arguments.head != "bt"):
        print("without TRL: " + ("not installed (pip install trl)" if arguments.head == "bt" else "it knows bt alone"))
        names.remove("trl")
    own = numbers("micro_batches", arguments.micro_batches)
    peers = numbers("peer_micro_batches", arguments.peer_micro_batches or arguments.micro_batches)
    sizes = {name: own if name in ("this", "regularized") else peers for name in names}
    if arguments.responses is not None and arguments.responses < 2:
        raise InputError(f"--responses {arguments.responses} leaves nothing to compare: use at least 2")
    for name, least in {"global_batch": 1, "steps": 1, "rounds": 0}.items():
        if (value := getattr(arguments, name)) < least:
            raise InputError(f"--{name} {value} must be at least {least}")
    if arguments.output.suffix == ".png" or arguments.output.is_dir():
        raise InputError(f"--output {arguments.output} must be a file, such as result.json: the picture is beside it")
    for name, some in sizes.items():
        batch, what = step_size(arguments, name)
        if any(batch % size for size in some):
            raise InputError(
                f"a step of {TITLES[name]} has {batch} {what}, which must be a multiple of its micro-batches"
            )
    print(describe_machine())
    with tempfile.TemporaryDirectory() as folder:
        arguments.backbone = Path(folder) / "backbone"
        groups = Path(folder) / "groups.jsonl"
        write_groups(arguments.dataset, groups, arguments.responses)
        arguments.dataset = str(groups)
        make_backbone(arguments)
        leave_out_long(groups, arguments)
        runs = []
        best: dict[str, int] = {}
        for name in names:
            if name == "regularized" and "this" in best:  # or the micro-batch would be compared with the regularizer
                sizes[name] = [best["this"]]
            for size in sizes[name]:
                runs.append(start(arguments, name, size))
                print(row_text(runs[-1]), flush=True)
            best[name] = max((run for run in runs if run["name"] == name), key=speed)["micro_batch"]
        for _ in range(arguments.rounds):
            for name in names:
                runs.append(start(arguments, name, best[name]))
                print(row_text(runs[-1]), flush=True)
    report(arguments, names, best, runs)


def write_groups(dataset: str, file: Path, count: int | None) -> None:
    """The comparisons as groups: of one pair each, or of `count` responses of which all pairs are compared."""
    from general_preference.datasets.sources import load_source, parse_sources

    rows = [row for source in parse_sources(dataset) for row in load_source(source)[0]]
    groups = []
    if count is None:
        for row in rows:
            pairs = zip(row["first"], row["second"], strict=True)
            groups += [(row["prompt"], [row["responses"][side] for side in pair], [[0, 1]]) for pair in pairs]
    else:
        everything, start = [response for row in rows for response in row["responses"]], 0
        for row in rows:
            whole = row["responses"] + [everything[(start + n) % len(everything)] for n in range(2 * count)]
            start = (start + len(row["responses"])) % len(everything)
            responses = [one for number, one in enumerate(whole) if one not in whole[:number]]
            if len(responses) < count:
                raise InputError(f"--responses {count}: {dataset} has too few different responses for such groups")
            groups.append((row["prompt"], responses[:count], list(itertools.combinations(range(count), 2))))
    lines = (dict(zip(("prompt", "responses", "preferences"), group, strict=True)) for group in groups)
    replace_lines(file, map(json.dumps, lines))


def step_size(arguments: argparse.Namespace, name: str) -> tuple[int, str]:
    """How many of what, prompts or pairs, an implementation has in a step."""
    if name in ("this", "regularized"):
        return arguments.global_batch, "comparisons" if arguments.responses is None else "prompts"
    return arguments.global_batch * pairs_of_prompt(arguments), "pairs"


def leave_out_long(file: Path, arguments: argparse.Namespace) -> None:
    """Keep the groups of which nothing would be cut, with a token to spare for other renderings of the template."""
    from general_preference.datasets.tokenization import ComparisonTokenizer, load_tokenizer

    encoder = ComparisonTokenizer(load_tokenizer(str(arguments.backbone)), arguments.max_len - 1)
    lines = file.read_text(encoding="utf-8").splitlines()
    kept = []
    for line in lines:
        group = json.loads(line)
        row = encoder.encode([group["prompt"]], [group["responses"]])[0]
        if not (row["prompt_cut"] or row["response_cut"]):
            kept.append(line)
    replace_lines(file, kept)
    what = "pairs" if arguments.responses is None else f"prompts with {arguments.responses} responses"
    print(f"{len(kept)} {what}; {len(lines) - len(kept)} longer than {arguments.max_len} tokens left out")


def make_backbone(arguments: argparse.Namespace) -> None:
    """A random Llama in fp32, with a tokenizer made of the data's own text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(read_texts([arguments.dataset]), arguments.vocabulary)
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.key_value_heads,
        max_position_embeddings=max(2048, arguments.max_len),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).float().save_pretrained(arguments.backbone)
    tokenizer.save_pretrained(arguments.backbone)


def start(arguments: argparse.Namespace, name: str, micro_batch: int) -> dict:
    """One measured process; what it found."""
    given = {key: value for key, value in vars(arguments).items() if key not in ("run", "micro_batch")}
    flags = [f"--{key}={value}" for key, value in given.items() if value is not None and not isinstance(value, bool)]
    flags += [f"--{key}" for key, value in given.items() if value is True]
    command = [sys.executable, __file__, *flags, f"--run={name}", f"--micro_batch={micro_batch}"]
    tuned = name in ("this", "regularized") or not arguments.plain_peers
    environment = os.environ | (CPU_SETTINGS if tuned and not torch.cuda.is_available() else {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        raise InputError(f"{TITLES[name]}, micro-batch {micro_batch}: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def speed(run: dict) -> float:
    """Comparisons per second over the timed steps."""
    return run["comparisons"] / run["seconds"]


def share_of_limit(run: dict) -> float:
    """Unique tokens' arithmetic over what the machine could have done in that time."""
    return 6 * run["parameters"] * run["unique_tokens"] / run["seconds"] / run["matmul_flops"]


def row_text(run: dict) -> str:
    """One line about one measured process."""
    return (
        f"{TITLES[run['name']]:20} micro-batch {run['micro_batch']:2}: {speed(run):6.2f} comparisons/s, "
        f"{share_of_limit(run):.2f} of the limit "
        f"({run['matmul_flops'] / 1e9:.0f} GFLOP/s), peak {run['peak_bytes'] / 2**30:.2f} GiB, "
        f"first loss {run['losses'][0]:.6f}"
    )


def regularizer_text(plain: list[dict], regularized: list[dict], arguments: argparse.Namespace, rate: float) -> str:
    """What the regularizer takes more, in time over its logits' arithmetic, and in memory."""
    extra = statistics.median(run["seconds"] for run in regularized) - statistics.median(
        run["seconds"] for run in plain
    )
    products = 6 * arguments.hidden_size * arguments.vocabulary * regularized[0]["chosen_tokens"] / rate
    memory = max(run["peak_bytes"] for run in regularized) / max(run["peak_bytes"] for run in plain) - 1
    return (
        f"regularizer: {extra:.2f} s more, {extra / products:.2f} times the arithmetic of its logits "
        f"({products:.2f} s); {100 * memory:+.0f} % peak memory"
    )


def report(arguments: argparse.Namespace, names: list[str], best: dict[str, int], runs: list[dict]):
    """The table, the JSON, the picture."""
    rate = statistics.median(run["matmul_flops"] for run in runs)
    chosen = {name: [run for run in runs if (run["name"], run["micro_batch"]) == (name, best[name])] for name in names}
    middle = {name: statistics.median(map(speed, some)) for name, some in chosen.items()}
    rows = {}
    for name, some in chosen.items():
        tokens = statistics.median(run["unique_tokens"] / run["seconds"] for run in some)
        rows[TITLES[name]] = {
            "micro-batch": best[name],
            "comparisons/s": f"{middle[name]:.2f}",
            "unique tokens/s": f"{tokens:.0f}",
            "of the limit": f"{statistics.median(share_of_limit(run) for run in some):.2f}",
            "peak GiB": f"{max(run['peak_bytes'] for run in some) / 2**30:.2f}",
            "this / it": f"{middle['this'] / middle[name]:.2f}" if "this" in middle else "-",
        }
    print(f"\n{format_table(rows, '', None)}")
    first = {name: some[0]["losses"][0] for name, some in chosen.items()}
    if {"this", "regularized"} <= chosen.keys():
        print("\n" + regularizer_text(chosen["this"], chosen["regularized"], arguments, rate))
    if {"this", "padded"} <= first.keys():
        print(f"\nloss of the first step, this and padded: difference {abs(first['this'] - first['padded']):.1e}")
    settings = {key: str(value) for key, value in vars(arguments).items() if key not in ("run", "micro_batch")}
    found = {"machine": describe_machine(), "matmul_flops": rate, "settings": settings, "best": best, "runs": runs}
    packages = {name: version(name) for name in ("torch", "transformers", "deepspeed") + (("trl",) * ("trl" in names))}
    replace_text(arguments.output, json.dumps(found | {"packages": packages}, indent=2))
    picture = arguments.output.with_suffix(".png")
    print(f"\nResult: {arguments.output}" + (f"\nPicture: {picture}" if draw(runs, rate, picture) else ""))


def draw(runs: list[dict], rate: float, path: Path) -> bool:
    """Speed over micro-batch, and the limit."""
    pyplot = load_pyplot()
    if pyplot is None:
        return False
    figure, axis = pyplot.subplots(figsize=(7, 4.2), constrained_layout=True)
    for name in dict.fromkeys(run["name"] for run in runs):
        sizes = sorted({run["pairs_at_once"] for run in runs if run["name"] == name})
        found = [[speed(run) for run in runs if (run["name"], run["pairs_at_once"]) == (name, size)] for size in sizes]
        axis.plot(sizes, [statistics.median(some) for some in found], "o-", label=TITLES[name])
    one = runs[0]
    limit = rate * one["comparisons"] / (6 * one["parameters"] * one["unique_tokens"])
    axis.axhline(limit, color="0.4", ls="--", lw=1, label="arithmetic limit")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="comparisons in a micro-batch", ylabel="comparisons per second", ylim=(0, 1.1 * limit))
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


if __name__ == "__main__":
    sys.exit(main())
