"""Accuracy, loss and calibration of scores, as float64 sums that add up exactly across micro-batches and processes."""

import math

import torch
from torch import Tensor

CALIBRATION_BINS = 15
_FIELDS = ("n", "loss", "correct", "ties", "probability", "margin")


def preference_sums(score: Tensor, label: Tensor, loss: Tensor, temperature, counted: Tensor | None = None) -> Tensor:
    """Sums that describe M scored preferences. Never waits for an accelerator.

    score, label, loss: (M,) score of first against second, probability in [0, 1] that first is preferred, loss.
    temperature: tau of P = sigmoid(score / tau). counted: (M,) booleans, which preferences count; None for all.

    Returns:
        (6 + 3 * CALIBRATION_BINS,) float64: count, loss, correct, ties, probability, margin; then per confidence bin
        the count, the summed confidence and the summed outcome. Zeros for M = 0.
    """
    score, label, loss = (tensor.detach().double() for tensor in (score, label, loss))
    counted = torch.ones_like(score) if counted is None else counted.double()
    tau = temperature.detach().double() if isinstance(temperature, Tensor) else temperature
    tie = (score == 0).double()
    wins = torch.where(score > 0, label, 1 - label)
    outcome = torch.where(score == 0, torch.full_like(label, 0.5), wins)
    correct = preference_credit(score, label)
    toward_preferred = torch.where(label >= 0.5, score, -score)
    probability = torch.sigmoid(toward_preferred / tau)
    head = torch.stack([torch.ones_like(score), loss, correct, tie, probability, toward_preferred])
    head = torch.where(counted > 0, head, 0.0).sum(dim=1)  # 0 * NaN would be NaN

    confidence = torch.sigmoid(score.abs() / tau)
    bins = ((confidence - 0.5) * 2 * CALIBRATION_BINS).long().clamp(0, CALIBRATION_BINS - 1)
    per_bin = torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64, device=score.device)
    each = torch.stack([torch.ones_like(confidence), confidence, outcome])
    per_bin.index_add_(1, bins, torch.where(counted > 0, each, 0.0))
    return torch.cat([head, per_bin.flatten()])


def preference_credit(score: Tensor, label: Tensor) -> Tensor:
    """(M,) 1 where the score is on the side of the label, else 0; one half where either is on none. Both float64."""
    right = (torch.where(score > 0, label, 1 - label) > 0.5).double()
    return torch.where((score == 0) | (label == 0.5), torch.full_like(label, 0.5), right)


def preference_statistics(sums: Tensor) -> dict[str, float]:
    """Turn added-up `preference_sums` into the numbers people read.

    Returns:
        accuracy:           share of preferences on the right side; a tie (score exactly 0) counts one half
        loss:               mean preference loss, in the loss's own unit (nats for logistic)
        n:                  preferences counted (a group of responses has several)
        ties:               number of scores that are exactly 0
        probability:        mean probability given to the preferred side
        margin:             mean score of the preferred side over the other
        calibration_error:  expected calibration error over 15 equal bins of confidence in [0.5, 1]
                            (arXiv 1706.04599), soft labels counting as the outcome they state
    An empty set has n = 0 and no other numbers.
    """
    values = dict(zip(_FIELDS, sums[: len(_FIELDS)].tolist(), strict=True))
    if (n := int(values["n"])) == 0:
        return {"n": 0}
    _counts, confidence, outcome = sums[len(_FIELDS) :].view(3, CALIBRATION_BINS)
    return {
        "accuracy": values["correct"] / n,
        "loss": values["loss"] / n,
        "n": n,
        "ties": int(values["ties"]),
        "probability": values["probability"] / n,
        "margin": values["margin"] / n,
        "calibration_error": float((confidence - outcome).abs().sum() / n),
    }


def calibration_bins(sums: Tensor) -> list[tuple[float, float, int]]:
    """(mean confidence, share that came out so, count) of every bin that holds something, from `preference_sums`."""
    bins = sums[len(_FIELDS) :].view(3, CALIBRATION_BINS).T.tolist()
    return [(confidence / count, outcome / count, int(count)) for count, confidence, outcome in bins if count]


def wilson_interval(share: float, count: int, deviations: float = 1.959964) -> tuple[float, float]:
    """Confidence interval of a share of `count` independent trials; 1.96 standard deviations are 95 %.

    Source: Wilson 1927; holds for few trials and shares near 0 or 1.
    """
    square = deviations**2
    center = share + square / (2 * count)
    half = deviations * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    low, high = ((center + sign * half) / (1 + square / count) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)
