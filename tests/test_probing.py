"""Heads on kept hidden states: the trainer's gradients, a planted truth found again, intervals, a killed run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from general_preference import GPMPipeline
from general_preference.datasets.packing import Collator
from general_preference.distributed import DistributedContext
from general_preference.errors import InputError, RunError
from general_preference.models.config import PreferenceConfig
from general_preference.models.preference_heads import PreferenceHeads
from general_preference.models.reward_model import get_reward_model
from general_preference.probing.comparing import (
    Stated,
    compare_scores,
    expanded_level,
    seed_interval,
    stated_preferences,
)
from general_preference.probing.fitting import GatedReward, Scored, parse_heads, read_batch, score_rows
from general_preference.probing.running import Trials, describe_set
from general_preference.probing.states import StateStore, collate_states, load_frozen, place_states
from general_preference.trainer.arguments import LossArguments
from general_preference.trainer.objectives import batch_loss
from general_preference.trainer.run_arguments import OptimizerArguments
from scripts.compare_heads import main
from tests.conftest import HIDDEN, random_comparisons

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "scripts" / "compare_heads.py")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """What is computed here and by one of several processes is the same to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokenized(comparisons: list[dict]) -> list[dict]:
    """Rows with all columns that a tokenized table has."""
    others = {"subset": ""}
    return [
        row | others | {"prompt_key": str(row["prompt_ids"]), "length": 20 + number % 7}
        for number, row in enumerate(comparisons)
    ]


@pytest.fixture
def context(own_environment):
    with DistributedContext.join() as joined:
        yield joined


def kept(folder: Path, tables: list, path: str, context) -> tuple[np.ndarray, list]:
    """(states, placed comparisons of each table), computed by the backbone at `path`."""
    prompts, placed = place_states(tables)
    store = StateStore(folder, prompts, HIDDEN, {"model": path})
    with store.open(context):
        assert store.fill(context, lambda: load_frozen(path, torch.float32, "auto", False, "cpu"), None) == len(prompts)
        assert store.fill(context, lambda: pytest.fail("it is computed already"), None) == 0
    return store.states, placed


def test_equal_prompts_and_responses_are_kept_once():
    first = {"prompt_ids": [1, 2], "response_ids": [[3], [4, 5]]}
    table = tokenized([
        {**row, "id": str(number), "first": [0], "second": [1], "label": [1.0], "margin": 0.0}
        for number, row in enumerate([
            first, {"prompt_ids": [1], "response_ids": [[2, 3], [3]]},
            {"prompt_ids": [1, 2], "response_ids": [[6], [4, 5]]}, {"prompt_ids": [1, 2], "response_ids": [[3], [3]]},
        ])
    ])  # fmt: skip
    prompts, (some, others) = place_states([table[:3], table[3:]])
    assert [(one["prompt_ids"].tolist(), [ids.tolist() for ids in one["response_ids"]]) for one in prompts] == [
        ([1, 2], [[3], [4, 5], [6]]),
        ([1], [[2, 3], [3]]),
    ]
    assert [(one.prompt, one.responses) for one in [*some, *others]] == [
        (0, [1, 2]),
        (4, [5, 6]),
        (0, [3, 2]),
        (0, [1, 1]),
    ]


HEADS = [
    PreferenceConfig("bt"),
    PreferenceConfig("gpm", 4, True, normalize=True, temperature=0.1),
    PreferenceConfig("gpm", 6, False, temperature=0.5, learnable_temperature=True),
    PreferenceConfig("hybrid", 5, True, "scaled_softmax", True, 0.1),
]


