"""Evaluation sets from tiny copies in their hub layouts: what is read and refused, and scorers with known results."""

import gzip
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from eval.run_preference_benchmarks import main
from general_preference.errors import InputError
from general_preference.evaluation.records import Record
from general_preference.evaluation.rewardbench.scoring import best_of_n_credit
from general_preference.evaluation.sets import SETS, LoadedSet, choose_sets, load_set
from general_preference.evaluation.summary import summarize_set
from tests import evaluation_copies as copies

pytestmark = pytest.mark.usefixtures("own_environment")


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return copies.write_copies(tmp_path_factory.mktemp("copies"))


@pytest.fixture(scope="session")
def sets(folder) -> dict[str, LoadedSet]:
    return {name: load_set(chosen, str(folder)) for name, chosen in SETS.items()}


def answers(record: Record) -> list[str]:
    return [response[0]["content"] for response in record.responses]


def test_what_is_read(sets):
    counts = {name: len(one.records) for name, one in sets.items()}
    assert counts == {
        "rewardbench": 46, "rewardbench_2": 16, "ppe_preference": 6, "ppe_correctness": 10, "rmb": 12, "rm_bench": 10,
        "judgebench": 12, "judgebench_claude": 12, "m_rewardbench": 46, "if_rewardbench": 3, "prior_sets": 21,
    }  # fmt: skip
    rows = copies.ppe_preference()
    second = sets["ppe_preference"].records[1]
    assert answers(second) == [rows[1]["response_1"], rows[1]["response_2"]] and second.pairs == [(1, 0)]
    assert second.language == "English" and sets["ppe_preference"].left_out == 2, "two votes are ties"

    row, record = copies.ppe_correctness(0)[0], sets["ppe_correctness"].records[0]
    assert record.id == "MMLU-Pro:0:m" and len(record.responses) == 32 and answers(record)[31] == row["response_32"]
    assert len(record.pairs) == len(row["sampled_conflict_pairs"])
    assert all(row["scores"][winner] > row["scores"][loser] for winner, loser in record.pairs)

    kinds = Counter((record.subset, record.rule, len(record.pairs)) for record in sets["rmb"].records)
    assert kinds[("Pairwise_set/Harmlessness", "pairs", 1)] == 4 and kinds[("BoN_set/Helpfulness", "all", 3)] == 1
    assert sets["rmb"].records[0].prompt[0].keys() == {"role", "content"} and sets["rmb"].records[0].language

    styles = sets["rm_bench"].records
    assert Counter(record.subset for record in styles) == {"chat": 2, "code": 2, "math": 2, "safety": 4}
    assert answers(styles[0]) == copies.rm_bench()[0]["chosen"] + copies.rm_bench()[0]["rejected"]
    assert styles[0].pairs[:4] == [(0, 3), (0, 4), (0, 5), (1, 3)]

    assert [record.pairs[0] for record in sets["judgebench"].records[:2]] == [(0, 1), (1, 0)]
    assert sets["judgebench"].records[0].subset == "mmlu-pro"
    assert sets["m_rewardbench"].records[-1].subset == "deu_Latn/hep-rust"
    assert len(sets["m_rewardbench"].missing) == 21, "languages that the copy lacks are named"
    assert sets["if_rewardbench"].records[2].prompt[0]["role"] == "system"
    assert sets["if_rewardbench"].records[0].pairs == [(0, 1), (0, 2), (1, 3)]
    assert {record.rule for record in sets["rewardbench_2"].records} == {"best", "ties"}


def oracle(record: Record) -> list[float]:
    """Numbers that agree with every pair, for records whose winners are never losers."""
    return [float(index in {winner for winner, _ in record.pairs}) for index in range(len(record.responses))]


def test_constant_and_perfect_scorers(sets):
    labels = [row["label"] for row in copies.judgebench("gpt")]
    for name, one in sets.items():
        constant, _ = summarize_set(one, [[0.5] * len(record.responses) for record in one.records], 1.0)
        assert constant["ties"] == 1.0 and constant["length"]["correlation"] is None
        if name.startswith("judgebench"):
            assert constant["score"] == labels.count("B>A") / len(labels)
        elif name == "rewardbench_2":
            subsets = {subset: row["accuracy"] for subset, row in constant["subsets"].items()}
            assert subsets.pop("Ties") == 0 and set(subsets.values()) == {0.25}
        else:
            assert constant["score"] == 0, name
        if name != "if_rewardbench":  # its graphs are chains
            right, _ = summarize_set(one, list(map(oracle, one.records)), 0.1)
            assert right["score"] == pytest.approx(1.01 * 1 / 6 + 5 / 6 if name == "rewardbench_2" else 1.0), name


