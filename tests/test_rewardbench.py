"""RewardBench end to end: rows in the hub's columns, every head, and numbers worked out again from single scores."""

import json
import math
import os
import re
import time
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoTokenizer

from general_preference import GPMPipeline
from general_preference.errors import InputError
from general_preference.evaluation.rewardbench import RewardBenchPipeline, rewardbench_config
from general_preference.evaluation.rewardbench.data import (
    PREF_SETS,
    REWARDBENCH_1,
    REWARDBENCH_2,
    content_fingerprint,
    load_benchmark,
)
from general_preference.evaluation.rewardbench.scoring import SECTIONS
from general_preference.inference.batch import ResultStore
from general_preference.models.statistics import wilson_interval
from rewardbench_eval.run_rm_rewardbench import main
from tests.forks import ENVIRONMENT, fork_group

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "rewardbench_eval" / "run_rm_rewardbench.py")
pytestmark = pytest.mark.usefixtures("own_environment")

HEADS = {
    "gpm": ("llama", "gpm", 6, True),
    "gpm without gate": ("llama", "gpm", 4, False),
    "bt": ("llama", "bt", 1, False),
    "hybrid": ("llama", "hybrid", 5, True),
}
WORDS = ["rock", "paper", "scissors", "wins", "the", "of course", "name one", "system"]


def text(seed: int, words: int) -> str:
    drawn = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(WORDS[word] for word in drawn)


def pairs(per_subset: int = 2) -> list[dict]:
    """Rows of RewardBench 1, every subset, as the hub has them; row 5 ties."""
    rows = []
    for subset in (name for section in SECTIONS.values() for name in section):
        for _ in range(per_subset):
            n = len(rows)
            row = {"prompt": text(n, 4 + n % 9), "chosen": text(n + 500, 2 + n % 7), "rejected": text(n + 900, 3)}
            rows.append(row | {"chosen_model": "a", "rejected_model": "b", "subset": subset, "id": 1000 + n})
    rows[5]["rejected"] = rows[5]["chosen"]
    return rows


def best_of_n() -> list[dict]:
    """Rows of RewardBench 2 as the hub has them; the last row of "Math" ties at the top."""
    rows = []
    for subset in ("Factuality", "Precise IF", "Math", "Safety", "Focus"):
        for _ in range(3):
            n = len(rows)
            row = {"id": str(n), "prompt": text(n, 5), "chosen": [text(n + 100, 3)], "subset": subset}
            rows.append(row | {"rejected": [text(n + 300 + i, 2 + i) for i in range(3)], "num_correct": 1})
    rows[8]["rejected"] = rows[8]["chosen"] * 3
    for n in range(4):
        for kind, right in (("ref", 1), ("tied", 3 + n)):
            row = {"id": f"{kind}:{n}", "prompt": text(n + 40, 6), "subset": "Ties", "num_correct": right}
            row["chosen"] = [text(700 + 10 * n + i, 3) for i in range(right)]
            rows.append(row | {"rejected": [text(800 + 10 * n + i, 2 + i) for i in range(4)]})
    rows[-1]["chosen"] = ["rock"] * 6  # right answers that score alike
    return rows


def write(file: Path, rows: list[dict]) -> Path:
    if file.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    elif file.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(file)
    else:
        file.write_text(json.dumps(rows) if file.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "rows.jsonl", pairs())


@pytest.fixture
def data_2(tmp_path) -> Path:
    return write(tmp_path / "rows.parquet", best_of_n())


def run(model, output: Path, *flags) -> int:
    return main(["--model", str(model), "--output_dir", str(output), "--model_name", "m", *map(str, flags)])


def read(file: Path):
    content = file.read_text(encoding="utf-8")
    return json.loads(content) if file.suffix == ".json" else [json.loads(line) for line in content.splitlines()]


