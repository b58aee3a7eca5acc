"""Requests that arrive together are scored in one call of the model: a queue, and a task for each device.

Not uvicorn's own workers: each of those would have a queue and groups of its own, and see a part of the requests.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import torch

from general_preference.errors import RunError
from general_preference.inference.embedding import EmbeddedPrompt
from general_preference.models.config import first_line
from general_preference.serving.metrics import Metrics
from general_preference.serving.refusal import Refused
from general_preference.serving.worker import Embedded, embed_rows


@dataclass
class _Waiting:
    row: dict
    tokens: int
    arrived: float
    future: asyncio.Future

    def settle(self, result: Embedded | Exception) -> None:
        if self.future.done():  # whoever asked is gone
            return
        if isinstance(result, Exception):
            self.future.set_exception(result)
        else:
            embeddings, gate = (None if one is None else torch.from_numpy(one) for one in result)
            self.future.set_result(EmbeddedPrompt(embeddings, None, gate))


class Batcher:
    """Embeds rows of token ids. While the devices are busy, rows gather; the next call takes as many as fit."""

    def __init__(
        self, executors: list[Executor], max_wait: float, batch_tokens: int, metrics: Metrics, broke: Callable[[], None]
    ):
        """executors: of one process each, with a loaded model. max_wait: seconds. broke: called if a process died."""
        self.max_wait, self.batch_tokens, self.metrics, self._broke = max_wait, batch_tokens, metrics, broke
        self.broken: str | None = None
        self._queue: deque[_Waiting] = deque()
        self._tokens = 0  # of the queue
        self._some, self._enough = asyncio.Event(), asyncio.Event()
        self._tasks = [asyncio.create_task(self._answer(executor)) for executor in executors]

    def __len__(self) -> int:
        """Rows that wait for a device."""
        return len(self._queue)

    async def embed(self, row: dict) -> EmbeddedPrompt:
        """What the model makes of one prompt and its responses, as `ComparisonTokenizer.encode` gives them.

        Raises:
            RunError: NaN or infinity for this row, or a fault of the model. Refused: no device answers any more.
        """
        loop = asyncio.get_running_loop()
        if self.broken:
            raise Refused(503, self.broken)
        waiting = _Waiting(row, count_tokens(row), loop.time(), loop.create_future())
        self._queue.append(waiting)
        self._count(waiting.tokens)
        return await waiting.future

    def fail(self, reason: str) -> None:
        """Answer nothing any more: what waits is refused, and so is what comes."""
        self.broken = reason
        for waiting in self._queue:
            waiting.settle(Refused(503, reason))
        self._queue.clear()
        self._count(-self._tokens)
        self._broke()

    async def _answer(self, executor: Executor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._some.wait()
            left = self._queue[0].arrived + self.max_wait - loop.time() if self._queue else 0
            if left > 0:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._enough.wait(), left)
            if not (batch := self._take()):  # another device was faster
                continue
            try:
                found = await loop.run_in_executor(executor, embed_rows, [one.row for one in batch])
            except Exception as error:  # of the process itself: embed_rows answers those of the model
                reason = f"a worker process has died ({type(error).__name__}: {first_line(error)})"
                found = [Refused(503, reason)] * len(batch)
                self.fail(reason)
            for waiting, result in zip(batch, found, strict=True):
                waiting.settle(RunError(result) if isinstance(result, str) else result)
            self.metrics.batch([one.row for one in batch], sum(one.tokens for one in batch))

    def _take(self) -> list[_Waiting]:
        batch, tokens = [], 0
        while self._queue and (not batch or tokens + self._queue[0].tokens <= self.batch_tokens):
            waiting = self._queue.popleft()
            self._count(-waiting.tokens)
            if not waiting.future.done():  # else nobody waits for it any more
                batch.append(waiting)
                tokens += waiting.tokens
        return batch

    def _count(self, tokens: int) -> None:
        self._tokens += tokens
        for event, true in ((self._some, self._queue), (self._enough, self._tokens >= self.batch_tokens)):
            event.set() if true else event.clear()


def count_tokens(row: dict) -> int:
    """Tokens of a prompt and its responses."""
    return len(row["prompt_ids"]) + sum(map(len, row["response_ids"]))
