"""K responses of a policy to each prompt, as token ids, by one of three engines.

transformers: `generate` over fixed batches. Each response has random numbers of its own, from the seed, the prompt's
    id and its place among the K, so the file is the same whatever the number of processes, and after a kill.
continuous:   transformers' continuous batching; equal files only where the same work meets the same free memory.
vllm:         a process of another interpreter, started with a script that imports nothing of this package.
"""

import contextlib
import json
import math
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from general_preference.alignment.prompts import Prompt
from general_preference.datasets.tokenization import stable_hash
from general_preference.errors import InputError, NonFiniteError, RunError
from general_preference.files import read_object
from general_preference.models.config import base_chain, load_config, resolve
from general_preference.models.loading import load_backbone

CPU_TOKENS, GPU_TOKENS = 16384, 65536  # of all responses and their prompts in one call of `generate`
CHUNK = 256  # prompts that the other engines have at a time: so many are lost by a kill
_LAUNCHED = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "TORCH_")

Found = Iterator[tuple[int, list[list[int]]]]  # (index of a prompt, its K responses with their stop tokens)


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: softmax(logits / temperature), cut to the likeliest tokens of mass `top_p`.

    stop_ids: tokens that end a response.
    """

    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    stop_ids: tuple[int, ...]

    @property
    def pad_id(self) -> int:
        """What fills a batch: masked before a prompt, cut off behind a response. Any token that the policy knows."""
        return self.stop_ids[0]

    def check_length(self, prompts: list[Prompt], positions: int | None) -> None:
        """InputError for a prompt whose response may not fit into the policy's context."""
        for prompt in prompts if positions is not None else ():
            if len(prompt.ids) + self.max_new_tokens > positions:
                found = f"prompt {prompt.id} has {len(prompt.ids)} tokens, with max_new_tokens {self.max_new_tokens}"
                cure = "lower max_new_tokens, or set max_prompt_tokens"
                raise InputError(f"{found} more than the policy's {positions} positions: {cure}")

    def seed_of(self, *parts: object) -> int:
        """A seed below 2^31 that is the same in every process."""
        return int(stable_hash(self.seed, *parts), 16) % 2**31


def load_policy(path: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False):
    """The causal LM at `path`, its adapter in place, ready to generate.

    Raises:
        InputError: no such model, or one without an LM head, as preference models of other tools are.
        RunError: it does not fit into the device's memory.
    """
    with _enough_memory(f"{path} does not fit: use a device with more, or free what other programs hold"):
        model = load_backbone(path, dtype, trust_remote_code=trust_remote_code, device=device).to(device)
    if model.made_up:
        raise InputError(
            f"{path} has no language-model head ({model.made_up}...), so it cannot write: use another policy"
        )
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    # Else what the folder says (top_k, repetition_penalty) would take the place of everything that is not asked for.
    model.generation_config = GenerationConfig()
    return model.eval()


def check_tokens(model, prompts: list[Prompt]) -> None:
    """InputError for a prompt with a token that the policy has no embedding for: its tokenizer is another model's."""
    embedding = model.get_input_embeddings()
    size = getattr(embedding, "base_layer", embedding).num_embeddings  # of one that an adapter changes
    for prompt in prompts:
        if (highest := max(prompt.ids)) >= size:
            raise InputError(f"prompt {prompt.id} has the token {highest}, but the policy has {size} embeddings")


@contextlib.contextmanager
def _enough_memory(cure: str) -> Iterator[None]:
    """What the device's memory, or the CPU's under a limit, does not hold becomes a RunError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise RunError(f"out of memory: {cure}") from error


def stop_tokens(path: str, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's end token, and those of generation_config.json or config.json."""
    files = (resolve(place, "generation_config.json") for place in base_chain(path))
    stated = next((read_object(Path(file)).get("eos_token_id") for file in files if file), None)
    if stated is None:
        stated = load_config(path, trust_remote_code).get_text_config().eos_token_id
    stated = stated if isinstance(stated, list) else [] if stated is None else [stated]
    return tuple(sorted({tokenizer.eos_token_id, *stated}))


def policy_positions(path: str, trust_remote_code: bool = False) -> int | None:
    """Tokens that fit into the policy's context; None where its configuration states no number."""
    return getattr(load_config(path, trust_remote_code).get_text_config(), "max_position_embeddings", None)


