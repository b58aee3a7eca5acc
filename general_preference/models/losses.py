"""The preference loss on scores and the language-model regularizers on chosen responses, as pure functions.

The trainer minimizes (1 - c) * preference + c * regularizer.
"""

from typing import Literal

import torch
import torch.nn.functional as F

PreferenceLossKind = Literal["logistic", "regression"]
LanguageModelLossKind = Literal["vanilla", "mean", "sum", "reference_free"]


def preference_loss(
    score: torch.Tensor,
    *,
    kind: PreferenceLossKind = "logistic",
    temperature: float | torch.Tensor = 1.0,
    margin: float | torch.Tensor = 0.0,
    target: float = 10.0,
    label: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """Loss of each comparison, given the score of its first response against its second.

    logistic:   cross-entropy between q and sigmoid(z), z = (score - margin) / temperature; q = 1: softplus(-z)
    regression: q * 0.5 * (score / temperature - target)^2 + (1 - q) * 0.5 * (-score / temperature - target)^2

    Args:
        score: (...,) score of first against second. temperature: tau > 0 of P = sigmoid(score / tau).
        margin: >= 0, in units of the score: how much `first` should win by. Logistic only.
        target: wanted score / temperature of a certain preference. Regression only.
        label: q in [0, 1], the probability that `first` is preferred; 0.5 is a tie.

    Returns:
        (...,) losses in nats (logistic) or squared logits (regression), fp32 or better.

    Raises:
        ValueError: unknown `kind`, or a margin with the regression loss (it has a target instead).

    Source: arXiv 2410.02197 (both losses); the margin is that of Llama 2, arXiv 2307.09288.
    """
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    label = torch.as_tensor(label, dtype=score.dtype, device=score.device).expand_as(score)
    if kind == "logistic":
        return F.binary_cross_entropy_with_logits((score - margin) / temperature, label, reduction="none")
    if kind == "regression":
        if isinstance(margin, torch.Tensor) or margin != 0:
            raise ValueError("the regression loss has a target, not a margin: leave margin at 0 or use kind='logistic'")
        logit = score / temperature
        return 0.5 * (label * (logit - target) ** 2 + (1 - label) * (logit + target) ** 2)
    raise ValueError(f"unknown preference loss {kind!r}: expected 'logistic' or 'regression'")


def language_model_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    *,
    kind: LanguageModelLossKind = "vanilla",
    beta: float = 1.0,
    margin: float = 0.0,
    rejected: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Mean regularizer of a batch of chosen sequences, a scalar in nats.

    The trainer gets the same value without (B, L, V) logits, from `regularizer` on summed log-probs.

    Args:
        logits: (B, L, V), logits[:, t] predicts token t + 1 (as a causal LM returns them).
        labels: (B, L) the token ids themselves; the shift by one happens here, as in transformers.
        mask: (B, L), 1 for the tokens of `labels` that count; the first token never counts.
        kind, beta, margin: see `regularizer`. rejected: (logits, labels, mask), for `reference_free` alone.

    Raises:
        ValueError: unknown `kind`, or `reference_free` without `rejected`.
    """
    chosen = _sequence_log_probs(logits, labels, mask)
    others = None if rejected is None else _sequence_log_probs(*rejected)
    return regularizer(chosen, others, kind=kind, beta=beta, margin=margin).mean()


def regularizer(
    chosen: tuple[torch.Tensor, torch.Tensor],
    rejected: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    kind: LanguageModelLossKind = "vanilla",
    beta: float = 1.0,
    margin: float = 0.0,
) -> torch.Tensor:
    """The four language-model regularizers per comparison, from (summed log-prob, token count), each (B,).

    vanilla:        -mean log-prob                                          (plain supervised fine-tuning)
    mean:           -logsigmoid(beta * mean log-prob)
    sum:            -logsigmoid(beta * summed log-prob)
    reference_free: -logsigmoid(beta * (mean chosen - mean rejected) - margin)    (SimPO, arXiv 2405.14734)

    Returns (B,) in nats; a sequence without counted tokens has mean log-prob 0. Source: arXiv 2406.10216.
    """
    mean = chosen[0] / chosen[1].clamp(min=1)
    if kind == "vanilla":
        return -mean
    if kind == "mean":
        return -F.logsigmoid(beta * mean)
    if kind == "sum":
        return -F.logsigmoid(beta * chosen[0])
    if kind == "reference_free":
        if rejected is None:
            raise ValueError("the reference_free regularizer compares with the rejected response: pass `rejected`")
        return -F.logsigmoid(beta * (mean - rejected[0] / rejected[1].clamp(min=1)) - margin)
    raise ValueError(f"unknown regularizer {kind!r}: expected 'vanilla', 'mean', 'sum' or 'reference_free'")


def token_log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability (...,) in nats of each target token under logits (..., V), computed in fp32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, targets[..., None]).squeeze(-1) - logits.logsumexp(dim=-1)


def _sequence_log_probs(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor):
    log_probs = token_log_probs(logits[:, :-1], labels[:, 1:].clamp(min=0))
    counted = mask[:, 1:].to(log_probs.dtype)
    return (log_probs * counted).sum(dim=1), counted.sum(dim=1)
