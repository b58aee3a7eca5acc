"""What the routes stand on: a model that loads, answers, and drains; prompts and responses in, embeddings out."""

import asyncio
import json
import multiprocessing
import signal
import threading
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.connection import wait

import torch

from general_preference.datasets.messages import begun_prompt, parse_prompt
from general_preference.datasets.records import parse_answer
from general_preference.datasets.tokenization import load_tokenizer
from general_preference.errors import InputError, RunError
from general_preference.inference.embedding import EmbeddedPrompt
from general_preference.inference.scorer import PreferenceScorer, Prompt, Response
from general_preference.models.config import PreferenceConfig
from general_preference.models.score import preference_probability
from general_preference.serving.arguments import ServingArguments
from general_preference.serving.barrier import GroupBarrier
from general_preference.serving.batching import Batcher, count_tokens
from general_preference.serving.group_reward import group_rewards
from general_preference.serving.metrics import Metrics
from general_preference.serving.refusal import Refused
from general_preference.serving.samples import Sample
from general_preference.serving.worker import load

_LAST = 3.0  # seconds in which idle worker processes end by themselves
_CHARACTERS = 8  # per token that is taken at most: tokenizing more would hold up the others


class RowEncoder(PreferenceScorer):
    """The tokenizer and settings of the served model; its weights are elsewhere."""

    def __init__(self, path: str, preference: PreferenceConfig, limits, max_length: int | None, **options):
        self._prepare(preference, load_tokenizer(path, **options), limits, max_length)

    def encode(self, prompt: Prompt, responses: list[Response], name: str) -> dict:
        """Token ids of a prompt and its responses, cut as by the pipeline. InputError calls the responses `name`."""
        try:
            json.dumps([prompt, responses], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"prompt or {name} hold half of a surrogate pair, which is no character") from error
        messages = begun_prompt(parse_prompt(prompt, "prompt"))
        parsed = [parse_answer(one, f"{name}[{index}]", messages) for index, one in enumerate(responses)]
        row = self._encode("prompt", messages, parsed)
        self.cut.report(self.max_length)
        return row