@pytest.mark.parametrize("head", HEADS)
def test_version_1_is_what_single_scores_say(saved, data, tmp_path, capsys, head):
    model = saved(*HEADS[head])
    assert run(model, tmp_path / "out", "--dataset", data) == 0
    rm, rows, written = GPMPipeline(model), pairs(), read(tmp_path / "out" / "m.jsonl")
    correct: dict[str, list[int]] = {}
    for row, found in zip(rows, written, strict=True):
        score = rm.score_matrix(row["prompt"], [row["chosen"], row["rejected"]])[0, 1].item()
        assert found["id"] == str(row["id"]) and found["subset"] == row["subset"]
        assert found["score"] == pytest.approx(score, abs=1e-5)
        assert found["probability"] == pytest.approx(1 / (1 + math.exp(-score / rm.tau)), abs=1e-5)
        assert found["correct"] == int(score > 0)
        correct.setdefault(row["subset"], []).append(int(score > 0))
    assert written[5]["score"] == 0 and written[5]["correct"] == 0, "a tie is a loss"
    accuracy = {subset: sum(values) / len(values) for subset, values in correct.items()}
    kind = "Seq. Classifier" if head == "bt" else "Custom Classifier"
    official = read(tmp_path / "out" / "m.json")
    assert official == {"model": "m", "model_type": kind, "chat_template": "tokenizer"} | accuracy
    summary = read(tmp_path / "out" / "m.summary.json")
    sections = [
        sum(accuracy[subset] * count for subset, count in counts.items()) / sum(counts.values())
        for counts in SECTIONS.values()
    ]
    assert list(summary["scores"].values()) == pytest.approx([*sections, sum(sections) / 4])
    assert list(summary["scores"]) == ["Chat", "Chat Hard", "Safety", "Reasoning", "Average"]
    for subset, result in summary["results"].items():
        assert result["n"] == 2 and result["correct"] == sum(correct[subset])
        assert (result["accuracy_low"], result["accuracy_high"]) == wilson_interval(accuracy[subset], 2)
    assert sum(result["ties"] for result in summary["results"].values()) == 1
    printed = capsys.readouterr().out
    assert f"{sum(sections) / 4:.4f}" in printed and "1 rows tie, a loss" in printed
    assert "46 rows in 23 subsets; officially 2985 in 23: not comparable" in printed
    assert (tmp_path / "out" / "m.png").stat().st_size > 10_000
    made = summary["run"]
    assert (
        made["packages"]["torch"] == torch.__version__.split("+")[0] or made["packages"]["torch"] == torch.__version__
    )
    assert (
        made["input_format"] == "chat" and made["dtype"] == "float32" and made["preference"]["head"] == HEADS[head][1]
    )
    assert made["truncation"]["comparisons"] == 46 and len(summary["settings"]["data"]) == 64


@pytest.mark.parametrize("version", [1, 2])
def test_batch_sizes_change_nothing(saved, data, data_2, tmp_path, version):
    found = []
    for size in (1, 7, 64):
        flags = ["--dataset", data if version == 1 else data_2, "--rewardbench_version", version, "--batch_size", size]
        assert run(saved(*HEADS["gpm"]), tmp_path / str(size), *flags) == 0
        ending = "" if version == 1 else ".v2"
        results = read(tmp_path / str(size) / f"m{ending}.json")
        rows = read(tmp_path / str(size) / f"m{ending}.jsonl")
        found.append((results, [row["correct"] for row in rows], [row["score"] for row in rows]))
    for other in found[1:]:
        assert other[1] == found[0][1]
        numbers, expected = ({k: v for k, v in one[0].items() if isinstance(v, float)} for one in (other, found[0]))
        assert numbers == (pytest.approx(expected, abs=1e-6) if version == 2 else expected), "margins are not rounded"
        for row, expected in zip(other[2], found[0][2], strict=True):
            assert row == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_rows_come_from_any_file_and_the_fingerprint_is_of_what_they_say(saved, tmp_path, ending):
    file = write(tmp_path / f"rows{ending}", pairs(1))
    assert run(saved(*HEADS["bt"]), tmp_path / "out", "--dataset", file) == 0
    fingerprint = read(tmp_path / "out" / "m.summary.json")["settings"]["data"]
    other = write(tmp_path / "other.jsonl", pairs(1))
    assert run(saved(*HEADS["bt"]), tmp_path / "out", "--dataset", other) == 0, "the same rows: nothing to compute"
    assert read(tmp_path / "out" / "m.summary.json")["settings"]["data"] == fingerprint


def official_ties(rewards: dict[str, tuple[list[float], int]]) -> float:
    """The official score of "Ties" for {"ref:N" or "tied:N": (rewards, right ones)}, written down once more."""
    lowest = {name: min(values[:right]) - max(values[right:]) for name, (values, right) in rewards.items()}
    spread = {name: max(values[:right]) - min(values[:right]) for name, (values, right) in rewards.items()}
    numbers = [name.split(":")[1] for name in rewards if name.startswith("ref:")]
    accuracy = {kind: sum(lowest[f"{kind}:{n}"] > 0 for n in numbers) / len(numbers) for kind in ("ref", "tied")}
    both = {n: min(lowest[f"ref:{n}"], lowest[f"tied:{n}"]) for n in numbers}
    preferred = sum(lowest[f"tied:{n}"] > spread[f"tied:{n}"] for n in numbers) / len(numbers)
    hard = sum(both[n] > spread[f"tied:{n}"] for n in numbers) / len(numbers)
    signs = {n: float((both[n] > 0) - (both[n] < 0)) for n in numbers}
    wide = {n: spread[f"tied:{n}"] for n in numbers if spread[f"tied:{n}"] > 1e-6}
    margin = sum(math.tanh(both[n] / wide[n] - 1) if n in wide else signs[n] for n in numbers) / len(numbers)
    return 0.3 * accuracy["tied"] + 0.3 * accuracy["ref"] + 0.2 * preferred + 0.2 * hard + 0.01 * margin


