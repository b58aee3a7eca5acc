"""The report of an alignment run: numbers worked by hand, what is refused, and the script in a process of its own."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from general_preference.alignment.pictures import draw_policies
from general_preference.alignment.policies import check_same_prompts, read_policy
from general_preference.alignment.report import (
    Contest,
    best_of_n,
    length_bins,
    length_controlled,
    mean_interval,
    policy_cyclic_share,
    policy_margins,
    preference_report,
    response_exploitability,
)
from general_preference.errors import InputError
from general_preference.models.score import preference_score
from scripts.compare_policies import main, read_kl

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("own_environment")  # or trainers of later tests would join a group
ANGLES = torch.tensor([0.0, 2 * math.pi / 3, 4 * math.pi / 3], dtype=torch.float64)
THROWS = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)  # each beats the one before it with a score of sin 120


def contest(policies: list[torch.Tensor], gate=None, tau=1.0, lengths: list[list[int]] | None = None) -> Contest:
    """Of the embeddings of each policy's responses to one prompt."""
    counts = torch.tensor(list(map(len, policies)))
    owner = torch.arange(len(policies)).repeat_interleave(counts)
    lengths = lengths or [[5] * count for count in counts.tolist()]
    return Contest(torch.cat(policies), gate, tau, owner, torch.tensor([length for own in lengths for length in own]))


def rewards(*policies: list[float], **options) -> Contest:
    """Of a Bradley-Terry model's rewards."""
    return contest([torch.tensor(one, dtype=torch.float64)[:, None] for one in policies], **options)


