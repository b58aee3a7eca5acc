#!/usr/bin/env python3
"""Ranking K responses behind one long prompt: `GPMPipeline.rank` against one padded forward pass per response.

    python benchmarks/rank_responses.py [MODEL] [--responses 16] [--prompt_tokens 600] [--response_tokens 100]

Both run in one process, turn by turn, on the same token ids; the ratio of their times is what is reported. Without
MODEL a random Llama is made (8 layers, hidden size 384). About a minute on two idle cores.
"""

import argparse
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

from general_preference import GPMPipeline, get_reward_model, preference_matrix, preference_probability
from general_preference.command_line import exit_code
from general_preference.datasets.tokenization import load_tokenizer
from general_preference.models.score import normalize_embedding
from scripts.make_tiny_model import make_tiny_model

WORDS = ("rock", "paper", "scissors", "answer", "wins", "always", "never", "you", "choose", "water", "fire", "wood")


def text_of(tokenizer, tokens: int, generator: random.Random) -> str:
    """Random words that make `tokens` tokens, or a few less."""
    words = [generator.choice(WORDS) for _ in range(tokens)]
    while len(tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]) > tokens:
        words.pop()
    return " ".join(words)


@torch.no_grad()
def one_by_one(rm: GPMPipeline, row: dict) -> torch.Tensor:
    """(K, K) probabilities from one forward of the plain backbone per response, all padded to the longest."""
    prompt, responses = row["prompt_ids"], row["response_ids"]
    length = len(prompt) + max(map(len, responses))
    embeddings, gate = [], None
    for response in responses:
        ids = prompt + response
        padded = torch.tensor([ids + [0] * (length - len(ids))], device=rm.device)
        mask = (torch.arange(length, device=rm.device) < len(ids)).long()[None]
        backbone = rm.model.language_model.base_model
        hidden = backbone(input_ids=padded, attention_mask=mask, use_cache=False).last_hidden_state[0]
        embeddings.append(rm.model.value_head(hidden[len(ids) - 1]))
        if rm.add_prompt_head and gate is None:
            gate = rm.model.gate(hidden[len(prompt) - 1]).cpu()
    stacked = torch.stack(embeddings).cpu()
    stacked = normalize_embedding(stacked) if rm.preference.normalize else stacked
    return preference_probability(preference_matrix(stacked, gate), rm.tau)


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


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="trained preference model: folder or hub name")
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--prompt_tokens", type=int, default=600)
    parser.add_argument("--response_tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each, after one that is not timed")
    arguments = parser.parse_args()
    if min(arguments.responses, arguments.repeats, arguments.prompt_tokens, arguments.response_tokens) < 1:
        parser.error("every number must be at least 1")
    disable_progress_bar()
    return exit_code(lambda: measure(arguments), kept="nothing was written")


def measure(arguments: argparse.Namespace) -> None:
    """Time both ways, turn by turn, and print."""
    with tempfile.TemporaryDirectory() as folder:
        rm = GPMPipeline(arguments.model or random_model(Path(folder)), truncation=False)
    generator = random.Random(0)
    prompt = text_of(rm.tokenizer, arguments.prompt_tokens, generator)
    responses = [text_of(rm.tokenizer, arguments.response_tokens, generator) for _ in range(arguments.responses)]
    row = rm.encoder.encode(
        [[{"role": "user", "content": prompt}]], [[[{"role": "assistant", "content": text}] for text in responses]]
    )[0]
    lengths = [len(ids) for ids in row["response_ids"]]
    print(f"{rm.model.config.model_type} on {rm.device}, {rm.model.dtype}: prompt of {len(row['prompt_ids'])} tokens, "
          f"{len(lengths)} responses of {min(lengths)} to {max(lengths)}")  # fmt: skip
    shared, separate = [], []
    for repeat in range(arguments.repeats + 1):
        seconds, matrix = timed(lambda: rm.preference_matrix(prompt, responses))
        baseline, expected = timed(lambda: one_by_one(rm, row))
        if repeat:
            shared.append(seconds)
            separate.append(baseline)
    ratios = [slow / fast for slow, fast in zip(separate, shared, strict=True)]
    print(f"shared prompt      {statistics.median(shared):8.3f} s, median of {len(shared)}")
    print(f"one by one, padded {statistics.median(separate):8.3f} s")
    print(f"ratio, turn by turn{statistics.median(ratios):8.2f}   (from {min(ratios):.2f} to {max(ratios):.2f})")
    if max(ratios) > 2 * min(ratios):
        print("the machine was busy with something else: these timings say little")
    print(f"largest difference of the two matrices {(matrix - expected).abs().max().item():.1e}")


if __name__ == "__main__":
    sys.exit(main())
