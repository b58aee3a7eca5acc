"""From matrices to winners: symmetry, ties, optimality, and the split into a transitive and a cyclic part."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from general_preference.errors import InputError
from general_preference.inference import ranking

# Rock, paper and scissors, and below them something that only rock beats clearly.
CYCLE = [[0.0, -2.0, 1.0, 4.0], [2.0, 0.0, -1.0, 0.5], [-1.0, 1.0, 0.0, 0.5], [-4.0, -0.5, -0.5, 0.0]]


def random_matrix(count: int, seed: int = 0) -> torch.Tensor:
    scores = torch.randn(count, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.sigmoid(2 * (scores - scores.T))


def cycle(count: int, strength: float = 0.9) -> torch.Tensor:
    matrix = torch.full((count, count), 0.5, dtype=torch.float64)
    for i in range(count):
        matrix[i, (i + 1) % count], matrix[(i + 1) % count, i] = strength, 1 - strength
    return matrix


def ladder(rewards: list[float]) -> torch.Tensor:
    values = torch.tensor(rewards, dtype=torch.float64)
    return torch.sigmoid(values[:, None] - values[None, :])


@pytest.mark.parametrize("method", ranking.METHODS)
def test_a_ladder_is_ranked_by_its_rewards(method):
    assert ranking.rank(ladder([0.3, 2.0, -1.0, 1.0]), method) == [1, 3, 0, 2]


@pytest.mark.parametrize("method", ranking.METHODS)
def test_one_two_and_ties(method):
    rate = ranking.METHODS[method]
    assert ranking.rank([[0.5]], method) == [0]
    assert rate([[0.5]]).tolist() == pytest.approx([1.0 if method == "nash" else 0.5])
    assert ranking.rank([[0.5, 0.2], [0.8, 0.5]], method) == [1, 0]
    tied = rate(torch.full((5, 5), 0.5))
    torch.testing.assert_close(tied, tied[:1].expand(5), atol=1e-4, rtol=0)
    assert ranking.rank(torch.full((5, 5), 0.5), method) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [3, 5])
def test_a_cycle_is_tied_by_borda_and_mixed_by_nash(count):
    matrix = cycle(count)
    torch.testing.assert_close(ranking.borda(matrix), torch.full((count,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(
        ranking.nash(matrix), torch.full((count,), 1 / count, dtype=torch.float64), atol=1e-4, rtol=0
    )
    found = ranking.cycles(matrix, longest=count)
    assert found == [list(range(count))]


def test_uneven_cycles_are_mixed_by_what_is_at_stake():
    # Rock-paper-scissors with stakes a, b, c: the weights are proportional to the stake between the other two.
    a, b, c = 0.1, 0.2, 0.4
    payoff = torch.tensor([[0, a, -b], [-a, 0, c], [b, -c, 0]], dtype=torch.float64)
    weights = ranking.nash(payoff + 0.5)
    torch.testing.assert_close(weights, torch.tensor([c, b, a], dtype=torch.float64) / (a + b + c), atol=1e-4, rtol=0)


def test_a_winner_above_a_cycle_takes_everything():
    matrix = torch.full((4, 4), 0.8, dtype=torch.float64)
    matrix[1:, 0], matrix[0, 0] = 0.2, 0.5
    matrix[1:, 1:] = cycle(3)
    assert ranking.nash(matrix).tolist() == pytest.approx([1, 0, 0, 0], abs=1e-4)
    assert ranking.rank(matrix, "nash")[0] == ranking.rank(matrix, "copeland")[0] == 0
    assert ranking.cycles(matrix) == [[1, 2, 3]]


def test_large_and_small_stakes():
    count = 201  # every response beats the next hundred: all weights are equal, and small
    behind = (torch.arange(count)[None, :] - torch.arange(count)[:, None]) % count
    matrix = torch.where(behind == 0, 0.5, torch.where(behind <= count // 2, 0.9, 0.1)).double()
    torch.testing.assert_close(ranking.nash(matrix), torch.full((count,), 1 / count, dtype=torch.float64))
    payoff = torch.tensor([[0, 1, -2], [-1, 0, 4], [2, -4, 0]], dtype=torch.float64) * 1e-5
    assert ranking.nash(payoff + 0.5).tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=1e-4)
    assert ranking.nash(payoff * 1e-3 + 0.5).tolist() == pytest.approx([1 / 3] * 3), "fp32 cannot tell these from ties"


def test_two_tied_winners_share_the_weight():
    matrix = torch.tensor([[0.5, 0.5, 0.9], [0.5, 0.5, 0.9], [0.1, 0.1, 0.5]])
    assert ranking.nash(matrix).tolist() == pytest.approx([0.5, 0.5, 0], abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10**6))
def test_no_response_beats_the_von_neumann_winner(count, seed):
    matrix = random_matrix(count, seed)
    weights = ranking.nash(matrix)
    assert weights.sum().item() == pytest.approx(1) and weights.min() >= 0
    assert (weights @ matrix - 0.5).min() > -1e-5
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(ranking.nash(matrix[order][:, order]), weights[order], atol=1e-4, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(0, 10**6))
def test_the_hodge_split_is_orthogonal_and_whole(count, seed):
    scores = torch.logit(random_matrix(count, seed))
    split = ranking.hodge(scores)
    torch.testing.assert_close(split.transitive + split.cyclic, scores)
    assert (split.transitive * split.cyclic).sum().item() == pytest.approx(0, abs=1e-9)
    assert split.cyclic.sum(dim=1).abs().max() < 1e-12 * max(1, scores.abs().max()) * count + 1e-12
    assert split.transitive_share + split.cyclic_share == pytest.approx(1)
    if count < 3:
        assert split.cyclic_share == pytest.approx(0, abs=1e-12)


def test_shares_of_known_matrices():
    rewards = torch.tensor([2.0, 0.5, -1.0, 0.0])
    split = ranking.hodge(rewards[:, None] - rewards[None, :])
    assert split.cyclic_share < 1e-12
    torch.testing.assert_close(split.potential.float(), rewards - rewards.mean())
    assert ranking.hodge(torch.logit(cycle(3))).cyclic_share == pytest.approx(1)
    assert ranking.hodge(torch.zeros(3, 3)).cyclic_share == 0


def test_cycles_are_all_found_once_the_most_decided_first():
    matrix = random_matrix(6, seed=3)
    wins = matrix > 0.5
    expected = {
        (i, j, k)
        for i in range(6) for j in range(6) for k in range(6)
        if i == min(i, j, k) and wins[i, j] and wins[j, k] and wins[k, i]
    }  # fmt: skip
    found = ranking.cycles(matrix)
    assert {tuple(one) for one in found} == expected and len(found) == len(expected) > 1
    weakest = [min(matrix[a, b].item() for a, b in zip(one, [*one[1:], one[0]], strict=True)) for one in found]
    assert weakest == sorted(weakest, reverse=True)
    assert ranking.cycles(matrix, longest=6)[0] == max(
        ranking.cycles(matrix, longest=6),
        key=lambda one: min(matrix[a, b].item() for a, b in zip(one, [*one[1:], one[0]], strict=True)),
    )
    assert all(one[0] == min(one) for one in ranking.cycles(matrix, longest=6)) and ranking.cycles([[0.5]]) == []


def test_response_scores_of_a_cycle():
    assert ranking.response_scores(CYCLE) == [Fraction(3, 4), Fraction(3, 8), Fraction(1, 8), Fraction(-5, 4)]
    assert ranking.response_scores(CYCLE, "copeland") == [Fraction(2, 3), Fraction(2, 3), Fraction(2, 3), 0]
    assert ranking.response_scores(CYCLE, "min") == [-2.0, -1.0, -1.0, -4.0]
    weights = ranking.response_scores(CYCLE, "nash", temperature=0.5)
    assert sum(weights) == pytest.approx(1, abs=1e-5) and weights[3] == 0 and min(weights[:3]) > 0.1
    assert all(ranking.response_scores([[0.0]], method) == [0] for method in ("borda", "copeland", "min"))
    with pytest.raises(InputError, match=r"'elo'.*borda, copeland, nash, min"):
        ranking.response_scores(CYCLE, "elo")


def test_scores_that_tie_keep_tying_exactly():
    third = torch.tensor(1 / 3, dtype=torch.float32).item()
    scores = [[0.0, third, -0.1], [-third, 0.0, 0.1 + 2 * third], [0.1, -0.1 - 2 * third, 0.0]]
    wanted = [sum(map(Fraction, row)) / 3 for row in scores]
    assert ranking.response_scores(scores) == wanted and sum(wanted) == 0


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([], "at least one row"),
        ([[0.5, 0.5]], "square"),
        ([[0.5, math.nan], [0.5, 0.5]], "not finite"),
        ([[0.5, 0.9], [0.9, 0.5]], "P\\[i\\]\\[j\\]"),
        ([[0.5, 2.0], [-1.0, 0.5]], "from 0 to 1"),
        ("text", "not a matrix"),
    ],
)
def test_what_is_no_preference_matrix_is_refused(matrix, message):
    for rate in ranking.METHODS.values():
        with pytest.raises(InputError, match=message):
            rate(matrix)


def test_unknown_method_and_scores_that_are_not_antisymmetric():
    with pytest.raises(InputError, match=r"'elo'.*borda, copeland, nash"):
        ranking.rank([[0.5]], "elo")
    with pytest.raises(InputError, match="not antisymmetric"):
        ranking.hodge([[0.0, 1.0], [1.0, 0.0]])
    with pytest.raises(InputError, match="at least 3"):
        ranking.cycles([[0.5]], longest=2)