def random_contest(seed: int, policies=3, responses=4, dim=5, same=False) -> Contest:
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(responses, dim, generator=generator) for _ in range(1 if same else policies)]
    gate = torch.rand(dim // 2, generator=generator)
    return contest(draws * (policies if same else 1), gate, 0.3)


def test_win_rates_of_a_bradley_terry_model_are_those_of_its_rewards():
    one = rewards([0.0, 0.0], [math.log(3), 0.0])  # P = 3/4 and 1/2
    assert policy_margins(one, 2).tolist() == [[0, pytest.approx(-0.125)], [pytest.approx(0.125), 0]]
    other = rewards([0.0, 0.0], [-math.log(3), -math.log(3), -math.log(3)])  # P = 1/4, and another number of responses
    found = preference_report([one, other, other], ["a", "b"])
    assert found["win_rate"]["start"]["win_rate"] == pytest.approx((0.625 + 0.25 + 0.25) / 3)
    assert found["win_rate"]["previous"] == found["win_rate"]["start"] == found["against_start"]["b"]
    assert found["win_rate"]["mixture"]["win_rate"] == pytest.approx((0.375 + 0.5) / 2)
    assert found["matrix"][0][1] == pytest.approx(0.625) and found["nash"] == {"a": 1, "b": 0}


def test_equal_policies_tie_exactly():
    found = preference_report([random_contest(seed, same=True) for seed in range(7)], ["start", "1", "2"])
    tie = {"win_rate": 0.5, "low": 0.5, "high": 0.5}
    assert list(found["win_rate"].values()) == [tie] * 3 and list(found["against_start"].values()) == [tie] * 3
    assert found["matrix"] == [[0.5] * 3] * 3 and found["length"]["controlled_win_rate"] == pytest.approx(0.5, abs=1e-9)
    assert list(found["nash"].values()) == [pytest.approx(1 / 3)] * 3 and found["cyclic_share"] == 0
    assert found["exploitability"]["policies"]["last"] == 0
    assert found["exploitability"]["responses"]["last"] > 0.05  # its own best response beats its average one
    for plane in found["planes"]:
        assert plane["contribution"] == pytest.approx(0, abs=1e-12) and plane["share"] == plane["start_share"]


def test_of_a_cycle_of_policies_only_the_mixture_is_not_exploitable():
    cycle = contest([THROWS[[i, i]] for i in range(3)], tau=0.1)
    margin = 1 / (1 + math.exp(-math.sin(2 * math.pi / 3) / 0.1)) - 0.5
    found = preference_report([cycle, cycle], ["rock", "paper", "scissors"])
    assert found["cyclic_share"] == pytest.approx(1) and list(found["nash"].values()) == [pytest.approx(1 / 3)] * 3
    for exploitability in found["exploitability"].values():
        assert exploitability["mixture"] == pytest.approx(0, abs=1e-12) == exploitability["nash"]
        assert list(exploitability["each"].values()) == [pytest.approx(margin)] * 3
    assert found["win_rate"]["previous"]["win_rate"] == pytest.approx(1 - found["win_rate"]["start"]["win_rate"])
    assert abs(found["win_rate"]["start"]["win_rate"] - 0.5) == pytest.approx(margin)
    assert found["win_rate"]["mixture"]["win_rate"] == pytest.approx(0.5)


def test_a_policy_that_beats_all_is_the_nash_mixture():
    found = preference_report([rewards([0.0, 0.0], [3.0, 3.0], [1.0, 1.0])], ["start", "1", "2"])
    assert found["nash"] == {"start": 0, "1": 1, "2": 0}
    assert found["exploitability"]["policies"]["nash"] == 0 == found["exploitability"]["policies"]["each"]["1"]
    assert found["exploitability"]["policies"]["last"] == pytest.approx(torch.tensor(2.0).sigmoid().item() - 0.5)
    mean = (torch.tensor([3.0, 0.0, 2.0]).sigmoid() - 0.5).mean().item()
    assert found["exploitability"]["responses"]["mixture"] == pytest.approx(mean)
    assert found["win_rate"]["start"]["low"] is None  # of a single prompt


def test_the_best_response_is_sought_per_prompt():
    """One policy has the best response to the first prompt, the other to the second: neither beats the other."""
    contests = [rewards([2.0, 0.0], [0.0, 0.0]), rewards([0.0, 0.0], [2.0, 0.0])]
    mixtures = torch.eye(2, dtype=torch.float64)
    best = torch.tensor(2.0).sigmoid().item() - 0.5
    found = torch.stack([response_exploitability(one, mixtures) for one in contests])
    assert found.tolist() == [pytest.approx([best / 2, best]), pytest.approx([best, best / 2])]
    assert preference_report(contests, ["a", "b"])["exploitability"]["policies"]["last"] == pytest.approx(0, abs=1e-12)


def test_win_rates_without_an_exception_are_cut_before_logits():
    chain = torch.tensor([[0.0, 0.5, 0.5], [-0.5, 0.0, 0.5], [-0.5, -0.5, 0.0]], dtype=torch.float64)
    assert policy_cyclic_share(chain, 10) == pytest.approx(1 / 9)  # residuals of +-L/3 on three pairs of +-L
    chain[0, 1], chain[1, 0] = 0.45, -0.45  # what the others are cut to by 10 prompts
    assert policy_cyclic_share(chain, 10) == pytest.approx(1 / 9)
    logits = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    ranked = torch.sigmoid(logits[:, None] - logits) - 0.5
    assert policy_cyclic_share(ranked, 1000) == pytest.approx(0, abs=1e-12)


def test_intervals_cover_the_mean_95_times_in_100():
    values = torch.rand(60, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).square()
    covered = sum(row["low"] <= 1 / 3 <= row["high"] for row in mean_interval(values)) / 200
    assert 0.89 < covered < 0.985
    assert mean_interval(values[:, :1]) == mean_interval(values[:, :1])


def lengths_and_wins(a: float, b: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    difference = torch.tensor([-40.0, -10, -3, 0, 2, 5, 20, 90], dtype=torch.float64)
    wins = torch.sigmoid(a + b * torch.tanh(difference / difference.square().mean().sqrt()))
    return difference, wins, torch.full_like(wins, 1 / 8)


def test_the_length_controlled_win_rate_is_that_at_equal_length():
    found = length_controlled(*lengths_and_wins(0.4, 1.7))
    assert found["controlled_win_rate"] == pytest.approx(1 / (1 + math.exp(-0.4)), abs=1e-4)
    assert found["slope"] == pytest.approx(1.7, abs=1e-3)
    difference, wins, weights = lengths_and_wins(0.0, 3.0)
    assert (wins * weights).sum() > 0.51  # only because it is longer
    assert length_controlled(difference, wins, weights)["controlled_win_rate"] == pytest.approx(0.5, abs=1e-4)
    separated = length_controlled(difference, (difference > 0).double(), weights)
    assert math.isfinite(separated["slope"]) and separated["slope"] > 5
    nothing = torch.zeros_like(difference)
    mean = (wins * weights).sum().item()
    assert length_controlled(nothing, wins, weights) == {"controlled_win_rate": pytest.approx(mean), "slope": None}
    assert length_controlled(nothing + 3, wins, weights)["controlled_win_rate"] is None


def test_bins_of_length_keep_equal_differences_together():
    difference = torch.tensor([-5.0, -5, -5, -5, -1, 0, 0, 2, 9, 9], dtype=torch.float64)
    wins = torch.tensor([0.0, 0, 0, 1, 1, 0.5, 0.5, 1, 1, 1], dtype=torch.float64)
    found = length_bins(difference, wins, torch.full_like(wins, 0.1), bins=3)
    assert [(row["low"], row["high"]) for row in found] == [(-5, -5), (-1, 0), (2, 9)]
    assert found[0] == {"low": -5, "high": -5, "share": pytest.approx(0.4), "win_rate": pytest.approx(0.25)}
    (whole,) = length_bins(torch.zeros(4, dtype=torch.float64), wins[:4], torch.full((4,), 0.25, dtype=torch.float64))
    assert whole["win_rate"] == pytest.approx(0.25) and (whole["low"], whole["high"]) == (0, 0)


def test_the_report_counts_tokens_of_current_less_those_of_start():
    longer = rewards([0.0, 0.0], [4.0, -4.0], lengths=[[10, 10], [30, 5]])
    found = preference_report([longer], ["a", "b"])["length"]
    assert [(row["low"], row["high"], row["share"]) for row in found["bins"]] == [(-5, -5, 0.5), (20, 20, 0.5)]
    assert found["bins"][1]["win_rate"] > 0.95 and found["slope"] > 0


def test_planes_and_the_scalar_add_up_to_the_logit():
    contests = [random_contest(seed) for seed in range(3)]
    planes = preference_report(contests, ["start", "1", "2"])["planes"]
    assert [plane["name"] for plane in planes] == ["plane 1", "plane 2", "scalar"]
    logits = [
        preference_score(one.embeddings[8:, None], one.embeddings[None, :4], one.gate).mean() / 0.3 for one in contests
    ]
    assert sum(plane["contribution"] for plane in planes) == pytest.approx(sum(logits).item() / 3, abs=1e-5)
    assert sum(plane["share"] for plane in planes) == pytest.approx(1)
    # One plane moves by a score of 2, the other by 1: shares of 4/5 and 1/5 whatever the gate's sum.
    pair = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    flat = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]])  # the second plane does not move at all
    gated = preference_report([contest([pair, flat], torch.tensor([2.0, 1.0]))], ["a", "b"])["planes"]
    assert [plane["start_share"] for plane in gated] == [pytest.approx(0.8), pytest.approx(0.2)]
    assert [plane["share"] for plane in gated] == [1, 0]


