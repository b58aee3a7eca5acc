"""Run by generate_responses.py with the interpreter of an environment that has vLLM, and nothing of this package.

    python generate_with_vllm.py SETTINGS.json REQUESTS.jsonl OUTPUT.jsonl

Reads settings {"engine": arguments of vllm.LLM, "sampling": {...}, "chunk"} and an object {"index", "prompt_ids",
"seed"} a line; writes {"index", "response_ids"} a line for each, `chunk` of them at a time.
"""

import argparse
import json
import sys


def main() -> int:
    """Generate with vLLM what the files on the command line ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("settings", "requests", "output"):
        parser.add_argument(name)
    arguments = parser.parse_args()
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        print(f"error: {sys.executable} has no vLLM ({error}): set GENERATE_PYTHON to one that has", file=sys.stderr)
        return 2
    with open(arguments.settings, encoding="utf-8") as file:
        settings = json.load(file)
    with open(arguments.requests, encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    # "vllm": without the folder's own defaults, such as a repetition penalty.
    model = LLM(**{"generation_config": "vllm"} | settings["engine"])
    sampling, chunk = settings["sampling"], settings["chunk"]
    options = {"n": sampling["samples"], "temperature": sampling["temperature"], "top_p": sampling["top_p"]}
    options |= {"max_tokens": sampling["max_new_tokens"], "stop_token_ids": sampling["stop_ids"], "detokenize": False}
    with open(arguments.output, "w", encoding="utf-8") as output:
        for start in range(0, len(rows), chunk):
            some = rows[start : start + chunk]
            prompts = [{"prompt_token_ids": row["prompt_ids"]} for row in some]
            asked = [SamplingParams(seed=row["seed"], **options) for row in some]
            for row, found in zip(some, model.generate(prompts, asked, use_tqdm=False), strict=True):
                responses = sorted(found.outputs, key=lambda one: one.index)
                ids = [list(one.token_ids) for one in responses]
                output.write(json.dumps({"index": row["index"], "response_ids": ids}) + "\n")
            output.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
