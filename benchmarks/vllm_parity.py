#!/usr/bin/env python3
"""A vLLM server and `RemotePreference` against `GPMPipeline` in this process: do they answer the same?

    VLLM_PYTHON=/path/to/python python benchmarks/vllm_parity.py MODEL EXPORT [EXPORT ...] [--responses 8]

MODEL is a trained model, each EXPORT a folder that scripts/export_model.py made of it, of either format. VLLM_PYTHON is
the interpreter of an environment with vLLM (default: this one), which may be another than the one that runs this. Each
EXPORT gets a server of its own, in fp32 and on a free port, which is stopped at the end. Printed are the largest
differences over all prompts; the exit code is 1 if one is above --tolerance.
"""

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, for its other scripts

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.machine import describe_machine
from benchmarks.ranking_throughput import WORDS
from general_preference import GPMPipeline, preference_probability
from general_preference.cli import exit_code, format_table
from general_preference.errors import InputError, RunError
from general_preference.inference.remote import RemotePreference
from general_preference.models.config import resolve

POSITIONS = 1024  # tokens of a sequence that the server makes room for


def main(argv: list[str] | None = None) -> int:
    """Serve, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="trained preference model: folder or hub name")
    parser.add_argument("exports", nargs="+", metavar="EXPORT", help="folder that was exported from it")
    parser.add_argument("--responses", type=int, default=8, help="responses to each of four prompts")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest difference that passes")
    parser.add_argument("--start_seconds", type=int, default=600, help="how long a server may take to start")
    arguments = parser.parse_args(argv)
    disable_progress_bar()
    return exit_code(lambda: compare(arguments), kept="nothing was written")


def compare(arguments: argparse.Namespace) -> None:
    """All exports; RunError if one is too far from the model."""
    if arguments.responses < 2:
        raise InputError(f"--responses {arguments.responses}: a comparison needs at least 2")
    rm = GPMPipeline(arguments.model, dtype=torch.float32, max_length=POSITIONS)
    print(f"{rm.preference.describe()} model on {rm.device} in {rm.model.dtype}; {describe_machine()}")
    table = {}
    for export in arguments.exports:
        with serving(export, arguments.start_seconds) as url:
            remote = RemotePreference(url, export, max_length=POSITIONS)
            began = time.perf_counter()
            found = differences(rm, remote, *texts(arguments.responses))
            seconds = time.perf_counter() - began
        table[f"{export} ({remote.server.api})"] = found
        print(f"{export}: compared in {seconds:.1f} s", flush=True)
    shown = {name: {key: f"{value:.1e}" for key, value in found.items()} for name, found in table.items()}
    print(f"\nLargest differences\n{format_table(shown, 'export (api)', None)}")
    worst = max(value for found in table.values() for value in found.values())
    if not worst <= arguments.tolerance:
        raise RunError(f"a difference of {worst:.1e} is above the tolerance of {arguments.tolerance:.1e}")


def texts(count: int) -> tuple[list, list]:
    """Four prompts, one of several turns and one long, and `count` responses of any length to each."""
    generator = random.Random(0)

    def some(most: int) -> str:
        return " ".join(generator.choice(WORDS) for _ in range(generator.randint(1, most)))

    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": some(20)},
        {"role": "assistant", "content": some(20)},
        {"role": "user", "content": some(20)},
    ]
    return [some(10), turns, "Écris « bonjour » 🙂", some(300)], [[some(60) for _ in range(count)] for _ in range(4)]


def differences(rm: GPMPipeline, remote: RemotePreference, prompts: list, responses: list) -> dict[str, float]:
    """The largest difference of everything that the two make of the same texts."""
    largest: dict[str, float] = {}
    for here, there in zip(rm.embed(prompts, responses), remote.embed(prompts, responses), strict=True):
        pairs = {"embedding": (here.embeddings, there.embeddings), "score": (here.scores(), there.scores())}
        if here.gate is not None:
            pairs["gate"] = here.gate, there.gate
        probabilities = (
            preference_probability(here.scores(), rm.tau),
            preference_probability(there.scores(), remote.tau),
        )
        for name, (one, other) in (pairs | {"probability": probabilities}).items():
            largest[name] = max(largest.get(name, 0.0), (one - other).abs().max().item())
    return largest


@contextlib.contextmanager
def serving(export: str, most_seconds: int) -> Iterator[str]:
    """The address of a vLLM server of this folder, which ends with the block, and with it whatever it started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    converted = "classify" if resolve(export, "modules.json") is None else "embed"
    command = [os.environ.get("VLLM_PYTHON", sys.executable), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", export, "--runner", "pooling", "--convert", converted, "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", str(POSITIONS), "--host", "127.0.0.1", "--port", str(port)]
    settings = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment = settings | {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        streams = {"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL}
        server = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        try:
            url, began = f"http://127.0.0.1:{port}", time.perf_counter()
            while not healthy(url):
                if server.poll() is not None or time.perf_counter() - began > most_seconds:
                    raise RunError(f"no server of {export} within {most_seconds} s: its log is above")
                time.sleep(1)
            print(f"{export}: a server after {time.perf_counter() - began:.0f} s", flush=True)
            yield url
        except RunError:
            log.seek(0)
            print(log.read()[-8000:], file=sys.stderr)
            raise
        finally:
            stop(server)


def healthy(url: str) -> bool:
    """Whether the server says so."""
    import httpx  # installed with the extra "remote"

    try:
        return httpx.get(f"{url}/health", timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return False


def stop(server: subprocess.Popen) -> None:
    """End the process group of the server: at its request, and otherwise at once."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=30)


if __name__ == "__main__":
    sys.exit(main())