def test_the_best_of_n_meets_fresh_samples():
    order = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    scores = 100 * (order[:, None] - order)
    margins = torch.sigmoid(scores) - 0.5
    assert best_of_n(scores, margins, 1) == pytest.approx(0)
    assert best_of_n(scores, margins, 2) == pytest.approx(1 / 6)  # of {0, 1}, {1, 2}, {2, 0} against the third
    cycle = contest([THROWS]).logits()  # the winner of any two loses to the third
    assert best_of_n(cycle, torch.sigmoid(cycle) - 0.5, 2) == pytest.approx(0.5 - torch.sigmoid(cycle.max()).item())
    draws = torch.randn(400, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    found = preference_report([rewards(one, [0.0, 0.0], tau=1e-9) for one in draws], ["a", "b"])["best_of_n"]
    assert [row["n"] for row in found] == [1, 2, 4]  # 8 would leave none to meet
    for row in found:  # the largest of n + 1 equal draws is among the n
        assert row["win_rate"] == pytest.approx(row["n"] / (row["n"] + 1), abs=0.03)
        assert row["kl_bound"] == math.log(row["n"]) - (row["n"] - 1) / row["n"]


def sample(number: int, texts: list[str], **changes) -> dict:
    ids = [list(text.encode()) for text in texts]
    row = {"id": f"p{number}", "prompt": f"Which throw? {number}", "prompt_ids": [1, 2], "responses": texts}
    return row | {"response_ids": ids, "finished": [True] * len(texts)} | changes


def write(path: Path, rows: list[dict], settings: dict | None = None) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    path.with_suffix(".summary.json").write_text(json.dumps({"settings": settings or {}}))
    return str(path)


def test_lengths_unfinished_and_repeated_responses_are_counted(tmp_path):
    rows = [sample(0, ["a", "a", "a", "bbbbb"], finished=[True, False, True, True]), sample(1, ["", "cc"])]
    policy = read_policy(write(tmp_path / "s.jsonl", rows, {"temperature": 1.0}))
    assert policy.settings == {"temperature": 1.0}
    assert policy.shares() == {"length_mean": 1.5, "unfinished_share": 0.125, "duplicate_share": 0.25}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (sample(0, ["a"]), "s.jsonl: 'p0' has 1 response, expected at least 2"),
        (sample(7, ["a", "b"]), "s.jsonl: its 2 prompts have 1 ids, expected each once"),
        (sample(0, ["a", "b"], log_probs=[math.nan, 0.0]), "s.jsonl, line 2: found id, prompt, "),
    ],
)
def test_samples_that_cannot_be_compared_are_refused(tmp_path, row, message):
    path = write(tmp_path / "s.jsonl", [sample(7, ["a", "b"]), row])
    with pytest.raises(InputError) as refused:
        read_policy(path)
    assert message in str(refused.value)


