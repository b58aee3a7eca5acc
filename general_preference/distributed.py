"""The processes of one run: ranks, and the few things they must agree on. No engine, no device.

How they find each other stands in rendezvous.py. Training joins on its way to DeepSpeed (trainer/deepspeed_engine.py),
everything else through `DistributedContext.join`.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

from general_preference import rendezvous
from general_preference.errors import InputError, RunError
from general_preference.heartbeat import Heartbeat


class DistributedContext:
    """Ranks and collectives of an initialized process group."""

    def __init__(self):
        """Read the ranks of the group that the launcher's environment and `torch.distributed` describe."""
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.is_main = self.rank == 0
        self.heartbeat: Heartbeat | None = None  # training's, on several nodes

    @classmethod
    def join(cls, backend: str = "gloo", timeout: float = 86400.0, join_timeout: float = 600.0) -> "DistributedContext":
        """Join the other processes.

        Args:
            timeout: seconds a process waits for the others; long because ranks finish at different times.
            join_timeout: seconds until all must have come.

        Raises:
            InputError: see `rendezvous.join`.
        """
        rendezvous.join(backend, timeout, join_timeout)
        return cls()

    def main_process_first(self, work: Callable[[], Any], main_only: bool = False) -> Any:
        """Run `work` on the first process of each node, then (from its caches) on the others.

        An InputError on any of them is raised on all, so that every process leaves with the same message.

        Args:
            main_only: only the very first process runs `work`; the others get None.
        """
        goes_first = self.is_main if main_only else self.local_rank == 0
        result = self.together(work if goes_first else None)
        if main_only:
            return result
        follows = self.together(None if goes_first else work)
        return result if goes_first else follows

    def together(self, work: Callable[[], Any] | None) -> Any:
        """Run `work` where there is some; an InputError or an error of the disk on any process is raised on all."""
        result, problem = self._attempt(work)
        if problem is not None:
            message, is_input = problem
            raise InputError(message) if is_input else RunError(message, everywhere=True)
        return result

    def _attempt(self, work: Callable[[], Any] | None) -> tuple[Any, tuple[str, bool] | None]:
        """(what `work` returned, None), or on all processes (None, the first problem of any and if it was an input)."""
        result, problem = None, None
        if work is not None:
            try:
                result = work()
            except (InputError, OSError, SafetensorError) as error:
                problem = str(error).splitlines()[0], isinstance(error, InputError)
        problems = [found for found in self.gather_objects(problem) if found is not None]
        return (None, problems[0]) if problems else (result, None)

    def write(self, folder: Path, work, main_only: bool = False):
        result, problem = self._attempt(work if self.is_main or not main_only else None)
        if problem is not None:
            raise RunError(f"cannot write {folder}: {problem[0]}. What was saved before is intact", everywhere=True)
        return result

    def all_reduce_max(self, values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def set_timeout(self, seconds: float) -> None:
        pass

    def all_reduce(self, sums: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over all processes, in place; the same result on each."""
        dist.all_reduce(sums)
        return sums

    def gather_objects(self, value: Any) -> list:
        """One picklable value of each process, on all of them."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """The main process's value, on all processes: for decisions that every process must take alike."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        dist.barrier()

    def __enter__(self) -> "DistributedContext":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Leave the process group."""
        if self.heartbeat is not None:
            self.heartbeat.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _lacks_space(folder: Path, needed: int) -> str | None:
    usage = _usage(folder)
    # A file system that does not know its size says 0.
    return "the disk is too full" if needed and usage is not None and usage.total > 0 and usage.free < needed else None


def _free(folder: Path) -> str:
    usage = _usage(folder)
    return "unknown" if usage is None else tqdm.format_sizeof(usage.free, "B")


def _usage(folder: Path):
    """Disk usage where `folder` is or will be; None if the system does not say."""
    existing = next((path for path in [folder, *folder.absolute().parents] if path.exists()), None)
    try:
        return None if existing is None else shutil.disk_usage(existing)
    except OSError:
        return None


def is_main_process() -> bool:
    """Whether the environment makes this the first process; usable before any process has joined."""
    return os.environ.get("RANK", "0") == "0"
