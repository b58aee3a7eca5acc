"""Policy losses against other trainers' figures, the published methods that they contain, groups, clipping, lengths."""

import pytest
import torch

from general_preference.alignment.targets import best_and_worst, policy_target
from general_preference.models.losses import policy_loss, preference_loss
from general_preference.models.score import preference_matrix

PAIR = torch.tensor([0, 0])
TAU = 0.4


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def embeddings(count=5, dim=6, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(one, other, tolerance=1e-12):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


# TRL 1.16.0, DPOTrainer._compute_loss at beta 0.3 in float64, for each of these pairs alone.
CHOSEN, REJECTED = numbers(1.25, -0.4, 3.0), numbers(-0.75, 0.6, 1.5)  # log-ratios to the reference
TOKENS = torch.tensor([[4, 3], [2, 5], [7, 1]])
TRL = {
    "sigmoid": numbers(0.43748795, 0.854355244, 0.493248946),
    "sigmoid_norm": numbers(0.612327535, 0.742298738, 0.866720792),
    "ipo": numbers(1.219184028, 3.946844444, 7.497165533),
    "sppo_hard": numbers(1.013888889, 9.408888889, 11.805555556),
}
BETA = 0.3
PAIRS = torch.tensor([0, 0, 1, 1, 2, 2])


def losses_of_pairs(target, **options):
    """(3, 2) losses of TRL's three pairs, all in one call; target: of the first of a pair and of the second."""
    log_ratio = torch.stack([CHOSEN, REJECTED], dim=1).flatten()
    return policy_loss(log_ratio, target.repeat(3), PAIRS, length=TOKENS.flatten(), **options).view(3, 2)


def hard_target(beta):
    return policy_target(numbers(3.0, 1.0)[:, None], None, TAU, kind="hard", beta=beta)


@pytest.mark.parametrize(("name", "gamma"), [("sigmoid", 0.0), ("sigmoid_norm", 1.0)])
def test_dpo_as_trl_computes_it(name, gamma):
    found = losses_of_pairs(numbers(1.0, 0.0), kind="logistic", beta=BETA, gamma=gamma)
    same(found, TRL[name][:, None].expand(3, 2), 1e-6)


def test_ipo_as_trl_computes_it():
    """TRL's is the square of the pair, which is the sum of ours twice; its gap 1 / (2 beta) is ours of 2 beta."""
    found = losses_of_pairs(hard_target(2 * BETA), kind="centered", gamma=1.0)
    same(2 * found.sum(dim=1), TRL["ipo"], 1e-6)


def test_sppo_hard_as_trl_computes_it():
    """TRL adds both responses' squares: twice our mean."""
    found = losses_of_pairs(hard_target(BETA), kind="regression")
    same(found.sum(dim=1), TRL["sppo_hard"], 1e-6)


@pytest.mark.parametrize(("beta", "expected"), [(0.3, 0.12205771642261329), (0.001, 50945.78326644567)])
def test_sppo_as_published(beta, expected):
    """uclaml/SPPO's formulas evaluated apart: loss "sppo" of sppo/trainer.py (e524519), its probabilities those of
    scripts/compute_prob.py (5bb639c)."""
    rewards = numbers(0.2, 1.5, -0.7, 0.9, 0.1)[:, None]
    ends = list(best_and_worst(preference_matrix(rewards)))
    assert ends == [1, 2]
    target = policy_target(rewards, None, 1.0, kind="probability", beta=beta)[ends]
    found = policy_loss(numbers(1.25, -0.75), target, PAIR, kind="regression").mean()
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_sppo_single_as_published():
    """As above, loss "sppo_single": the pair's own probability, which is the target among the others of a pair."""
    target = policy_target(numbers(1.5, -0.7)[:, None], None, 1.0, kind="probability", beta=0.3, count_self=False)
    found = policy_loss(numbers(1.25, -0.75), target, PAIR, kind="regression").mean()
    assert found.item() == pytest.approx(0.17416627146380392, abs=1e-9)


def test_a_centered_pair_is_a_quarter_of_the_square_of_its_difference():
    rho, target = numbers(1.3, -0.2), numbers(0.4, -0.9)
    gap = (rho[0] - rho[1]) - (target[0] - target[1])
    same(policy_loss(rho, target, PAIR), (gap**2 / 4).expand(2))


def test_inpo_is_a_centered_pair_with_two_anchors():
    """Zhang et al., arXiv 2407.00617: (h_w - h_l - 1 / (2 eta))^2, h = l - tau / eta l_ref - (1 - tau / eta) l_t."""
    now, reference, last = numbers(-5.0, -7.5), numbers(-6.0, -6.2), numbers(-5.5, -7.0)
    for tau in (0.0, 0.1):  # 0: mirror descent without a reference
        eta = 0.3
        rho = now - tau / eta * reference - (1 - tau / eta) * last
        found = policy_loss(rho, hard_target(2 * eta), PAIR)
        same(4 * found, ((rho[0] - rho[1] - 1 / (2 * eta)) ** 2).expand(2))


def test_dpo_is_the_preference_loss_of_the_log_ratios():
    rho = numbers(0.4, 1.3, -0.2, 0.9)
    group, chance = torch.tensor([3, 1, 3, 1]), numbers(0.8, 0.0, 0.2, 1.0)
    found = policy_loss(rho, chance, group, kind="logistic", beta=0.1)
    expected = [
        preference_loss(rho[0] - rho[2], temperature=10.0, label=0.8),
        preference_loss(rho[3] - rho[1], temperature=10.0),
    ]
    same(found, torch.stack([expected[0], expected[1], expected[0], expected[1]]))


@pytest.mark.parametrize("kind", ["centered", "regression"])
def test_groups_of_any_sizes_in_any_order_do_not_touch_each_other(kind):
    sizes = (1, 4, 2, 3)
    group = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    rho, target = embeddings(10, 1)[:, 0], embeddings(10, 1, seed=1)[:, 0]
    alone = [
        policy_loss(*values, torch.zeros(len(values[0]), dtype=torch.long), kind=kind)
        for values in zip(rho.split(sizes), target.split(sizes), strict=True)
    ]
    same(policy_loss(rho, target, group, kind=kind), torch.cat(alone))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    same(policy_loss(rho[order], target[order], group[order], kind=kind), torch.cat(alone)[order])
    renamed = torch.tensor([7, 0, 9, 2])[group]
    same(policy_loss(rho, target, renamed, kind=kind), torch.cat(alone))


def test_equal_responses_give_a_centered_loss_without_gradient():
    rho = torch.full((4,), 0.37, dtype=torch.float64, requires_grad=True)
    target = policy_target(embeddings(1).expand(4, -1), None, TAU, beta=0.5)
    assert (target == 0).all()
    loss = policy_loss(rho, target, torch.zeros(4, dtype=torch.long))
    loss.mean().backward()
    assert loss.abs().max() < 1e-20 and rho.grad.abs().max() < 1e-15


def test_length_normalization_divides_the_log_ratio_alone():
    rho, target, length = numbers(6.0, -3.0), numbers(0.5, -0.5), torch.tensor([4, 9])
    for gamma, divisor in ((0.5, numbers(2.0, 3.0)), (1.0, numbers(4.0, 9.0)), (0.0, numbers(1.0, 1.0))):
        found = policy_loss(rho, target, PAIR, kind="regression", length=length, gamma=gamma)
        same(found, (rho / divisor - target) ** 2)
        found = policy_loss(rho, target, PAIR, kind="centered", length=length, gamma=gamma)
        same(found, policy_loss(rho / divisor, target, PAIR, kind="centered"))
    empty = policy_loss(rho, target, PAIR, kind="regression", length=torch.tensor([0, 9]), gamma=1.0)
    same(empty[0], numbers(5.5)[0] ** 2)


def test_the_surrogate_clips_only_what_would_move_on():
    """Ratios 2, 2, 1/2, 1/2 and 1.1 with advantages of both signs: no gradient where the policy has gone far enough."""
    length = torch.tensor([3, 3, 5, 5, 2])
    rho = (numbers(2.0, 2.0, 0.5, 0.5, 1.1).log() * length).requires_grad_()
    advantage, group = numbers(1.5, -1.5, 1.5, -1.5, 1.5), torch.zeros(5, dtype=torch.long)
    loss = policy_loss(rho, advantage, group, kind="surrogate", length=length, clip=0.2)
    same(loss.detach(), numbers(-1.8, 3.0, -0.75, 1.2, -1.65))
    loss.sum().backward()
    same(rho.grad, numbers(0.0, 3.0 / 3, -0.75 / 5, 0.0, -1.65 / 2))
    free = policy_loss(rho.detach(), advantage, group, kind="surrogate", length=length)
    same(free, numbers(-3.0, 3.0, -0.75, 0.75, -1.65))


def test_likelihood_is_the_mean_negative_log_probability_of_a_token():
    log_prob, length = numbers(-6.0, -4.0, 0.0), torch.tensor([3, 8, 0])
    found = policy_loss(log_prob, torch.zeros(3), torch.arange(3), kind="likelihood", length=length)
    same(found, numbers(2.0, 0.5, 0.0))


@pytest.mark.parametrize("kind", ["centered", "regression", "logistic", "surrogate", "likelihood"])
def test_half_precision_log_ratios_are_computed_in_fp32(kind):
    rho, target = torch.tensor([1.3, -0.2]).bfloat16(), torch.tensor([0.9, 0.1])
    found = policy_loss(rho, target, PAIR, kind=kind, length=torch.tensor([3, 7]))
    exact = policy_loss(rho.double(), target.double(), PAIR, kind=kind, length=torch.tensor([3, 7]))
    assert found.dtype == torch.float32
    same(found.double(), exact, 1e-6)


def test_wrong_requests_are_refused():
    rho, length = torch.zeros(3), torch.ones(3)
    group = torch.tensor([0, 0, 0])
    with pytest.raises(ValueError, match="unknown policy loss 'hinge': expected one of centered, regression"):
        policy_loss(rho, rho, group, kind="hinge")
    with pytest.raises(ValueError, match="compares pairs, but a group has 3 responses"):
        policy_loss(rho, rho, group, kind="logistic")
    with pytest.raises(ValueError, match="compares pairs, but a group has 1 responses"):
        policy_loss(rho, rho, torch.tensor([0, 0, 1]), kind="logistic")
    for kind, gamma in (("surrogate", 0.0), ("likelihood", 0.0), ("regression", 1.0), ("logistic", 0.5)):
        with pytest.raises(ValueError, match=f"the {kind} loss needs the lengths"):
            policy_loss(rho, rho, group, kind=kind, gamma=gamma)
    assert policy_loss(rho, rho, group, kind="likelihood", length=length).shape == (3,)
