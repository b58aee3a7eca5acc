"""Policies that play a preference game against themselves: where the losses' minima are, and where iterating leads.

A game is an antisymmetric score matrix S; its planes are real embeddings, so the targets are the package's own.
"""

import math

import pytest
import torch
from scipy.linalg import schur
from scipy.optimize import root

from general_preference.alignment.targets import policy_target
from general_preference.inference.ranking import nash
from general_preference.models.losses import policy_loss
from general_preference.models.score import preference_matrix

CYCLE = torch.tensor([[0, 1, -1], [-1, 0, 1], [1, -1, 0]], dtype=torch.float64)
DOMINANT = torch.zeros(4, 4, dtype=torch.float64)  # the first beats the members of a cycle
DOMINANT[0, 1:], DOMINANT[1:, 0], DOMINANT[1:, 1:] = 2, -2, CYCLE
RANDOM = torch.randn(6, 6, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
GAMES = {"cycle": CYCLE, "dominant": DOMINANT, "random": (RANDOM - RANDOM.T) / 2}
COPIES = {"cycle": [2, 3, 5], "dominant": [1, 4, 3, 2], "random": [1, 2, 3, 4, 5, 6]}  # the policy: copies / their sum
TAU = 0.5  # of the preference model, so that forgetting it shows


def embed(game: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (K, 2P) and gate (P,) whose scores are TAU * game: the planes of its real Schur form."""
    blocks, basis = (torch.from_numpy(matrix) for matrix in schur(game.numpy(), output="real"))
    first = [i for i in range(len(game) - 1) if blocks[i, i + 1].abs() > 1e-9]
    embeddings = basis[:, [column for i in first for column in (i, i + 1)]]
    gate = TAU * torch.stack([blocks[i, i + 1] for i in first])
    torch.testing.assert_close(preference_matrix(embeddings, gate), TAU * game, rtol=0, atol=1e-12)
    return embeddings, gate


def minimize(policy: torch.Tensor, rows: torch.Tensor, target: torch.Tensor, kind: str) -> torch.Tensor:
    """The tabular policy that minimizes the mean loss of the responses `rows`, which are in its proportions."""
    logits = policy.log().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        log_ratio = (logits.log_softmax(0) - policy.log())[rows]
        loss = policy_loss(log_ratio, target, torch.zeros_like(rows), kind=kind).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(0)


def group_of(name: str, beta: float):
    """(policy, rows, target, closed form) of a group that holds each response in exact proportion to the policy."""
    copies = torch.tensor(COPIES[name])
    rows, policy = torch.arange(len(copies)).repeat_interleave(copies), copies.double() / copies.sum()
    embeddings, gate = embed(GAMES[name])
    target = policy_target(embeddings[rows], gate, TAU, beta=beta)
    closed = policy * (GAMES[name] @ policy / beta).exp()
    return policy, rows, target, closed / closed.sum()


@pytest.mark.parametrize("beta", [4.0, 1.0, 0.25])
@pytest.mark.parametrize("name", GAMES)
def test_the_minimum_of_the_centered_loss_is_the_multiplicative_weights_step(name, beta):
    policy, rows, target, closed = group_of(name, beta)
    found = minimize(policy, rows, target, "centered")
    torch.testing.assert_close(found, closed, rtol=0, atol=1e-8)
    assert (found - policy).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "beta", "off"),
    [("cycle", 4.0, 3.0e-5), ("dominant", 1.0, 0.106), ("dominant", 0.25, 0.328), ("random", 0.25, 0.044)],
)
def test_taking_log_z_for_zero_moves_the_minimum_by_known_amounts(name, beta, off):
    policy, rows, target, closed = group_of(name, beta)
    found = minimize(policy, rows, target, "regression")
    assert (found - closed).abs().max() == pytest.approx(off, rel=0.02)
    log_z = (policy * (GAMES[name] @ policy / beta).exp()).sum().log()
    exact = minimize(policy, rows, target - log_z, "regression")
    torch.testing.assert_close(exact, closed, rtol=0, atol=1e-8)


def play(name, start, steps, *, beta, anchor=0.0):
    """The policies from `start` on: each is the centered loss's minimum, of anchors start: anchor, last: 1 - anchor.

    Scores are bilinear: against the mean embedding under a policy, a response's score is its mean over the policy.
    """
    embeddings, gate = embed(GAMES[name])
    first, policies = start.log(), [start]
    for _ in range(steps):
        last = policies[-1]
        pairs = torch.stack([embeddings, (last @ embeddings).expand_as(embeddings)], dim=1)
        target = torch.stack([policy_target(pair, gate, TAU, beta=beta, count_self=False)[0] for pair in pairs])
        policies.append((anchor * first + (1 - anchor) * last.log() + target).softmax(0))
    return policies


def gap(name, policy):
    """Duality gap of the policy against itself; 0 for the von Neumann winner alone."""
    return 2 * (GAMES[name] @ policy).max().item()


def divergence(one, other):
    return (one * (one / other).log()).sum().item()


def policy_of(*weights):
    return torch.tensor(weights, dtype=torch.float64) / sum(weights)


@pytest.mark.parametrize("name", GAMES)
def test_the_average_policy_approaches_the_von_neumann_winner(name):
    start, largest = policy_of(*COPIES[name]), GAMES[name].abs().max()
    winner = nash(0.5 + GAMES[name] / (2 * largest))  # of the scores: sigmoid would make it another game
    # Regret of exponential weights: KL(winner, start) beta + steps (2 largest)^2 / (8 beta), at beta = sqrt(steps).
    bound = 2 * (-start.min().log() + largest**2 / 2).item()
    away = []
    for steps in (10, 40, 160, 640):
        found = torch.stack(play(name, start, steps - 1, beta=math.sqrt(steps))).mean(dim=0)
        assert -1e-9 < gap(name, found) * math.sqrt(steps) < bound
        away.append((found - winner).abs().max().item())
    assert away[-1] < 0.1 and away[-1] < away[0] / 2
    assert abs(gap(name, winner)) < 1e-6


def test_the_last_policy_circles_outward_in_a_cycle_and_settles_where_one_response_dominates():
    policies = play("cycle", policy_of(0.4, 0.35, 0.25), 1000, beta=1 / 0.3)
    away = [divergence(policy_of(1, 1, 1), policies[step]) for step in (0, 100, 500, 1000)]
    assert away == pytest.approx([0.019, 0.234, 2.42, 4.19], rel=0.02)
    settled = play("dominant", policy_of(*COPIES["dominant"]), 40, beta=math.sqrt(40))[-1]
    assert gap("dominant", settled) < 2e-4 and settled[0] > 0.9999


def test_inpo_reaches_the_regularized_nash_policy_linearly_if_eta_is_large_enough():
    tau, start = 0.1, policy_of(5, 3, 2)

    def unlike(logits):  # 0 where pi is proportional to start * exp(S pi / tau)
        logits = torch.from_numpy(logits)
        return (start.log() + CYCLE @ logits.softmax(0) / tau - logits).numpy()

    solved = root(unlike, start.log().numpy(), tol=1e-14)
    winner = torch.from_numpy(solved.x).softmax(0)
    assert abs(unlike(solved.x)).max() < 1e-12
    away = {
        eta: [divergence(winner, policy) for policy in play("cycle", start, 400, beta=eta, anchor=tau / eta)]
        for eta in (1.0, 3.0, 10.0)
    }
    for eta, factor in ((3.0, 18.5), (10.0, 5.3)):
        for step in (100, 200, 300):
            assert away[eta][step] / away[eta][step + 100] == pytest.approx(factor, rel=0.05)
    assert min(away[1.0][100:]) > 0.3  # too small an eta: the step overshoots for ever
