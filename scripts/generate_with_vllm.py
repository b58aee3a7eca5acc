"""Run by generate_responses.py with the interpreter of an environment that has vLLM, and nothing of this package.

Reads a JSON object {"index", "prompt_ids", "seed"} a line, writes {"index", "response_ids"} a line for each.
"""

import argparse
import json
import sys


def main() -> int:
    """Generate with vLLM what the command line asks for, a chunk of prompts at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "requests", "output", "dtype"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("samples", "max_new_tokens", "chunk"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("temperature", "top_p"):
        parser.add_argument(f"--{name}", type=float, required=True)
    parser.add_argument("--stop_ids", type=int, nargs="+", required=True)
    parser.add_argument("--options", type=json.loads, default={}, help="more arguments of vllm.LLM")
    arguments = parser.parse_args()
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        print(f"error: {sys.executable} has no vLLM ({error}): set GENERATE_PYTHON to one that has", file=sys.stderr)
        return 2
    # "vllm": without the folder's own defaults, such as a repetition penalty.
    options = {"generation_config": "vllm", "dtype": arguments.dtype} | arguments.options
    model = LLM(model=arguments.model, **options)
    with open(arguments.requests, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    with open(arguments.output, "w", encoding="utf-8") as output:
        for start in range(0, len(rows), arguments.chunk):
            some = rows[start : start + arguments.chunk]
            prompts = [{"prompt_token_ids": row["prompt_ids"]} for row in some]
            settings = [
                SamplingParams(
                    n=arguments.samples,
                    temperature=arguments.temperature,
                    top_p=arguments.top_p,
                    max_tokens=arguments.max_new_tokens,
                    stop_token_ids=arguments.stop_ids,
                    seed=row["seed"],
                    detokenize=False,
                )
                for row in some
            ]
            for row, found in zip(some, model.generate(prompts, settings, use_tqdm=False), strict=True):
                responses = sorted(found.outputs, key=lambda one: one.index)
                ids = [list(one.token_ids) for one in responses]
                output.write(json.dumps({"index": row["index"], "response_ids": ids}) + "\n")
            output.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
