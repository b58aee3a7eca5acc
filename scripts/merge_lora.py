#!/usr/bin/env python3
"""Fold a LoRA adapter into its base model: a full checkpoint with heads, tokenizer and card, which needs no peft.

    python scripts/merge_lora.py ADAPTER OUTPUT [--dtype auto|float32|bfloat16|float16] [--skip_finished]

An adapter without preference heads, as supervised fine-tuning leaves it, gives a language model. Merging runs in fp32;
an adapter trained with --load_in_4bit is merged into the unquantized base. Exit codes: 0 done, 1 failed, 2 unusable
input, 130 interrupted.
"""

import argparse
import os
import sys
from pathlib import Path

from general_preference.cli import exit_code, quiet_other_libraries
from general_preference.files import read_object
from general_preference.models.config import MERGED_FROM, weights_digest
from general_preference.models.merging import merge_into_folder


def main(argv: list[str] | None = None) -> int:
    """Parse, merge, and turn what can go wrong into one line and an exit code."""
    parser = argparse.ArgumentParser(description="Fold a LoRA adapter into its base model.")
    parser.add_argument("adapter", help="folder or hub name of the adapter, such as --save_path of a LoRA run")
    parser.add_argument("output", type=Path, help="folder of the full model; must not hold anything yet")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
                        help="in which the backbone is saved; auto: the base model's own")  # fmt: skip
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base model")
    parser.add_argument("--skip_finished", action="store_true", help="do nothing where output is of this adapter")
    arguments = parser.parse_args(argv)
    quiet_other_libraries()
    return exit_code(lambda: merge(**vars(arguments)), kept="the adapter is as it was, and the output was not made")


def merge(
    adapter: str, output: Path, dtype: str = "auto", trust_remote_code: bool = False, skip_finished: bool = False
) -> None:
    """See `merge_into_folder`."""
    adapter, output = os.path.expanduser(adapter), output.expanduser().resolve()
    made_of = read_object(output / MERGED_FROM).get("weights")
    if skip_finished and made_of is not None and made_of == weights_digest(adapter):
        print(f"{output} is finished")
        return
    base, stored = merge_into_folder(adapter, output, dtype, trust_remote_code)
    print(f"{adapter} on {base}: {output} ({stored})")


if __name__ == "__main__":
    sys.exit(main())
