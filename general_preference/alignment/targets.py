"""What a policy's log-ratio is pulled to: one number per response, from the preference model alone.

Of a prompt and responses y_1 .. y_K that the policy pi_t wrote, S_ij = score(y_i, y_j) / tau and P_ij = sigmoid(S_ij).
Targets do not change while the policy trains, so they follow from embeddings that were computed once.
"""

import math
from typing import Literal

import torch

from general_preference.models.score import TIE, plane_advantages, preference_matrix

TargetKind = Literal["score", "probability", "dynamic", "hard", "win_rate", "planes"]


def policy_target(
    embeddings: torch.Tensor,
    gate: torch.Tensor | None,
    temperature: float,
    *,
    kind: TargetKind = "score",
    beta: float,
    iteration: int = 1,
    mix: float = 1.0,
    clamp: float | None = None,
    count_self: bool = True,
) -> torch.Tensor:
    """Target of each of K responses to one prompt.

    score:       (1 / beta) mean_j S_ij                                    GPO: arXiv 2410.02197, section 5
    probability: (1 / beta) (mean_j P_ij - 1/2)                            SPPO: arXiv 2405.00675
    dynamic:     as probability, of sigmoid(((1 + m) s_T + (1 - m) s_C) / tau), m = mix / sqrt(iteration), where s_T is
                 the difference of scalars and s_C the planes' score       DSPPO: arXiv 2605.17342
    hard:        +1 / (2 beta) for the best, -1 / (2 beta) for the worst by mean score, else 0    SPPO's hard labels;
                 with the centered loss IPO's and INPO's, whose tau and eta are beta / 2
    win_rate:    mean_j P_ij against the others, in [0, 1]; of a pair P_ij itself      labels for the logistic loss
    planes:      `plane_advantages`                                        GPRL's, for the surrogate loss

    Args:
        embeddings: (K, D) of the preference model. gate: (P,) its weights of planes, or None. temperature: its tau > 0.
        beta: > 0, the strength of the regularization: the exact step is pi_t(y) exp(T(y)) / Z. `win_rate` and `planes`
            have none. iteration, mix: of `dynamic`; iteration counts from 1.
        clamp: limit of |target|; the published recipes have one without its value, so there is no default.
        count_self: average over all K, each response tying with itself (published), or over the K - 1 others, which
            estimates the expectation under pi_t without bias. Neither `hard`, `win_rate` nor `planes` depends on it.

    Returns (K,) in fp32 or better; the targets of score, probability, dynamic, hard and planes sum to 0 unless clamped.

    Raises:
        ValueError: no response, an unknown kind, a number out of range, or `dynamic` without planes beside a scalar.
    """
    count, dim = embeddings.shape
    _check(count, kind, temperature=temperature, beta=beta, iteration=iteration, clamp=clamp)
    scores = preference_matrix(embeddings, gate)
    if kind == "planes":
        target = plane_advantages(embeddings, gate)
    elif kind == "hard":
        target = _best_and_worst(scores) / (2 * beta)
    elif kind == "win_rate":
        target = _mean(torch.sigmoid(scores / temperature) - 0.5, count_self=False) + 0.5
    elif kind == "score":
        target = _mean(scores / temperature, count_self) / beta
    else:
        if kind == "dynamic":
            if dim % 2 == 0 or dim == 1:
                raise ValueError(
                    f"target 'dynamic' weighs planes against a scalar: it needs a hybrid head, not D = {dim}"
                )
            scalar, cyclic = preference_matrix(embeddings[:, -1:]), preference_matrix(embeddings[:, :-1], gate)
            share = mix / math.sqrt(iteration)
            scores = (1 + share) * scalar + (1 - share) * cyclic
        target = _mean(torch.sigmoid(scores / temperature) - 0.5, count_self) / beta
    return target if clamp is None else target.clamp(-clamp, clamp)


def best_and_worst(scores: torch.Tensor) -> tuple[int, int] | None:
    """The responses of highest and lowest mean score among (K, K), the first of equals; None if all means tie."""
    means = scores.mean(dim=1)
    if means.max() - means.min() <= TIE * scores.abs().max():
        return None
    return int(means.argmax()), int(means.argmin())


def _best_and_worst(scores: torch.Tensor) -> torch.Tensor:
    target, places = torch.zeros(len(scores), dtype=scores.dtype), best_and_worst(scores)
    if places is not None:
        target[places[0]], target[places[1]] = 1.0, -1.0
    return target


def _mean(values: torch.Tensor, count_self: bool) -> torch.Tensor:
    """Mean over columns of an antisymmetric (K, K), whose diagonal is 0; alone a response has no other: 0."""
    return values.sum(dim=1) / max(len(values) - (not count_self), 1)


def _check(count: int, kind: str, **numbers) -> None:
    if count == 0:
        raise ValueError("a target needs at least one response")
    if kind not in TargetKind.__args__:
        raise ValueError(f"unknown target {kind!r}: expected one of {', '.join(TargetKind.__args__)}")
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, expected above 0")