def many(one: LoadedSet, times: int) -> LoadedSet:
    """Each record so often, behind other prompts."""
    found = []
    for copy in range(times):
        for record in one.records:
            kind, _, number = record.id.partition(":")
            name = f"{kind}:{int(number) + 100 * copy}" if record.rule == "ties" else f"{record.id}.{copy}"
            prompt = [*record.prompt[:-1], record.prompt[-1] | {"content": f"{copy} {record.prompt[-1]['content']}"}]
            found.append(replace(record, id=name, prompt=prompt))
    return LoadedSet(one.set, found)


@pytest.mark.parametrize("name", [name for name in SETS if name != "rewardbench_2"])
def test_a_random_scorer_is_right_by_chance(sets, name):
    one = many(sets[name], -(-400 // len(sets[name].records)))
    generator = np.random.default_rng(1)
    numbers, _ = summarize_set(one, [generator.standard_normal(len(r.responses)).tolist() for r in one.records], 1.0)
    width = numbers["score_high"] - numbers["score_low"]
    if name == "rmb":  # a best response beats all of 2 or 3 losers
        for subset, row in numbers["subsets"].items():
            expected = 0.5 if subset.startswith("Pairwise") else (1 / 3 + 1 / 4) / 2
            assert abs(row["accuracy"] - expected) < row["accuracy_high"] - row["accuracy_low"] < 0.3
    else:
        assert abs(numbers["score"] - 0.5) < width < 0.2
    assert numbers["ties"] == 0 and abs(numbers["pair_accuracy"] - 0.5) < 0.1


def test_a_random_scorer_finds_one_of_four(sets):
    one = many(sets["rewardbench_2"], 40)
    generator = np.random.default_rng(2)
    numbers, _ = summarize_set(one, [generator.standard_normal(len(r.responses)).tolist() for r in one.records], 1.0)
    for subset in copies.SUBSETS_2:
        row = numbers["subsets"][subset]
        assert row["accuracy_low"] - 0.05 < 0.25 < row["accuracy_high"] + 0.05 and row["maximum"] == row["beats_all"]


def test_the_interval_is_that_of_scipys_bootstrap(sets):
    one = many(sets["ppe_preference"], 30)
    scores = [np.random.default_rng(int(i)).standard_normal(2).tolist() for i in range(len(one.records))]
    numbers, _ = summarize_set(one, scores, 1.0)
    right = [float(s[r.pairs[0][0]] > s[r.pairs[0][1]]) for r, s in zip(one.records, scores, strict=True)]
    expected = stats.bootstrap((right,), np.mean, n_resamples=4000, method="percentile", random_state=0)
    found = numbers["score_low"], numbers["score_high"]
    assert found == pytest.approx(tuple(expected.confidence_interval), abs=0.015)


def test_a_matrix_is_judged_pair_by_pair_and_the_best_by_its_mean(sets):
    one = sets["rewardbench_2"]
    scores = []
    for record in one.records:
        half = np.random.default_rng(len(scores)).standard_normal((len(record.responses),) * 2)
        scores.append((half - half.T).tolist())
    numbers, _ = summarize_set(one, scores, 1.0)
    means = [np.mean(matrix, axis=1).tolist() for matrix in scores]
    for subset in copies.SUBSETS_2:
        credits = [best_of_n_credit(m) for r, m in zip(one.records, means, strict=True) if r.subset == subset]
        assert numbers["subsets"][subset]["accuracy"] == np.mean(credits)
    assert numbers["groups"]["cycles"] > 0.2 and numbers["groups"]["cyclic_share"] > 0.1


BAD = {
    "ppe_preference": [
        ({"winner": "nobody"}, "column 'winner' is 'nobody', expected one of model_a, model_b, tie"),
        ({"response_2": None}, "no column 'response_2', found"),
        ({"hint": "it is 7"}, "nothing reads the text of column 'hint': name it in ignore_columns"),
    ],
    "rm_bench": [
        ({"chosen": ["a", "b"]}, "column 'chosen' is a list ['a', 'b'], expected a list of 3 texts"),
        ({"domain": "poetry"}, "column 'domain' is 'poetry', expected one of chat, code, math, safety"),
    ],
    "ppe_correctness": [
        ({"sampled_conflict_pairs": [[0, 32]]}, "a conflict pair is a list [0, 32], expected two indices below 32"),
        ({"scores": [1.0] * 31}, "expected a number for each of 32 responses"),
        ({"sampled_conflict_pairs": [3]}, "a conflict pair is int 3, expected two indices below 32"),
        ({"sampled_conflict_pairs": [[True, False]]}, "a list [True, False], expected two indices below 32"),
        ({"scores": [1.0] * 32}, "has scores 1.0 and 1.0, which say of neither that it is better"),
        ({"scores": [float("nan")] * 32}, "has scores nan and nan, which say of neither that it is better"),
        ({"scores": None}, "no column 'scores', found question_id, prompt, model_name, category, response_1"),
    ],
    "judgebench": [
        ({"label": "A"}, "column 'label' is 'A', expected one of A>B, B>A"),
        ({"response_A": "x \ud800"}, "it is not valid Unicode (half of a surrogate pair)"),
    ],
    "m_rewardbench": [({"source": "chat"}, "column 'source' is 'chat', expected one of alpacaeval-easy")],
    "if_rewardbench": [
        ({"preference_graph": [{"chosen": 1}]}, "an edge is an object {'chosen': 1}, expected {'chosen'"),
        ({"responses": ["a", "b"]}, "an edge joins responses (0, 2), expected two indices below 2"),
        ({"messages": [{"role": "user", "content": "q", "image": ""}]}, "nothing reads the field 'image' of a message"),
    ],
    "rmb": [
        ({"category_path": "BoN_set/Poetry/x"}, "column 'category_path' is 'BoN_set/Poetry', expected one of Pairwise"),
        ({"loser_list": [{"text": "a"}]}, "'bon_best' and 'loser_list' hold no two objects with a text 'answer'"),
    ],
}  # fmt: skip
PLACES = {
    "ppe_preference": ("PPE-Human-Preference-V1/data/test.jsonl", copies.ppe_preference),
    "rm_bench": ("RM-Bench/total_dataset.json", copies.rm_bench),
    "ppe_correctness": ("PPE-MMLU-Pro-Best-of-K/data/train.jsonl", lambda: copies.ppe_correctness(0)),
    "judgebench": ("JudgeBench/data/dataset=judgebench,response_model=gpt-4o.jsonl", lambda: copies.judgebench("gpt")),
    "m_rewardbench": ("multilingual-reward-bench/arb_Arab/test.jsonl", lambda: copies.m_rewardbench("arb_Arab")),
    "if_rewardbench": ("IF-RewardBench/data/if_rewardbench.json", copies.if_rewardbench),
    "rmb": (
        "RMB-Reward-Model-Benchmark/RMB_dataset/BoN_set/Harmlessness/S1.json",
        lambda: copies.rmb("BoN_set", "Harmlessness/S1", 0),
    ),
}


def write_rows(folder: Path, name: str, rows: list[dict]) -> None:
    file, _ = PLACES[name]
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text("\n".join(map(json.dumps, rows)) if file.endswith("l") else json.dumps(rows))


@pytest.mark.parametrize(("name", "change", "reason"), [(name, *one) for name, some in BAD.items() for one in some])
def test_a_bad_row_is_named_with_its_set_and_number(tmp_path, name, change, reason):
    rows = PLACES[name][1]()
    at = 1 if name != "if_rewardbench" else 0
    rows[at] |= change
    write_rows(tmp_path, name, rows)
    for other in copies.CORRECTNESS[1:] if name == "ppe_correctness" else ():
        copies.parquet(tmp_path / f"PPE-{other}-Best-of-K/train-0.parquet", copies.ppe_correctness(0))
    with pytest.raises(InputError) as error:
        load_set(SETS[name], str(tmp_path))
    message = str(error.value)
    assert message.startswith(f"{name}, row {at + 1} of ") and reason in message and "\n" not in message
    assert message.endswith("nothing was scored")


def test_a_column_may_be_left_out_by_name_and_github_layouts_are_read(tmp_path):
    for name, (_, rows) in PLACES.items():
        write_rows(tmp_path, name, [row | {"hint": "it is 7"} for row in rows()])
    for name in ("rm_bench", "judgebench", "if_rewardbench", "m_rewardbench", "ppe_preference"):
        assert load_set(SETS[name], str(tmp_path), ("hint",)).records, name
    rows = [row | {"hint": "it is 7"} for row in copies.rewardbench()]
    copies.parquet(tmp_path / "allenai/reward-bench/data/filtered-00000-of-00001.parquet", rows)
    with pytest.raises(InputError, match="nothing reads the text of column 'hint'"):
        load_set(SETS["rewardbench"], str(tmp_path))
    assert len(load_set(SETS["rewardbench"], str(tmp_path), ("hint",)).records) == 46


def said(capsys, *flags) -> tuple[int, str]:
    code = main([str(flag) for flag in flags])
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    return code, line


def scores_of(one: LoadedSet, seed: int = 0) -> list[dict]:
    generator = np.random.default_rng(seed)
    return [{"id": r.id, "scores": generator.standard_normal(len(r.responses)).tolist()} for r in one.records]


def write_lines(file: Path, rows: list[dict]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_a_file_of_scores_is_summed_up_without_a_model(folder, sets, tmp_path, capsys):
    rows = [{"set": name} | row for name in ("rm_bench", "rmb") for row in scores_of(sets[name])]
    file, out = write_lines(tmp_path / "mine.jsonl", rows[::-1]), tmp_path / "out"
    flags = ["--scores", file, "--sets", "rm_bench,rmb", "--data", folder, "--output_dir", out, "--markdown"]
    assert main(list(map(str, flags))) == 0
    expected, _ = summarize_set(sets["rm_bench"], [row["scores"] for row in scores_of(sets["rm_bench"])], 1.0)
    summary = json.loads((out / "mine.rm_bench.summary.json").read_text())
    assert summary["subsets"]["safety"]["n"] == 4 and summary["subsets"]["safety"]["pairs"] == 36
    assert summary["score"] == expected["score"] and summary["averages"] == expected["averages"]
    assert [json.loads(line) for line in (out / "mine.rm_bench.jsonl").read_text().splitlines()] == [
        {"id": row["id"], "scores": row["scores"]} for row in scores_of(sets["rm_bench"])
    ]
    printed = capsys.readouterr().out
    assert "| mine | - | - | - | - |" in printed and f"{100 * expected['score']:.1f}" in printed
    assert (out / "benchmarks.md").read_text().strip() in printed
    assert sorted(file.name for file in out.iterdir()) == [
        "benchmarks.json", "benchmarks.md", "benchmarks.png",
        "mine.rm_bench.jsonl", "mine.rm_bench.png", "mine.rm_bench.summary.json",
        "mine.rmb.jsonl", "mine.rmb.png", "mine.rmb.summary.json",
    ]  # fmt: skip
    before = (out / "benchmarks.json").read_text()
    assert main(list(map(str, flags))) == 0 and (out / "benchmarks.json").read_text() == before, "a second run"
    changed = write_lines(file, [row | {"scores": [2 * s for s in row["scores"]]} for row in rows])
    code, line = said(capsys, *flags)
    assert code == 2 and "mine.rm_bench.jsonl was made with scores_in_file =" in line and "set overwrite" in line
    assert main([*map(str, flags), "--overwrite"]) == 0 and changed.exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda rows: rows[:-1], "lacks scores of 1 records of rm_bench, the first 'safety-response:9'"),
        (lambda rows: [*rows, rows[0]], "line 11: record 'chat:0' was scored in a line before"),
        (lambda rows: [rows[0] | {"id": "x"}], "line 1: record 'x' is none of rm_bench"),
        (lambda rows: [rows[0] | {"scores": [1, 2]}], "has scores a list [1, 2], expected 6 numbers, or 6 rows of 6"),
        (lambda rows: [rows[0] | {"scores": np.ones((6, 6)).tolist()}], "with scores[i][j] = -scores[j][i]"),
        (lambda rows: [rows[0] | {"scores": [float("nan")] * 6}], "has scores a list [nan"),
        (lambda rows: [rows[0] | {"scores": [1e308, -1e308, 1, 2, 3, 4]}], "has scores a list [1e+308, -1e+308"),
        (lambda rows: [rows[0] | {"scores": [10**400, 1, 2, 3, 4, 5]}], "has scores a list [1000"),
        (lambda rows: [rows[0] | {"scores": ["1"] * 6}], "has scores a list ['1'"),
        (lambda rows: [rows[0] | {"scores": [[1, 2], [3]]}], "has scores a list [[1, 2], [3]]"),
        (
            lambda rows: [rows[0] | {"reward": 1}],
            "nothing reads the column 'reward': name it in ignore_columns",
        ),
        (lambda rows: [rows[0] | {"set": ["rm_bench"]}], "line 1: its set is ['rm_bench'], expected one of rm_bench"),
        (lambda rows: [rows[0] | {"id": "\ud800"}], "is none of rm_bench"),
        (lambda rows: [{"id": 3, "scores": [1]}], "record '3' is none of rm_bench"),
        (lambda rows: [{"scores": [1]}], "line 1 is no object with id and scores"),
        (lambda rows: [rows[0] | {"set": "rmb"}], "its set is 'rmb', expected one of rm_bench"),
    ],
)
def test_a_file_of_scores_that_does_not_fit_is_refused(folder, sets, tmp_path, capsys, change, reason):
    file = write_lines(tmp_path / "mine.jsonl", change(scores_of(sets["rm_bench"])))
    flags = ["--scores", file, "--sets", "rm_bench", "--data", folder, "--output_dir", tmp_path / "out"]
    code, line = said(capsys, *flags)
    assert code == 2 and reason in line and not list(tmp_path.glob("out/*.json*"))


