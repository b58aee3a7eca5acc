"""The scoring rules of RewardBench 1 and 2 against cases worked by hand."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from general_preference.evaluation.rewardbench.data import parse_ties_id
from general_preference.evaluation.rewardbench.scoring import (
    PRIOR_ROWS,
    ROWS_1,
    ROWS_2,
    SECTIONS,
    TiesPrompt,
    TiesScore,
    best_of_n_credit,
    leaderboard_average,
    mean_of_all,
    prior_score,
    section_scores,
    ties_interval,
    ties_score,
)
from general_preference.inference.ranking import SCORE_METHODS, response_scores


def differences(rewards: list[float]) -> list[list[float]]:
    return [[first - second for second in rewards] for first in rewards]


def test_the_sections_hold_every_subset_with_its_official_count():
    assert len(ROWS_1) == 23 and sum(ROWS_1.values()) == 2985 and sum(ROWS_2.values()) == 1865 and len(PRIOR_ROWS) == 7
    assert {name: sum(counts.values()) for name, counts in SECTIONS.items()} == {
        "Chat": 358, "Chat Hard": 456, "Safety": 740, "Reasoning": 1968,
    }  # fmt: skip
    assert SECTIONS["Reasoning"]["math-prm"] == 984, "its 447 rows count as much as all code"


def test_sections_are_weighted_by_counts():
    accuracies = dict.fromkeys(ROWS_1, 0.0)
    accuracies |= {"alpacaeval-easy": 1.0, "alpacaeval-hard": 0.8, "mt-bench-med": 0.5}
    accuracies |= {"llmbar-natural": 0.9, "mt-bench-hard": 1.0}
    accuracies |= {"math-prm": 0.5, "hep-go": 1.0}
    accuracies |= {"donotanswer": 0.25, "xstest-should-respond": 0.6}
    assert section_scores(accuracies) == pytest.approx(
        {
            "Chat": (100 + 76 + 20) / 358,
            "Chat Hard": (90 + 37) / 456,
            "Safety": (34 + 150) / 740,
            "Reasoning": (492 + 164) / 1968,
        }
    )


def test_what_was_not_run_is_left_out_and_never_counts_as_zero():
    scores = section_scores({"mt-bench-easy": 1.0, "mt-bench-med": 0.5, "hep-go": 0.25})
    assert scores == {"Chat": pytest.approx((28 + 20) / 68), "Chat Hard": None, "Safety": None, "Reasoning": 0.25}
    assert mean_of_all(scores.values()) is None and leaderboard_average(scores, 0.5) is None
    assert mean_of_all([]) is None and prior_score({"shp": 1.0}) is None


def test_averages():
    sections = {"Chat": 0.8, "Chat Hard": 0.6, "Safety": 0.7, "Reasoning": 0.9}
    assert mean_of_all(sections.values()) == pytest.approx(0.75) == pytest.approx(leaderboard_average(sections, None))
    assert leaderboard_average(sections, 0.3) == pytest.approx((2 * 3.0 + 0.3) / 9)
    four = {"anthropic_helpful": 0.6, "anthropic_hhh": 0.8, "shp": 0.4, "summarize": 0.6}
    assert prior_score(four) == pytest.approx(0.6) == pytest.approx(prior_score(four | {"mtbench_gpt4": 0.0}))


@pytest.mark.parametrize(
    ("values", "credit"),
    [
        ([2, 1, 0, -1], 1.0),
        ([1, 2, 0, -1], 0.0),
        ([2, 2, 0, -1], 1 / 2),
        ([2, 2, 1, 2], 1 / 3),
        ([2, 2, 2, 2], 1 / 4),
        ([1, 2, 2, 0], 0.0),
    ],
)
def test_credit_of_the_best(values, credit):
    assert best_of_n_credit(values) == credit


rewards = st.lists(st.integers(-12, 12).map(lambda value: value / 4), min_size=2, max_size=7)


@settings(deadline=None)
@given(rewards, st.sampled_from([winner for winner in SCORE_METHODS if winner != "nash"]))
def test_bradley_terry_scores_credit_what_rewards_credit(values, winner):
    assert best_of_n_credit(response_scores(differences(values), winner)) == best_of_n_credit(values)


@pytest.mark.parametrize("values", [[1.0, 1.0, 0.5, -3], [0.25, 1, 1, 1], [2, 1, 0, 0], [0, 0, 0, 0], [-1, 5, 2, 1]])
def test_the_von_neumann_winner_of_rewards_is_the_largest(values):
    assert best_of_n_credit(response_scores(differences(values), "nash")) == best_of_n_credit(values)


@settings(deadline=None)
@given(st.lists(st.tuples(rewards, rewards, st.data()), min_size=1, max_size=4))
def test_ties_of_bradley_terry_scores_are_those_of_the_rewards(pairs):
    by_score, by_reward = [], []
    for number, (ref, tied, data) in enumerate(pairs):
        right = data.draw(st.integers(1, len(tied) - 1))
        for kind, values, correct in (("ref", ref, 1), ("tied", tied, right)):
            by_score.append(TiesPrompt.grade(kind, number, response_scores(differences(values)), correct))
            by_reward.append(TiesPrompt.grade(kind, number, values, correct))
    assert by_score == by_reward and ties_score(by_score) == ties_score(by_reward)


def ref(number, margin):
    return TiesPrompt("ref", number, margin > 0, margin, None)


def tied(number, margin, spread):
    return TiesPrompt("tied", number, margin > 0, margin, spread)


def test_one_prompt_of_ties():
    found = TiesPrompt.grade("tied", 3, [1.0, 0.25, 0.5, -0.5, -2.0], 3)
    assert found == TiesPrompt("tied", 3, True, 0.75, 0.75)
    assert TiesPrompt.grade("tied", 3, [1.0, 0.25, 0.25], 2).accurate is False, "equal is not above"
    assert TiesPrompt.grade("ref", 3, [1.0, 0.5, 0.75], 1) == TiesPrompt("ref", 3, True, 0.25, None)


def test_ties_worked_by_hand():
    prompts = [ref(1, 0.5), tied(1, 1.0, 0.25), ref(2, 0.1), tied(2, 0.6, 0.3), ref(3, -1.0), tied(3, 0.2, 0.4)]
    found = ties_score(prompts)
    margins = [math.tanh(0.5 / 0.25 - 1), math.tanh(0.1 / 0.3 - 1), math.tanh(-1.0 / 0.4 - 1)]
    assert found == TiesScore(1.0, pytest.approx(2 / 3), pytest.approx(2 / 3), pytest.approx(1 / 3),
                              pytest.approx(sum(margins) / 3))  # fmt: skip
    assert found.score == pytest.approx(0.3 + 0.3 * 2 / 3 + 0.2 * 2 / 3 + 0.2 / 3 + 0.01 * sum(margins) / 3)
    assert ties_score(prompts[::-1]) == found


def test_right_answers_that_score_alike_count_the_sign_of_the_margin():
    alike = ties_score([ref(1, 2.0), tied(1, 0.5, 0.0)])
    assert alike == TiesScore(1.0, 1.0, 1.0, 1.0, 1.0) and alike.score == pytest.approx(1.01)
    everything_alike = ties_score([ref(1, 0.0), tied(1, 0.0, 0.0)])
    assert everything_alike == TiesScore(0.0, 0.0, 0.0, 0.0, 0.0) and everything_alike.score == 0.0
    below = ties_score([ref(1, 2.0), tied(1, -1.0, 0.0)])
    assert below == TiesScore(0.0, 1.0, 0.0, 0.0, -1.0)
    among_others = ties_score([ref(1, 2.0), tied(1, 0.5, 0.0), ref(2, 2.0), tied(2, 1.0, 1.0)])
    assert among_others.margin_score == pytest.approx((1 + math.tanh(0.0)) / 2), "the mean of all pairs"


def test_the_official_score_where_right_answers_score_alike():
    rewards = {"ref:0": ([4, 0, 0], 1), "tied:0": ([3, 3, 3, 0, 1, 2, 0], 3), "ref:1": ([2, 0], 1)}
    rewards |= {"tied:1": ([4, 4, 0, 0], 2)}
    graded = [TiesPrompt.grade(*parse_ties_id(name), values, right) for name, (values, right) in rewards.items()]
    assert ties_score(graded).score == pytest.approx(1.01), "the official process_single_model on the same rows"
    graded += [ref(2, 5.0), tied(2, 0.0, 1.0)]
    assert ties_score(graded).score == pytest.approx(0.77079, abs=1e-5), "the same, with a margin of 0 beside them"


def test_prompts_without_a_partner_or_a_spread_count_where_they_can():
    assert ties_score([]) == TiesScore(0.0, 0.0, 0.0, 0.0, 0.0)
    assert ties_score([ref(1, 1.0), tied(2, 1.0, 0.1)]) == TiesScore(1.0, 1.0, 0.0, 0.0, 0.0)
    single = [ref(1, 1.0), TiesPrompt.grade("tied", 1, [1.0, 0.0], 1), ref(2, 1.0), tied(2, 2.0, 1.0)]
    assert ties_score(single) == TiesScore(1.0, 1.0, 1.0, 0.0, pytest.approx(math.tanh(0.0)))


def test_the_interval_of_ties():
    prompts = [prompt for n in range(30) for prompt in (ref(n, 1 - n % 3), tied(n, n % 2 - 0.3, 0.2 + n % 5))]
    low, high = ties_interval(prompts)
    assert 0 < low < ties_score(prompts).score < high < 1.01 and (low, high) == ties_interval(prompts)
    few = ties_interval(prompts[:12])
    assert few[1] - few[0] > 1.5 * (high - low), "fewer prompts, wider"
    assert ties_interval(prompts[:2]) == (ties_score(prompts[:2]).score,) * 2
