#!/usr/bin/env python3
"""Write a trained model as a folder that inference servers read; its README.md says how to serve and use it.

    python scripts/export_model.py MODEL OUT --format sequence_classification    # transformers, vLLM, SGLang
    python scripts/export_model.py MODEL OUT --format sentence_transformers      # sentence-transformers, vLLM

MODEL is whatever GPMPipeline loads; a LoRA adapter is merged. Exit codes: 0 done, 1 failed, 2 unusable input,
130 interrupted.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # importing takes seconds, in which Ctrl-C should print no traceback

from general_preference.cli import exit_code, quiet_other_libraries
from general_preference.inference.export import FORMATS, export_model


def main(argv: list[str] | None = None) -> int:
    """Parse, export, and turn what can go wrong into one line and an exit code."""
    parser = argparse.ArgumentParser(description="Write a trained model as a folder that inference servers read.")
    parser.add_argument("model", help="folder or hub name of a trained model: full, sharded or a LoRA adapter")
    parser.add_argument("output", type=Path, help="folder to write; must not hold anything yet")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what reads the folder")
    arguments = parser.parse_args(argv)
    quiet_other_libraries()
    return exit_code(lambda: export(**vars(arguments)), kept="the model is as it was, and the output was not made")


def export(model: str, output: Path, format: str) -> None:
    """See `export_model`."""
    preference, architecture = export_model(os.path.expanduser(model), output.expanduser().resolve(), format)
    offset = preference.reward_offset
    note = f"; rewards lack their constant {offset:+.6g}, on which scores do not depend" if offset else ""
    print(f"{model} ({preference.describe()}): {output} ({format}, {architecture}){note}")


if __name__ == "__main__":
    sys.exit(main())