def make_batches(prompts: list[Prompt], sampling: Sampling, batch_tokens: int) -> list[list[int]]:
    """Indices of prompts of similar length that are answered together, the longest first; a prompt stays whole.

    They depend on nothing but the arguments: not on processes, nor on what is done already.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda index: (-len(prompts[index].ids), index)):
        longest = len(prompts[batches[-1][0]].ids) if batches else 0
        rows = sampling.samples * (len(batches[-1]) + 1) if batches else 0
        if batches and rows * (longest + sampling.max_new_tokens) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


class InverseSampler(LogitsProcessor):
    """Leaves one token of each row: the one at which the distribution function passes the row's next random number.

    So a greedy choice behind it is a draw that does not depend on the other rows of the batch.
    """

    def __init__(self, draws: torch.Tensor, width: int, temperature: float, top_p: float):
        """draws: (rows, steps) in [0, 1). width: tokens of the padded prompts."""
        self.draws, self.width, self.temperature, self.top_p = draws, width, temperature, top_p
        self.finite = torch.tensor(True, device=draws.device)  # asked once at the end: that waits for the device

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) logits -> the same with all but the drawn token at -infinity."""
        probabilities = torch.softmax(scores.float() / self.temperature, dim=-1).to(self.draws.dtype)
        draw = self.draws[:, input_ids.shape[1] - self.width, None]
        order = None
        if self.top_p < 1:
            probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        mass = probabilities.cumsum(dim=-1)
        self.finite &= mass[:, -1].isfinite().all()
        token = torch.searchsorted(mass, draw * mass[:, -1:], right=True).clamp(max=mass.shape[1] - 1)
        token = token if order is None else order.gather(1, token)
        return torch.full_like(scores, -math.inf).scatter(1, token, 0.0)


def draws_of(prompts: list[Prompt], sampling: Sampling, device: torch.device) -> torch.Tensor:
    """(prompts x K, max_new_tokens) uniform numbers, each row's from the seed, the prompt's id and its place."""
    kind = torch.float32 if device.type == "mps" else torch.float64  # mps has no other
    rows = []
    for prompt in prompts:
        for place in range(sampling.samples):
            generator = torch.Generator().manual_seed(sampling.seed_of(prompt.id, place))
            rows.append(torch.rand(sampling.max_new_tokens, generator=generator, dtype=kind))
    return torch.stack(rows).to(device)


@torch.no_grad()
def generate_in_batches(model, prompts: list[Prompt], batches: list[list[int]], sampling: Sampling) -> Found:
    """Responses by `generate`, batch by batch; see `make_batches`."""
    device, count = model.device, sampling.samples
    for batch in batches:
        some = [prompts[index] for index in batch]
        width = max(len(prompt.ids) for prompt in some)
        rows = [prompt.ids for prompt in some for _ in range(count)]
        ids = torch.tensor([[sampling.pad_id] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        draw = InverseSampler(draws_of(some, sampling, device), width, sampling.temperature, sampling.top_p)
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(sampling.stop_ids),
            pad_token_id=sampling.pad_id,
            do_sample=False,
        )
        options = {"generation_config": config, "logits_processor": LogitsProcessorList([draw])}
        tokens = len(rows) * (width + sampling.max_new_tokens)
        cure = f"{len(rows)} responses, {tokens} tokens, are too much at once: set batch_tokens to less, and overwrite"
        with _enough_memory(f"{cure}; or ask for fewer samples or max_new_tokens, if this is one prompt alone"):
            out = model.generate(input_ids=ids, attention_mask=mask, **options)
        if not draw.finite:
            found = f"prompt {some[0].id}, or one beside it, has probabilities of tokens that are not finite"
            raise NonFiniteError(f"{found}: the policy is broken, or temperature {sampling.temperature} too low")
        found = [_until_stop(row, sampling.stop_ids) for row in out[:, width:].tolist()]
        for place, index in enumerate(batch):
            yield index, found[count * place : count * (place + 1)]


def _until_stop(ids: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids) - 1)
    return ids[: end + 1]


