"""Targets of policies against their equations, the identities between published methods, ties and wrong requests."""

import math

import pytest
import torch

from general_preference.alignment.targets import best_and_worst, policy_target
from general_preference.models.score import plane_advantages, plane_scores, preference_matrix
from tests.test_policy_loss import TAU, embeddings, numbers, same


def test_targets_by_hand():
    """Three responses on a plane whose gate is 2, and a scalar."""
    group = numbers(1.0, 0.0, 0.5, 0.6, 0.8, -0.3, 0.0, 1.0, 0.1).view(3, 3)
    gate, tau, beta = numbers(2.0), 0.5, 3.0
    cyclic = {(0, 1): 1.6, (0, 2): 2.0, (1, 2): 1.2}  # 2 (x1 y2 - y1 x2)
    scalar = {(0, 1): 0.8, (0, 2): 0.4, (1, 2): -0.4}

    def rows(one):  # of an antisymmetric matrix from its upper triangle
        return numbers(one[0, 1] + one[0, 2], -one[0, 1] + one[1, 2], -one[0, 2] - one[1, 2])

    def chances(scores):
        return rows({pair: 1 / (1 + math.exp(-score / tau)) - 0.5 for pair, score in scores.items()})

    total = {pair: cyclic[pair] + scalar[pair] for pair in cyclic}
    weight = 0.9 / math.sqrt(4)
    mixed = {pair: (1 + weight) * scalar[pair] + (1 - weight) * cyclic[pair] for pair in cyclic}
    for kind, expected in {
        "score": rows(total) / tau / 3 / beta,
        "probability": chances(total) / 3 / beta,
        "dynamic": chances(mixed) / 3 / beta,
        "hard": numbers(1 / 6, 0.0, -1 / 6),
        "win_rate": chances(total) / 2 + 0.5,
    }.items():
        same(policy_target(group, gate, tau, kind=kind, beta=beta, iteration=4, mix=0.9), expected)


def test_sppo_of_small_scores_is_gpo_of_four_times_its_beta():
    small = 0.01 * embeddings()
    sppo = policy_target(small, None, TAU, kind="probability", beta=0.5)
    gpo = policy_target(small, None, TAU, kind="score", beta=2.0)
    assert gpo.abs().max() > 1e-4
    same(sppo, gpo, 1e-6 * gpo.abs().max().item())  # to the square of the scores


def test_dynamic_weights_leave_the_plain_probability_in_the_end():
    hybrid, gate = embeddings(dim=5), numbers(0.7, 1.6)

    def target(kind, **options):
        return policy_target(hybrid, gate, TAU, kind=kind, beta=0.5, **options)

    same(target("dynamic", mix=0.0), target("probability"))
    same(target("dynamic", iteration=10**14), target("probability"), 1e-6)
    first = policy_target(2 * hybrid[:, -1:], None, TAU, kind="probability", beta=0.5)
    same(target("dynamic"), first)  # iteration 1, mix 1: twice the scalar, and no planes


def test_a_bradley_terry_head_pulls_to_its_centered_rewards():
    rewards = embeddings(dim=1)
    expected = (rewards[:, 0] - rewards.mean()) / (0.5 * TAU)
    same(policy_target(rewards, None, TAU, kind="score", beta=0.5), expected)


def test_planes_and_scalar_add_up_to_the_score_target():
    group, gate = embeddings(dim=5), numbers(0.7, 1.6)
    parts = [policy_target(group[:, 2 * p : 2 * p + 2], gate[p : p + 1], TAU, beta=0.5) for p in range(2)]
    parts.append(policy_target(group[:, -1:], None, TAU, beta=0.5))
    same(sum(parts), policy_target(group, gate, TAU, beta=0.5))


def test_advantage_of_one_plane_is_grpo_s_of_the_mean_scores():
    group = embeddings(dim=2)
    rewards = plane_scores(group[:, None], group[None])[..., 0].mean(dim=1)
    same(plane_advantages(group), (rewards - rewards.mean()) / rewards.std(correction=0))
    rewards = embeddings(dim=1)[:, 0]
    same(plane_advantages(rewards[:, None]), (rewards - rewards.mean()) / rewards.std(correction=0))


