#!/usr/bin/env python3
"""Ranking K responses behind one long prompt: `GPMPipeline` against padded forward passes and a model of pairs.

    python benchmarks/ranking_throughput.py [MODEL] [--responses 2,4,8,16,32,64] [--output RESULT.json]

For every K, in one process and turn by turn, on the same token ids: the pipeline's matrix of preferences; the plain
backbone on every response with its prompt, padded to the longest in batches of --batch (a single one has no padding
and needs no mask, which is fastest on CPUs); and what a model that reads both responses of a pair
would need, K (K - 1) / 2 forward passes of the prompt with two responses, of which one is measured and counted so
often. The ratio of the times is what is reported. Without MODEL a random Llama is made (8 layers, hidden size 384).
About two minutes on two idle cores. Writes RESULT.json and a picture beside it.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads slow each other down
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for scripts/

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.machine import describe_machine, numbers
from general_preference import GPMPipeline, get_reward_model, preference_matrix, preference_probability
from general_preference.cli import exit_code, format_table
from general_preference.datasets.tokenization import load_tokenizer
from general_preference.errors import InputError
from general_preference.files import replace_text
from general_preference.models.score import normalize_embedding
from general_preference.plots import load_pyplot
from scripts.make_tiny_model import make_tiny_model

WORDS = ("rock", "paper", "scissors", "answer", "wins", "always", "never", "you", "choose", "water", "fire", "wood")


def text_of(tokenizer, tokens: int, generator: random.Random) -> str:
    """Random words that make `tokens` tokens, or a few less."""
    words = [generator.choice(WORDS) for _ in range(tokens)]
    while len(tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]) > tokens:
        words.pop()
    return " ".join(words)


@torch.no_grad()
def by_padding(rm: GPMPipeline, row: dict, batch: int) -> torch.Tensor:
    """(K, K) probabilities from the plain backbone on every response with its own copy of the prompt."""
    prompt, responses = row["prompt_ids"], row["response_ids"]
    backbone, states = rm.model.language_model.base_model, []
    for start in range(0, len(responses), batch):
        some = [prompt + response for response in responses[start : start + batch]]
        longest = max(map(len, some))
        ids = torch.tensor([one + [0] * (longest - len(one)) for one in some], device=rm.device)
        lengths = torch.tensor([len(one) for one in some], device=rm.device)
        padded = len(set(map(len, some))) > 1
        mask = (torch.arange(longest, device=rm.device) < lengths[:, None]).long() if padded else None
        hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        states.append(hidden[torch.arange(len(some)), lengths - 1])
        if start == 0 and rm.add_prompt_head:
            gate = rm.model.gate(hidden[0, len(prompt) - 1]).cpu()
    embeddings = rm.model.value_head(torch.cat(states)).cpu()
    embeddings = normalize_embedding(embeddings) if rm.preference.normalize else embeddings
    return preference_probability(preference_matrix(embeddings, gate if rm.add_prompt_head else None), rm.tau)


@torch.no_grad()
def one_pair(rm: GPMPipeline, row: dict) -> torch.Tensor:
    """(hidden,) last hidden state of the prompt with two of its responses: what a model of pairs reads for one pair."""
    ids = torch.tensor([row["prompt_ids"] + row["response_ids"][0] + row["response_ids"][-1]], device=rm.device)
    return rm.model.language_model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1].cpu()


def timed(work) -> tuple[float, torch.Tensor]:
    """Seconds that `work` took, and its result (which is on the CPU, so the device is done)."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def random_model(folder: Path) -> str:
    """A Llama of 8 layers and hidden size 384 with a random GPM head of 3 gated planes."""
    make_tiny_model(folder / "base", hidden_size=384, num_layers=8, num_heads=6)
    base = str(folder / "base")
    model = get_reward_model(base, bf16=False, is_general_preference=True, value_head_dim=6, add_prompt_head=True)
    model.save_pretrained(str(folder / "model"))
    load_tokenizer(base).save_pretrained(str(folder / "model"))
    return str(folder / "model")


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="trained preference model: folder or hub name")
    parser.add_argument("--responses", default="2,4,8,16,32,64", help="numbers K of responses")
    parser.add_argument("--prompt_tokens", type=int, default=600)
    parser.add_argument("--response_tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each, after one that is not timed")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a padded batch")
    parser.add_argument("--output", type=Path, default=Path("ranking_throughput.json"), help="JSON; a .png beside it")
    arguments = parser.parse_args(argv)
    disable_progress_bar()
    return exit_code(lambda: measure(arguments), kept="nothing was written")


