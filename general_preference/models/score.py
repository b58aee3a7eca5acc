"""The idea of this repository: two embeddings become one antisymmetric preference score.

A Bradley-Terry model gives a response one number, so its preferences are transitive. The General Preference Model
(GPM, arXiv 2410.02197) compares embeddings of D numbers with a skew-symmetric operator R, which allows cycles:

    score(first, second) = < R first, second > = sum_p gate_p * (first[2p] * second[2p+1] - first[2p+1] * second[2p])
    P(first > second)    = sigmoid(score / temperature)

R is block diagonal with blocks [[0, -1], [1, 0]]; each block is a plane. The sign is fixed by one consequence: with
the embedding (r, 1) the score equals r_first - r_second, so **a positive score means `first` is preferred**.

One function serves every head: D = 1 is Bradley-Terry (score = first - second), even D is GPM, and odd D > 1 is the
hybrid head (arXiv 2605.17342) whose last coordinate is a scalar reward beside the planes.
"""

import math
from collections.abc import Iterator

import torch

# Mean scores closer than this share of the largest score tie: of a symmetric cycle fp32 leaves rounding, not zeros.
TIE = 1e-6


def preference_score(first: torch.Tensor, second: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """Score of `first` against `second`; positive means `first` is preferred. No unit (a logit before temperature).

    Args:
        first, second: embeddings (..., D), broadcast against each other. Half precision is computed in fp32.
        gate: weight per plane (..., P) with P = D // 2, from the prompt; None weighs every plane by 1.

    Returns:
        (...,) scores, antisymmetric exactly and not only up to rounding: both orders add the same products.

    Raises:
        ValueError: the embedding sizes differ, or the gate does not have one weight per plane.

    Source: arXiv 2410.02197, preference embeddings; the odd D follows arXiv 2605.17342.
    """
    score = plane_scores(first, second, gate).sum(dim=-1)
    if first.shape[-1] % 2 == 1:
        score = score + (_at_least_fp32(first[..., -1]) - _at_least_fp32(second[..., -1]))
    return score


def plane_scores(first: torch.Tensor, second: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """What each plane adds to `preference_score`: gate_p * (first[2p] * second[2p+1] - first[2p+1] * second[2p]).

    Args, Raises: as `preference_score`. Returns (..., P) in fp32 or better, without an odd D's scalar difference.
    """
    dim = first.shape[-1]
    planes = dim // 2
    if second.shape[-1] != dim:
        raise ValueError(f"embeddings differ in size: first has D = {dim}, second has D = {second.shape[-1]}")
    if gate is not None and gate.shape[-1] != planes:
        raise ValueError(f"the gate has {gate.shape[-1]} weights, but D = {dim} has {planes} planes")
    first, second = _at_least_fp32(first), _at_least_fp32(second)
    even, odd = slice(0, 2 * planes, 2), slice(1, 2 * planes, 2)
    areas = first[..., even] * second[..., odd] - first[..., odd] * second[..., even]
    return areas if gate is None else _at_least_fp32(gate) * areas


def preference_matrix(embeddings: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """All pairwise scores of K responses to one prompt: entry (i, j) is the score of response i against response j.

    embeddings: (..., K, D). gate: (..., P), shared by the K responses, or None. Returns (..., K, K) scores, exactly
    antisymmetric.
    """
    gate = None if gate is None else gate[..., None, None, :]
    return preference_score(embeddings[..., :, None, :], embeddings[..., None, :, :], gate)


def plane_advantages(embeddings: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """(K,) advantage of each response in its group: sum_p gate_p (m_p - mean m_p) / std m_p, over planes p.

    m_p is a response's mean score against the group on plane p, without the gate; an odd D's scalar counts as a plane
    of weight 1. A plane on which all tie adds nothing. Source: the advantage of GPRL; its drift controller is left out,
    since no text that was found gives its threshold.

    embeddings: (K, D). gate: (P,), or None for weights of 1.
    """
    scores = plane_scores(embeddings[:, None], embeddings[None])  # (K, K, P)
    weights = scores.new_ones(scores.shape[-1]) if gate is None else gate
    if embeddings.shape[1] % 2:
        scores = torch.cat([scores, preference_matrix(embeddings[:, -1:])[..., None]], dim=-1)
        weights = torch.cat([weights, weights.new_ones(1)])
    means = scores.mean(dim=1)  # antisymmetric scores: over the group these average to 0
    spread = means.square().mean(dim=0).sqrt()
    differ = spread > TIE * scores.abs().amax(dim=(0, 1))
    return (weights * torch.where(differ, means / spread.where(differ, 1.0), 0.0)).sum(dim=1)


def preference_probability(score: torch.Tensor, temperature: float | torch.Tensor = 1.0) -> torch.Tensor:
    """P(first > second) = sigmoid(score / temperature), same shape as `score`, in [0, 1]."""
    return torch.sigmoid(_at_least_fp32(score) / temperature)


def normalize_embedding(embedding: torch.Tensor) -> torch.Tensor:
    """L2-normalize the planes of an embedding (..., D); an odd D's scalar coordinate is unchanged.

    Scores then lie in [-max(gate), max(gate)] plus the scalar difference. Source: arXiv 2410.02197.
    """
    planes = 2 * (embedding.shape[-1] // 2)
    unit = torch.nn.functional.normalize(embedding[..., :planes], dim=-1)
    return torch.cat([unit, embedding[..., planes:]], dim=-1)


def head_embedding(output: torch.Tensor, normalize: bool = False, reward_offset: float = 0.0) -> torch.Tensor:
    """Embedding (..., D) from the D numbers of the embedding head.

    normalize: see `normalize_embedding`. reward_offset: added to the last coordinate, the scalar of an odd D.
    """
    if normalize:
        output = normalize_embedding(output)
    if reward_offset:
        scalar = torch.arange(output.shape[-1], device=output.device) == output.shape[-1] - 1
        output = output + reward_offset * scalar
    return output


def gate_weights(logits: torch.Tensor, gate: str, hidden_size: int) -> torch.Tensor:
    """Weights of the planes (..., P), >= 0, from the P numbers of the prompt head.

    gate: "softmax" (arXiv 2410.02197), or "scaled_softmax": P * softmax(logits / sqrt(hidden_size)).
    """
    if gate == "scaled_softmax":
        return logits.shape[-1] * torch.softmax(logits / math.sqrt(hidden_size), dim=-1)
    return torch.softmax(logits, dim=-1)


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def simple_cycles(edges: list, longest: int | None = None) -> Iterator[list[int]]:
    """The simple cycles among (winner, loser) pairs, each from its smallest index on. Needs networkx."""
    import networkx  # only here: the import is slow, and scoring does without

    for cycle in networkx.simple_cycles(networkx.DiGraph(edges), length_bound=longest):
        at = cycle.index(min(cycle))
        yield cycle[at:] + cycle[:at]
