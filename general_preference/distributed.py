"""The processes of one run: ranks and the few collectives they need. No engine, no device.

torchrun (scripts/launch.py) starts, watches and restarts processes and tells them their ranks; a process that no
launcher started is a world of one and needs no port.
"""

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from general_preference.errors import InputError, RunError

logger = logging.getLogger(__name__)

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


class DistributedContext:
    """Ranks of this process, and collectives: every process calls them in the same order."""

    def __init__(self):
        """Read the ranks of the process group that `torch.distributed` is in."""
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.is_main = self.rank == 0
        # Python objects and CPU tensors never wait for an accelerator.
        self._host_group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    @classmethod
    def join(cls, backend: str = "gloo", timeout: float = 86400.0) -> "DistributedContext":
        """Initialize torch's process group with the ranks in the environment; one that exists already is used.

        Args:
            backend: "gloo" or "nccl".
            timeout: seconds a process waits for the others, in joining and later, see `set_timeout`.

        Raises:
            InputError: several processes, but no address at which they meet.
        """
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            os.environ.update(ALONE)
        os.environ.setdefault("LOCAL_RANK", "0")
        if not dist.is_initialized():
            options: dict[str, Any] = {}
            if os.environ["WORLD_SIZE"] == "1":
                options = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
            try:
                dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **options)
            except ValueError as error:  # a variable is missing
                raise InputError(f"{error}: start several processes by torchrun or scripts/launch.py") from error
        return cls()

    def set_timeout(self, seconds: float) -> None:
        """From now on a process waits for the others for so long; then it ends with an error."""
        for group in dist.distributed_c10d._world.pg_map:  # as torchtitan does it: there is no public call yet
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

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
        """Run `work` (if given); raise the first InputError of any rank on every rank."""
        result, error, problem = self._attempt(work, InputError)
        if problem is not None:
            raise InputError(problem) from error
        return result

    def write(self, folder: Path, work: Callable[[], Any], main_only: bool = False) -> Any:
        """Run `work`, which writes into `folder`, on every process or on the first alone.

        Raises:
            RunError: on every process if it fails on any; names the folder and the reason.
        """
        kinds = (InputError, OSError, SafetensorError)
        result, error, problem = self._attempt(work if self.is_main or not main_only else None, kinds)
        if problem is not None:
            message = f"cannot write {folder}: {problem}. What was saved before is intact"
            raise RunError(message, everywhere=True) from error
        return result

    def _attempt(self, work: Callable[[], Any] | None, kinds) -> tuple[Any, Exception | None, str | None]:
        """(what `work` returned, its error here, the first problem of any rank in one line)."""
        result = error = None
        if work is not None:
            try:
                result = work()
            except kinds as found:
                error = found
        problem = None if error is None else str(error).splitlines()[0]
        problems = [found for found in self.gather_objects(problem) if found is not None]
        return result, error, problems[0] if problems else None

    def all_reduce(self, sums: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over all processes, in place; the same result on each."""
        dist.all_reduce(sums, group=self._group_of(sums))
        return sums

    def all_reduce_max(self, values: torch.Tensor) -> torch.Tensor:
        """The largest of each value over all processes, in place."""
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group_of(values))
        return values

    def _group_of(self, tensor: torch.Tensor):
        return self._host_group if tensor.device.type == "cpu" else None

    def gather_objects(self, value: Any) -> list:
        """One picklable value of each process, on all of them."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._host_group)
        return values

    def broadcast(self, value: Any) -> Any:
        """The main process's value, on all processes: for decisions that every process must take alike."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._host_group)
        return values[0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        dist.barrier(group=self._host_group)

    def __enter__(self) -> "DistributedContext":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def is_main_process() -> bool:
    """Whether the environment makes this the first process; usable before any process has joined."""
    return os.environ.get("RANK", "0") == "0"