@pytest.mark.parametrize("preference", HEADS, ids=lambda preference: preference.describe())
def test_gradients_are_the_trainers_on_a_frozen_backbone(preference, model_folder, context, tmp_path):
    path, comparisons = model_folder("llama"), random_comparisons(9, 300, seed=1)
    model = get_reward_model(path, bf16=False, preference=preference, seed=3)
    model.backbone.requires_grad_(False)
    batch = Collator(0, model.train().layout_on())([row | {"weight": 1 / 9} for row in comparisons])
    whole = batch_loss(model(**batch.model_inputs()), batch, LossArguments())
    whole.total.backward()

    states, (rows,) = kept(tmp_path, [tokenized(comparisons)], path, context)
    heads = PreferenceHeads(preference, HIDDEN)
    heads.initialize_heads(3)
    small = collate_states(rows, [1 / 9] * 9, "cpu")
    alone = batch_loss(read_batch(heads, states, small), small, LossArguments())
    alone.total.backward()
    torch.testing.assert_close(alone.score, whole.score, rtol=1e-5, atol=1e-5)
    trained = dict(model.named_parameters())
    for name, weight in heads.named_parameters():
        scale = trained[name].grad.abs().max()
        assert scale > 1e-4
        torch.testing.assert_close(weight.grad / scale, trained[name].grad / scale, rtol=0, atol=1e-5)


def test_the_rival_of_equal_size_reads_the_prompt():
    (gpm, rival) = parse_heads("gpm8_gate,bt_gate8", "model", None)
    sizes = [sum(weight.numel() for weight in spec.make(HIDDEN, 0).parameters()) for spec in (gpm, rival)]
    assert rival.units == 6 and sizes == [(8 + 4) * HIDDEN, (6 + 6) * HIDDEN + 6]
    head = GatedReward(HIDDEN, 6)
    head.initialize_heads(1)
    responses, prompts = torch.randn(2, HIDDEN), torch.randn(2, HIDDEN)
    same, other = (
        head(responses[:1].expand(2, -1), some)["embeddings"] for some in (prompts[:1].expand(2, -1), prompts)
    )
    assert same.shape == (2, 1) and torch.equal(same[0], same[1]) and (other[0] - other[1]).abs() > 1e-4


