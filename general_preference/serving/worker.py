"""The process that holds the model on one device: token ids in, embeddings out. Called through batching.py.

A process of its own, since a model's Python code would hold up the event loop of the front process, and since a crash
or the kernel's out-of-memory killer then leaves someone to say so.
"""

import multiprocessing
import os
import signal
import threading

import torch

from general_preference.cli import quiet_other_libraries
from general_preference.errors import NonFiniteError
from general_preference.inference.embedding import CPU_TOKENS, GPU_TOKENS, embed
from general_preference.inference.pipeline import GPMPipeline
from general_preference.models.config import first_line
from general_preference.models.device import choose_device

Embedded = tuple  # embeddings (K, D), and gate (P,) or None; of numpy, since torch would send shared memory

_pipeline: GPMPipeline | None = None  # of this process


def load(path: str, device: str, options: dict) -> dict:
    """Load the model into this process; returns what the front process must know of it.

    Raises:
        InputError: as `GPMPipeline`.
    """
    global _pipeline
    for number in (signal.SIGINT, signal.SIGTERM):  # the front process ends this one when all is answered
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet_other_libraries()
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    _pipeline = GPMPipeline(path, device=chosen, **options)
    model = _pipeline.model
    return {
        "preference": vars(_pipeline.preference),
        "limits": (model.learned_positions, model.vocabulary_size),
        "batch_tokens": _pipeline.batch_tokens or (CPU_TOKENS if _pipeline.device.type == "cpu" else GPU_TOKENS),
        "device": str(_pipeline.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "pid": os.getpid(),
    }


def embed_rows(rows: list[dict]) -> list[Embedded | str]:
    """Embed token ids in one call; if that fails, each row alone, so that one cannot spoil the others.

    Returns:
        for each row its embeddings and gate, or the line that says why there are none.
    """
    try:
        return _embed(rows)
    except torch.AcceleratorError:  # the device answers nothing any more
        raise
    except Exception as error:
        if len(rows) > 1:
            return [found for row in rows for found in embed_rows([row])]
        if isinstance(error, NonFiniteError):
            return [str(error)]
        return [f"the model failed ({type(error).__name__}: {first_line(error)})"]


def _embed(rows: list[dict]) -> list[Embedded]:
    found = embed(_pipeline.model, rows, batch_tokens=_pipeline.batch_tokens)
    ordered = [one for _, one in sorted(found, key=lambda entry: entry[0])]
    return [(one.embeddings.numpy(), None if one.gate is None else one.gate.numpy()) for one in ordered]


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