def test_files_over_other_prompts_are_refused(tmp_path):
    rows = [sample(number, ["a", "b"]) for number in range(3)]
    start = read_policy(write(tmp_path / "a.jsonl", rows))
    turned = read_policy(write(tmp_path / "b.jsonl", rows[::-1]))
    check_same_prompts({"start": start, "1": turned})
    same = sample(2, ["a", "b"], prompt=[{"role": "user", "content": "Which throw? 2"}])
    check_same_prompts({"start": start, "1": read_policy(write(tmp_path / "m.jsonl", [*rows[:2], same]))})
    fewer = read_policy(write(tmp_path / "c.jsonl", rows[:2]))
    with pytest.raises(InputError, match=r"a\.jsonl and .*c\.jsonl are of other prompts: 1 has no 'p2' \(1 differ\)"):
        check_same_prompts({"start": start, "1": fewer})
    other = read_policy(write(tmp_path / "d.jsonl", [*rows[:2], sample(2, ["a", "b"], prompt="Another")]))
    with pytest.raises(InputError, match=r"have other prompts under the id 'p2'"):
        check_same_prompts({"start": start, "1": other})
    asked = read_policy(write(tmp_path / "e.jsonl", [*rows[:2], rows[2] | {"options": {"enable_thinking": False}}]))
    with pytest.raises(InputError, match=r"have other prompts under the id 'p2'"):
        check_same_prompts({"start": start, "1": asked})


