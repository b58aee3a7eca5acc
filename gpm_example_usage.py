#!/usr/bin/env python3
"""Use a trained preference model: the paper's example, and the shorter way. Under a minute on a CPU.

    python gpm_example_usage.py                                                     no download
    python gpm_example_usage.py general-preference/GPM-Llama-3.1-8B-Instruct        published weights
    python gpm_example_usage.py path/to/your/run

Without an argument it takes the model that scripts/run_train_rm_general_preference_single.sh has trained, or, if there
is none yet, makes a tiny untrained one: its numbers mean nothing, but everything runs.
"""

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from general_preference import GPMPipeline, generate_high_dim_result_with_prompt, get_reward_model
from general_preference.cli import exit_code
from general_preference.datasets.tokenization import load_tokenizer
from general_preference.inference import ranking

ROOT = Path(__file__).resolve().parent
TRAINED = ROOT / "checkpoint" / "rm-tiny"


def paper_example(rm: GPMPipeline) -> None:
    """Embed two responses, then compare the embeddings: one forward pass each, however often they are compared."""
    prompt_text = "Describe the importance of reading books in today's digital age."
    response1 = "Books remain crucial in the digital era, offering in-depth knowledge and fostering critical thinking."
    response2 = "Books are still useful for learning new things. They help you relax."
    context1 = [{"role": "user", "content": prompt_text}, {"role": "assistant", "content": response1}]
    context2 = [{"role": "user", "content": prompt_text}, {"role": "assistant", "content": response2}]

    if rm.add_prompt_head:
        reward1, prompt_hidden_state = rm([context1], return_prompt=True)
    else:
        reward1, prompt_hidden_state = rm([context1]), None
    reward2 = rm([context2])
    result = generate_high_dim_result_with_prompt(rm.model, rm.value_head_dim, reward1, reward2, prompt_hidden_state)
    print("reward1", reward1.tolist())
    print("reward2", reward2.tolist())
    print("score of 1 over 2", result.float().cpu().detach().numpy().tolist())


def modern_example(rm: GPMPipeline) -> None:
    """Compare, rank, and look for cycles."""
    with (ROOT / "data" / "cyclic" / "test.jsonl").open(encoding="utf-8") as lines:
        group = next(record for record in map(json.loads, lines) if len(record["responses"]) == 3)
    prompt, responses = group["prompt"], group["responses"]
    print("\nprompt:", prompt)
    for index, response in enumerate(responses):
        print(f"  {index}: {response}")
    print("stated: " + ", ".join(f"{winner} over {loser}" for winner, loser, *_ in group["preferences"]))

    print(f"P(0 preferred to 1) = {rm.compare(prompt, responses[0], responses[1]):.3f}")
    scores = rm.score_matrix(prompt, responses)
    probabilities = rm.preference_matrix(prompt, responses)
    print("P(row preferred to column):")
    print("\n".join("  " + "  ".join(f"{value:.3f}" for value in row) for row in probabilities.tolist()))
    for method, rate in ranking.METHODS.items():
        print(
            f"rank by {method:<9}",
            rm.rank(prompt, responses, method),
            [round(v, 3) for v in rate(probabilities).tolist()],
        )
    print("cycles found:", ranking.cycles(probabilities))
    print(f"cyclic share of the scores: {ranking.hodge(scores).cyclic_share:.3f}")

    chat = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": prompt},
    ]
    print("best of three after a longer chat:", responses[rm.rank(chat, responses)[0]])


def make_model(folder: Path) -> str:
    """A tiny GPM with random weights in `folder`."""
    from scripts.make_tiny_model import make_tiny_model

    base, made = folder / "base", folder / "model"
    make_tiny_model(base)
    model = get_reward_model(str(base), bf16=False, is_general_preference=True, value_head_dim=4, add_prompt_head=True)
    model.save_pretrained(str(made))
    load_tokenizer(str(base)).save_pretrained(str(made))
    return str(made)


def main() -> int:
    """Choose the model and run both examples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or hub name of a trained preference model")
    model = parser.parse_args().model
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        if model is None and (TRAINED / "config.json").is_file():
            model = str(TRAINED)
        elif model is None:
            print("No trained model here yet: making an untrained one, so the numbers mean nothing.")
            model = make_model(Path(folder))

        def show() -> None:
            rm = GPMPipeline(model)  # value_head_dim=6 and the like may be added: they are checked
            paper_example(rm)
            modern_example(rm)

        return exit_code(show, kept="nothing was written")


if __name__ == "__main__":
    sys.exit(main())
