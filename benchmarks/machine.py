"""What benchmarks share: what they say about the machine they run on, and lists of numbers as flags."""

import os
import platform
import resource
import statistics
import time

import torch

from general_preference.errors import InputError


def describe_machine() -> str:
    """Device, cores and library versions, on one line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    model = next((line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")), device)
    name = device if torch.cuda.is_available() else model
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}"


def matmul_rate(dtype: torch.dtype = torch.float32) -> float:
    """Floating-point operations per second of large square matrix products: the median of nine runs.

    2,048 wide one at a time on CPUs; on GPUs 8,192 wide and ten at a time, or their start would be what is measured.
    """
    device, size, many = ("cuda", 8192, 10) if torch.cuda.is_available() else ("cpu", 2048, 1)
    first, second = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(11):
        began = time.perf_counter()
        for _ in range(many):
            first @ second
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return many * 2 * size**3 / statistics.median(seconds[2:])


def peak_memory() -> int:
    """Bytes that this process held at most: on the GPU if there is one, else its resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def numbers(flag: str, text: str) -> list[int]:
    """`"1,2,4"` -> [1, 2, 4]; InputError for anything else."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--{flag} {text} is no list such as 1,2,4") from None
    if min(found) < 1:
        raise InputError(f"--{flag} {text}: every number must be at least 1")
    return found


def _cpu_info() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return file.read().splitlines()
    except OSError:
        return []
