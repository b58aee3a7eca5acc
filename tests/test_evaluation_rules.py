"""The rules, averages and diagnostics of evaluation sets against cases worked by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from general_preference.evaluation import aggregates
from general_preference.evaluation.diagnostics import (
    best_responses,
    calibration,
    cycles_and_choices,
    has_cycle,
    length_bias,
)
from general_preference.evaluation.records import Record, record_table, with_unique_ids
from general_preference.evaluation.rewardbench.scoring import ROWS_1, SECTIONS
from general_preference.evaluation.rules import RULES, grade_record, kendall_tau_b, score_matrix, style_credits
from general_preference.evaluation.sets import SETS, TABLE, LoadedSet, choose_sets
from general_preference.evaluation.summary import summarize_set
from general_preference.evaluation.tables import format_results, seven_columns

CYCLE = np.array([[0.0, 1, -1], [-1, 0, 1], [1, -1, 0]])


def record(rule: str, pairs, count: int = 2, subset: str = "all", name: str = "r", prompt: str = "q") -> Record:
    responses = [[{"role": "assistant", "content": "x" * (i + 1)}] for i in range(count)]
    return Record(name, "rm_bench", subset, "", [{"role": "user", "content": prompt}], responses, pairs, rule)


def earned(rule: str, pairs, scores, number: str = "accuracy") -> tuple[float, float]:
    return grade_record(record(rule, pairs, len(scores)), score_matrix(scores))[number]


@pytest.mark.parametrize(
    ("rule", "pairs", "scores", "credit"),
    [
        ("pairs", [(0, 1)], [2, 1], (1, 1)),
        ("pairs", [(0, 1)], [1, 2], (0, 1)),
        ("pairs", [(0, 1)], [1, 1], (0, 1)),  # a tie is wrong
        ("pairs", [(1, 0)], [1, 2], (1, 1)),
        ("pairs", [(0, 1), (2, 0), (2, 1)], [3, 2, 2], (1, 3)),
        ("second", [(0, 1)], [2, 1], (1, 1)),
        ("second", [(0, 1)], [1, 1], (0, 1)),  # JudgeBench: a tie says B>A
        ("second", [(1, 0)], [1, 1], (1, 1)),
        ("second", [(1, 0)], [1, 2], (1, 1)),
        ("graph", [(0, 1), (2, 0), (2, 1)], [3, 2, 1], (1 / 3, 1)),
        ("best", [(0, 1), (0, 2), (0, 3)], [2, 1, 0, 0], (1, 1)),
        ("best", [(0, 1), (0, 2), (0, 3)], [2, 2, 0, 2], (1 / 3, 1)),
        ("best", [(0, 1), (0, 2), (0, 3)], [1, 2, 0, 0], (0, 1)),
        ("all", [(0, 1), (0, 2)], [2, 1, 0], (1, 1)),
        ("all", [(0, 1), (0, 2)], [2, 2, 0], (0, 1)),  # it beats every loser, or it is wrong
        ("ties", [(0, 2), (1, 2)], [2, 1, 0], (1, 1)),
        ("ties", [(0, 2), (1, 2)], [2, 0, 0], (0, 1)),
    ],
)
def test_rules(rule, pairs, scores, credit):
    assert earned(rule, pairs, scores) == pytest.approx(credit)


def test_maximum_and_beats_all_differ_for_a_preference_model_alone():
    # 0 loses to 1 by little and beats 2 and 3 by far: the largest mean, but not above all.
    scores = np.array([[0, -0.1, 3, 3], [0.1, 0, 0, 0], [-3, 0, 0, 0], [-3, 0, 0, 0]], dtype=float)
    pairs = [(0, 1), (0, 2), (0, 3)]
    for rule, official in (("best", 1.0), ("all", 0.0)):
        found = grade_record(record(rule, pairs, 4), scores)
        assert found == {"accuracy": (official, 1.0), "maximum": (1.0, 1.0), "beats_all": (0.0, 1.0)}
    scalar = grade_record(record("best", pairs, 4), score_matrix([3, 2, 1, 0]))
    assert scalar["maximum"] == scalar["beats_all"] == (1.0, 1.0)


def test_styles_are_upper_diagonal_and_lower():
    gains = np.array([[1, -1, 1], [1, 0, -1], [1, 1, 1]], dtype=float)  # the tie on the diagonal is wrong
    credits = style_credits(gains)
    assert credits == {"accuracy": (6.0, 9.0), "hard": (1.0, 3.0), "normal": (2.0, 3.0), "easy": (3.0, 3.0)}
    pairs = [(i, 3 + j) for i in range(3) for j in range(3)]
    concise_wins = grade_record(record("styles", pairs, 6), score_matrix([3, 2, 1, 2.5, 1.5, 0.5]))
    assert concise_wins["hard"] == (3, 3) and concise_wins["easy"] == (0, 3) and concise_wins["normal"] == (3, 3)


def test_tau_b():
    assert kendall_tau_b(np.array([1.0, 1, 1])) == 1 and kendall_tau_b(np.array([-1.0, -2])) == -1
    assert kendall_tau_b(np.array([1.0, 1, -1, 0])) == pytest.approx(1 / math.sqrt(3 * 4))
    assert kendall_tau_b(np.zeros(3)) == 0, "everything ties: the denominator is 1"


def test_averages():
    means = {name: {"accuracy": 0.5, "hard": 0.25, "normal": 0.5, "easy": 0.75} for name in aggregates.DOMAINS}
    means["chat"] = {"accuracy": 0.9, "hard": 0.85, "normal": 0.9, "easy": 0.95}
    found = aggregates.rm_bench_mean(means, {})
    assert found == pytest.approx({"score": 0.6, "hard": 0.4, "normal": 0.6, "easy": 0.8})
    assert aggregates.rm_bench_mean({"chat": means["chat"]}, {})["score"] is None, "three domains were not run"

    sources = dict(zip(aggregates.JUDGEBENCH_SOURCES, (0.5, 0.75, 1.0, 0.25), strict=True))
    weights = dict(zip(sources, (154.0, 98.0, 56.0, 42.0), strict=True))
    found = aggregates.judgebench_accuracy({name: {"accuracy": value} for name, value in sources.items()}, weights)
    assert found == pytest.approx({"score": (77 + 73.5 + 56 + 10.5) / 350, "macro": 0.625})

    five = {name: {"accuracy": n / 10} for n, name in enumerate(aggregates.CORRECTNESS)}
    assert aggregates.correctness_mean(five, {}) == pytest.approx({"score": 0.2})
    four = dict(zip(aggregates.RMB_SECTIONS, (0.8, 0.6, 0.4, 0.2), strict=True))
    sections = {n: {"accuracy": v} | ({"maximum": v + 0.1} if "BoN" in n else {}) for n, v in four.items()}
    assert aggregates.rmb_mean(sections, {}) == pytest.approx({"score": 0.5, "best of n by maximum": 0.4})

    kinds = {"Single_Turn": {"accuracy": 0.5, "tau_b": 0.1}, "Multi_Turn": {"accuracy": 0.8, "tau_b": 0.4}}
    found = aggregates.instruction_types_mean(kinds, {"Single_Turn": 3.0, "Multi_Turn": 1.0})
    assert found["score"] == pytest.approx(0.65) and found["tau_b"] == pytest.approx(0.25)
    assert found["accuracy, all records"] == pytest.approx(0.575)


def test_m_rewardbench_is_rewardbench_in_each_language():
    right = {"arb_Arab": set(SECTIONS["Chat"]), "deu_Latn": set(ROWS_1)}
    means = {f"{one}/{subset}": {"accuracy": float(subset in right[one])} for one in right for subset in ROWS_1}
    found = aggregates.multilingual_mean(means, {})
    assert found == pytest.approx({"score": 0.625, "arb_Arab": 0.25, "deu_Latn": 1.0})


def test_calibration_by_hand():
    gains = np.array([math.log(3), math.log(3), math.log(3), -math.log(3), 0.0])  # P = 3/4, of which 3 of 4 are right
    found, bins = calibration(gains, 1.0)
    assert found["ties"] == 0.2 and found["ece"] == pytest.approx(0.0) and found["n"] == 5
    assert found["brier"] == pytest.approx((3 * 0.0625 + 0.5625 + 0.25) / 5)
    assert found["log_loss"] == pytest.approx((3 * math.log(4 / 3) + math.log(4) + math.log(2)) / 5)
    assert [count for *_, count in bins] == [1, 4] and found["pair_accuracy"] == 0.7
    assert calibration(gains / 2, 0.5)[0] == pytest.approx(found), "the temperature is read"
    sure = calibration(np.array([9.0, -9.0]), 0.1)[0]
    assert sure["ece"] == pytest.approx(0.5), "always sure, half the time right"


def test_length():
    winner, loser = np.array([30, 10, 100, 10]), np.array([10, 30, 95, 30])
    found = length_bias(np.array([2.0, -2.0, 1.0, 1.0]), winner, loser)
    assert found["preferred longer"] == {"accuracy": 1.0, "n": 1} and found["about as long"] == {
        "accuracy": 1.0,
        "n": 1,
    }
    assert found["preferred shorter"] == {"accuracy": 0.5, "n": 2}
    follows = length_bias(winner - loser, winner, loser)["correlation"]
    assert follows == pytest.approx(1.0)
    swapped = length_bias(loser - winner, loser, winner)["correlation"]
    assert swapped == pytest.approx(1.0), "a scorer that likes length is one whoever wins"
    assert length_bias(np.zeros(4), winner, loser)["correlation"] is None


def test_cycles_and_the_best_response():
    assert has_cycle(CYCLE) and not has_cycle(score_matrix([1, 2, 3])) and not has_cycle(np.zeros((4, 4)))
    four = np.zeros((4, 4))
    for winner, loser in ((0, 1), (1, 2), (2, 3), (3, 0)):  # the other pairs tie: a cycle of four and none of three
        four[winner, loser], four[loser, winner] = 1, -1
    assert has_cycle(four)
    assert best_responses(CYCLE, 1.0) == {name: {0, 1, 2} for name in ("scalar", "borda", "nash")}
    # 0 beats both by little, 1 beats 2 by far: the mean reward prefers 1, who loses to nobody is 0.
    apart = np.array([[0, 0.1, 0.1], [-0.1, 0, 9], [-0.1, -9, 0]])
    assert best_responses(apart, 0.1) == {"scalar": {1}, "borda": {0}, "nash": {0}}
    found = cycles_and_choices([CYCLE, apart, score_matrix([2, 1, 0])], 0.1)
    assert found["n"] == 3 and found["cycles"] == pytest.approx(1 / 3)
    assert found["borda_not_scalar"] == found["nash_not_scalar"] == pytest.approx(1 / 3)
    assert found["nash_not_borda"] == 0 and found["cyclic_share"] > 1 / 3
    assert cycles_and_choices([], 1.0) == {"n": 0}


def loaded(records: list[Record], name: str = "rm_bench") -> LoadedSet:
    return LoadedSet(SETS[name], records)


def test_prompts_are_resampled_whole():
    # 40 prompts of 5 records each, all right or all wrong: the interval is that of 40 draws, not of 200.
    many = [record("pairs", [(0, 1)], name=f"{p}:{k}", prompt=str(p)) for p in range(40) for k in range(5)]
    scores = [[1.0, 0.0] if p % 2 else [0.0, 1.0] for p in range(40) for _ in range(5)]
    numbers, _ = summarize_set(loaded(many, "ppe_preference"), scores, 1.0)
    half = 1.96 * math.sqrt(0.25 / 40)
    assert numbers["score"] == 0.5
    assert (numbers["score_low"], numbers["score_high"]) == pytest.approx((0.5 - half, 0.5 + half), abs=0.03)
    alone, _ = summarize_set(loaded(many[:5], "ppe_preference"), scores[:5], 1.0)
    assert (alone["score"], alone["score_low"]) == (0.0, None), "a single prompt has no interval"


def test_the_order_of_records_does_not_matter():
    generator = np.random.default_rng(3)
    pairs = [(i, 3 + j) for i in range(3) for j in range(3)]
    domains = [domain for domain in ("math", "chat", "safety", "code") for _ in range(6)]
    many = [record("styles", pairs, 6, domain, str(n), str(n)) for n, domain in enumerate(domains)]
    scores = [generator.standard_normal(6).tolist() for _ in many]
    order = generator.permutation(len(many))
    numbers, _ = summarize_set(loaded(many), scores, 1.0)
    other, _ = summarize_set(loaded([many[i] for i in order]), [scores[i] for i in order], 1.0)
    for key in ("score", "score_low", "score_high", "ece", "brier", "log_loss"):
        assert other[key] == pytest.approx(numbers[key], abs=1e-12), key
    assert other["subsets"] == numbers["subsets"] and other["groups"] == pytest.approx(numbers["groups"])


def test_records_become_rows_that_are_tokenized_and_repeated_ids_are_told_apart():
    one = record("all", [(0, 1), (0, 2)], 3)
    (row,) = record_table([one])
    assert (row["first"], row["second"], row["label"]) == ([0, 0], [1, 2], [1.0, 1.0])
    assert row["prompt"] == one.prompt and row["responses"] == one.responses and one.lengths == [1, 2, 3]
    assert [r.id for r in with_unique_ids([one, replace(one, id="s"), one, one])] == ["r", "s", "r#2", "r#3"]


def test_the_table_has_the_fields_columns_and_a_mean_only_of_all_seven():
    scores = (0.978, 0.865, 0.798, 0.872, 0.893, 0.96, 0.834)
    found = {name: {"score": score} for name, score in zip(TABLE, scores, strict=True)}
    whole = seven_columns({"m": found})["m"]
    assert list(whole.values()) == ["97.8", "86.5", "79.8", "87.2", "89.3", "96.0", "83.4", "88.6"]
    assert list(whole)[-1] == "Avg."
    part = seven_columns({"m": {name: found[name] for name in TABLE[:6]}})["m"]
    assert part["JudgeBench"] == part["Avg."] == "-"


def test_markdown_and_text_hold_the_same_numbers():
    many = [record("pairs", [(0, 1)], name=str(n), prompt=str(n)) for n in range(4)]
    numbers, _ = summarize_set(loaded(many, "ppe_preference"), [[1, 0], [1, 0], [1, 0], [0, 1]], 1.0)
    text, markdown = (format_results({"m": {"ppe_preference": numbers}}, form) for form in (False, True))
    for form in (text, markdown):
        assert "75.0" in form and "PPE Preference: 4 of 16038 rows: not comparable with published numbers" in form
        assert "cut" not in form
    cut = {"ppe_preference": numbers | {"cut": {"prompts": 3, "responses": 1}}}
    line = "m on PPE Preference: records longer than max_length are cut, 3 in the prompt, 1 in a response"
    assert line in format_results({"m": cut})
    assert markdown.startswith("| model | RewardBench |") and "| m | - | - | 75.0 |" in markdown


def test_every_rule_is_some_set_and_the_sets_are_named():
    assert set(RULES) == {"pairs", "second", "graph", "best", "ties", "all", "styles"}
    assert [one.name for one in choose_sets("rmb, rm_bench")] == ["rmb", "rm_bench"]
    assert len(choose_sets("all")) == len(SETS) == 11 and set(TABLE) < set(SETS)