def generate_continuously(model, prompts: list[Prompt], chunks: list[list[int]], sampling: Sampling) -> Found:
    """Responses by transformers' continuous batching, chunk by chunk.

    Raises:
        InputError: this transformers has none. RunError: it gave up on a prompt.
    """
    try:
        from transformers import ContinuousBatchingConfig
    except ImportError as error:
        raise InputError(
            "engine continuous needs a newer transformers: upgrade it, or use engine transformers"
        ) from error
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.stop_ids),
        pad_token_id=sampling.pad_id,
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,
    )
    for chunk in chunks:
        rows = [prompts[index].ids for index in chunk for _ in range(sampling.samples)]
        # Without a limit the cache of a CPU is 90 % of the memory, which takes a minute to fill with zeros.
        memory = 0.02 if model.device.type == "cpu" else None
        seed = sampling.seed_of(prompts[chunk[0]].id)
        options = ContinuousBatchingConfig(seed=seed, max_memory_percent=memory)
        results = list(
            model.generate_batch(inputs=rows, generation_config=config, continuous_batching_config=options).values()
        )
        if len(results) < len(rows) or any(one.error is not None for one in results):
            raise RunError(
                "continuous batching gave up on some prompts (its message is above): use engine transformers"
            )
        for place, index in enumerate(chunk):
            some = results[sampling.samples * place : sampling.samples * (place + 1)]
            yield index, [_until_stop(one.generated_tokens, sampling.stop_ids) for one in some]


def generate_with_vllm(
    script: Path, python: str, path: str, dtype: str, prompts: list[Prompt], wanted: list[int], sampling: Sampling,
    local_rank: int, world_size: int, options: dict,
) -> Found:  # fmt: skip
    """Responses to the `wanted` prompts by vLLM, which the interpreter `python` runs in `script`.

    Its results come through a pipe, so that it ends with this process. Of several processes each has one GPU.

    Raises:
        InputError: no such interpreter. RunError: vLLM failed, or gave another number of responses.
    """
    if not wanted:
        return
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHED)}
    if world_size > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(local_rank + 1)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local_rank]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as opened:
        requests, settings = Path(folder) / "requests.jsonl", Path(folder) / "settings.json"
        rows = ({"index": i, "prompt_ids": prompts[i].ids, "seed": sampling.seed_of(prompts[i].id)} for i in wanted)
        requests.write_text("".join(json.dumps(row) + "\n" for row in rows))
        engine = options | {"model": os.path.expanduser(path), "dtype": dtype}
        settings.write_text(json.dumps({"engine": engine, "sampling": asdict(sampling), "chunk": CHUNK}))
        read, write = os.pipe()
        command = [python, str(script), str(settings), str(requests), f"/dev/fd/{write}"]
        lines = opened.enter_context(os.fdopen(read, encoding="utf-8"))
        try:
            process = subprocess.Popen(command, pass_fds=[write], env=environment, stdin=subprocess.DEVNULL)
        except OSError as error:
            raise InputError(f"cannot start {python} ({error.strerror}), which should run vLLM") from error
        finally:
            os.close(write)
        opened.callback(_end, process)
        remaining = set(wanted)
        for line in lines:
            row = json.loads(line)
            if len(row["response_ids"]) != sampling.samples:
                raise RunError(f"vLLM gave {len(row['response_ids'])} responses instead of {sampling.samples}")
            remaining.discard(row["index"])
            yield row["index"], [_until_stop(ids, sampling.stop_ids) for ids in row["response_ids"]]
        if code := process.wait():
            raise RunError(f"the process of vLLM ended with exit code {code}: its messages are above")
        if remaining:
            raise RunError(f"vLLM left out {len(remaining)} prompts")


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.terminate()
        process.wait()


def sample_row(prompt: Prompt, response_ids: list[list[int]], tokenizer, stop_ids: tuple[int, ...]) -> dict:
    """The row of samples.py for K responses. Texts keep control tokens that the policy wrote, but not the last stop."""
    finished = [ids[-1] in stop_ids for ids in response_ids]
    bare = [ids[:-1] if end else ids for ids, end in zip(response_ids, finished, strict=True)]
    texts = [tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) for ids in bare]
    return prompt.columns() | {"responses": texts, "response_ids": response_ids, "finished": finished}


def summarize_samples(rows: Iterator[dict]) -> dict:
    """Prompts, responses, their tokens, and which shares of them are unfinished or repeat one of the same prompt."""
    prompts = responses = tokens = unfinished = duplicates = 0
    for row in rows:
        prompts += 1
        responses += len(row["responses"])
        tokens += sum(map(len, row["response_ids"]))
        unfinished += row["finished"].count(False)
        duplicates += len(row["responses"]) - len(set(map(tuple, row["response_ids"])))
    shares = {"unfinished_share": unfinished / responses, "duplicate_share": duplicates / responses}
    return {"prompts": prompts, "responses": responses, "tokens": tokens, "mean_tokens": tokens / responses} | shares