@pytest.fixture(scope="module")
def pool(model_folder, tmp_path_factory):
    """Real hidden states of 2,400 random comparisons, a third of which are for the test."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patched.delenv(name, raising=False)
        with DistributedContext.join() as context:
            table = tokenized(random_comparisons(2400, 300, seed=5, groups=False))
            states, (rows,) = kept(tmp_path_factory.mktemp("pool"), [table], model_folder("llama"), context)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    return states, rows


def compared(pool, context, preference, names: str, sharpness: float) -> dict:
    """Heads on labels that are drawn from a model with this head, whose mean |logit| is the sharpness."""
    states, rows = pool
    truth = PreferenceHeads(preference, HIDDEN)
    truth.initialize_heads(11)
    scores = score_rows(truth, states, rows, "cpu").score
    chances = torch.sigmoid(sharpness * scores / scores.abs().mean())
    first_wins = torch.rand(len(rows), generator=torch.Generator().manual_seed(2), dtype=torch.float64) < chances
    drawn = [
        replace(row, first=[0 if wins else 1], second=[1 if wins else 0], label=[1.0])
        for row, wins in zip(rows, first_wins.tolist(), strict=True)
    ]
    parts = {"fit": drawn[:1300], "validation": drawn[1300:1600]}
    trials = Trials(
        context, "cpu", states, parts, OptimizerArguments(max_epochs=12, micro_train_batch_size=200, seed=1)
    )
    specs = parse_heads(names, "model", None)
    chosen = trials.choose_rates(specs, [1e-2, 5e-2])
    rates = {name: found["learning_rate"] for name, found in chosen.items()}
    scored, _ = trials.score_sets(specs, rates, 3, {"test": drawn[1600:]})
    return compare_scores(scored["test"], stated_preferences(drawn[1600:]))


def test_losses_that_are_not_finite_are_no_choice(pool, context):
    states, rows = pool
    parts = {"fit": rows[:200], "validation": rows[200:300]}
    trials = Trials(context, "cpu", states, parts, OptimizerArguments(max_epochs=3, micro_train_batch_size=50, seed=1))
    specs = parse_heads("bt,gpm4_raw", "model", None)
    chosen = trials.choose_rates(specs, [1e-2, 1e25])["gpm4_raw"]
    assert chosen["learning_rate"] == 1e-2 and chosen["losses"]["1e+25"] is None
    with pytest.raises(RunError, match="gpm4_raw: no learning rate"):
        trials.choose_rates(specs, [1e25])
    with pytest.raises(RunError, match="gpm4_raw: losses with seed 1 are not finite"):
        trials.score_sets(specs, {"bt": 1e-2, "gpm4_raw": 1e25}, 1, {"test": rows[300:400]})


def test_planted_planes_are_found_again(pool, context):
    found = compared(pool, context, PreferenceConfig("gpm", 4), "bt,bt_gate4,gpm2_raw,gpm4_raw", 3.0)
    accuracy = {name: one["accuracy"]["mean"] for name, one in found.items()}
    assert accuracy["gpm4_raw"] > accuracy["gpm2_raw"] > accuracy["bt"] + 0.05, accuracy
    assert found["gpm4_raw"]["verdict"] == "better" and found["gpm4_raw"]["loss_difference"]["high"] < 0
    assert found["bt_gate4"]["verdict"] == "no difference"


def test_a_planted_scalar_makes_no_head_better(pool, context):
    found = compared(pool, context, PreferenceConfig("bt"), "bt,gpm2_raw,hybrid3", 2.0)
    assert found["bt"]["accuracy"]["mean"] > 0.7
    assert {name: one.get("verdict") for name, one in found.items()} == {
        "bt": None, "gpm2_raw": "no difference", "hybrid3": "no difference",
    }  # fmt: skip


@pytest.mark.parametrize("prompts", [100, 15])
def test_among_many_equal_heads_hardly_one_seems_better(prompts):
    """Guessing heads: with plain 95 % intervals two of five comparisons, or more, would find a difference."""
    n, alarms = max(90, 2 * prompts), 0
    stated = Stated(torch.ones(n).double(), torch.arange(n) % prompts, torch.zeros(n).double())
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.randn(11, n, generator=generator, dtype=torch.float64)
        found = compare_scores({str(k): [Scored(one, one * 0, 1.0)] for k, one in enumerate(scores)}, stated)
        alarms += any(one.get("verdict") != "no difference" for name, one in found.items() if name != "0")
    assert alarms <= 2


def test_few_prompts_widen_an_interval():
    assert expanded_level(0.95, 10**6) == pytest.approx(0.95, abs=1e-5)
    # sqrt(11 / 10) * 2.228139 = 2.336898 deviations, of which a normal has 0.980556 inside
    assert expanded_level(0.95, 11) == pytest.approx(0.980556, abs=1e-5) and expanded_level(0.95, 1) == 0.95


def test_intervals_and_verdicts_by_hand():
    found = seed_interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2 and found["high"] - 2 == pytest.approx(4.302653 / 3**0.5, rel=1e-5)
    assert seed_interval([1.0]) == {"mean": 1.0, "low": None, "high": None}
    n = 200
    stated = Stated(torch.ones(n).double(), torch.arange(n), torch.tensor([1.0, -1.0, 0.0, 1.0] * (n // 4)).double())

    def scored(right: int) -> Scored:
        score = torch.where(torch.arange(n) < right, 1.0, -1.0).double()
        return Scored(score, -torch.nn.functional.logsigmoid(score), 1.0)

    heads = {"bt": [scored(100), scored(104)], "same": [scored(102)] * 2, "more": [scored(140), scored(142)]}
    found = compare_scores(heads | {"less": [scored(60), scored(61)]}, stated)
    assert found["bt"]["accuracy"]["mean"] == pytest.approx(0.51) and "verdict" not in found["bt"]
    assert found["more"]["difference"]["difference"] == pytest.approx(0.195)
    assert [found[name]["verdict"] for name in ("same", "more", "less")] == ["no difference", "better", "worse"]
    seeds = found["more"]["difference"]["seeds"]  # (140 - 100) / 200 and (142 - 104) / 200; t at 95 %, 1 degree
    assert seeds["mean"] == pytest.approx(0.195) and seeds["mean"] - seeds["low"] == pytest.approx(
        0.005 * 12.706, rel=1e-3
    )
    # Of four in a row three differ: two for the longer where the score is positive, one where it is negative.
    assert found["bt"]["longer"] == pytest.approx((25 * 2 + 25 + 26 * 2 + 24) / 300)
    few = replace(stated, cluster=torch.arange(n) % 14)
    assert {one.get("verdict") for one in compare_scores(heads, few).values()} == {None, "too few prompts"}
    confident = 1 / (1 + np.exp(-1))
    assert found["same"]["calibration_error"]["mean"] == pytest.approx(confident - 0.51)


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_a_difference_that_only_some_seeds_show_is_none(spread):
    """The mean over seeds is far above the first head's, but with spread one seed is far below."""
    n = 400
    stated = Stated(torch.ones(n).double(), torch.arange(n), torch.zeros(n).double())

    def scored(share: float) -> Scored:
        score = torch.where(torch.arange(n) < share * n, 1.0, -1.0).double()
        return Scored(score, torch.zeros(n).double(), 1.0)

    heads = {"bt": [scored(0.5)] * 3, "other": [scored(0.6 + shift) for shift in (-spread, 0.0, spread)]}
    found = compare_scores(heads, stated)["other"]
    assert found["difference"]["low"] > 0 and found["longer"] is None
    assert found["verdict"] == ("no difference" if spread else "better")


