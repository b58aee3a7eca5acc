#!/usr/bin/env python3
"""The preference server under load: many clients at once against the same requests one at a time.

    python benchmarks/serving.py [MODEL] [--requests 2000] [--clients 64] [--responses 8] [--output RESULT.json]

Starts a server, asks it for comparisons of K responses from as many clients, then for a part of the same requests by
one client, and compares every answer with the pipeline's. Reports requests per second and their ratio, the median and
the 99th percentile of the latency, calls of the model, and the memory of the server's processes before and after.
Without MODEL a tiny random one, for which the server's own work is what is measured. Writes RESULT.json.
"""

import argparse
import asyncio
import json
import os
import random
import re
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout, for scripts/

import httpx
import torch

from benchmarks.machine import describe_machine
from general_preference import GPMPipeline, get_reward_model
from general_preference.cli import exit_code
from general_preference.datasets.tokenization import load_tokenizer
from general_preference.errors import RunError
from general_preference.files import replace_text
from general_preference.models.config import PreferenceConfig
from scripts.make_tiny_model import make_tiny_model

WORDS = ("rock", "paper", "scissors", "answer", "wins", "always", "never", "you", "choose", "water", "fire", "wood")


def make_requests(count: int, responses: int) -> list[dict]:
    """Prompts of 8 to 48 words, each with responses of 1 to 24."""
    draw = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    return [{"prompt": words(8, 48), "responses": [words(1, 24) for _ in range(responses)]} for _ in range(count)]


async def ask_all(url: str, bodies: list[dict], clients: int) -> tuple[list[dict], list[float], float]:
    """The answers, their latencies in seconds, and the seconds in all; RunError for any status but 200."""
    answers, seconds, waiting = [None] * len(bodies), [], iter(enumerate(bodies))
    verify = ssl.create_default_context()  # shared, for speed

    async def work() -> None:  # each with a connection of its own: httpx's pool of 64 would cost more than the answers
        async with httpx.AsyncClient(base_url=url, timeout=300, verify=verify) as client:
            for index, body in waiting:
                began = time.perf_counter()
                answer = await client.post("/compare", json=body)
                seconds.append(time.perf_counter() - began)
                if answer.status_code != 200:
                    raise RunError(f"request {index} was answered with status {answer.status_code}: {answer.text}")
                answers[index] = answer.json()

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(clients)))
    return answers, seconds, time.perf_counter() - began


def resident(pid: int) -> int:
    """Bytes that a process and its children hold in memory."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    pages = sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in (pid, *children))
    return pages * os.sysconf("SC_PAGE_SIZE")


def metric(url: str, name: str) -> float:
    """One number of the server's /metrics."""
    return float(re.search(rf"^{name} (\S+)$", httpx.get(url + "/metrics").text, re.MULTILINE)[1])


def start(model: str, log: Path) -> tuple[subprocess.Popen, str]:
    """A server that is ready, and its address."""
    command = [sys.executable, str(ROOT / "scripts" / "serve_preference_model.py"), "--model", model, "--port", "0"]
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not (found := re.search(r"on (http://\S+)", log.read_text())):
        if server.poll() is not None:
            raise RunError(f"the server did not start: {log.read_text()}")
        time.sleep(0.2)
    return server, found[1]


def largest_difference(rm: GPMPipeline, bodies: list[dict], answers: list[dict]) -> float:
    """Between a probability of the server and the pipeline's."""
    expected = rm.embed([body["prompt"] for body in bodies], [body["responses"] for body in bodies])
    matrices = (torch.sigmoid(one.scores() / rm.tau) for one in expected)
    pairs = zip(matrices, answers, strict=True)
    return max((one - torch.tensor(answer["matrix"])).abs().max().item() for one, answer in pairs)


def measure(model: str, bodies: list[dict], clients: int, alone: int, log: Path) -> dict:
    """All numbers of one run."""
    server, url = start(model, log)
    try:
        asyncio.run(ask_all(url, bodies[:clients], clients))  # warm
        before, calls = resident(server.pid), metric(url, "gpm_batch_rows_count")
        answers, latency, seconds = asyncio.run(ask_all(url, bodies, clients))
        calls, after = metric(url, "gpm_batch_rows_count") - calls, resident(server.pid)
        _, latency_alone, seconds_alone = asyncio.run(ask_all(url, bodies[:alone], 1))
    finally:
        server.terminate()
        code = server.wait()
    rates = {"requests_per_second": len(bodies) / seconds, "alone_per_second": alone / seconds_alone}
    return rates | {
        "ratio": rates["requests_per_second"] / rates["alone_per_second"],
        "answered": sum(answer is not None for answer in answers),
        "largest_difference": largest_difference(GPMPipeline(model), bodies, answers),
        "calls": calls,
        "latency_p50": statistics.median(latency),
        "latency_p99": statistics.quantiles(latency, n=100)[98],
        "alone_p50": statistics.median(latency_alone),
        "bytes_before": before,
        "bytes_after": after,
        "exit_code": code,
    }


def main(argv: list[str] | None = None) -> int:
    """Parse, run, write; 1 if a request was lost or answered otherwise than by the pipeline."""
    parser = argparse.ArgumentParser(description="The preference server under load.")
    parser.add_argument("model", nargs="?", help="folder or hub name; default a tiny random model")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--responses", type=int, default=8, help="of each request")
    parser.add_argument("--alone", type=int, default=200, help="requests that are sent one at a time as well")
    parser.add_argument("--output", type=Path, default=Path("serving.json"))
    arguments = parser.parse_args(argv)
    return exit_code(lambda: run(arguments), kept="no result was written")


def run(arguments: argparse.Namespace) -> None:
    """See the module."""
    bodies = make_requests(arguments.requests, arguments.responses)
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or make_model(folder)
        alone = min(arguments.alone, len(bodies))
        found = measure(model, bodies, arguments.clients, alone, Path(folder) / "log")
    found |= {"requests": len(bodies), "clients": arguments.clients, "machine": describe_machine()}
    replace_text(arguments.output, json.dumps(found, indent=2) + "\n")
    print(found["machine"])
    for name, value in found.items():
        if name != "machine":
            print(f"{name:20s} {value:.6g}")
    if found["answered"] != len(bodies) or found["largest_difference"] > 1e-5:
        raise RunError("requests were lost, or answered otherwise than by the pipeline")


def make_model(folder: str) -> str:
    """A tiny random GPM with a gate."""
    base, path = os.path.join(folder, "base"), os.path.join(folder, "model")
    make_tiny_model(base)
    preference = PreferenceConfig("gpm", 4, True, normalize=True, temperature=0.1)
    get_reward_model(base, bf16=False, preference=preference, seed=0).save_pretrained(path)
    load_tokenizer(base).save_pretrained(path)
    return path


if __name__ == "__main__":
    sys.exit(main())
