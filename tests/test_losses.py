"""Losses against their equations, their derivatives, and the properties people rely on."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from general_preference import language_model_loss, preference_loss
from general_preference.models.losses import regularizer

SCORES = st.floats(-8, 8)
TEMPERATURES = st.floats(0.05, 3)
LABELS = st.floats(0, 1)
DTYPES = st.sampled_from([torch.float32, torch.float64])


@settings(max_examples=80, deadline=None)
@given(SCORES, TEMPERATURES, LABELS, st.floats(0, 2), DTYPES)
def test_logistic_is_cross_entropy(score, tau, label, margin, dtype):
    loss = preference_loss(torch.tensor([score], dtype=dtype), temperature=tau, margin=margin, label=label)
    z = (score - margin) / tau
    softplus = lambda x: max(x, 0) + math.log1p(math.exp(-abs(x)))  # noqa: E731
    expected = label * softplus(-z) + (1 - label) * softplus(z)
    assert loss.dtype == dtype
    assert math.isclose(loss.item(), expected, rel_tol=1e-4 if dtype == torch.float32 else 1e-9, abs_tol=1e-5)


@settings(max_examples=60, deadline=None)
@given(SCORES, TEMPERATURES, LABELS, st.sampled_from(["logistic", "regression"]))
def test_swapping_the_pair_and_the_label_changes_nothing(score, tau, label, kind):
    score = torch.tensor(score, dtype=torch.float64)
    one = preference_loss(score, kind=kind, temperature=tau, label=label)
    other = preference_loss(-score, kind=kind, temperature=tau, label=1 - label)
    torch.testing.assert_close(one, other)


def test_regression_reaches_its_target():
    score = torch.tensor([0.5, 1.0, -1.0], dtype=torch.float64)
    loss = preference_loss(score, kind="regression", temperature=0.1, target=10.0)
    torch.testing.assert_close(loss, torch.tensor([12.5, 0.0, 200.0], dtype=torch.float64))


def test_a_tie_is_smallest_at_zero():
    scores = torch.linspace(-2, 2, 41, dtype=torch.float64)
    losses = preference_loss(scores, temperature=0.5, label=0.5)
    assert scores[losses.argmin()].abs() < 1e-9
    assert math.isclose(losses.min().item(), math.log(2))


def test_extreme_scores_stay_finite():
    scores = torch.tensor([-1e4, 1e4])
    assert torch.isfinite(preference_loss(scores, temperature=0.1)).all()


@pytest.mark.parametrize("kind", ["logistic", "regression"])
def test_gradients(kind):
    score = torch.randn(4, dtype=torch.float64, requires_grad=True)
    tau = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    label = torch.tensor([1.0, 0.5, 0.8, 0.0], dtype=torch.float64)
    margin = 0.3 if kind == "logistic" else 0.0

    def loss(score, tau):
        return preference_loss(score, kind=kind, temperature=tau, margin=margin, label=label, target=2.0)

    assert torch.autograd.gradcheck(loss, (score, tau))


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match="unknown preference loss"):
        preference_loss(torch.zeros(1), kind="hinge")
    with pytest.raises(ValueError, match="target, not a margin"):
        preference_loss(torch.zeros(1), kind="regression", margin=0.5)
    with pytest.raises(ValueError, match="pass `rejected`"):
        language_model_loss(
            torch.zeros(1, 3, 5), torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3), kind="reference_free"
        )
    with pytest.raises(ValueError, match="unknown regularizer"):
        regularizer((torch.zeros(1), torch.ones(1)), kind="other")


def sequences(seed, batch=3, length=7, vocabulary=11):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, length, vocabulary, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (batch, length), generator=generator)
    mask = torch.ones(batch, length)
    mask[0, 5:] = 0
    mask[1, :3] = 0
    return logits, labels, mask


def test_vanilla_is_the_usual_cross_entropy():
    logits, labels, mask = sequences(0)
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    counted = mask[:, 1:]
    expected = ((each * counted).sum(1) / counted.sum(1)).mean()
    torch.testing.assert_close(language_model_loss(logits, labels, mask), expected)


def test_the_four_kinds_by_hand():
    logits, labels, mask = sequences(1)
    chosen = torch.log_softmax(logits[:, :-1], -1).gather(-1, labels[:, 1:, None])[..., 0] * mask[:, 1:]
    other_logits, other_labels, other_mask = sequences(2)
    rejected = (
        torch.log_softmax(other_logits[:, :-1], -1).gather(-1, other_labels[:, 1:, None])[..., 0] * other_mask[:, 1:]
    )
    mean = chosen.sum(1) / mask[:, 1:].sum(1)
    other_mean = rejected.sum(1) / other_mask[:, 1:].sum(1)
    expected = {
        "vanilla": -mean,
        "mean": -F.logsigmoid(2.0 * mean),
        "sum": -F.logsigmoid(2.0 * chosen.sum(1)),
        "reference_free": -F.logsigmoid(2.0 * (mean - other_mean) - 0.5),
    }
    for kind, values in expected.items():
        loss = language_model_loss(
            logits, labels, mask, kind=kind, beta=2.0, margin=0.5, rejected=(other_logits, other_labels, other_mask)
        )
        torch.testing.assert_close(loss, values.mean(), msg=kind)


@pytest.mark.parametrize("kind", ["vanilla", "mean", "sum", "reference_free"])
def test_regulariser_gradients(kind):
    logits, labels, mask = sequences(3)
    rejected = sequences(4)
    assert torch.autograd.gradcheck(
        lambda x: language_model_loss(x, labels, mask, kind=kind, beta=0.7, margin=0.2, rejected=rejected),
        logits.requires_grad_(),
    )


def test_masked_tokens_do_not_matter():
    logits, labels, mask = sequences(5)
    changed = labels.clone()
    changed[0, 5:] = 0
    torch.testing.assert_close(language_model_loss(logits, labels, mask), language_model_loss(logits, changed, mask))