class PreferenceService:
    """One served model. `state` is loading, ready, draining or broken."""

    def __init__(self, arguments: ServingArguments):
        self.arguments, self.metrics = arguments, Metrics()
        self.state = "loading"
        self.broke = asyncio.Event()  # a worker process has died
        self.barrier = GroupBarrier(self._group_rewards, arguments.group_timeout, arguments.max_groups)
        self.metrics.watch("gpm_waiting_groups", "Groups whose samples have not all come", lambda: len(self.barrier))
        self.encoder: RowEncoder
        self.about: dict = {}  # what /model says
        self._batcher: Batcher
        self._encoding = 0
        self._executors: list[ProcessPoolExecutor] = []
        self._thread = ThreadPoolExecutor(1)  # one: tokenizers cannot be used by several at once

    async def load(self) -> None:
        """Start a process for each device and load the model there, and its tokenizer here.

        Raises:
            InputError: no such device or model, as `GPMPipeline`. RunError: a process died.
        """
        asked, loop = self.arguments, asyncio.get_running_loop()
        devices, path = choose_devices(asked.devices), asked.model
        options = {name: getattr(asked, name) for name in ("max_length", "bf16", "batch_tokens", "trust_remote_code")}
        options |= {"tau": asked.general_preference_tau, "attn_implementation": asked.attn_implementation}
        spawn = multiprocessing.get_context("spawn")
        self._executors = [ProcessPoolExecutor(1, spawn) for _ in devices]
        pairs = zip(self._executors, devices, strict=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: a terminal's Ctrl-C goes to all
        try:
            starts = [loop.run_in_executor(one, load, path, on, options) for one, on in pairs]
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            loaded = await asyncio.gather(*starts)
        except BrokenExecutor as error:
            raise RunError(f"a worker process died while it loaded {path}: is the memory too small?") from error
        found, preference = loaded[0], PreferenceConfig.from_dict(loaded[0]["preference"])
        remote = {"trust_remote_code": asked.trust_remote_code}
        self.encoder = RowEncoder(path, preference, found["limits"], asked.max_length, **remote)
        self._batcher = Batcher(
            self._executors, asked.max_wait_ms / 1000, found["batch_tokens"], self.metrics, self._break
        )
        self.metrics.watch("gpm_queue_rows", "Prompts that wait for a device", lambda: len(self._batcher))
        self.about = {
            "model": path, "preference": found["preference"], "dim": preference.dim,
            "temperature": preference.temperature, "max_length": self.encoder.max_length, "mode": asked.mode,
            "devices": [one["device"] for one in loaded], "dtype": found["dtype"], "parameters": found["parameters"],
        }  # fmt: skip
        workers = {process.sentinel: process for process in multiprocessing.active_children()}
        threading.Thread(target=self._watch, args=(list(workers), loop), daemon=True).start()
        self.state = "ready"

    def _watch(self, sentinels: list, loop: asyncio.AbstractEventLoop) -> None:
        wait(sentinels)
        if self.state != "closed":
            loop.call_soon_threadsafe(self._batcher.fail, "a worker process has died")

    def _break(self) -> None:
        if self.state != "closed":
            self.state = "broken"
            self.broke.set()

    async def embed(self, prompt: Prompt, responses: list[Response], name: str, accepted: bool = False):
        """EmbeddedPrompt of one prompt and its responses, which errors call `name`; see `row` for what it refuses.

        accepted: the queue may be full, since these were let in one by one.
        """
        return await self.embed_row(await self.row(prompt, responses, name, accepted))

    async def embed_row(self, row: dict) -> EmbeddedPrompt:
        """What the model makes of what `row` gives."""
        return await self._batcher.embed(row)

    async def row(self, prompt: Prompt, responses: list[Response], name: str, accepted: bool = False) -> dict:
        """Token ids of one prompt and its responses.

        Raises:
            InputError: they cannot be scored. Refused: they are too many, or the queue is full.
        """
        asked = self.arguments
        if len(responses) > asked.max_responses:
            raise Refused(422, f"{name}: {len(responses)} of them, this server takes {asked.max_responses} at most")
        if not accepted and self._encoding + len(self._batcher) >= asked.max_queue:
            raise Refused(429, f"{asked.max_queue} requests wait already: ask again", retry_after=1)
        if (size := sum(map(_characters, (prompt, *responses)))) > _CHARACTERS * asked.max_tokens:
            most = f"{_CHARACTERS * asked.max_tokens} at most ({_CHARACTERS} per token)"
            raise Refused(422, f"prompt and {name}: {size} characters, this server takes {most}")
        self._encoding += 1
        try:
            loop = asyncio.get_running_loop()
            row = await loop.run_in_executor(self._thread, self.encoder.encode, prompt, responses, name)
        finally:
            self._encoding -= 1
        if (tokens := count_tokens(row)) > asked.max_tokens:
            raise Refused(422, f"prompt and {name}: {tokens} tokens, this server takes {asked.max_tokens} at most")
        self.metrics.cut(row["prompt_cut"], row["response_cut"])
        return row

    async def sample_reward(self, sample: Sample) -> float:
        """The reward of one sample: P(it is preferred to its reference), or, when its group is whole, its place there.

        Raises:
            As `embed` and `GroupBarrier.reward`.
        """
        if sample.place is not None:
            if sample.place.size > self.arguments.max_responses:
                most = self.arguments.max_responses
                raise Refused(422, f"{sample.place}: size {sample.place.size}, this server takes {most} at most")
            messages = begun_prompt(parse_prompt(sample.prompt, "prompt"))  # refused alone, not with its siblings
            parse_answer(sample.response, "response", messages)
            return await self.barrier.reward(sample.place, sample.prompt, sample.response)
        embedded = await self.embed(sample.prompt, [sample.response, sample.reference], "[response, reference]")
        return preference_probability(embedded.scores()[0, 1], self.encoder.tau).item()

    async def _group_rewards(self, prompt: Prompt, responses: list[Response]) -> list[float]:
        return await self.rewards(await self.embed(prompt, responses, "responses of the group", accepted=True))

    async def rewards(self, embedded: EmbeddedPrompt, mode: str | None = None) -> list[float]:
        """One number per response; `mode` of MODES, None for the server's own."""
        settings = len(embedded.embeddings), mode or self.arguments.mode, self.encoder.tau
        return await asyncio.to_thread(group_rewards, embedded, *settings)

    def close(self) -> None:
        """End the worker processes: those that do not end by themselves are killed."""
        self.state = "closed"
        self._thread.shutdown(wait=False, cancel_futures=True)
        processes, ends = multiprocessing.active_children(), time.monotonic() + _LAST
        for executor in self._executors:
            executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.join(max(ends - time.monotonic(), 0))
            process.kill()


def _characters(value: object) -> int:
    return len(value if isinstance(value, str) else json.dumps(value))


def choose_devices(names: str) -> list[str]:
    """ "cuda:0,cuda:1" -> both; "auto" -> all GPUs, or "auto" alone where there is none."""
    if names != "auto":
        return [name.strip() for name in names.split(",")]
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["auto"]
