"""Samples of a policy through a preference model: embeddings of the K responses to each prompt, and the prompt's gate.

The preference model has a tokenizer of its own, so it reads the texts. Called by scripts/score_responses.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from general_preference.datasets.messages import begun_prompt, parse_prompt
from general_preference.errors import InputError
from general_preference.inference.embedding import EmbeddedPrompt
from general_preference.inference.pipeline import GPMPipeline
from general_preference.inference.ranking import hodge
from general_preference.models.score import plane_scores, preference_matrix

PROMPTS = 1  # of one call: with others beside it the rounding of a row would change by what a kill left to do


@dataclass
class SampleTable:
    """Samples as `inference.batch.score_table` reads a table; a row is tokenized when it is asked for."""

    rm: GPMPipeline
    samples: list[dict]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | str):
        """Row `key` with its tokens; for "length" a number for each row that grows with them."""
        if key == "length":
            return [len(str(row["prompt"])) + sum(map(len, row["responses"])) for row in self.samples]
        row, rm = self.samples[key], self.rm
        prompt = begun_prompt(parse_prompt(row["prompt"], row["id"]))
        responses = [[{"role": "assistant", "content": text}] for text in row["responses"]]
        try:
            (encoded,) = rm.encoder.encode([prompt], [responses], [row.get("options", {})])
        except InputError as error:
            raise InputError(f"{row['id']}: {error}") from error
        highest = max(max(ids) for ids in (encoded["prompt_ids"], *encoded["response_ids"]))
        if highest >= rm.model.vocabulary_size:
            token = rm.tokenizer.convert_ids_to_tokens(highest)
            raise InputError(f"{row['id']} has the token {token!r}, for which the preference model has no embedding")
        return encoded | {"id": row["id"]}


def score_row(encoded: dict, embedded: EmbeddedPrompt) -> dict:
    """The row of samples.py for one prompt."""
    gate = None if embedded.gate is None else embedded.gate.tolist()
    row = {"id": encoded["id"], "embeddings": embedded.embeddings.tolist(), "gate": gate}
    return row | ({"cut": True} if encoded["prompt_cut"] or encoded["response_cut"] else {})


def summarize_scores(rows: Iterable[dict]) -> dict:
    """What the scores of all prompts are like, without tau.

    mean_plane_score: mean |score| on each plane with its gate, and mean_scalar_score that of a scalar beside them, over
    all pairs of different responses; mean_gate; cyclic_share: mean of `ranking.hodge` over prompts with K >= 3; cut:
    prompts whose texts did not fit.
    """
    planes: list[torch.Tensor] = []
    scalars, gates, cyclic, prompts, cut = [], [], [], 0, 0
    for row in rows:
        embeddings = torch.tensor(row["embeddings"])
        gate = None if row["gate"] is None else torch.tensor(row["gate"])
        prompts, cut = prompts + 1, cut + row.get("cut", False)
        gates += [] if gate is None else [gate]
        count, dim = embeddings.shape
        if count > 1:
            first, second = torch.triu_indices(count, count, 1)
            planes.append(plane_scores(embeddings[first], embeddings[second], gate).abs().mean(dim=0))
            scalars += [(embeddings[first, -1] - embeddings[second, -1]).abs().mean().item()] if dim % 2 else []
        if count > 2:
            cyclic.append(hodge(preference_matrix(embeddings, gate)).cyclic_share)
    return {
        "prompts": prompts,
        "cut": cut,
        "mean_plane_score": torch.stack(planes).mean(dim=0).tolist() if planes else None,
        "mean_scalar_score": sum(scalars) / len(scalars) if scalars else None,
        "mean_gate": torch.stack(gates).mean(dim=0).tolist() if gates else None,
        "cyclic_share": sum(cyclic) / len(cyclic) if cyclic else None,
    }
