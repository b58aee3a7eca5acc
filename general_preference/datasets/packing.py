"""Comparisons -> a batch in which all responses of a prompt share one copy of that prompt.

A row is [prompt][response 1][response 2]... with positions that continue from the prompt's end in every response, made
exact by `models/attention.py`. By `RowLayout` it holds one comparison, all of the batch, or a single response. A
comparison's responses with the same tokens lie there once, so that they tie exactly and not up to rounding.
"""

from dataclasses import dataclass, fields

import torch

from general_preference.models.attention import PADDING, PROMPT, PackedSequences, RowLayout, pack_sequences

Block = tuple[list[int], list[list[int]]]  # ids of a prompt, ids of each response behind it


@dataclass
class Batch:
    """R rows of L tokens that hold G prompts with N responses, and M terms of a loss: preferences, or the responses.

    input_ids, position_ids, segments: (R, L); segments are -1 padding, 0 prompt, k >= 1 the row's k-th response
    shared:        rows hold several responses behind one prompt, or several comparisons
    sequences:     how a packed row attends; None for padded rows and for kernels that take a mask
    response_ends: (N,) position of each response's end token in the flattened rows; equal responses have the same
    prompt_ends:   (G,) position of each prompt's last token
    comparison_index: (M,) index into the G prompts
    weight:        (M,) share of each term in the loss; a prompt's weights sum to its own weight
    targets:       (predict_positions, target_ids, sequence_index), see `PackedBackbone.sequence_log_probs`, or None
    ids:           G names for messages to people
    counted:       (R, L) the tokens of prompts with a weight, over which experts are balanced, or None
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor
    shared: bool
    sequences: PackedSequences | None
    response_ends: torch.Tensor
    prompt_ends: torch.Tensor
    comparison_index: torch.Tensor
    weight: torch.Tensor
    targets: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    ids: list[str]
    counted: torch.Tensor | None

    def model_inputs(self) -> dict:
        """The keyword arguments of `PackedBackbone.forward`."""
        names = ("input_ids", "position_ids", "segments", "shared", "sequences", "response_ends", "prompt_ends")
        return {name: getattr(self, name) for name in (*names, "targets", "counted")}

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Page-locked tensors, so that a data loader's copies to an accelerator overlap with its work."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, move) -> "Batch":
        def moved(value):
            if isinstance(value, torch.Tensor):
                return move(value)
            if isinstance(value, PackedSequences):
                return value.map(move)
            return tuple(map(moved, value)) if isinstance(value, tuple) else value

        return type(self)(**{field.name: moved(getattr(self, field.name)) for field in fields(self)})


@dataclass
class PreferenceBatch(Batch):
    """A batch whose terms are preferences.

    first, second: (M,) indices into the N responses; first is the preferred one
    label, margin: (M,) probability in [0.5, 1] that first is preferred; margin in units of the score
    """

    first: torch.Tensor
    second: torch.Tensor
    label: torch.Tensor
    margin: torch.Tensor


@dataclass
class SampleBatch(Batch):
    """A batch whose terms are its responses, samples of a policy: M = N.

    target: (N,) what each log-ratio is pulled to. anchor: (N,) log-probability in nats that it is taken against.
    finished: (N,) whether the policy ended the response itself.
    """

    target: torch.Tensor
    anchor: torch.Tensor
    finished: torch.Tensor


@dataclass
class Collator:
    """Turns tokenized comparisons into a `PreferenceBatch`.

    pad_id:      any token id; padding is never attended to nor read.
    layout:      what `layout_on` of the model returns. Rows of one response are plain sequences without an (L, L) mask.
    regularized: whose tokens get log-probs: "" none, "chosen" or "both" (for reference_free) with their prompts, or
                 "responses", all of them without prompts.
    balanced:    experts are balanced, so the batch says which tokens count.
    """

    pad_id: int
    layout: RowLayout
    regularized: str = ""
    balanced: bool = False

    def __call__(self, comparisons: list[dict]) -> Batch:
        """Comparisons with the columns of `preparation.TOKENIZED` and optionally `weight` (default 1)."""
        packed = self.layout.packed
        laid_out = [distinct_responses(comparison["response_ids"]) for comparison in comparisons]
        shared = packed or (self.layout.shared and any(len(responses) > 1 for responses, _ in laid_out))
        # A block is a prompt and the responses behind it: one per comparison, or one per response.
        blocks: list[Block] = []
        first_blocks, real, places, before = [], [], [], 0
        for comparison, (responses, own_places) in zip(comparisons, laid_out, strict=True):
            first_blocks.append(len(blocks))
            places += [before + place for place in own_places]
            before += len(responses)
            groups = [responses] if shared else [[response] for response in responses]
            blocks += [(comparison["prompt_ids"], group) for group in groups]
            real += [comparison.get("weight", 1.0) != 0] * (len(blocks) - len(real))
        rows = [blocks] if packed else [[block] for block in blocks]
        length = self.layout.row_length(max(sum(map(_tokens, row)) for row in rows))
        prompt_ends, ends = _ends(rows, length)
        prompt_ends = [prompt_ends[index] for index in first_blocks]
        response_ends = [ends[place] for place in places]
        ids, positions, segments = self._lay_out(rows, length)
        lengths = [(len(prompt), list(map(len, responses))) for prompt, responses in blocks]
        return self._batch(
            comparisons,
            input_ids=ids,
            position_ids=positions,
            segments=segments,
            shared=shared,
            sequences=pack_sequences(lengths) if packed and not self.layout.rounded else None,
            response_ends=torch.tensor(response_ends),
            prompt_ends=torch.tensor(prompt_ends),
            targets=self._targets(comparisons, response_ends, prompt_ends) if self.regularized else None,
            ids=[comparison.get("id", "") for comparison in comparisons],
            counted=_counted(rows, real, segments) if self.balanced else None,
        )

    def _batch(self, comparisons: list[dict], **layout) -> Batch:
        return PreferenceBatch(**layout, **preference_terms(comparisons))

    def _lay_out(self, rows: list[list[Block]], length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids = torch.full((len(rows), length), self.pad_id)
        positions = torch.zeros(len(rows), length, dtype=torch.long)
        segments = torch.full((len(rows), length), PADDING)
        for row, parts in enumerate(rows):
            end = 0
            for prompt, group in parts:
                for number, part in enumerate([prompt, *group], PROMPT):
                    start, end = end, end + len(part)
                    before = 0 if number == PROMPT else len(prompt)
                    ids[row, start:end] = torch.as_tensor(part)
                    positions[row, start:end] = torch.arange(before, before + len(part))
                    segments[row, start:end] = number
        return ids, positions, segments

    def _targets(self, comparisons, response_ends, prompt_ends):
        """Which hidden state predicts which token, and whose log-prob that is: responses first, then prompts."""
        predict_positions, target_ids, sequence_index = [], [], []

        def add(start: int, count: int, predicted, sequence: int) -> None:
            predict_positions.append(torch.arange(start, start + count))
            target_ids.append(torch.as_tensor(predicted, dtype=torch.long))
            sequence_index.append(torch.full((count,), sequence))

        response, total = 0, len(response_ends)
        for index, comparison in enumerate(comparisons):
            prompt = comparison["prompt_ids"]
            prompt_end = prompt_ends[index]
            if self.regularized != "responses":
                add(prompt_end - len(prompt) + 1, len(prompt) - 1, prompt[1:], total + index)
            wanted = self._wanted(comparison)
            for number, ids in enumerate(comparison["response_ids"]):
                if number in wanted:
                    add(prompt_end, 1, ids[:1], response)
                    add(response_ends[response] - len(ids) + 1, len(ids) - 1, ids[1:], response)
                response += 1
        return torch.cat(predict_positions), torch.cat(target_ids), torch.cat(sequence_index)

    def _wanted(self, comparison: dict) -> set[int]:
        if self.regularized == "responses":
            return set(range(len(comparison["response_ids"])))
        return set(comparison["first"]) | (set(comparison["second"]) if self.regularized == "both" else set())


class SampleCollator(Collator):
    """Turns samples of a policy into a `SampleBatch`: rows with `target`, `anchor` and `finished` for each response."""

    def __init__(self, pad_id: int, layout: RowLayout, balanced: bool = False):
        super().__init__(pad_id, layout, "responses", balanced)

    def _batch(self, comparisons: list[dict], **layout) -> SampleBatch:
        counts = [len(row["response_ids"]) for row in comparisons]
        weights = [row.get("weight", 1.0) / count for row, count in zip(comparisons, counts, strict=True)]
        repeats, numbers = torch.tensor(counts), {}
        for name in ("target", "anchor"):
            numbers[name] = torch.tensor([value for row in comparisons for value in row[name]], dtype=torch.float32)
        return SampleBatch(
            **layout,
            **numbers,
            finished=torch.tensor([value for row in comparisons for value in row["finished"]]),
            comparison_index=torch.arange(len(comparisons)).repeat_interleave(repeats),
            weight=torch.tensor(weights).repeat_interleave(repeats),
        )


def distinct_responses(response_ids: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """(each different response once, the index of every response among these) of one comparison."""
    known: dict[tuple[int, ...], int] = {}
    places = [known.setdefault(tuple(ids), len(known)) for ids in response_ids]
    return [list(ids) for ids in known], places


def _tokens(block: Block) -> int:
    return len(block[0]) + sum(map(len, block[1]))


def _counted(rows: list[list[Block]], real: list[bool], segments: torch.Tensor) -> torch.Tensor:
    """(R, L) tokens that are not padding and belong to a block that is `real`; blocks are numbered across rows."""
    counted, flags = segments != PADDING, iter(real)
    for number, row in enumerate(rows):
        of_tokens = [flag for part in row for flag in [next(flags)] * _tokens(part)]
        counted[number, : len(of_tokens)] = torch.tensor(of_tokens)
    return counted


def _ends(rows: list[list[Block]], length: int) -> tuple[list[int], list[int]]:
    """Positions in the flattened rows of the last token of each block's prompt, and of each response."""
    prompts, responses = [], []
    for number, row in enumerate(rows):
        end = number * length
        for prompt, group in row:
            end += len(prompt)
            prompts.append(end - 1)
            for response in group:
                end += len(response)
                responses.append(end - 1)
    return prompts, responses


def preference_terms(comparisons: list[dict]) -> dict[str, torch.Tensor]:
    """Who is compared with whom, as flat tensors over the M preferences of the batch."""
    first, second, comparison_index, label, margin, weight, offset = [], [], [], [], [], [], 0
    for index, comparison in enumerate(comparisons):
        count = len(comparison["first"])
        first += [offset + i for i in comparison["first"]]
        second += [offset + i for i in comparison["second"]]
        comparison_index += [index] * count
        label += comparison["label"]
        margin += [comparison["margin"]] * count
        weight += [comparison.get("weight", 1.0) / max(count, 1)] * count
        offset += len(comparison["response_ids"])
    indices = {"first": first, "second": second, "comparison_index": comparison_index}
    numbers = {"label": label, "margin": margin, "weight": weight}
    tensors = {name: torch.tensor(values, dtype=torch.long) for name, values in indices.items()}
    return tensors | {name: torch.tensor(values, dtype=torch.float32) for name, values in numbers.items()}


class Comparisons(torch.utils.data.Dataset):
    """A tokenized `datasets.Dataset` indexed by the samplers' (index, weight) items."""

    def __init__(self, table):
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, item: tuple[int, float]) -> dict:
        index, weight = item
        return self.table[index] | {"weight": weight}
