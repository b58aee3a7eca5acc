"""Batch inference over files: every comparison once and in order, whatever happens in between."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from eval.batch_inference_rm_general_preference import _order, main
from general_preference import GPMPipeline
from general_preference.files import lock_folder
from general_preference.inference.batch import ResultStore, result_row, summarize_rows
from general_preference.inference.embedding import EmbeddedPrompt
from general_preference.models.statistics import wilson_interval
from tests.forks import ENVIRONMENT, run_forks

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("own_environment")
SCRIPT = str(ROOT / "eval" / "batch_inference_rm_general_preference.py")
TEXTS = ["rock", "the paper wins", "scissors, of course", "", "name the rock and win " * 5]


@pytest.fixture(scope="module")
def model(make_model, model_folder, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("batch") / "model")
    make_model().save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder("llama")).save_pretrained(folder)
    return folder


def records() -> list[dict]:
    """All shapes of record, soft labels below one half among them."""
    rows = [
        {
            "id": f"pair-{i}",
            "prompt": f"Which throw wins, number {i}?",
            "chosen": TEXTS[i % 5],
            "rejected": TEXTS[(i + 1) % 5],
            "subset": "even" if i % 2 == 0 else "odd",
        }
        for i in range(9)
    ]
    rows.append({"id": "soft", "prompt": "Which?", "chosen": "a", "rejected": "b", "chosen_probability": 0.2})
    rows.append({"id": "custom", "instruction": "Which?", "chosen": {"response": "a"}, "reject": "b"})
    rows.append({"id": "group", "prompt": "Which throw wins?", "responses": TEXTS[:4],
                 "preferences": [[0, 1], [1, 2], [2, 0], [3, 0, 0.3]]})  # fmt: skip
    user = [{"role": "user", "content": "Which throw wins?"}]
    rows.append({"id": "messages", "chosen": [*user, {"role": "assistant", "content": "a"}],
                 "rejected": [*user, {"role": "assistant", "content": "b"}]})  # fmt: skip
    return rows


@pytest.fixture
def data(tmp_path) -> Path:
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, records())))
    return file


def run(model, data, output, *flags) -> int:
    return main(["--pretrain", model, "--dataset", str(data), "--output_path", str(output), *map(str, flags)])


def read(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_rows_are_in_order_and_hold_the_pipelines_scores(model, data, tmp_path, capsys):
    output = tmp_path / "new folder" / "results.jsonl"
    assert run(model, data, output, "--save_embeddings", "--micro_batch_size", 2) == 0
    rows, rm = read(output), GPMPipeline(model)
    assert [row["id"] for row in rows] == [record["id"] for record in records()]
    for row, record in zip(rows[:9], records(), strict=False):
        score = rm.score_matrix(record["prompt"], [record["chosen"], record["rejected"]])[0, 1].item()
        assert row["score"] == pytest.approx(score, abs=1e-6) and row["subset"] == record["subset"]
        assert row["probability"] == pytest.approx(1 / (1 + math.exp(-score / 0.1)), abs=1e-5)
        assert row["label"] == 1.0 and len(row["embeddings"]) == 2 and sum(row["gate"]) == pytest.approx(1)
    by_id = {row["id"]: row for row in rows}
    soft = rm.score_matrix("Which?", ["a", "b"])[0, 1].item()
    assert by_id["soft"]["score"] == pytest.approx(soft, abs=1e-6) == pytest.approx(by_id["custom"]["score"], abs=1e-6)
    assert by_id["soft"]["label"] == pytest.approx(0.2)
    scores = rm.score_matrix("Which throw wins?", TEXTS[:4])
    assert by_id["group"]["preferences"] == [[0, 1, 1.0], [1, 2, 1.0], [2, 0, 1.0], [0, 3, 0.7]]
    expected = [scores[i, j].item() for i, j, _ in by_id["group"]["preferences"]]
    assert by_id["group"]["score"] == pytest.approx(expected, abs=1e-6)
    assert 0 <= by_id["group"]["cyclic_share"] <= 1
    summary = json.loads((output.parent / "results.summary.json").read_text())
    assert set(summary["results"]) == {"all", "even", "odd"} and summary["results"]["all"]["n"] == 16
    assert summary["results"]["even"]["n"] == 5 and summary["results"]["all"]["groups"] == 1
    assert (output.parent / "results.reliability.png").stat().st_size > 10_000
    assert not list(output.parent.glob("*.parts"))
    printed = capsys.readouterr().out
    assert f"{summary['results']['all']['accuracy']:.4f}" in printed and "even" in printed


def test_batches_do_not_change_rows(model, data, tmp_path):
    scores = []
    for flags in ([], ["--batch_tokens", 1], ["--micro_batch_size", 3, "--attn_implementation", "eager"]):
        output = tmp_path / f"{len(scores)}.jsonl"
        assert run(model, data, output, *flags) == 0
        scores.append(torch.cat([torch.tensor(row["score"]).flatten() for row in read(output)]))
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], atol=1e-5, rtol=1e-5)


def test_a_second_run_computes_nothing_and_other_settings_are_refused(model, data, tmp_path, capsys, monkeypatch):
    output = tmp_path / "r.jsonl"
    assert run(model, data, output) == 0
    content = output.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(ResultStore, "append", lambda *_: pytest.fail("it was finished"))
        assert run(model, data, output) == 0
    assert output.read_bytes() == content
    assert run(model, data, output, "--max_len", 64) == 2
    assert "max_length = None, now 64" in capsys.readouterr().err
    assert output.read_bytes() == content and not list(tmp_path.glob("*.parts"))
    data.write_text("\n".join(map(json.dumps, records()[:3])))
    assert run(model, data, output) == 2
    assert run(model, data, output, "--overwrite") == 0 and len(read(output)) == 3
    mine = tmp_path / "mine.txt"
    mine.write_text("not yours")
    assert run(model, data, mine) == 2 and mine.read_text() == "not yours"


def test_a_broken_off_run_continues_row_by_row(model, data, tmp_path, monkeypatch):
    output, whole = tmp_path / "r.jsonl", tmp_path / "whole.jsonl"
    assert run(model, data, whole) == 0
    append, done = ResultStore.append, []

    def stops(store, index, row):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(index)
        append(store, index, row)

    with monkeypatch.context() as patch:
        patch.setattr(ResultStore, "append", stops)
        assert run(model, data, output) == 130
    parts = output.with_name("r.jsonl.parts")
    assert not output.exists() and len((parts / "part-0.jsonl").read_text().splitlines()) == 5
    with (parts / "part-0.jsonl").open("a") as part:
        part.write('12\t{"id": "half a li')  # as a kill leaves it
    kept = {"id": "group", "score": [9.0], "probability": [1.0], "preferences": [[0, 1, 1.0]]}
    (parts / "part-7.jsonl").write_text(f"11\t{json.dumps(kept)}\n3")  # of another process, which was killed, too
    again = []
    with monkeypatch.context() as patch:
        patch.setattr(ResultStore, "append", lambda store, index, row: (again.append(index), append(store, index, row)))
        assert run(model, data, output) == 0
    assert sorted([*done, *again, 11]) == list(range(13)), "no row twice; that of another process was kept"
    rows, expected = read(output), read(whole)
    assert rows[11]["score"] == [9.0]
    assert [row["id"] for row in rows] == [row["id"] for row in expected]
    for row, other in zip(rows[:11], expected, strict=False):
        assert row["score"] == pytest.approx(other["score"], abs=1e-6)


def test_a_kill_at_any_byte_changes_nothing(model, data, tmp_path):
    """Every state of the files that a kill can leave: the same command ends with the same output."""
    output, parts = tmp_path / "r.jsonl", tmp_path / "r.jsonl.parts"
    assert run(model, data, output) == 0
    content, summary = output.read_bytes(), (tmp_path / "r.summary.json").read_bytes()
    settings = json.dumps(json.loads(summary)["settings"])
    part = b"".join(b"%d\t%s\n" % (i, line) for i, line in reversed(list(enumerate(content.splitlines()))))
    for length in (0, 1, 2, 40, len(part) // 2, len(part) - 1, len(part)):
        for merged in (False, True):
            for file in [*tmp_path.glob("r.*")]:
                file.unlink()
            parts.mkdir()
            (parts / "settings.json").write_text(settings)
            (parts / "part-1.jsonl").write_bytes(part[:length])
            if merged:
                output.write_bytes(content)
            assert run(model, data, output) == 0
            assert [row["id"] for row in read(output)] == [record["id"] for record in records()]
            assert output.read_bytes().splitlines()[-1] == content.splitlines()[-1] or length < 40
            assert (tmp_path / "r.summary.json").exists() and not parts.exists()
    parts.mkdir()  # killed before the settings were written, or while the parts were removed
    (parts / ".lock").touch()
    assert run(model, data, output) == 0 and not parts.exists()


def test_two_runs_into_one_file_are_refused(model, data, tmp_path, capsys):
    claim = lock_folder(tmp_path / "r.jsonl.parts", "results")
    assert run(model, data, tmp_path / "r.jsonl") == 2
    assert "is being written by another run" in capsys.readouterr().err
    claim.close()
    assert run(model, data, tmp_path / "r.jsonl") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "/nowhere/x.jsonl"], "/nowhere/x.jsonl does not exist"),
        (["--pretrain", "/nowhere/model"], "/nowhere/model does not exist"),
        (["--pretrain", "BASE"], "plain language model"),
        (["--value_head_dim", "6"], "dim = 4, but 6"),
        (["--is_general_preference", "false"], "head = 'gpm'"),
        (["--tau", "0.7"], "temperature = 0.1, but 0.7"),
        (["--max_samples", "0"], "must be at least 1"),
        (["--dataset_probs", "0.5,0.5"], "2 numbers, but dataset has 1"),
        (["--is_custom_dataset"], "expects the key 'instruction'"),
        (["--output_path", "."], "is a folder"),
        (["--output_path", "/proc/nothing/r.jsonl"], "cannot be written"),
        (["--flash_attn", "--attn_implementation", "eager"], "disagree"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(model, model_folder, data, tmp_path, capsys, flags, message):
    flags = [model_folder("llama") if flag == "BASE" else flag for flag in flags]
    assert run(model, data, tmp_path / "r.jsonl", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "r.jsonl").exists()


def test_files_of_one_stem_keep_to_themselves(model, data, tmp_path):
    assert run(model, data, tmp_path / "r.jsonl") == 0
    assert run(model, data, tmp_path / "r.1.jsonl", "--max_len", 64) == 0
    assert run(model, data, tmp_path / "r.json", "--max_len", 32) == 0
    summaries = [json.loads((tmp_path / f"{name}.summary.json").read_text()) for name in ("r", "r.1", "r.json")]
    assert [summary["settings"]["max_length"] for summary in summaries] == [None, 64, 32]


def test_the_papers_flags_as_the_paper_writes_them(model, data, tmp_path):
    flags = ["--is_general_preference", "--general_preference_tau", 0.1, "--value_head_dim", 4, "--add_prompt_head"]
    flags += ["--max_len", 128, "--seed", 1, "--max_samples", 5, "--micro_batch_size", 2, "--disable_fast_tokenizer"]
    assert run(model, data, tmp_path / "r.jsonl", *flags) == 0 and len(read(tmp_path / "r.jsonl")) == 5
    assert run(model, data, tmp_path / "bf16.jsonl", "--bf16", "--max_samples", 2) == 0
    assert json.loads((tmp_path / "bf16.summary.json").read_text())["settings"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_what_is_not_ours_is_never_touched(model, data, tmp_path, overwrite):
    content = data.read_bytes()
    assert run(model, data, tmp_path / "folder" / ".." / data.name, *overwrite) == 2, "the input"
    shutil.copy(data, tmp_path / "x.summary.json")
    assert run(model, tmp_path / "x.summary.json", tmp_path / "x.jsonl", *overwrite) == 2
    (tmp_path / "y.summary.json").write_text('{"my": "notes"}')
    assert run(model, data, tmp_path / "y.jsonl", *overwrite) == 2
    (tmp_path / "z.jsonl.parts").mkdir()
    (tmp_path / "z.jsonl.parts" / "mine.txt").write_text("mine")
    assert run(model, data, tmp_path / "z.jsonl", *overwrite) == 0
    assert (tmp_path / "z.jsonl.parts" / "mine.txt").read_text() == "mine"
    assert run(model, tmp_path / "z.jsonl.parts", tmp_path / "z.jsonl", *overwrite) == 2, "its own parts as data"
    for name, text in (("w.jsonl.parts/part-0.jsonl", "my line"), ("v.summary.json", '{"settings": {"my": 1}}')):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        assert run(model, data, tmp_path / f"{name[0]}.jsonl", *overwrite) == 2
        assert (tmp_path / name).read_text() == text
    assert data.read_bytes() == (tmp_path / "x.summary.json").read_bytes() == content
    assert (tmp_path / "y.summary.json").read_text() == '{"my": "notes"}'


def test_names_of_subsets_may_hold_anything(model, tmp_path):
    rows = [{"prompt": "Which?", "chosen": "a", "rejected": "b", "subset": name} for name in ("$\\frac$ 5", "all", "_")]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(model, tmp_path / "d.jsonl", tmp_path / "r.jsonl") == 0
    assert json.loads((tmp_path / "r.summary.json").read_text())["results"]["all"]["n"] == 3


def test_bad_records_may_be_left_out(model, data, tmp_path):
    data.write_text(data.read_text() + '\n{"chosen": 5}\n')
    assert run(model, data, tmp_path / "r.jsonl") == 2
    assert run(model, data, tmp_path / "r.jsonl", "--on_bad_record", "skip") == 0
    assert len(read(tmp_path / "r.jsonl")) == 13
    (read_in,) = json.loads((tmp_path / "r.summary.json").read_text())["data"]
    assert (read_in["comparisons"], read_in["left_out"], read_in["empty"]) == (13, 1, 5)


def test_several_sets_are_subsets(model, data, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"id": "o", "prompt": "Which?", "chosen": "a", "rejected": "b"}))
    both = f"{data},named={other}"
    assert run(model, both, tmp_path / "r.jsonl", "--max_samples", 13, "--dataset_probs", "0.5,0.5") == 0
    rows = read(tmp_path / "r.jsonl")
    assert [row["id"] for row in rows[:3]] == ["pair-0", "o", "pair-1"] and len(rows) == 13
    results = json.loads((tmp_path / "r.summary.json").read_text())["results"]
    assert list(results) == ["even", "mine", "named", "odd", "all"] and results["named"]["n"] == 1


def test_orders_of_blended_sets():
    assert _order([3, 2], None, 10**6, 0) == [0, 1, 2, 3, 4]
    drawn = _order([50, 50], None, 10, 0)
    assert drawn == sorted(set(drawn)) and len(drawn) == 10 and drawn != _order([50, 50], None, 10, 1)
    blended = _order([300, 300], [0.75, 0.25], 200, 0)
    assert sum(index < 300 for index in blended) == pytest.approx(150, abs=1) and len(set(blended)) == 200
    assert sorted(_order([3, 200], [0.5, 0.5], 10**6, 0)) == list(range(203)), "each once, whatever the shares"


def test_summaries_agree_with_a_count_by_hand():
    def row(score, label, subset=""):
        embedded = EmbeddedPrompt(torch.tensor([[score], [0.0]]), torch.zeros(1), None)
        stated = {"first": [0], "second": [1], "label": [label]}
        if label < 0.5:
            stated = {"first": [1], "second": [0], "label": [1 - label]}
        return result_row({"id": "x", "subset": subset, **stated}, embedded, tau=0.5)

    rows = [row(1.0, 1.0, "a"), row(-1.0, 1.0, "a"), row(-0.5, 0.25), row(0.0, 1.0)]
    assert [r["label"] for r in rows] == [1.0, 1.0, 0.25, 1.0]
    results, reliability = summarize_rows(rows, 0.5)
    assert sum(count for *_, count in reliability) == 4
    assert list(results) == ["a", "all"] and results["a"]["accuracy"] == 0.5
    assert results["all"]["accuracy"] == (1 + 0 + 1 + 0.5) / 4 and results["all"]["ties"] == 1
    losses = [math.log1p(math.exp(-2)), math.log1p(math.exp(2)),
              0.25 * math.log1p(math.exp(1)) + 0.75 * math.log1p(math.exp(-1)), math.log(2)]  # fmt: skip
    assert results["all"]["loss"] == pytest.approx(sum(losses) / 4)


def test_wilson_interval():
    assert wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    low, high = wilson_interval(1.0, 10)
    assert low == pytest.approx(0.7225, abs=1e-4) and high == pytest.approx(1)
    assert wilson_interval(0.0, 1)[0] == 0.0


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_processes_and_a_kill_change_nothing(model, tmp_path):
    """On two processes: the rows of one process; after kill -9 of one under torchrun, only what was missing."""
    data, output = tmp_path / "many.jsonl", tmp_path / "r.jsonl"
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 200, (400,), generator=generator).tolist()
    many = [{"id": str(i), "prompt": "rock " * n, "chosen": "paper", "rejected": "rock " * (n % 7)}
            for i, n in enumerate(lengths)]  # fmt: skip
    data.write_text("\n".join(map(json.dumps, many)))
    flags = ["--pretrain", model, "--dataset", str(data), "--micro_batch_size", "1"]
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2", SCRIPT]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "env": environment, "text": True}
    first = subprocess.Popen([*torchrun, *flags, "--output_path", str(output)], **quiet)
    part = tmp_path / "r.jsonl.parts" / "part-1.jsonl"
    while first.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < 20):
        time.sleep(0.01)
    assert first.poll() is None, first.stderr.read()[-2000:]
    workers = subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[1]), signal.SIGKILL)
    first.communicate(timeout=120)
    assert first.returncode != 0 and not output.exists()
    kept = {int(line.split(b"\t")[0]) for file in part.parent.glob("part-*.jsonl")
            for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")}  # fmt: skip
    assert 20 <= len(kept) < 400
    second = run_forks(2, [SCRIPT, *flags, "--output_path", str(output)], os.environ | ENVIRONMENT)
    assert second.returncode == 0, second.stderr[-2000:]
    assert f"{len(kept)} done before" in second.stderr and "2 process(es)" in second.stderr
    assert main([*flags, "--output_path", str(tmp_path / "one.jsonl")]) == 0
    rows, expected = read(output), read(tmp_path / "one.jsonl")
    assert [row["id"] for row in rows] == [row["id"] for row in expected] == [str(i) for i in range(400)]
    assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in expected], abs=1e-6)
