"""Cycles from rated responses: found, freed of contradictions, split and counted as by hand; bad ratings in a line."""

import itertools
import json
import random

import pytest

from general_preference.datasets.cycles import (
    Cycle,
    RatedPrompt,
    find_cycles,
    make_record,
    scalar_ceiling,
    split_records,
    without_conflicts,
)
from general_preference.datasets.records import parse_record
from scripts.make_cyclic_comparisons import main, stated_texts

ROCK = [
    [3.0, 2.0, 1.0],
    [2.0, 3.0, 2.0],
    [1.0, 2.0, 3.0],
]  # 0 > 1 by the first, 1 > 2 by the second, 2 > 0 by the third


def rated(ratings, responses=None) -> RatedPrompt:
    return RatedPrompt("id", "Which?", responses or [f"answer {n}" for n in range(len(ratings))], ratings)


def test_a_cycle_takes_each_link_from_its_own_criterion():
    assert find_cycles(rated(ROCK)) == [Cycle((0, 1, 2), (1.0, 1.0, 2.0))]
    assert find_cycles(rated([[3, 3, 3], [2, 2, 2], [1, 1, 1]])) == []  # what is best by all is never turned around
    assert find_cycles(rated([[2, 2, 2]] * 3)) == []  # ties decide nothing
    assert find_cycles(rated([[3.0, 2, 1], [2.0, None, 2], [1.0, 2, 3]])) == []  # 1 > 2 is not rated
    assert find_cycles(rated(ROCK, ["same", "other", "same"])) == []
    assert find_cycles(rated([])) == []
    # 3 is 0 once more: it closes the same circle, and one that is wider
    again = find_cycles(rated([*ROCK, [9.0, 2.0, 0.0]], ["rock", "paper", "scissors", "rock"]))
    assert again == [Cycle((0, 1, 2), (7.0, 1.0, 3.0))]


def test_the_widest_assignment_of_criteria_counts():
    # 0 > 1 by a, 1 > 2 by b, 2 > 0 by c: 5 - 4, 5 - 4, 10 - 9. 0 > 1 by c, 1 > 2 by a, 2 > 0 by b: 9 - 5, 4 - 0, 4 - 0.
    assert find_cycles(rated([[5, 0, 9], [4, 5, 5], [0, 4, 10]])) == [Cycle((0, 1, 2), (4, 4, 4))]
    assert find_cycles(rated([[5, 9, 1], [4, 5, 5], [0, 4, 2]])) == [
        Cycle((0, 1, 2), (1, 1, 1))
    ]  # here the first alone


def test_longer_cycles_need_a_criterion_each():
    ratings = [[4, 0, 0, 0], [3, 4, 0, 0], [0, 3, 4, 0], [0, 0, 3, 4]]
    assert [cycle.members for cycle in find_cycles(rated(ratings))] == [(0, 1, 2, 3)]


def test_a_comparison_is_never_stated_both_ways():
    wide, narrow = Cycle((0, 1, 2), (3, 3, 3)), Cycle((0, 2, 1), (1, 1, 1))
    beside = Cycle((0, 1, 3), (2, 2, 2))
    assert without_conflicts([wide, beside, narrow]) == [wide, beside]
    record = make_record(rated([[]] * 5), [wide, beside])
    assert record["responses"] == [f"answer {n}" for n in range(4)]
    assert record["preferences"] == [[0, 1], [1, 2], [1, 3], [2, 0], [3, 0]]
    assert len(parse_record(record).preferences) == 5  # the package reads what is written


def test_the_scalar_ceiling_by_hand():
    circle, chain = [("p", *"ab"), ("p", *"bc"), ("p", *"ca")], [("q", *"ab"), ("q", *"bc")]
    assert scalar_ceiling(circle) == pytest.approx(2 / 3)
    assert scalar_ceiling(circle + chain) == pytest.approx(4 / 5)
    assert scalar_ceiling([*circle, ("p", *"bd"), ("p", *"da")]) == pytest.approx(4 / 5)  # two circles through a > b
    assert scalar_ceiling([*circle, *circle[:2]]) == pytest.approx(4 / 5)  # c > a is stated once, the others twice
    assert scalar_ceiling([*chain, ("q", *"aa")]) == pytest.approx(2.5 / 3)  # a tie
    ring = [("p", k, (k + 1) % 13) for k in range(13)]
    assert scalar_ceiling(ring) is None and scalar_ceiling(ring[:-1]) == 1


def test_the_scalar_ceiling_is_that_of_the_best_order():
    draw = random.Random(0)
    for _ in range(30):
        edges = [("p", *draw.sample(range(5), 2)) for _ in range(draw.randrange(1, 14))]
        orders = itertools.permutations(range(5))
        best = max(sum(order[winner] > order[loser] for _, winner, loser in edges) for order in orders)
        assert scalar_ceiling(edges) == best / len(edges)


def test_splits_share_no_comparison():
    whole = make_record(rated(ROCK), find_cycles(rated(ROCK)))
    turned = {"responses": whole["responses"][::-1]}  # the same responses elsewhere
    records = [whole | {"prompt": f"p{n // 2}"} | (turned if n % 2 else {}) for n in range(80)]
    splits = split_records(records, 0.8, 0.2, seed=1)
    prompts = {name: {record["prompt"] for record in some} for name, some in splits.items()}
    assert not prompts["train"] & prompts["prompts"] and prompts["pairs"] <= prompts["train"]
    assert len(splits["train"]) == 64 and len(splits["prompts"]) == 16
    assert all(len(one["preferences"]) == 1 for one in splits["pairs"])
    found = {name: [(prompt, frozenset(pair)) for prompt, *pair in stated_texts(some)] for name, some in splits.items()}
    assert not set(found["train"]) & set(found["pairs"])
    assert len(set(found["pairs"])) == len(found["pairs"]) >= round(0.2 * 64 * 3) / 2
    assert len(found["train"]) + 2 * len(found["pairs"]) == 64 * 3
    assert splits == split_records(records, 0.8, 0.2, seed=1) != split_records(records, 0.8, 0.2, seed=2)


