"""The processes of one run: ranks, collectives, and work that all of them must agree on. No engine, no device.

torchrun starts, watches and restarts them (scripts/launch.py); without a launcher there is one.
"""

import contextlib
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from general_preference.errors import InputError, RunError

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


class DistributedContext(contextlib.AbstractContextManager):
    """Ranks and collectives of an initialized process group; objects and CPU tensors always go over gloo."""

    def __init__(self):
        """Of the process group that exists."""
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.is_main = self.rank == 0
        self._host_group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    @classmethod
    def join(cls, backend: str = "gloo", timeout: float = 86400.0) -> "DistributedContext":
        """Initialize the process group that the launcher's environment describes; one that exists is used as it is.

        A world of one opens no port. DeepSpeed reads the environment too, so it is completed then.

        Args:
            backend: "gloo", or "nccl" for tensors on GPUs.
            timeout: seconds a process waits for the others, here and in every collective until `set_timeout`.

        Raises:
            InputError: the environment names several processes, but no address to meet at.
        """
        if dist.is_initialized():
            return cls()
        limit = timedelta(seconds=timeout)
        if os.environ.get("WORLD_SIZE", "1") == "1":
            os.environ |= ALONE | os.environ
            store, rank, world_size = dist.HashStore(), 0, 1
        elif "MASTER_ADDR" not in os.environ or "RANK" not in os.environ:
            raise InputError("WORLD_SIZE is set without RANK and MASTER_ADDR: start with scripts/launch.py or torchrun")
        else:
            store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                # torchrun keeps its store over restarts, and with it the addresses of processes that are gone.
                store = dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
        return cls()

    def main_process_first(self, work: Callable[[], Any], main_only: bool = False) -> Any:
        """Run `work` on the first process of each node, then (from its caches) on the others. Collective.

        Args:
            main_only: only the very first process runs `work`; the others get None.

        Raises:
            InputError: on every process, if `work` raises one on any.
        """
        goes_first = self.is_main if main_only else self.local_rank == 0
        result = self.together(work if goes_first else None)
        if main_only:
            return result
        follows = self.together(None if goes_first else work)
        return result if goes_first else follows

    def together(self, work: Callable[[], Any] | None) -> Any:
        """Run `work` where it is given; an InputError of any process is raised on all. Collective."""
        result, problem = self._attempt(work, InputError)
        if problem is not None:
            raise InputError(problem[0]) from problem[1]
        return result

    def write(self, folder: Path, work: Callable[[], Any], main_only: bool = False) -> Any:
        """Run `work`, which writes into `folder`, on every process or on the main process alone. Collective.

        Raises:
            RunError: on every process, if it fails on any; names the folder and the reason.
        """
        here = self.is_main or not main_only
        result, problem = self._attempt(work if here else None, (InputError, OSError, SafetensorError, RunError))
        if problem is not None:
            message = f"cannot write {folder}: {problem[0]}. What was saved before is intact"
            raise RunError(message, everywhere=True) from problem[1]
        return result

    def _attempt(self, work: Callable[[], Any] | None, expected) -> tuple[Any, tuple[str, Exception | None] | None]:
        """(what `work` returned, None), or (None, (message of the first problem of any process, this one's own))."""
        result, own = None, None
        if work is not None:
            try:
                result = work()
            except expected as error:
                own = error.__cause__ if isinstance(error, RunError) and error.__cause__ else error
        messages = self.gather_objects(None if own is None else str(own).split("\n")[0])
        first = next((message for message in messages if message is not None), None)
        return (result, None) if first is None else (None, (first, own))

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest of each element over all processes, in place."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def _reduce(self, tensor: torch.Tensor, operation) -> torch.Tensor:
        dist.all_reduce(tensor, operation, group=self._host_group if tensor.device.type == "cpu" else None)
        return tensor

    def gather_objects(self, value: Any) -> list:
        """One picklable value of each process, on all of them."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._host_group)
        return values

    def broadcast(self, value: Any) -> Any:
        """The main process's value, on all processes: for decisions that all of them must make alike."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._host_group)
        return values[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        dist.barrier(group=self._host_group)

    def set_timeout(self, seconds: float) -> None:
        """From now on a process waits for the others for so long, in every group, whoever made it."""
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    def close(self, *_) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    __exit__ = close


def is_main_process() -> bool:
    """Whether the environment makes this the first process; usable before any process has joined."""
    return os.environ.get("RANK", "0") == "0"