def test_files_of_scores_are_read_as_other_json_is(folder, sets, tmp_path, capsys):
    rows, flags = (
        scores_of(sets["rm_bench"]),
        ["--sets", "rm_bench", "--data", folder, "--output_dir", tmp_path / "out"],
    )
    lines = "\n\n".join(json.dumps(row | {"reward": 1}) for row in rows)  # blank lines, and a column to leave out
    (tmp_path / "mine.jsonl.gz").write_bytes(gzip.compress(lines.encode("utf-8-sig")))
    assert main([*map(str, ["--scores", tmp_path / "mine.jsonl.gz", *flags]), "--ignore_columns", "reward"]) == 0
    (file := tmp_path / "mine.jsonl").write_bytes(b"\xff\xfe\x00abc")
    assert "mine.jsonl, line 1: not JSON in UTF-8" in said(capsys, "--scores", file, *flags)[1]
    line = said(capsys, "--scores", file.rename(tmp_path / "mine.txt"), *flags)[1]
    assert "mine.txt is no file of JSON lines by its name: call it .jsonl" in line
    code, line = said(capsys, "--scores", write_lines(file, rows), *flags, "--general_preference_tau", 0)
    assert code == 2 and "--general_preference_tau 0.0 must be a number above 0" in line


def test_what_cannot_be_used_is_one_line(folder, tmp_path, capsys):
    scores, out = write_lines(tmp_path / "s.jsonl", []), ["--output_dir", tmp_path / "out"]
    with_scores = ["--scores", scores, *out]
    assert said(capsys, *with_scores, "--sets", "rmbench")[1].startswith(
        "error: there is no evaluation set 'rmbench', expected all or some of rewardbench, rewardbench_2"
    )
    assert "is named twice" in said(capsys, *with_scores, "--sets", "rmb,rmb")[1]
    assert "no folder nowhere with copies" in said(capsys, *with_scores, "--sets", "rmb", "--data", "nowhere")[1]
    assert "is on GitHub alone: clone it" in said(capsys, *with_scores, "--sets", "rmb")[1]
    (data := tmp_path / "data" / "RM-Bench").mkdir(parents=True)
    from_data = [*with_scores, "--data", data.parent, "--sets"]
    code, line = said(capsys, *from_data, "rmb")
    assert code == 2 and "holds no copy of Zhou-Zoey/RMB-Reward-Model-Benchmark" in line
    assert "holds none of data/train-*.parquet" in said(capsys, *from_data, "rm_bench")[1]
    (data / "train.jsonl").write_text("")
    assert "rm_bench: none of 0 rows can be scored" in said(capsys, *from_data, "rm_bench")[1]
    (data / "train.jsonl").write_text('{"id": 1}\n{"id"')
    line = said(capsys, *from_data, "rm_bench")[1]
    assert "rm_bench, row 1 of train (" in line and "(2 such rows in all)" in line
    assert "--model M [M ...] or --scores FILE is needed" in said(capsys, *out)[1]
    assert "is no file" in said(capsys, "--scores", tmp_path / "none", *out)[1]
    assert "two models are called 'a'" in said(capsys, "--model", "x/a", "y/a", "--model_name", "a", "a", *out)[1]
    models = ["--model", tmp_path, tmp_path / "none", "--sets", "rm_bench", "--data", folder, *out]
    assert f"{tmp_path} is not a model folder" in said(capsys, *models)[1]
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # a model as far as is seen before it is loaded
    code, line = said(capsys, *models)
    assert code == 2 and f"model folder {tmp_path / 'none'} does not exist" in line, "before the first one scores"
    inside = said(capsys, "--scores", scores, "--sets", "rm_bench", "--data", folder, "--output_dir", folder)[1]
    assert "would be written into" in inside and not list(folder.glob("*.json*"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "benchmarks.json").write_text('{"mine": 1}')
    line = said(capsys, *with_scores, "--sets", "rm_bench", "--data", folder)[1]
    assert "benchmarks.json is of no run of these sets and would be replaced" in line
    with pytest.raises(InputError, match="no evaluation set ''"):
        choose_sets("")