def test_advantages_of_planes_are_weighed_by_the_gate_after_they_are_standardized():
    group, gate = embeddings(dim=5), numbers(0.7, 1.6)
    expected = 0.7 * plane_advantages(group[:, :2]) + 1.6 * plane_advantages(group[:, 2:4])
    expected += plane_advantages(group[:, 4:])
    same(plane_advantages(group, gate), expected)
    same(policy_target(group, gate, TAU, kind="planes", beta=0.5), expected)


@pytest.mark.parametrize("dim", [1, 4, 5])
@pytest.mark.parametrize("kind", ["score", "probability", "hard", "planes"])
def test_targets_of_a_group_sum_to_zero(kind, dim):
    for count in (1, 2, 5, 8):
        target = policy_target(embeddings(count, dim), None, TAU, kind=kind, beta=0.01)
        assert target.shape == (count,) and abs(target.sum()) < 1e-9 and (count == 1) == (target.abs().max() == 0)


@pytest.mark.parametrize("kind", ["score", "probability"])
def test_counting_itself_shrinks_a_target_by_k_minus_one_over_k(kind):
    for count in (2, 5):
        group = embeddings(count)
        with_self, without = (
            policy_target(group, None, TAU, kind=kind, beta=0.5, count_self=count_self) for count_self in (True, False)
        )
        same(with_self, (count - 1) / count * without)


def test_clamp_limits_targets_of_both_signs():
    free = policy_target(embeddings(), None, TAU, beta=0.5)
    limit = free.abs().median().item()
    clamped = policy_target(embeddings(), None, TAU, beta=0.5, clamp=limit)
    same(clamped, free.sign() * free.abs().clamp(max=limit))
    assert (clamped == limit).any() and (clamped == -limit).any() and (clamped == free).sum() >= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_ties_are_ties_whatever_the_rounding(dtype, scale):
    """Equal responses, and a symmetric cycle, whose mean scores are rounding alone."""
    angles = torch.arange(3) * 2 * math.pi / 3
    groups = [(scale * torch.tensor([[0.3, 0.7, 50.1]], dtype=dtype)).expand(7, 3)]
    if dtype != torch.bfloat16:  # in which the cycle itself is not symmetric
        groups.append(scale * torch.stack([angles.cos(), angles.sin()], dim=1).to(dtype))
    for group in groups:
        assert best_and_worst(preference_matrix(group)) is None
        for kind in ("planes", "hard"):
            target = policy_target(group, None, TAU, kind=kind, beta=0.5)
            assert target.dtype == torch.promote_types(dtype, torch.float32) and (target == 0).all()
        assert policy_target(group, None, TAU, beta=0.5).abs().max() < 1e-5 * scale**2


@pytest.mark.parametrize("kind", ["score", "probability", "dynamic"])
def test_half_precision_embeddings_are_computed_in_fp32(kind):
    group = torch.cat([embeddings(dim=4), 300 + embeddings(dim=1)], dim=1).bfloat16()
    found = policy_target(group, None, 10.0, kind=kind, beta=0.5, iteration=3)
    assert found.dtype == torch.float32
    same(found.double(), policy_target(group.double(), None, 10.0, kind=kind, beta=0.5, iteration=3), 1e-5)


@pytest.mark.parametrize("name", ["beta", "temperature", "iteration", "clamp"])
@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
def test_targets_refuse_numbers_out_of_range(name, value):
    options = {"temperature": TAU, "beta": 0.5, "iteration": 1, "clamp": 1.0} | {name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}, expected above 0"):
        policy_target(embeddings(), None, options.pop("temperature"), **options)


def test_targets_refuse_what_they_cannot_mean():
    with pytest.raises(ValueError, match="unknown target 'rank': expected one of score, probability"):
        policy_target(embeddings(), None, TAU, kind="rank", beta=0.5)
    with pytest.raises(ValueError, match="at least one response"):
        policy_target(embeddings()[:0], None, TAU, beta=0.5)
    for dim in (1, 6):
        with pytest.raises(ValueError, match=f"needs a hybrid head, not D = {dim}"):
            policy_target(embeddings(dim=dim), None, TAU, kind="dynamic", beta=0.5)
    with pytest.raises(ValueError, match="the gate has 2 weights"):
        policy_target(embeddings(), torch.ones(2), TAU, kind="planes", beta=0.5)
