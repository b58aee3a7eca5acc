"""Tokenized comparisons in, embeddings out: calls of bounded size, similar lengths together, any number of responses.

Collation and forward pass are those of training, so a pair gets the score of the trainer's evaluation.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from general_preference.datasets.packing import Collator, distinct_responses
from general_preference.errors import NonFiniteError
from general_preference.models.attention import RowLayout
from general_preference.models.reward_model import RewardModel
from general_preference.models.score import preference_matrix

# Tokens of one forward call, padding included: small calls are faster on CPUs, large ones on GPUs, but a mask is
# quadratic in the longest row.
CPU_TOKENS, GPU_TOKENS = 4096, 16384
KEYS_PER_TOKEN = 4  # at most, in packed rows, which copy a prompt's keys for every response


@dataclass
class EmbeddedPrompt:
    """What the model makes of a prompt and its K responses, on the CPU.

    embeddings: (K, D) in fp32. prompt_hidden_state: (hidden,), None of a served model. gate: (P,) or None.
    """

    embeddings: torch.Tensor
    prompt_hidden_state: torch.Tensor | None
    gate: torch.Tensor | None

    def scores(self) -> torch.Tensor:
        """(K, K) scores, row over column, exactly antisymmetric."""
        return preference_matrix(self.embeddings, self.gate)


@dataclass(frozen=True)
class _Part:
    """Some responses of one comparison, as `rows` rows of `length` tokens that attend to `keys` copies of tokens."""

    index: int
    start: int
    stop: int
    rows: int
    length: int
    keys: int


def embed(
    model: RewardModel, comparisons: Sequence[dict], *, batch_tokens=None, batch_size=None, padding=True, progress=None
) -> Iterator[tuple[int, EmbeddedPrompt]]:
    """Embed every comparison; each comes out as soon as it is done, the longest first.

    Responses of a comparison with the same tokens are computed once: they tie exactly, not up to rounding.

    Args:
        comparisons: dicts with `prompt_ids` and `response_ids` (K lists of ids), as the tokenizer makes them.
        batch_tokens: most tokens in one call (a longer sequence gets one alone). batch_size: most comparisons in it.
        padding: whether rows of different length may share a call; the result is the same.
        progress: title of a progress bar, shown after two seconds; None for none.

    Yields:
        (index into `comparisons`, EmbeddedPrompt).

    Raises:
        NonFiniteError: the model gives NaN or infinity for a comparison, which the message names.
    """
    device = model.device
    limit = batch_tokens or (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS)
    layout = model.layout_on()
    collate = Collator(0, layout)
    distinct = [distinct_responses(row["response_ids"]) for row in comparisons]  # before a group is split into parts
    comparisons = [row | {"response_ids": once} for row, (once, _) in zip(comparisons, distinct, strict=True)]
    parts = [part for index, row in enumerate(comparisons) for part in _split(index, row, limit, layout)]
    calls = _calls(parts, limit, batch_size, padding, layout)
    remaining = Counter(part.index for part in parts)
    pieces: dict[int, list[tuple[int, EmbeddedPrompt]]] = {}
    tokens = sum(part.rows * part.length for part in parts)
    with tqdm(total=tokens, desc=progress, unit="tok", unit_scale=True, delay=2, disable=progress is None) as bar:
        for call in calls:
            for part, piece in zip(call, _run(model, collate, comparisons, call, device), strict=True):
                pieces.setdefault(part.index, []).append((part.start, piece))
                remaining[part.index] -= 1
                if remaining[part.index] == 0:
                    yield part.index, _join(pieces.pop(part.index), distinct[part.index][1])
            bar.update(sum(part.rows * part.length for part in call))


def _split(index: int, comparison: dict, limit: int, layout: RowLayout) -> Iterator[_Part]:
    """The parts of one comparison, each with as many responses as fit into `limit` tokens, at least one."""
    prompt, lengths = len(comparison["prompt_ids"]), list(map(len, comparison["response_ids"]))

    def part(start: int, stop: int) -> _Part:
        own = lengths[start:stop]
        keys = prompt * len(own) + sum(own)
        if layout.shared:
            return _Part(index, start, stop, 1, prompt + sum(own), keys)
        return _Part(index, start, stop, len(own), prompt + max(own), keys)

    start = 0
    while start < len(lengths):
        stop = start + 1
        while stop < len(lengths) and _fits([part(start, stop + 1)], limit, layout):
            stop += 1
        yield part(start, stop)
        start = stop


def _fits(call: list[_Part], limit: int, layout: RowLayout) -> bool:
    """Whether these parts, the longest first, are few enough tokens for one call."""
    if layout.packed:
        keys = sum(part.keys for part in call)
        return sum(part.length for part in call) <= limit and keys <= KEYS_PER_TOKEN * limit
    return sum(part.rows for part in call) * call[0].length <= limit


def _calls(parts: list[_Part], limit: int, batch_size: int | None, padding: bool, layout: RowLayout):
    """Lists of parts of similar length, the longest first: the first call needs the most memory."""
    calls: list[list[_Part]] = []
    for part in sorted(parts, key=lambda part: (-part.length, part.index, part.start)):
        joins = calls and _fits([*calls[-1], part], limit, layout) and len(calls[-1]) < (batch_size or len(parts))
        if joins and (padding or part.length == calls[-1][0].length):
            calls[-1].append(part)
        else:
            calls.append([part])
    return calls


@torch.no_grad()
def _run(model: RewardModel, collate: Collator, comparisons, call: list[_Part], device) -> list[EmbeddedPrompt]:
    nothing = {"first": [], "second": [], "label": [], "margin": 0.0}  # is compared: the scores come later
    rows = [comparisons[part.index] | nothing for part in call]
    for row, part in zip(rows, call, strict=True):
        row["response_ids"] = row["response_ids"][part.start : part.stop]
    output = model(**collate(rows).to(device).model_inputs())
    embeddings = output["embeddings"].float().cpu().split([part.stop - part.start for part in call])
    states = output["prompt_hidden_states"].cpu()
    gates = output["gates"].float().cpu() if "gates" in output else [None] * len(call)
    for part, *found in zip(call, embeddings, states, gates, strict=True):
        if not all(torch.isfinite(tensor).all() for tensor in found if tensor is not None):
            name = comparisons[part.index].get("id") or f"prompt {part.index}"
            raise NonFiniteError(f"{name}: the embeddings are not finite in {model.dtype}; try fp32")
    return [EmbeddedPrompt(*found) for found in zip(embeddings, states, gates, strict=True)]


def _join(pieces: list[tuple[int, EmbeddedPrompt]], places: list[int]) -> EmbeddedPrompt:
    """All responses of a comparison; one gate for all, so that its scores stay antisymmetric."""
    ordered = [piece for _, piece in sorted(pieces, key=lambda entry: entry[0])]
    embeddings = torch.cat([piece.embeddings for piece in ordered])
    return EmbeddedPrompt(embeddings[places], ordered[0].prompt_hidden_state, ordered[0].gate)