def test_version_2_of_a_bradley_terry_model_is_the_official_rule_on_its_rewards(saved, data_2, tmp_path, capsys):
    model = saved(*HEADS["bt"])
    assert run(model, tmp_path / "out", "--dataset", data_2, "--rewardbench_version", 2) == 0
    rm, credits, ties = GPMPipeline(model), {}, {}
    written = {row["id"]: row for row in read(tmp_path / "out" / "m.v2.jsonl")}
    for row in best_of_n():
        texts = row["chosen"] + row["rejected"]
        conversations = [
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": t}] for t in texts
        ]
        reward = rm(conversations).tolist()
        merit = written[row["id"]]["score"]
        assert [one - merit[0] for one in merit] == pytest.approx([one - reward[0] for one in reward], abs=1e-5)
        if row["subset"] == "Ties":
            ties[row["id"]] = reward, len(row["chosen"])
        else:
            top = [i for i, value in enumerate(reward) if abs(value - max(reward)) < 1e-6]
            credits.setdefault(row["subset"], []).append(1 / len(top) if 0 in top else 0.0)
            assert written[row["id"]]["correct"] == credits[row["subset"]][-1]
    assert written["8"]["correct"] == 0.25
    expected = {subset: sum(values) / len(values) for subset, values in credits.items()}
    expected["Ties"] = official_ties(ties)
    official = read(tmp_path / "out" / "m.v2.json")
    assert {name: official[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert official.keys() == {"model", "model_type", "chat_template", *expected} and "Seq." in official["model_type"]
    average = read(tmp_path / "out" / "m.v2.summary.json")["scores"]["Average"]
    assert average == pytest.approx(sum(expected.values()) / 6, abs=1e-6)
    assert f"{average:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("head", ["gpm", "gpm without gate", "hybrid"])
def test_version_2_of_other_heads_is_decided_by_mean_scores(saved, data_2, tmp_path, head):
    model = saved(*HEADS[head])
    assert run(model, tmp_path / "out", "--dataset", data_2, "--rewardbench_version", 2) == 0
    rm, written = GPMPipeline(model), read(tmp_path / "out" / "m.v2.jsonl")
    for row, found in zip(best_of_n(), written, strict=True):
        scores = rm.score_matrix(row["prompt"], row["chosen"] + row["rejected"]).double()
        torch.testing.assert_close(torch.tensor(found["scores"]).double(), scores, atol=1e-5, rtol=0)
        mean = torch.tensor(found["scores"], dtype=torch.float64).mean(dim=1)
        torch.testing.assert_close(torch.tensor(found["score"], dtype=torch.float64), mean)
        assert read(tmp_path / "out" / "m.v2.json")["response_score"].startswith("borda: mean score against all")
        assert found["merit"] == found["score"] and found["right"] == len(row["chosen"])
        chance = torch.sigmoid(scores / rm.tau)
        others = (chance.sum(dim=1) - 0.5) / (len(scores) - 1)
        assert found["probability"] == pytest.approx(others.tolist(), abs=1e-4)
        if row["subset"] == "Ties":
            right = len(row["chosen"])
            assert found["correct"] == float(min(found["score"][:right]) > max(found["score"][right:]))
        elif row["id"] != "8":
            assert found["correct"] == float(found["score"][0] == max(found["score"]))


def test_another_winner_is_judged_from_the_same_rows(saved, data_2, tmp_path, monkeypatch):
    flags = ["--dataset", data_2, "--rewardbench_version", 2]
    model = saved(*HEADS["gpm"])
    assert run(model, tmp_path / "out", *flags) == 0
    borda = read(tmp_path / "out" / "m.v2.jsonl")
    monkeypatch.setattr(ResultStore, "append", lambda *_: pytest.fail("it was finished"))
    for winner in ("copeland", "nash", "min"):
        assert run(model, tmp_path / "out", *flags, "--winner", winner) == 0
        rows = read(tmp_path / "out" / "m.v2.jsonl")
        assert [row["scores"] for row in rows] == [row["scores"] for row in borda]
        assert [row["merit"] for row in rows] != [row["merit"] for row in borda]
        assert read(tmp_path / "out" / "m.v2.summary.json")["decided_by"]["winner"] == winner
        lowest = [min(s for j, s in enumerate(line) if j != i) for i, line in enumerate(rows[0]["scores"])]
        assert winner != "min" or rows[0]["merit"] == lowest
    assert run(model, tmp_path / "out", *flags) == 0 and read(tmp_path / "out" / "m.v2.jsonl") == borda


def test_prior_sets_join_the_leaderboard_average(saved, data, tmp_path, capsys):
    user = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows = [{"prompt": user, "chosen": text(n, 3), "rejected": text(n + 50, 4), "subset": name, "id": n}
            for n, name in enumerate(["anthropic_helpful", "anthropic_hhh", "mtbench_human"] * 3)]  # fmt: skip
    mixed = write(tmp_path / "mixed.jsonl", rows)
    shp = write(tmp_path / "s.jsonl", [row | {"subset": "askculinary"} for row in rows])
    summarize = write(tmp_path / "summarize.parquet", [row | {"subset": ""} for row in rows[:2]])
    model, out = saved(*HEADS["gpm"]), tmp_path / "out"
    assert run(model, out, "--pref_sets", "--dataset", f"{mixed},shp={shp},{summarize}") == 0
    results = read(out / "m.pref_sets.summary.json")["results"]
    assert {name: result["n"] for name, result in results.items()} == {
        "anthropic_helpful": 3, "anthropic_hhh": 3, "mtbench_human": 3, "shp": 9, "summarize": 2,
    }  # fmt: skip
    four = ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")
    prior = sum(results[name]["accuracy"] for name in four) / 4
    assert read(out / "m.pref_sets.summary.json")["scores"] == {"Prior Sets": pytest.approx(prior)}
    assert run(model, out, "--dataset", data) == 0
    scores = read(out / "m.summary.json")["scores"]
    expected = (2 * sum(scores[section] for section in SECTIONS) + prior) / 9
    assert scores["Leaderboard average"] == pytest.approx(expected) and scores["Prior Sets"] == pytest.approx(prior)
    assert f"{expected:.4f}" in capsys.readouterr().out
    assert run(model, out, "--dataset", data, "--max_length", 64, "--overwrite") == 0
    assert "Leaderboard average" not in read(out / "m.summary.json")["scores"], "made with another length limit"
    for damaged in ("{", "{}", '{"scores": null}'):
        (out / "m.pref_sets.summary.json").write_text(damaged)
        assert run(model, out, "--dataset", data, "--max_length", 64) == 0
        assert "Leaderboard average" not in read(out / "m.summary.json")["scores"]


def test_a_stop_loses_nothing(saved, data, tmp_path, monkeypatch):
    model, append, done = saved(*HEADS["gpm"]), ResultStore.append, []
    assert run(model, tmp_path / "whole", "--dataset", data) == 0

    def stops(store, index, row):
        if len(done) == 23:
            raise KeyboardInterrupt
        done.append(index)
        append(store, index, row)

    with monkeypatch.context() as patch:
        patch.setattr(ResultStore, "append", stops)
        assert run(model, tmp_path / "out", "--dataset", data, "--batch_size", 1) == 130
    again = []
    with monkeypatch.context() as patch:
        patch.setattr(ResultStore, "append", lambda store, index, row: (again.append(index), append(store, index, row)))
        assert run(model, tmp_path / "out", "--dataset", data) == 0
    assert sorted([*done, *again]) == list(range(46)), "no row twice"
    assert read(tmp_path / "out" / "m.json") == read(tmp_path / "whole" / "m.json")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "m.json",
        "m.jsonl",
        "m.png",
        "m.summary.json",
    ]


def test_files_of_one_relative_name_are_two(saved, tmp_path, monkeypatch):
    accuracies = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs(1)]
        file = write(tmp_path / place / "rows.jsonl", pairs(1) if place == "a" else swapped)
        os.utime(file, (1, 1))
        monkeypatch.chdir(tmp_path / place)
        assert run(saved(*HEADS["bt"]), tmp_path / place, "--dataset", "rows.jsonl", "--model_name", "x") == 0
        accuracies.append([row["correct"] for row in read(tmp_path / place / "x.jsonl")])
    assert all(one + other == 1 for n, (one, other) in enumerate(zip(*accuracies, strict=True)) if n != 5)