S = "start=a.jsonl"
REFUSED = {
    "no model": (["--samples", S, "1=b.jsonl"], "--model names no preference model"),
    "a single policy": (["--samples", S, "--model", "m"], "--samples names 1 policies: expected at least the start"),
    "no name": (["--samples", "a.jsonl", S, "--model", "m"], "--samples 'a.jsonl' names no policy: expected name=FILE"),
    "a name twice": (["--samples", S, "start=b.jsonl", "--model", "m"], "--samples 'start=b.jsonl' is given twice"),
    "a file twice": (["--samples", S, "1=a.jsonl", "--model", "m"], "--samples '1=a.jsonl' is given twice"),
    "no file": (["--samples", S, "1=none.jsonl", "--model", "m"], "none.jsonl does not exist"),
    "a stopped run": (
        ["--samples", S, "1=stopped.jsonl", "--model", "m"],
        "stopped.jsonl is not finished",
    ),
    "an empty file": (["--samples", S, "1=empty.jsonl", "--model", "m"], "empty.jsonl is empty"),
    "no such model": (["--samples", S, "1=b.jsonl", "--model", "./none"], "./none"),
    "a folder without a model": (["--samples", S, "1=b.jsonl", "--model", "folder"], "folder"),
    "a judge's temperature": (
        ["--samples", S, "1=b.jsonl", "--model", "m", "--judge_tau", "1"],
        "--judge_tau 1.0 is of a",
    ),
    "an input as output": (
        ["--samples", S, "1=b.jsonl", "--model", "m", "--output", "b.summary.json"],
        "is b.summary.json",
    ),
    "another file as output": (
        ["--samples", S, "1=b.jsonl", "--model", "m", "--output", "mine.json"],
        "is of no report",
    ),
    "no number": (
        ["--samples", S, "1=b.jsonl", "--model", "m", "--train_report", "mine.json"],
        "states no finite 'kl'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_reported_is_refused_in_one_line(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "stopped.jsonl"):
        write(Path(name), [sample(0, ["a", "b"])], {})
    write(Path("empty.jsonl"), [])
    Path("mine.json").write_text("{}")
    Path("folder").mkdir()
    Path("stopped.jsonl.parts").mkdir()
    arguments, message = REFUSED[case]
    assert main([*arguments, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not Path("report.json").exists()


def test_the_script_writes_report_and_picture(tmp_path, monkeypatch, saved):
    texts = [["the rock", "paper", "", "the rock"], ["scissors", "the paper wins", "a rock", "Name one"]]
    start = [sample(number, texts[number % 2]) for number in range(5)]
    changed = [sample(number, texts[1 - number % 2][:3], finished=[True, False, True]) for number in range(5)]
    write(tmp_path / "start.jsonl", start, {"asked": {"policy": "base", "temperature": 1.0}})
    write(tmp_path / "same.jsonl", start)
    write(tmp_path / "now.jsonl", changed[::-1])
    (tmp_path / "train.json").write_text('{"kl": 0.7}')
    command = [sys.executable, str(ROOT / "scripts/compare_policies.py"), "--model", saved(head="hybrid", dim=5)]
    command += ["--judge", saved(head="bt", dim=1, gate=False), "--train_report", "train.json", "--device", "cpu"]
    command += ["--samples", "start=start.jsonl", "1=same.jsonl", "2=now.jsonl"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # the threads of two processes here
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["prompts"], report["previous"], report["current"], report["kl"]) == (5, "1", "2", 0.7)
    assert report["policies"]["start"]["settings"] == {"asked": {"policy": "base", "temperature": 1.0}}
    assert report["policies"]["2"]["unfinished_share"] == pytest.approx(1 / 3)
    assert report["policies"]["start"]["duplicate_share"] == pytest.approx(0.15)
    for role in ("model", "judge"):
        found = report[role]
        assert found["against_start"]["1"] == {"win_rate": 0.5, "low": 0.5, "high": 0.5}
        assert found["win_rate"]["start"] == found["win_rate"]["previous"] and found["matrix"][0] == found["matrix"][1]
        assert found["win_rate"]["start"]["win_rate"] != 0.5
    assert [plane["name"] for plane in report["judge"]["planes"]] == ["scalar"]
    assert len(report["model"]["planes"]) == 3
    (tmp_path / "unknown.json").write_text('{"kl": null}')
    assert read_kl(str(tmp_path / "unknown.json")) is None
    assert "policy 2, KL 0.700 from 1" in done.stdout and "against start (judge)" in done.stdout
    assert (tmp_path / "report.png").stat().st_size > 50_000
    two = [command[0], str(ROOT / "scripts/launch.py"), "--standalone", "--nproc_per_node", "2", *command[1:]]
    done = subprocess.run([*two, "--output", "two.json"], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0 and "2 process(es)" in done.stderr, done.stderr
    for ending in (".json", ".png", ".model.jsonl", ".judge.jsonl", ".model.summary.json"):
        assert (tmp_path / f"two{ending}").read_bytes() == (tmp_path / f"report{ending}").read_bytes(), ending
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(command[2:]) == 0  # it replaces its own report
    finally:
        torch.set_num_threads(threads)
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_a_finished_report_is_left_alone_and_one_of_another_judge_made_again(tmp_path, monkeypatch, saved, caplog):
    monkeypatch.chdir(tmp_path)
    for name, texts in (("start", ["the rock", "paper"]), ("now", ["scissors", "a rock"])):
        write(Path(f"{name}.jsonl"), [sample(number, texts) for number in range(3)])
    flags = ["--samples", "start=start.jsonl", "1=now.jsonl", "--model", saved(), "--device", "cpu", "--skip_finished"]
    judge = ["--judge", saved(head="bt", dim=1, gate=False)]
    caplog.set_level("INFO", "compare_policies")
    assert main(flags) == 0
    before = [(file.stat().st_ino, file.stat().st_mtime_ns) for file in sorted(tmp_path.iterdir())]
    assert main(flags) == 0 and caplog.messages == ["report.json is finished"]
    assert [(file.stat().st_ino, file.stat().st_mtime_ns) for file in sorted(tmp_path.iterdir())] == before
    assert main([*flags, *judge]) == 0 and caplog.messages[1] == "report.json is made again: of other judge"
    judged = json.loads(Path("report.json").read_text())["judge"]
    assert judged["head"] == "Bradley-Terry"
    Path("report.png").unlink()
    assert main([*flags, *judge]) == 0 and caplog.messages[2] == "report.json is made again: of other pictures"
    write(Path("now.jsonl"), [sample(number, ["scissors", "paper"]) for number in range(3)])
    assert main(flags) == 0 and caplog.messages[3] == "report.json is made again: of other samples and judge"
    assert json.loads(Path("report.json").read_text())["judge"] is None and Path("report.png").is_file()


def test_the_picture_needs_no_judge_and_no_kl(tmp_path):
    view = preference_report([random_contest(seed, policies=2, dim=1) for seed in range(3)], ["start", "now"])
    report = {"policies": {"start": {}, "now": {}}, "current": "now", "prompts": 3}
    report |= {"model": view, "judge": None, "kl": None, "previous": "start"}
    assert draw_policies(report, tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 50_000