def records(count: int) -> str:
    rows = []
    for n in range(count):
        responses = [f"rock {n % 5}", f"paper {n % 7} wins", "the scissors"]
        rows.append({"prompt": f"Which throw, {n}?", "responses": responses, "preferences": [[0, 1], [1, 2], [2, 0]]})
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "train.jsonl").write_text(records(60))
    (folder / "many.jsonl").write_text(records(2600))
    return folder


FAST = ["--seeds=2", "--epochs=2", "--learning_rates=1e-2", "--preprocessing_workers=1"]


@pytest.mark.usefixtures("own_environment")
def test_the_saved_head_scores_as_it_did(files, saved, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["--pretrain", saved(), "--dataset", str(files / "train.jsonl"), "--output", str(output), *FAST]
    assert main([*command, "--heads=bt,gpm4_gate,bt_gate4", "--save=gpm4_gate"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    found = json.loads((output / "heads.json").read_text())
    test = found["results"]["held_out"]
    assert found["comparisons"] == {"fit": 41, "validation": 7, "held_out": 12} and test["n"] == 36
    assert test["scalar_ceiling"] == 24 / 36 and "a scalar gets at most 0.6667" in printed
    assert test["heads"]["bt"]["accuracy"]["mean"] <= 24 / 36 and len(test["heads"]["bt"]["accuracy"]["each"]) == 2
    assert re.search(r"gpm4_gate +192 .* too few prompts", printed)
    assert (output / "heads.png").stat().st_size > 5000
    states = torch.from_numpy(np.load(output / "features" / "states.npy"))
    assert states.shape == (60 * 4, HIDDEN)
    rm = GPMPipeline(str(output / "model"), device="cpu")
    (embedded,) = rm.embed(["Which throw, 0?"], [["rock 0", "paper 0 wins", "the scissors"]])
    place = int((states - embedded.prompt_hidden_state).norm(dim=1).argmin())  # where the backbone has kept it
    with torch.no_grad():
        kept_heads = rm.model.read_states(states[place + 1 : place + 4], states[place : place + 1])
    torch.testing.assert_close(kept_heads["embeddings"], embedded.embeddings, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept_heads["gates"][0], embedded.gate, rtol=1e-4, atol=1e-5)
    trained = PreferenceHeads(rm.preference, HIDDEN)
    trained.initialize_heads(42)
    assert not torch.allclose(trained.value_head.weight, rm.model.value_head.weight, atol=1e-3)
    written = (output / "features" / "states.npy").stat().st_mtime_ns
    assert main([*command, "--heads=bt,gpm2"]) == 0  # the same states, other heads
    assert (output / "features" / "states.npy").stat().st_mtime_ns == written


def descendants(pid: int) -> list[int]:
    """All processes that it started, and that these started."""
    children = list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    return children + [one for child in children for one in descendants(child)]


def state(pid: int) -> str:
    """R, S, Z, ... of a process, empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


@pytest.mark.engine
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("own_environment")
def test_killed_while_caching_and_started_again(files, saved, tmp_path, capsys):
    """Two processes are killed on the way; one process goes on and writes what another writes alone."""
    flags = ["--pretrain", saved(), "--dataset", str(files / "many.jsonl"), "--heads=bt", *FAST, "--device=cpu"]
    flags += ["--max_samples=2600", "--epochs=1", "--seeds=1"]
    output, done = tmp_path / "killed", tmp_path / "killed" / "features" / "done.npy"
    launch = [sys.executable, str(ROOT / "scripts" / "launch.py"), "--nproc-per-node=2", SCRIPT, *flags]
    run = subprocess.Popen([*launch, "--output", str(output)], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE,
                           stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        while not (done.exists() and done.stat().st_size > 128 and np.load(done, mmap_mode="r").sum() > 2):
            assert run.poll() is None, run.stderr.read().decode()[-2000:]
            time.sleep(0.005)
    finally:
        killed = [run.pid, *descendants(run.pid)]
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        run.wait()
    while any(state(pid) not in ("", "Z") for pid in killed):
        time.sleep(0.01)
    finished = np.load(done)
    assert 2 < finished.sum() < len(finished), "killed too late or too early"
    assert main([*flags, "--output", str(output)]) == 0, capsys.readouterr().err
    assert main([*flags, "--output", str(tmp_path / "whole")]) == 0
    both = [(folder / "features" / "states.npy").read_bytes() for folder in (output, tmp_path / "whole")]
    assert both[0] == both[1]
    assert np.load(tmp_path / "whole" / "features" / "states.npy").any(axis=1).all(), "no row was left out"
    other = main([*flags, "--output", str(output), "--max_len=9"])
    assert other == 2 and "of other comparisons, or of these with other cuts" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["states.npy", "done.npy"])
def test_states_that_were_cut_are_refused(name, model_folder, context, tmp_path):
    tables, path = [tokenized(random_comparisons(9, 300, seed=1))], model_folder("llama")
    kept(tmp_path, tables, path, context)
    os.truncate(tmp_path / name, (tmp_path / name).stat().st_size - 1)
    with pytest.raises(InputError, match=f"{name} is missing or damaged"):
        kept(tmp_path, tables, path, context)


@pytest.mark.usefixtures("own_environment")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--heads=bt,gpm3"], "a GPM head needs an even value_head_dim >= 2, not 3"),
        (["--heads=bt,rnn"], "'rnn' is none of bt, bt_gateD, gpmD, hybridD"),
        (["--heads=bt,bt"], "bt is named twice"),
        (["--heads=bt,bt_gate4", "--save=bt_gate4"], "a rival for comparison"),
        (["--save=gpm10"], "none of --heads, nor best"),
        (["--learning_rates=fast"], "is no list such as 1e-4,1e-3"),
        (["--train_split_ratio=1"], "holds nothing out"),
        (["--validation_ratio=0.0001"], "leaves none"),
        (["--train_split_ratio=0.9999"], "holds none out: lower it"),
        (["--output=FILES"], "which is read"),
        (["--output="], "--output is missing"),
        (["--output=OUT/x", "--features=OUT/x"], "is --output, too"),
        (["--output=OUT/x", "--save=bt", "--save_path=OUT/x"], "gets other results"),
        (["--save_path=OUT/model"], "has no model to hold"),
    ],
)
def test_bad_flags_are_one_line(files, saved, tmp_path, capsys, flags, message):
    flags = [flag.replace("FILES", str(files)).replace("OUT", str(tmp_path)) for flag in flags]
    command = ["--pretrain", saved(), "--dataset", str(files / "train.jsonl"), "--output", str(tmp_path / "out"), *FAST]
    assert main([*command, *flags]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_what_a_set_says_about_itself(pool):
    _, rows = pool
    found = describe_set(rows[:50])
    assert found["n"] == found["prompts"] == 50 and found["scalar_ceiling"] is None
    longer = [np.sign(row.lengths[0] - row.lengths[1]) for row in rows[:50]]
    assert found["longer_response"] == pytest.approx(np.mean([(sign + 1) / 2 for sign in longer]))
    circle = [
        replace(rows[0], responses=[1 + n, 1 + (n + 1) % 3], first=[0], second=[1], label=[1.0]) for n in range(3)
    ]
    assert describe_set(circle)["scalar_ceiling"] == pytest.approx(2 / 3)  # also of rows with a pair each
    tie = replace(circle[0], label=[0.5])
    assert describe_set([*circle, tie])["scalar_ceiling"] == pytest.approx(2.5 / 4)
