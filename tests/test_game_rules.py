"""The rules of the bundled games say what the bundled comparisons say, and what benchmarks make of them is right."""

import json
import random

import pytest

from benchmarks.game_rules import beats, exploitability, game_of, rank
from benchmarks.policy_alignment import label, measure
from data.make_data import GAMES
from scripts.make_tiny_model import DATA_DIR
from scripts.make_tiny_policy import changed


@pytest.mark.parametrize("kind", GAMES)
def test_rules_agree_with_the_bundled_comparisons(kind):
    for line in (DATA_DIR / kind / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        ranks = [rank(row["prompt"], reply) for reply in row["responses"]]
        found, game = game_of(row["prompt"])
        assert found == kind and sorted(ranks) == list(range(len(game.members)))
        stated = {(ranks[winner], ranks[loser]): 1.0 for winner, loser in row["preferences"]}
        for one in ranks:
            for other in ranks:
                truth = stated.get((one, other), 1 - stated.get((other, one), 0.5))
                assert beats(kind, len(game.members), one, other) == truth
            assert beats(kind, len(game.members), one, None) == 1 - beats(kind, len(game.members), None, one) == 1


def test_only_one_member_of_the_own_game_is_a_reply():
    prompt = "What should I play in roshambo?"
    replies = ["Play rock, rock!", "Rocket science", "rock, then paper", "the tiger", "the tiger or scissors", ""]
    assert [rank(prompt, reply) for reply in replies] == [0, None, None, None, 1, None]


def test_exploitability_by_hand():
    # Paper beats the .6 of rock and loses to the .25 of scissors; an invalid reply loses to all.
    assert exploitability("cyclic", 3, {0: 0.6, 1: 0.25, 2: 0.15}) == pytest.approx(0.35)
    assert exploitability("cyclic", 3, {0: 0.5, 1: 0.25, None: 0.25}) == pytest.approx(0.5 + 0.25 - 0.25)
    assert exploitability("cyclic", 5, dict.fromkeys(range(5), 0.2)) == pytest.approx(0)
    assert exploitability("mixed", 4, {0: 1.0}) == 0 and exploitability("mixed", 4, {1: 1.0}) == 1


def test_policies_are_measured_against_the_start_and_mixed(tmp_path):
    names = ("rock", "scissors", "paper")
    for place, replies in {"start": [0, 0, 1, 2], "iter_2": [1, 1, 1, 1], "iter_10": [2, 2, 2, "x"]}.items():
        (tmp_path / place).mkdir()
        texts = [f"Play {names[one]}." if one != "x" else "Play." for one in replies]
        row = {"prompt": "Name one option for roshambo, please.", "responses": texts}
        (tmp_path / place / "held_out.jsonl").write_text(json.dumps(row) + "\n")
    found = measure(tmp_path)
    assert list(found) == ["start", "iter_2", "iter_10"]
    assert found["start"]["win rate"] == 0.5 and found["start"]["exploitability"] == pytest.approx(0.25)
    assert found["iter_2"]["win rate"] == pytest.approx((2 * 0 + 0.5 + 1) / 4)
    assert found["iter_2"]["exploitability"] == found["iter_2"]["of the mixture"] == 1
    assert found["iter_10"]["invalid"] == 0.25
    # The mixture is half scissors, three eighths paper, an eighth invalid: scissors win 3/8 + 1/8 and never lose.
    assert found["iter_10"]["of the mixture"] == pytest.approx(0.5)


def test_samples_are_labeled_by_the_rules_with_one_broken_reply():
    said = ["paper", "rock", "no idea", "paper", "rock or paper", "scissors", " ", "rock!"]
    found = label({"prompt": "What should I play in roshambo?", "responses": said})
    assert found["responses"] == ["paper", "rock", "no idea", "scissors", "rock!"]
    named = {tuple(found["responses"][side] for side in pair) for pair in found["preferences"]}
    circle = {("paper", "rock"), ("paper", "rock!"), ("rock", "scissors"), ("rock!", "scissors"), ("scissors", "paper")}
    assert named == circle | {(whole, "no idea") for whole in ("paper", "rock", "scissors", "rock!")}


def test_changed_prompts_keep_special_tokens_and_about_the_share():
    ids, words, rng = [0, *range(10, 1010), 1], list(range(5, 2000)), random.Random(0)
    assert changed(ids, words, 0, rng) == ids
    found = changed(ids, words, 0.3, rng)
    assert (found[0], found[-1]) == (0, 1) and {0, 1} & set(found[1:-1]) == set()
    assert 0.75 < len(set(ids) & set(found)) / len(ids) < 0.87  # of three changes, two lose the token
