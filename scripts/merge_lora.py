#!/usr/bin/env python3
"""Fold a LoRA run's adapter into its base model: a full checkpoint with heads, tokenizer and card, which needs no peft.

    python scripts/merge_lora.py ADAPTER OUTPUT [--dtype auto|float32|bfloat16|float16]

Merging runs in fp32; an adapter trained with --load_in_4bit is merged into the unquantized base. Exit codes: 0 done, 1
failed, 2 unusable input, 130 interrupted.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch

from general_preference.cli import exit_code, quiet_other_libraries
from general_preference.datasets.tokenization import load_tokenizer
from general_preference.errors import InputError
from general_preference.models.config import ADAPTER_CONFIG, adapter_base, load_config, resolve
from general_preference.models.loading import merge_adapter
from general_preference.models.reward_model import load_reward_model


def main(argv: list[str] | None = None) -> int:
    """Parse, merge, and turn what can go wrong into one line and an exit code."""
    parser = argparse.ArgumentParser(description="Fold a LoRA adapter with its preference heads into its base model.")
    parser.add_argument("adapter", help="folder or hub name of the adapter: what --save_path named with --lora_rank")
    parser.add_argument("output", type=Path, help="folder of the full model; must not hold anything yet")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
                        help="in which the backbone is saved; auto: the base model's own")  # fmt: skip
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base model")
    arguments = parser.parse_args(argv)
    quiet_other_libraries()
    return exit_code(lambda: merge(**vars(arguments)), kept="the adapter is as it was, and the output was not made")


def merge(adapter: str, output: Path, dtype: str = "auto", trust_remote_code: bool = False) -> None:
    """Write the merged model to `output` at once; InputError without adapter or base, or if `output` is not empty."""
    load_config(adapter, trust_remote_code)
    base = adapter_base(adapter)
    if base is None:
        raise InputError(f"{adapter} is not an adapter: it has no {ADAPTER_CONFIG}. A full model needs no merging")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} exists and is not empty: choose another folder, or remove it")
    output = output.resolve()
    model = load_reward_model(adapter, dtype=torch.float32, trust_remote_code=trust_remote_code)
    of_tokenizer = adapter if resolve(adapter, "tokenizer_config.json") else base
    tokenizer = load_tokenizer(of_tokenizer, trust_remote_code=trust_remote_code)
    merge_adapter(model)
    stored = getattr(load_config(base, trust_remote_code), "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    model.backbone.to(stored or torch.float32)
    model.card.base_model = model.card.base_model or base

    temporary = output.with_name(f".writing_{output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(str(temporary))
    tokenizer.save_pretrained(str(temporary))
    if (card := resolve(adapter, "README.md")) is not None:  # head, data and results are those of the merged model too
        shutil.copyfile(card, temporary / "README.md")
    if output.is_dir():
        output.rmdir()
    temporary.rename(output)
    print(f"{adapter} on {base}: {output} ({stored or torch.float32})")


if __name__ == "__main__":
    sys.exit(main())
