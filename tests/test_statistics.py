"""Evaluation numbers against values worked by hand, and their additivity over parts."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from general_preference.models.statistics import CALIBRATION_BINS, preference_statistics, preference_sums
from general_preference.plots import find_cycle

EMPTY = torch.zeros(6 + 3 * CALIBRATION_BINS, dtype=torch.float64)


def statistics(score, label, loss=None, temperature=1.0):
    score, label = torch.tensor(score), torch.tensor(label)
    return preference_statistics(preference_sums(score, label, score * 0 if loss is None else loss, temperature))


def test_by_hand():
    result = statistics([2.0, -1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.5])
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    assert result["n"] == 4 and result["ties"] == 1
    assert result["accuracy"] == (1 + 0 + 0.5 + 0.5) / 4
    assert math.isclose(result["margin"], 0.5)
    assert math.isclose(result["probability"], (sigmoid(2) + sigmoid(-1) + 0.5 + sigmoid(1)) / 4)


def test_calibration_error_is_zero_for_a_calibrated_model_and_large_for_a_boaster():
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(200_000, generator=generator) * 2
    label = (torch.rand(200_000, generator=generator) < torch.sigmoid(score)).float()
    honest = preference_statistics(preference_sums(score, label, score, 1.0))
    boaster = preference_statistics(preference_sums(score, label, score, 0.1))
    assert honest["calibration_error"] < 0.01
    assert boaster["calibration_error"] > 0.15
    soft = preference_statistics(preference_sums(score, torch.sigmoid(score), score, 1.0))
    assert soft["calibration_error"] < 1e-6


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(0, 30), st.integers(0, 10**6))
def test_parts_add_up(first, second, seed):
    generator = torch.Generator().manual_seed(seed)
    score, label, loss = (torch.randn(first + second, generator=generator) for _ in range(3))
    label = (label > 0).float()
    whole = preference_sums(score, label, loss, 0.5)
    parts = EMPTY + sum(
        preference_sums(score[part], label[part], loss[part], 0.5) for part in (slice(0, first), slice(first, None))
    )
    torch.testing.assert_close(whole, parts)


def test_what_does_not_count_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    score, label, loss = (torch.randn(40, generator=generator) for _ in range(3))
    label, counted = (label > 0).float(), torch.rand(40, generator=generator) > 0.3
    score[~counted], loss[~counted] = float("nan"), float("inf")
    found = preference_sums(score, label, loss, 0.5, counted)
    torch.testing.assert_close(found, preference_sums(score[counted], label[counted], loss[counted], 0.5))
    assert preference_sums(score, label, loss, 0.5, torch.zeros(40, dtype=torch.bool)).tolist() == EMPTY.tolist()
    assert torch.isnan(preference_sums(score, label, loss, 0.5)).any(), "a score that counts is never hidden"


def test_nothing_counted():
    assert preference_statistics(EMPTY) == {"n": 0}


def test_cycles_are_found():
    assert find_cycle([(0, 1), (1, 2), (2, 0)]) == [0, 1, 2]
    assert find_cycle([(0, 1), (0, 2), (1, 2)]) is None
    assert find_cycle([(3, 0), (3, 1), (3, 2), (0, 2), (2, 1), (1, 0)]) == [0, 2, 1]
    assert find_cycle([(0, 1), (1, 0), (1, 2), (2, 3), (3, 4), (4, 1)]) == [1, 2, 3, 4]