def measure(arguments: argparse.Namespace) -> None:
    """All K, the table, the JSON, the picture."""
    if min(arguments.repeats, arguments.prompt_tokens, arguments.response_tokens, arguments.batch) < 1:
        raise InputError("--repeats, --prompt_tokens, --response_tokens and --batch must be at least 1")
    counts = numbers("responses", arguments.responses)
    if min(counts) < 2:
        raise InputError(f"--responses {arguments.responses}: a ranking needs at least 2")
    with tempfile.TemporaryDirectory() as folder:
        rm = GPMPipeline(arguments.model or random_model(Path(folder)), truncation=False)
    generator = random.Random(0)
    prompt = text_of(rm.tokenizer, arguments.prompt_tokens, generator)
    texts = [text_of(rm.tokenizer, arguments.response_tokens, generator) for _ in range(max(counts))]
    machine = f"{rm.model.config.model_type} on {rm.device} in {rm.model.dtype}; {describe_machine()}"
    print(f"{machine}\nprompt of about {arguments.prompt_tokens} tokens, responses of {arguments.response_tokens}")
    found = [measure_one(rm, prompt, texts[:count], arguments.repeats, arguments.batch) for count in counts]
    report(found, machine, arguments)


def measure_one(rm: GPMPipeline, prompt: str, texts: list[str], repeats: int, batch: int) -> dict:
    """Seconds of the three ways for one K, each a list of `repeats`, and how far their matrices are apart."""
    row = rm.encoder.encode(
        [[{"role": "user", "content": prompt}]], [[[{"role": "assistant", "content": text}] for text in texts]]
    )[0]
    seconds: dict[str, list[float]] = {"shared": [], "padded": [], "pair": []}
    for repeat in range(repeats + 1):
        shared, matrix = timed(lambda: rm.preference_matrix(prompt, texts))
        padded, expected = timed(lambda: by_padding(rm, row, batch))
        pair, _ = timed(lambda: one_pair(rm, row))
        if repeat:
            for name, value in zip(seconds, (shared, padded, pair), strict=True):
                seconds[name].append(value)
    lengths = [len(ids) for ids in row["response_ids"]]
    return {
        "responses": len(texts),
        "prompt_tokens": len(row["prompt_ids"]),
        "response_tokens": [min(lengths), max(lengths)],
        "pairs": len(texts) * (len(texts) - 1) // 2,
        "seconds": seconds,
        "largest_difference": (matrix - expected).abs().max().item(),
    }


def ratios(one: dict) -> dict[str, float]:
    """How many times the time of the pipeline the others need, medians of ratios turn by turn."""
    seconds = one["seconds"]
    padded = [slow / fast for slow, fast in zip(seconds["padded"], seconds["shared"], strict=True)]
    pairs = [one["pairs"] * slow / fast for slow, fast in zip(seconds["pair"], seconds["shared"], strict=True)]
    return {"padded": statistics.median(padded), "pairs": statistics.median(pairs)}


def report(found: list[dict], machine: str, arguments: argparse.Namespace) -> None:
    """The table, the JSON, the picture."""
    rows = {}
    for one in found:
        middle = {name: statistics.median(values) for name, values in one["seconds"].items()}
        by = ratios(one)
        rows[str(one["responses"])] = {
            "shared prompt, s": f"{middle['shared']:.3f}",
            "each with its prompt, s": f"{middle['padded']:.3f}",
            "its ratio": f"{by['padded']:.2f}",
            "model of pairs, s (counted)": f"{one['pairs'] * middle['pair']:.3f}",
            "ratio": f"{by['pairs']:.1f}",
            "difference": f"{one['largest_difference']:.1e}",
        }
    print(f"\n{format_table(rows, 'K', None)}")
    if any(max(values) > 2 * min(values) for one in found for values in one["seconds"].values() if min(values) > 0.05):
        print("the machine was busy with something else: these timings say little")
    replace_text(arguments.output, json.dumps({"machine": machine, "runs": found}, indent=2))
    picture = arguments.output.with_suffix(".png")
    print(f"\nResult: {arguments.output}" + (f"\nPicture: {picture}" if draw(found, picture) else ""))


def draw(found: list[dict], path: Path) -> bool:
    """Seconds over K for the three ways."""
    pyplot = load_pyplot()
    if pyplot is None:
        return False
    figure, axis = pyplot.subplots(figsize=(6.4, 4.2), constrained_layout=True)
    counts = [one["responses"] for one in found]
    titles = {
        "shared": "shared prompt (this)",
        "padded": "each with its prompt, padded",
        "pair": "a pass per pair, counted",
    }
    for name, title in titles.items():
        times = [statistics.median(one["seconds"][name]) * (one["pairs"] if name == "pair" else 1) for one in found]
        axis.plot(counts, times, "o-", label=title)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set(xlabel="responses K to one prompt", ylabel="seconds for all preferences")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True


if __name__ == "__main__":
    sys.exit(main())
