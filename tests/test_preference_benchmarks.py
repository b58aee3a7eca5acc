"""eval/run_preference_benchmarks.py with models: all sets from tiny copies, numbers worked out again, stops."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from eval.run_preference_benchmarks import main
from general_preference import GPMPipeline
from general_preference.distributed import DistributedContext
from general_preference.evaluation.scoring import model_rows, write_model_scores
from general_preference.evaluation.sets import SETS, load_set
from general_preference.evaluation.summary import summarize_set
from general_preference.inference.batch import ResultStore
from rewardbench_eval.run_rm_rewardbench import main as rewardbench
from tests import evaluation_copies as copies
from tests.test_reward_models_of_others import classifier

pytestmark = pytest.mark.usefixtures("own_environment")

GPM, BT = ("llama", "gpm", 6, True), ("llama", "bt", 1, False)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return copies.write_copies(tmp_path_factory.mktemp("copies"))


def run(output: Path, folder: Path, models: list[str], *flags) -> int:
    paths = ["--model", *models, "--model_name", *(f"m{number}" for number in range(len(models)))]
    return main([*paths, "--data", str(folder), "--output_dir", str(output), *map(str, flags)])


def read(file: Path):
    content = file.read_text(encoding="utf-8")
    return json.loads(content) if file.suffix == ".json" else [json.loads(line) for line in content.splitlines()]


@pytest.mark.timeout(120)
def test_all_sets_with_a_preference_model(saved, folder, tmp_path, capsys):
    model, out = saved(*GPM), tmp_path / "out"
    assert run(out, folder, [model]) == 0
    printed = capsys.readouterr().out
    results = read(out / "benchmarks.json")["preference_benchmarks"]["m0"]
    assert list(results) == list(SETS) and all(numbers["score"] is not None for numbers in results.values())
    seven = [f"{100 * results[name]['score']:.1f}" for name in list(SETS)[:7]]
    mean = sum(results[name]["score"] for name in list(SETS)[:7]) / 7
    assert re.search(r"m0 +" + r" +".join(map(re.escape, [*seven, f"{100 * mean:.1f}"])), printed)
    assert (out / "benchmarks.png").stat().st_size > 20_000 and (out / "m0.rmb.png").stat().st_size > 10_000

    rm = GPMPipeline(model)
    row, found = copies.rm_bench()[3], read(out / "m0.rm_bench.jsonl")[3]
    scores = rm.score_matrix(row["prompt"], row["chosen"] + row["rejected"]).numpy()
    assert found["id"] == "code:3" and np.allclose(found["scores"], scores, atol=1e-5)
    right = [rm.score_matrix(r["prompt"], r["chosen"] + r["rejected"]).numpy()[:3, 3:] > 0 for r in copies.rm_bench()]
    domains = [right[:2], right[2:4], right[4:6], right[6:]]
    hard = np.mean([np.mean([np.triu(one, 1).sum() / 3 for one in domain]) for domain in domains])
    assert results["rm_bench"]["averages"]["hard"]["value"] == pytest.approx(hard)
    assert results["rm_bench"]["score"] == pytest.approx(np.mean([np.mean(domain) for domain in domains]))
    assert results["ppe_correctness"]["groups"]["cycles"] > 0, "this random model has cycles"

    common = ["--model", model, "--model_name", "own", "--output_dir", str(tmp_path)]
    for name, repository, flags, ending in (
        ("rewardbench", "reward-bench", [], ""),
        ("rewardbench_2", "reward-bench-2", ["--rewardbench_version", "2"], ".v2"),
        ("prior_sets", "pref-test-sets", ["--pref_sets"], ".pref_sets"),
    ):
        assert rewardbench([*common, "--dataset", str(folder / repository), *flags]) == 0
        own = read(tmp_path / f"own{ending}.summary.json")
        subsets = {subset: row["accuracy"] for subset, row in results[name]["subsets"].items()}
        assert subsets == {subset: row["accuracy"] for subset, row in own["results"].items()}, (
            "the same numbers, exactly"
        )
        assert results[name]["score"] == own["scores"].get("Average", own["scores"].get("Prior Sets"))


def test_scalar_models_beside_each_other_and_again(saved, folder, tmp_path, model_folder, capsys, monkeypatch):
    models = [saved(*BT), classifier(model_folder("llama"), tmp_path / "classifier")]
    flags = ["--sets", "judgebench,rmb", "--markdown"]
    assert run(tmp_path / "out", folder, models, *flags) == 0
    results = read(tmp_path / "out" / "benchmarks.json")["preference_benchmarks"]
    assert list(results) == ["m0", "m1"] and (tmp_path / "out" / "benchmarks.md").is_file()
    for name, model in zip(results, models, strict=True):
        rm = GPMPipeline(model)
        rows = read(tmp_path / "out" / f"{name}.judgebench.jsonl")
        correct = []
        for row, found in zip(copies.judgebench("gpt"), rows, strict=True):
            first, second = rm.score([row["question"]], [[row["response_A"], row["response_B"]]])[0].tolist()
            assert found["scores"][0] - found["scores"][1] == pytest.approx(first - second, abs=1e-5)
            correct.append((first > second) == (row["label"] == "A>B"))
        assert results[name]["judgebench"]["score"] == sum(correct) / len(correct)
        assert results[name]["rmb"]["groups"]["cycles"] == 0 and results[name]["rmb"]["groups"]["nash_not_borda"] == 0
    capsys.readouterr()
    monkeypatch.setattr(ResultStore, "append", lambda *_: pytest.fail("it was finished"))
    assert run(tmp_path / "out", folder, models, *flags) == 0
    assert read(tmp_path / "out" / "benchmarks.json")["preference_benchmarks"] == results
    assert run(tmp_path / "out", folder, models[::-1], *flags) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        "m0.judgebench.jsonl was made with model = " in line and "; model_files = " in line and "set overwrite" in line
    )


def test_a_stop_continues_and_batches_change_nothing(saved, folder, tmp_path, monkeypatch):
    model, append, done = saved(*GPM), ResultStore.append, []
    flags = ["--sets", "judgebench,rm_bench"]
    assert run(tmp_path / "whole", folder, [model], *flags) == 0

    def stops(store, index, row):
        if len(done) == 17:
            raise KeyboardInterrupt
        done.append(index)
        append(store, index, row)

    with monkeypatch.context() as patch:
        patch.setattr(ResultStore, "append", stops)
        assert run(tmp_path / "out", folder, [model], *flags, "--batch_size", 1) == 130
    assert not list((tmp_path / "out").glob("benchmarks*")) and (tmp_path / "out" / "m0.judgebench.jsonl").is_file()
    again = []
    with monkeypatch.context() as patch:
        patch.setattr(ResultStore, "append", lambda store, index, row: (again.append(index), append(store, index, row)))
        assert run(tmp_path / "out", folder, [model], *flags, "--batch_size", 1) == 0
    assert len(done) + len(again) == 12 + 10, "no record twice"
    whole, out = (read(tmp_path / name / "benchmarks.json")["preference_benchmarks"]["m0"] for name in ("whole", "out"))
    for name, numbers in whole.items():
        assert out[name]["subsets"] == numbers["subsets"]
        assert out[name]["log_loss"] == pytest.approx(numbers["log_loss"], abs=1e-5)
    for one, other in zip(
        read(tmp_path / "whole/m0.rm_bench.jsonl"), read(tmp_path / "out/m0.rm_bench.jsonl"), strict=True
    ):
        assert one["id"] == other["id"] and np.allclose(one["scores"], other["scores"], atol=1e-5)


def test_a_file_that_a_run_wrote_gives_its_numbers_again(saved, folder, tmp_path):
    assert run(tmp_path / "out", folder, [saved(*GPM)], "--sets", "if_rewardbench") == 0
    first = read(tmp_path / "out" / "m0.if_rewardbench.summary.json")
    flags = ["--scores", tmp_path / "out" / "m0.if_rewardbench.jsonl", "--sets", "if_rewardbench", "--data", folder]
    flags += ["--general_preference_tau", first["tau"], "--output_dir", tmp_path / "again"]
    assert main(list(map(str, flags))) == 0
    (again,) = (tmp_path / "again").glob("*.summary.json")
    for key in ("score", "averages", "subsets", "ece", "brier", "log_loss", "length", "groups"):
        assert read(again)[key] == first[key]


def test_k_responses_cost_k_forwards(saved, folder, tmp_path):
    rm, one = GPMPipeline(saved(*GPM)), load_set(SETS["ppe_correctness"], str(folder))
    embedded = []
    rm.model.register_forward_hook(lambda model, inputs, output: embedded.append(len(output["embeddings"])))
    store = ResultStore(tmp_path / "scores.jsonl")
    with DistributedContext.join() as context:
        table, _, settings = model_rows(rm, "m", one, 1, context)
        with store.open(context, len(table), settings, overwrite=False):
            write_model_scores(rm, table, store, context, 64)
            numbers, _ = summarize_set(one, (row["scores"] for row in store.rows()), rm.tau)
    distinct = sum(len({tuple(ids) for ids in row["response_ids"]}) for row in table)
    assert sum(embedded) == distinct <= 32 * len(one.records), "a response that is repeated is not run twice"
    assert numbers["n"] == sum(len(record.pairs) for record in one.records) > 20 * len(one.records)
