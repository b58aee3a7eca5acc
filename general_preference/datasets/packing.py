"""Comparisons -> a batch in which all responses of a prompt stand behind one copy of that prompt.

A row is [prompt][response 1][response 2]... with positions that continue from the prompt's end for every response, so
a prompt's tokens are computed once. `models/attention.py` turns `segments` into the mask that makes this exact. Where
an architecture cannot take such a mask, every response gets a row with its own copy of the prompt; everything else
about the batch (what is read where, who is compared with whom) stays the same.
"""

from dataclasses import dataclass, fields

import torch

from general_preference.models.attention import PADDING, PROMPT


@dataclass
class Batch:
    """R rows of L tokens that hold G comparisons with N responses and M preferences.

    input_ids, position_ids, segments: (R, L); segments are -1 padding, 0 prompt, k >= 1 the row's k-th response
    shared:        rows hold several responses behind one prompt
    response_ends: (N,) where each response's end token stands in the flattened rows
    prompt_ends:   (G,) where each prompt's last token stands
    first, second: (M,) indices into the N responses; first is the preferred one
    owner:         (M,) index into the G comparisons
    label, margin: (M,) probability in [0.5, 1] that first is preferred; margin in units of the score
    weight:        (M,) share of each preference in the loss; a comparison's weights sum to its own weight
    targets:       (sources, tokens, owners) of the language-model regulariser or None, see `RewardModel.forward`
    ids:           G names for messages to people
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: torch.Tensor
    shared: bool
    response_ends: torch.Tensor
    prompt_ends: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    owner: torch.Tensor
    label: torch.Tensor
    margin: torch.Tensor
    weight: torch.Tensor
    targets: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    ids: list[str]

    def model_inputs(self) -> dict:
        """The keyword arguments of `RewardModel.forward`."""
        names = ("input_ids", "position_ids", "segments", "shared", "response_ends", "prompt_ends", "targets")
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""

        def move(value):
            if isinstance(value, torch.Tensor):
                return value.to(device, non_blocking=True)
            return tuple(map(move, value)) if isinstance(value, tuple) else value

        return Batch(**{field.name: move(getattr(self, field.name)) for field in fields(self)})

    def pin_memory(self) -> "Batch":
        """Page-locked tensors, so that a data loader's copies to an accelerator overlap with its work."""

        def pin(value):
            if isinstance(value, torch.Tensor):
                return value.pin_memory()
            return tuple(map(pin, value)) if isinstance(value, tuple) else value

        return Batch(**{field.name: pin(getattr(self, field.name)) for field in fields(self)})


@dataclass
class Collator:
    """Turns tokenised comparisons into a `Batch`.

    pad_id:      any token id; padding is never attended to nor read.
    shared:      whether the model can share prompts (`RewardModel.shares_prompts`). Rows that hold one response each
                 are plain sequences anyway: no mask of length times length is made for them.
    regularized: whose tokens get log-probs: "" nobody's, "chosen", or "both" (reference_free compares them).
    """

    pad_id: int
    shared: bool = True
    regularized: str = ""

    def __call__(self, comparisons: list[dict]) -> Batch:
        """Comparisons with the columns of `tables.TOKENIZED` and optionally `weight` (default 1)."""
        rows, response_ends, prompt_ends = [], [], []
        shared = self.shared and any(len(comparison["response_ids"]) > 1 for comparison in comparisons)
        for comparison in comparisons:
            prompt, responses = comparison["prompt_ids"], comparison["response_ids"]
            groups = [responses] if shared else [[response] for response in responses]
            prompt_ends.append((len(rows), len(prompt) - 1))
            for group in groups:
                end = len(prompt)
                for response in group:
                    end += len(response)
                    response_ends.append((len(rows), end - 1))
                rows.append((prompt, group))
        length = max(len(prompt) + sum(map(len, group)) for prompt, group in rows)
        ids, positions, segments = self._lay_out(rows, length)
        return Batch(
            input_ids=ids,
            position_ids=positions,
            segments=segments,
            shared=shared,
            response_ends=torch.tensor([row * length + column for row, column in response_ends]),
            prompt_ends=torch.tensor([row * length + column for row, column in prompt_ends]),
            **_preferences(comparisons),
            targets=self._targets(comparisons, response_ends, prompt_ends, length) if self.regularized else None,
            ids=[comparison.get("id", "") for comparison in comparisons],
        )

    def _lay_out(self, rows, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids = torch.full((len(rows), length), self.pad_id)
        positions = torch.zeros(len(rows), length, dtype=torch.long)
        segments = torch.full((len(rows), length), PADDING)
        for row, (prompt, group) in enumerate(rows):
            end = len(prompt)
            ids[row, :end] = torch.as_tensor(prompt)
            positions[row, :end] = torch.arange(end)
            segments[row, :end] = PROMPT
            for number, response in enumerate(group, 1):
                start, end = end, end + len(response)
                ids[row, start:end] = torch.as_tensor(response)
                positions[row, start:end] = torch.arange(len(prompt), len(prompt) + len(response))
                segments[row, start:end] = number
        return ids, positions, segments

    def _targets(self, comparisons, response_ends, prompt_ends, length: int):
        """Which hidden state predicts which token, and whose log-prob that is: responses first, then prompts."""
        sources, tokens, owners = [], [], []

        def add(start: int, count: int, predicted, owner: int) -> None:
            sources.append(torch.arange(start, start + count))
            tokens.append(torch.as_tensor(predicted, dtype=torch.long))
            owners.append(torch.full((count,), owner))

        response, total = 0, len(response_ends)
        for index, comparison in enumerate(comparisons):
            prompt = comparison["prompt_ids"]
            row, column = prompt_ends[index]
            prompt_end = row * length + column
            add(prompt_end - len(prompt) + 1, len(prompt) - 1, prompt[1:], total + index)
            wanted = set(comparison["first"]) | (set(comparison["second"]) if self.regularized == "both" else set())
            for number, ids in enumerate(comparison["response_ids"]):
                row, column = response_ends[response]
                if number in wanted:
                    add(prompt_end, 1, ids[:1], response)
                    add(row * length + column - len(ids) + 1, len(ids) - 1, ids[1:], response)
                response += 1
        return torch.cat(sources), torch.cat(tokens), torch.cat(owners)


def _preferences(comparisons: list[dict]) -> dict[str, torch.Tensor]:
    """Who is compared with whom, as flat tensors over the M preferences of the batch."""
    first, second, owner, label, margin, weight, offset = [], [], [], [], [], [], 0
    for index, comparison in enumerate(comparisons):
        count = len(comparison["first"])
        first += [offset + i for i in comparison["first"]]
        second += [offset + i for i in comparison["second"]]
        owner += [index] * count
        label += comparison["label"]
        margin += [comparison["margin"]] * count
        weight += [comparison.get("weight", 1.0) / max(count, 1)] * count
        offset += len(comparison["response_ids"])
    return {
        "first": torch.tensor(first, dtype=torch.long),
        "second": torch.tensor(second, dtype=torch.long),
        "owner": torch.tensor(owner, dtype=torch.long),
        "label": torch.tensor(label, dtype=torch.float32),
        "margin": torch.tensor(margin, dtype=torch.float32),
        "weight": torch.tensor(weight, dtype=torch.float32),
    }