def row(number: int, ratings, criteria=("a", "b", "c"), **other) -> dict:
    completions = [
        {"response": f"answer {n}", "annotations": {by: {"Rating": str(value)} for by, value in zip(criteria, some)}}  # noqa: B905
        for n, some in enumerate(ratings)
    ]
    return {"source": "test", "instruction": f"question {number}", "completions": completions} | other


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


WHOLE = [[3, 2, 1], [2, 3, 2], [1, 2, 3]]


def test_written_groups_and_their_summary(tmp_path, capsys):
    rows = [row(n, WHOLE) for n in range(10)] + [row(10, [[1, 1, 1]] * 3), row(11, [[3, 2, "N/A"], *WHOLE[1:]])]
    flags = ["--criteria", "a,b,c", "--train_split_ratio", "0.8", "--held_out_pairs", "0.125"]
    command = ["--ratings", write(tmp_path / "rated.jsonl", rows), *flags, "--output", str(tmp_path / "out")]
    assert main(command) == 0, capsys.readouterr().err
    read = {
        name: (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "pairs", "prompts")
    }
    assert {name: len(lines) for name, lines in read.items()} == {"train": 8, "pairs": 3, "prompts": 2}
    whole = json.loads(read["prompts"][0])
    assert whole["preferences"] == [[0, 1], [1, 2], [2, 0]] and whole["responses"] == [
        "answer 0",
        "answer 1",
        "answer 2",
    ]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["prompts_read"], summary["prompts_with_a_cycle"], summary["unrated"]) == (12, 10, 1)
    assert summary["cycles_found"] == 10 and summary["mean_margin"] == pytest.approx(4 / 3, abs=1e-4)
    assert summary["splits"]["prompts"] == {"prompts": 2, "comparisons": 6, "ceiling": 2 / 3}
    assert summary["splits"]["train"]["ceiling"] == (5 * 2 + 3 * 2) / (5 * 3 + 3 * 2)
    assert main(command) == 2 and "is not empty" in capsys.readouterr().err


def test_the_papers_four_sets(tmp_path, capsys):
    names = ["instruction_following", "honesty", "truthfulness", "helpfulness"]
    rows = []
    for left_out in range(4):  # 2, 3, 4 and 5 prompts whose only circle does without this criterion: it rates all alike
        ratings = [[*some[:left_out], 2, *some[left_out:]] for some in WHOLE]
        rows += [row(10 * left_out + n, ratings, names) for n in range(2 + left_out)]
    command = ["--ratings", write(tmp_path / "rated.jsonl", rows), "--paper", "--output", str(tmp_path / "out")]
    assert main([*command, "--train_split_ratio", "0.5"]) == 0, capsys.readouterr().err
    read = {n: json.loads((tmp_path / "out" / f"cyclic_{n}" / "summary.json").read_text()) for n in range(1, 5)}
    assert [one["criteria"] for one in read.values()] == [
        ["honesty", "truthfulness", "helpfulness"],
        ["instruction_following", "truthfulness", "helpfulness"],
        ["instruction_following", "honesty", "helpfulness"],
        ["instruction_following", "honesty", "truthfulness"],
    ]
    assert [one["prompts_with_a_cycle"] for one in read.values()] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([row(0, WHOLE)], ["--criteria", "a,a,a"], "one criterion ranks responses and has no cycles"),
        ([row(0, WHOLE)], ["--criteria", "a"], "a cycle needs at least three"),
        (
            [row(0, WHOLE[:2]), row(1, WHOLE[:2])],
            [],
            "no prompt has 3 responses rated by a, b, c (at most 2 responses)",
        ),
        ([row(0, WHOLE), row(1, [["good", 1, 1]])], [], "line 2: completion 0 is rated 'good' by a, expected a number"),
        ([row(n, [[2, 2, 2]] * 3) for n in range(3)], [], "all responses of a prompt are rated alike by a"),
        ([row(0, WHOLE)], ["--criteria", "a,b,honesty"], "no response is rated by 'honesty', found a, b, c"),
        (
            [{"prompt": "x", "chosen": "y"}],
            [],
            "line 1: found ['chosen', 'prompt'], expected instruction and completions",
        ),
        ([row(0, WHOLE) | {"instruction": 5}], [], "expected instruction, a text, and completions, a list, found"),
        ([row(0, WHOLE) | {"completions": None}], [], "expected instruction, a text, and completions, a list, found"),
        ([row(0, []), row(1, WHOLE)], [], "1 of 2 prompts have a cycle"),
        ([row(0, WHOLE) | {"instruction": "\ud800"}], [], "line 1: not valid Unicode"),
        ([row(0, WHOLE)], ["--ratings", "/nowhere/x.jsonl"], "/nowhere/x.jsonl does not exist"),
        ([row(0, WHOLE)], ["--held_out_pairs", "1"], "--held_out_pairs 1.0 must lie between 0 and 1"),
    ],
)
def test_bad_ratings_are_one_line(tmp_path, capsys, rows, flags, message):
    output = tmp_path / "out"
    command = ["--ratings", write(tmp_path / "rated.jsonl", rows), "--criteria", "a,b,c", "--output", str(output)]
    assert main([*command, *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and not output.exists()