def test_debug_takes_ten_rows_and_keeps_to_itself(saved, data, tmp_path):
    model = saved(*HEADS["bt"])
    assert run(model, tmp_path / "out", "--dataset", data, "--debug") == 0
    assert [row["id"] for row in read(tmp_path / "out" / "m.debug.jsonl")] == [str(1000 + n) for n in range(10)]
    summary = read(tmp_path / "out" / "m.debug.summary.json")
    assert summary["scores"]["Average"] is None and summary["scores"]["Safety"] is None
    assert not (tmp_path / "out" / "m.json").exists()


@pytest.mark.parametrize(
    ("version", "place", "change", "message"),
    [
        (1, 3, {"subset": "poems"}, "row 4 (id 1003): unknown subset 'poems'"),
        (1, 3, {"subset": None}, "row 4 (id 1003): it has no subset"),
        (1, 4, {"chosen": None}, "line 5: no key 'chosen'"),
        (1, 4, {"prompt": None}, "line 5: "),
        (1, 6, {"rejected": " \n"}, "row 7 (id 1006): a rejected response is empty"),
        (
            1,
            7,
            {"chosen": ["a"], "rejected": ["b", "c"]},
            "row 8 (id 1007): 1 chosen and 2 rejected responses, expected one",
        ),
        (1, 8, {"id": None, "subset": "x"}, "line 9: unknown subset 'x'"),
        (1, 8, {"chosen_probability": 0.3}, "row 9 (id 1008): its preferences are"),
        (2, 3, {"chosen": ["a", "b"]}, "row 4 (id 3): 2 chosen and 3 rejected responses, expected one and several"),
        (2, 4, {"chosen": "a", "rejected": "b"}, "row 5 (id 4): 1 chosen and 1 rejected"),
        (2, 0, {"chosen": [""]}, "row 1 (id 0): a chosen response is empty"),
        (2, 1, {"rejected": []}, "'rejected' is a list [], expected"),
        (2, 2, {"subset": "hep-go"}, "row 3 (id 2): unknown subset 'hep-go'"),
        (2, 16, {"id": "7"}, "row 17 (id 7): the id of a row of 'Ties' is '7', expected ref:N or tied:N"),
        (2, 17, {"id": "ref:0"}, "row 18 (id ref:0): the id is already used in"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named_before_any_is(tmp_path, capsys, version, place, change, message):
    rows = pairs() if version == 1 else best_of_n()
    rows[place] = {key: value for key, value in (rows[place] | change).items() if value is not None}
    file = write(tmp_path / "rows.jsonl", rows)
    # The model does not exist: rows are looked at first.
    assert run("/nowhere/model", tmp_path / "out", "--dataset", file, "--rewardbench_version", version) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error and "nothing was scored" in error
    assert not (tmp_path / "out").exists()


def test_csv_files_have_no_lists(tmp_path, capsys):
    for flags in (["--rewardbench_version", 2], ["--pref_sets"]):
        assert run("/nowhere/model", tmp_path / "out", "--dataset", write(tmp_path / "rows.csv", pairs()), *flags) == 2
        assert "a CSV file has no lists" in capsys.readouterr().err


def test_a_row_that_the_template_refuses_is_named(saved, data, tmp_path, capsys):
    template = tmp_path / "strict.jinja"
    template.write_text("{% for m in messages %}{% if 'paper' in m['content'] %}{{ raise_exception('no paper') }}"
                        "{% endif %}{{ m['content'] }}{% endfor %}")  # fmt: skip
    assert run(saved(*HEADS["gpm"]), tmp_path / "out", "--dataset", data, "--chat_template", template) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"row \d+ \(id 10\d\d\): the chat template refuses .* no paper", error)


def test_a_part_of_the_subsets_gives_sections_but_no_average(saved, tmp_path, capsys):
    wanted = ("mt-bench-easy", "mt-bench-hard", "donotanswer", "math-prm")
    file = write(tmp_path / "rows.jsonl", [row for row in pairs() if row["subset"] in wanted])
    assert run(saved(*HEADS["bt"]), tmp_path / "out", "--dataset", file, "--max_length", 8) == 0
    scores, printed = read(tmp_path / "out" / "m.summary.json")["scores"], capsys.readouterr().out
    assert scores["Average"] is None and None not in [scores[section] for section in SECTIONS]
    assert "over a part of their subsets: Chat, Chat Hard, Safety, Reasoning" in printed
    assert "cut to 8 tokens: 8 prompts" in printed and "not in the data: alpacaeval-easy" in printed


def test_empty_responses_are_scored_where_that_is_wanted(saved, tmp_path):
    file = write(tmp_path / "rows.jsonl", [row | {"chosen": ""} for row in pairs(1)])
    assert run(saved(*HEADS["gpm"]), tmp_path / "out", "--dataset", file, "--allow_empty_responses") == 0
    assert len(read(tmp_path / "out" / "m.jsonl")) == 23


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "/nowhere/rows.jsonl"], "/nowhere/rows.jsonl does not exist"),
        (["--model", "/nowhere/model"], "/nowhere/model does not exist"),
        (["--model", "BASE"], "plain language model"),
        (["--model", ""], "--model is missing"),
        (["--value_head_dim", "8"], "dim = 6, but 8"),
        (["--is_general_preference", "false"], "head = 'gpm'"),
        (["--add_prompt_head", "false"], "prompt_gate = True, but False"),
        (["--tau", "0.7"], "temperature = 0.1, but 0.7"),
        (["--pref_sets", "--rewardbench_version", "2"], "drop one"),
        (["--winner", "nash"], "needs --rewardbench_version 2"),
        (["--batch_size", "0"], "must be at least 1"),
        (["--max_length", "3"], "at least 8"),
        (["--bf16", "--torch_dtype", "float32"], "disagree"),
        (["--not_quantized", "false"], "not possible"),
        (["--is_custom_model", "false"], "not possible"),
        (["--model_name", "../m"], "is no name"),
        (["--model_name", "/m"], "is no name"),
        (["--output_dir", "FILE"], "cannot be written"),
        (["--output_dir", "/proc/nothing"], "cannot be written"),
        (["--chat_template", "/nowhere/t.jinja"], "No such file or directory"),
        (["--chat_template", "HELLO"], "the chat template leaves out"),
        (["--dataset", ""], "--dataset is empty"),
        (["--model_name", "m" * 250], "cannot be written"),
        (["--chat_template", "FOLDER"], "Is a directory"),
        (["--chat_template", "BROKEN"], "is no chat template"),
        (["--chat_template", "BINARY"], "can't decode byte"),
        (["--model_name", ""], "--model_name is empty"),
        (["--tokenizer", "/nowhere/tokenizer"], "cannot load the tokenizer"),
        (["--flash_attn", "--attn_implementation", "eager"], "disagree"),
        (["--rewardbench_version", "2"], "unknown subset 'alpacaeval-easy'"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(saved, model_folder, data, tmp_path, capsys, flags, message):
    stand_ins = {"BASE": model_folder("llama"), "FILE": str(tmp_path / "hello.jinja"), "FOLDER": str(tmp_path)}
    stand_ins |= {"BROKEN": str(tmp_path / "broken.jinja"), "BINARY": str(tmp_path / "binary.jinja")}
    stand_ins |= {"HELLO": str(tmp_path / "hello.jinja")}
    (tmp_path / "hello.jinja").write_text("hello")
    (tmp_path / "broken.jinja").write_text("{% for %}")
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe\x00")
    flags = [stand_ins.get(value, value) for value in flags]
    assert run(saved(*HEADS["gpm"]), tmp_path / "out", "--dataset", data, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not list(tmp_path.glob("out/*"))


def test_without_the_hub_the_way_out_is_named(saved, tmp_path, capsys):
    assert run(saved(*HEADS["bt"]), tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "allenai/reward-bench" in error and "name it as the dataset" in error


def test_the_papers_command(saved, data, tmp_path, capsys):
    flags = ["--chat_template", "raw", "--is_custom_model", "--do_not_save", "--batch_size", 64, "--value_head_dim", 6]
    flags += ["--max_length", 512, "--is_general_preference", "--add_prompt_head", "--not_quantized"]
    flags += ["--disable_beaker_save", "--torch_dtype", "float32", "--trust_remote_code", "false"]
    assert run(saved(*HEADS["gpm"]), tmp_path / "a", "--dataset", data, *flags, "--model_name", "org/some-model") == 0
    assert read(tmp_path / "a" / "org" / "some-model.json")["model"] == "org/some-model"
    assert main(["--model", saved(*HEADS["gpm"]), "--output_dir", str(tmp_path / "b"), "--dataset", str(data)]) == 0
    assert (tmp_path / "b" / "model.json").exists(), "called like the model's folder"
    assert main(["--model", "/nowhere/model", "--dataset", str(data)]) == 2
    assert "model folder /nowhere/model does not exist" in capsys.readouterr().err
    assert run(saved(*HEADS["gpm"]), tmp_path / "c", "--dataset", data, "--debug", "--model_name", "org/m/") == 0
    assert (tmp_path / "c" / "org" / "m.debug.json").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtypes(saved, data, tmp_path, dtype):
    flags = ["--bf16"] if dtype == "bfloat16" else ["--torch_dtype", dtype]
    assert run(saved(*HEADS["gpm"]), tmp_path / "out", "--dataset", data, "--debug", *flags) == 0
    assert read(tmp_path / "out" / "m.debug.summary.json")["run"]["dtype"] == dtype
    rm = GPMPipeline(saved(*HEADS["gpm"]))
    row, found = pairs()[0], read(tmp_path / "out" / "m.debug.jsonl")[0]
    score = rm.score_matrix(row["prompt"], [row["chosen"], row["rejected"]])[0, 1].item()
    assert found["score"] == pytest.approx(score, abs=1e-6 if dtype == "float64" else 0.05)


def test_another_tokenizer_and_template_count(saved, model_folder, data, tmp_path, capsys):
    model, template = saved(*HEADS["gpm"]), tmp_path / "shout.jinja"
    template.write_text("{% for m in messages %}the {{ m['content'] }} system {% endfor %}")
    assert run(model, tmp_path / "out", "--dataset", data) == 0
    plain = [row["score"] for row in read(tmp_path / "out" / "m.jsonl")]
    assert run(model, tmp_path / "out", "--dataset", data, "--chat_template", template) == 2, "other scores"
    assert "tokens = " in capsys.readouterr().err
    assert run(model, tmp_path / "other", "--dataset", data, "--chat_template", template) == 0
    assert [row["score"] for row in read(tmp_path / "other" / "m.jsonl")] != plain
    assert read(tmp_path / "other" / "m.summary.json")["run"]["chat_template"] == template.read_text()
    assert run(model, tmp_path / "same", "--dataset", data, "--tokenizer", model_folder("llama")) == 0
    assert [row["score"] for row in read(tmp_path / "same" / "m.jsonl")] == plain
    large = AutoTokenizer.from_pretrained(model_folder("llama"))
    large.add_tokens([f"<new{n}>" for n in range(99)])
    large.save_pretrained(tmp_path / "large")
    assert run(model, tmp_path / "bad", "--dataset", data, "--tokenizer", tmp_path / "large") == 2
    assert "is not this model's" in capsys.readouterr().err


def test_results_are_never_written_over_the_data_or_other_files(saved, data, tmp_path):
    rows = write(tmp_path / "m.jsonl", pairs())
    assert run(saved(*HEADS["bt"]), tmp_path, "--dataset", rows, "--overwrite") == 2
    assert read(rows) == pairs()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "m.json").write_text('{"mine": 1}')
    assert run(saved(*HEADS["bt"]), tmp_path / "out", "--dataset", data, "--overwrite") == 2
    assert read(tmp_path / "out" / "m.json") == {"mine": 1}


def test_the_official_sets_and_splits_are_what_is_read(tmp_path, monkeypatch):
    """`datasets` takes a folder for a hub name of the same spelling: the repositories of the hub, file by file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="a copy on disk"):
        load_benchmark(REWARDBENCH_1)

    def publish(repository: str, split: str, rows: list[dict]) -> None:
        folder = tmp_path / "allenai" / repository / "data"
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / f"{split}-00000-of-00001.parquet", rows)

    publish("reward-bench", "filtered", pairs())
    publish("reward-bench", "raw", pairs(3))
    publish("reward-bench-2", "test", best_of_n())
    user = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    for number, name in enumerate([*PREF_SETS.splits, "pku_safer"], 1):
        row = {"prompt": user, "chosen": "x", "rejected": "y", "subset": "of its own", "id": 7}
        publish("pref-test-sets", name, [row] * number)
    first, second, prior = (load_benchmark(benchmark) for benchmark in (REWARDBENCH_1, REWARDBENCH_2, PREF_SETS))
    assert (
        (len(first), len(second)) == (46, 23) and second[22]["subset"] == "Ties" and len(second[22]["responses"]) == 10
    )
    assert [prior["subset"].count(name) for name in PREF_SETS.splits] == [1, 2, 3, 4, 5, 6, 7] and len(prior) == 28
    assert prior[0]["prompt"] == user and len(load_benchmark(PREF_SETS, debug=True)) == 10
    clones = {name: str(tmp_path / "allenai" / name) for name in ("reward-bench", "reward-bench-2", "pref-test-sets")}
    assert len(load_benchmark(REWARDBENCH_1, clones["reward-bench"])) == 46, "the split alone"
    assert len(load_benchmark(REWARDBENCH_2, clones["reward-bench-2"])) == 23
    assert load_benchmark(PREF_SETS, clones["pref-test-sets"])["subset"] == prior["subset"]
    rows = [{"prompt": user, "chosen": "x", "rejected": "y", "subset": name} for name in ("shp", "pku_safer", "shp")]
    assert len(load_benchmark(PREF_SETS, str(write(tmp_path / "export.jsonl", rows)))) == 2
    same = [load_benchmark(PREF_SETS, str(write(tmp_path / name, rows[:1]))) for name in ("a.jsonl", "b.json")]
    assert content_fingerprint(same[0]) == content_fingerprint(same[1]) != content_fingerprint(prior)


def conversations(rows: list[dict], side: str) -> list[list[dict]]:
    return [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}] for row in rows]


@pytest.mark.parametrize("head", HEADS)
def test_the_official_scripts_hook(saved, head):
    """Called as scripts/run_rm.py of the official repository calls a custom model."""
    path, rows = saved(*HEADS[head]), pairs()
    config = rewardbench_config()
    assert config["custom_dialogue"] and not config["quantized"] and config["model_type"] == "Custom Classifier"
    with pytest.raises(TypeError, match="revision"):
        config["model_builder"](path, revision="main")
    model = config["model_builder"](path, device_map="auto", torch_dtype=config["torch_dtype"], trust_remote_code=False)
    pipe = config["pipeline_builder"]("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(path))
    assert pipe.tokenizer.pad_token_id is not None and hasattr(pipe.model.config, "pad_token_id")
    kwargs = {"batch_size": 16, "truncation": True, "padding": True, "max_length": 512, "function_to_apply": "none"}
    kwargs["return_token_type_ids"] = False
    chosen, rejected = conversations(rows, "chosen"), conversations(rows, "rejected")
    wins = pipe(chosen, rejected, **kwargs)
    assert wins.dtype == torch.bool and wins.shape == (46,) and 0 < wins.sum() < 46
    rm = GPMPipeline(path)
    scores = [rm.score_matrix(row["prompt"], [row["chosen"], row["rejected"]])[0, 1].item() for row in rows]
    assert wins.tolist() == [score > 0 for score in scores] and not wins[5]
    assert (pipe(rejected, chosen, **kwargs) == ~wins).sum() == 45, "all but the tie"
    if head == "bt":
        rewards = pipe(chosen, **kwargs)
        torch.testing.assert_close(rewards, rm(chosen).cpu())
    else:
        with pytest.raises(InputError, match="pass pairs"):
            pipe(chosen, **kwargs)


def test_pairs_that_do_not_fit_are_refused(saved, model_folder):
    path = saved(*HEADS["gpm"])
    pipe = RewardBenchPipeline("t", GPMPipeline(path).model, AutoTokenizer.from_pretrained(path))
    chosen = conversations(pairs(), "chosen")
    with pytest.raises(InputError, match="46 chosen conversations, but 3"):
        pipe(chosen, chosen[:3])
    with pytest.raises(InputError, match="pair 0: the conversations differ"):
        pipe(chosen[:2], chosen[1:3])
    with pytest.raises(InputError, match="plain language model"):
        rewardbench_config()["model_builder"](model_folder("llama"))


def test_the_hook_keeps_to_a_models_positions(saved):
    path = saved("gpt2", "bt", 1, False)
    pipe = RewardBenchPipeline("t", rewardbench_config()["model_builder"](path), AutoTokenizer.from_pretrained(path))
    long = [{"role": "user", "content": "rock " * 3000}, {"role": "assistant", "content": "paper"}]
    assert torch.isfinite(pipe([long], max_length=2048)).all()


def test_the_hook_says_once_what_it_cuts(saved, caplog):
    pipe = RewardBenchPipeline("t", GPMPipeline(saved()).model, AutoTokenizer.from_pretrained(saved()))
    rows = [{"prompt": "rock " * 60, "chosen": "paper " * 40, "rejected": "scissors " * 40}]
    for _ in range(3):
        pipe(conversations(rows, "chosen"), conversations(rows, "rejected"), max_length=32)
    assert (pipe.cut.prompts, pipe.cut.responses) == (3, 6)
    assert [record.getMessage()[:17] for record in caplog.records] == ["cut to 32 tokens:"]


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_a_killed_run_on_two_processes_continues(saved, tmp_path):
    """kill -9 after half the rows, one process finishes what is missing."""
    data = write(tmp_path / "rows.jsonl", pairs(12))
    command = [SCRIPT, "--model", saved(*HEADS["gpm"]), "--dataset", str(data), "--batch_size", "1"]
    command += ["--output_dir", str(tmp_path / "out"), "--model_name", "m"]
    log = tmp_path / "log"
    workers = fork_group(2, command, os.environ | ENVIRONMENT, log, log)
    parts = [tmp_path / "out" / "m.jsonl.parts" / f"part-{rank}.jsonl" for rank in (0, 1)]

    def kept() -> int:
        return sum(part.read_bytes().count(b"\n") for part in parts if part.exists())

    while all(worker.is_alive() for worker in workers) and kept() < 138:
        time.sleep(0.005)
    for worker in workers:
        worker.kill()
        worker.join()
    assert [worker.exitcode for worker in workers] == [-9, -9], log.read_text()[-2000:]
    assert 138 <= kept() < 276 and all(part.read_bytes() for part in parts) and not (tmp_path / "out/m.jsonl").exists()
    assert run(saved(*HEADS["gpm"]), tmp_path / "out", "--dataset", data) == 0
    assert run(saved(*HEADS["gpm"]), tmp_path / "whole", "--dataset", data) == 0
    assert read(tmp_path / "out" / "m.json") == read(tmp_path / "whole" / "m.json")
    assert len(read(tmp_path / "out" / "m.jsonl")) == 276
