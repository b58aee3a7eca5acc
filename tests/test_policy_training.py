"""Policies trained by the real script on tiny models: log-probs, first steps, resuming, selections, refusals.

Starting costs many seconds, so two starts (one process, two processes) of script_worker.py serve all runs.
"""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from general_preference.alignment.samples import samples_checksum
from general_preference.alignment.targets import policy_target
from general_preference.datasets.packing import SampleCollator
from general_preference.files import lock_folder
from general_preference.models.attention import RowLayout
from general_preference.models.config import weights_digest
from general_preference.models.policy import get_policy
from general_preference.trainer.metrics import read_metrics
from tests.conftest import FAMILIES
from tests.test_training import run_cases

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

TAU, BETA, LAYOUTS = 0.5, 2.0, (RowLayout(packed=True), RowLayout(), RowLayout(shared=False))


def random_samples(count: int, seed: int = 0, least: int = 2, stop: int = 5) -> list[dict]:
    """Samples of `least` to 4 responses; the second of each prompt is cut off, the third equal to the first."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(6, 290, (length,), generator=generator).tolist()

    rows = []
    for index in range(count):
        responses = [[*ids(2, 9), stop], ids(2, 9), None, [*ids(2, 9), stop]][: least + index % (5 - least)]
        responses = [responses[0] if one is None else one for one in responses]
        row = {"id": f"{seed}/{index}", "prompt": f"prompt {index}", "prompt_ids": [1, *ids(3, 12)]}
        row |= {"responses": [str(one) for one in responses], "response_ids": responses}
        rows.append(row | {"finished": [one[-1] == stop for one in responses]})
    return rows


def embeddings_of(rows: list[dict], dim: int = 4, seed: int = 9) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(row["responses"]), dim, generator=generator).tolist() for row in rows]


def write(folder: Path, name: str, rows: list[dict], policy: str, embeddings=None, **settings) -> list[str]:
    """Files of samples and their scores; the flags that name them."""
    embeddings = embeddings_of(rows) if embeddings is None else embeddings
    scores = [{"id": row["id"], "embeddings": one, "gate": None} for row, one in zip(rows, embeddings, strict=True)]
    judge = {"asked": {"model": "judge"}, "model_files": "1", "head": "gpm", "dim": len(embeddings[0][0]), "planes": 2}
    judge |= {"tau": TAU, "samples": samples_checksum(rows), **settings}
    written = {"samples": (rows, {"asked": {}, "policy_digest": weights_digest(policy)}), "scores": (scores, judge)}
    for kind, (lines, summary) in written.items():
        (folder / f"{name}.{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / f"{name}.{kind}.summary.json").write_text(json.dumps({"settings": summary}))
    return ["--samples", str(folder / f"{name}.samples.jsonl"), "--scores", str(folder / f"{name}.scores.jsonl")]


def plain_log_probs(model, row: dict) -> torch.Tensor:
    """By a forward of transformers over each response alone."""
    found = []
    for response in row["response_ids"]:
        ids, start = torch.tensor([row["prompt_ids"] + response]), len(row["prompt_ids"])
        logits = model(input_ids=ids).logits[0, start - 1 : -1].double()
        found.append(logits.log_softmax(-1).gather(1, ids[0, start:, None]).sum())
    return torch.stack(found)


def policy_log_probs(model, rows: list[dict], layout=None) -> torch.Tensor:
    nothing = [dict.fromkeys(("target", "anchor"), [0.0] * len(row["responses"])) for row in rows]
    batch = SampleCollator(0, layout or model.layout_on())(
        [row | more for row, more in zip(rows, nothing, strict=True)]
    )
    return model(**batch.model_inputs())["log_probs"].double()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_log_probs_are_those_of_a_plain_forward(model_folder, family):
    model = get_policy(model_folder(family), bf16=False).eval()
    plain = AutoModelForCausalLM.from_pretrained(model_folder(family)).eval()
    rows = random_samples(6)
    expected = torch.cat([plain_log_probs(plain, row) for row in rows])
    layouts = (model.layout_on(), RowLayout(), RowLayout(shared=False))
    for layout in layouts:
        torch.testing.assert_close(policy_log_probs(model, rows, layout), expected, rtol=1e-5, atol=1e-5)
    one_by_one = torch.cat([policy_log_probs(model, [row]) for row in rows])
    torch.testing.assert_close(one_by_one, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(policy_log_probs(model, rows[1:3]), torch.cat(
        [plain_log_probs(plain, row) for row in rows[1:3]]), rtol=1e-5, atol=1e-5)  # fmt: skip
    four = policy_log_probs(model, [rows[2]])
    assert len(four) == 4 and four[0] == four[2], "equal responses"
    assert not rows[2]["finished"][1] and rows[2]["response_ids"][1][-1] != 5


# name: flags of runs with one step over eight prompts
STEP = ["--micro_train_batch_size", "8", "--loss", "regression"]
STEPS = {
    "whole": STEP,
    "accumulated": ["--micro_train_batch_size", "4", "--accumulated_gradient", "2", "--loss", "regression"],
    "zero0": [*STEP, "--zero_stage", "0"],
    "zero3": [*STEP, "--zero_stage", "3"],
    "centered": ["--micro_train_batch_size", "8"],
    "lora": [*STEP, "--lora_rank", "2"],
    "pair": [*STEP, "--select", "pair"],
    "dpo": ["--recipe", "dpo", "--micro_train_batch_size", "8", "--beta", "0.3"],
    "likelihood": ["--recipe", "best_of_n", "--micro_train_batch_size", "8"],
    "reference": [*STEP, "--anchors", "ref=0.3333,t=0.6667", "--reference", "{other}"],
    "small_beta": [*STEP, "--beta", "0.001"],
}
LONG = ["--micro_train_batch_size", "2", "--accumulated_gradient", "2", "--max_epochs", "4", "--save_steps", "2"]
LONG += ["--lora_dropout", "0.0"]


class Runs:
    """What the runs left: folders, exit codes and terminals by case."""

    def __init__(self, folder: Path, policy: str, other: str):
        self.folder, self.policy, self.other, self.results = folder, policy, other, {}
        self.rows = random_samples(8)
        self.embeddings = embeddings_of(self.rows)
        self.embeddings[3] = [[1.0, 2.0, 3.0, 4.0]] * len(self.embeddings[3])  # all tie
        self.data = write(folder, "own", self.rows, policy, self.embeddings)

    def flags(self, name: str, more: list[str], data: list[str] | None = None) -> list[str]:
        more = [flag.format(other=self.other, folder=self.folder) for flag in more]
        return [*(data or self.data), "--save_path", str(self.folder / name), *more]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return AutoModelForCausalLM.from_pretrained(self.folder / name).state_dict()

    def metrics(self, name: str) -> list[dict]:
        code, said = self.results[name]
        assert code == 0, said
        return [row for row in read_metrics(self.folder / name / "metrics.jsonl") if "train/loss" in row]

    def targets(self, **options) -> list[torch.Tensor]:
        return [policy_target(torch.tensor(one), None, TAU, beta=BETA, **options) for one in self.embeddings]


def refusals(runs: Runs, saved, folder: Path) -> dict[str, tuple[list[str], list[str] | None, str]]:
    """{case: (flags, data, what is said)}."""
    policy, rows = runs.policy, runs.rows
    other = random_samples(8, seed=1)
    wide = [dict(row) for row in random_samples(2, seed=2)]
    wide[1]["prompt_ids"] = [1, 5000]
    stranger = write(folder, "stranger", other, policy)
    wrong = [*runs.data[:2], "--scores", stranger[3]]
    changed = [row | {"responses": ["x"] * len(row["responses"])} for row in rows]
    reworded = [*write(folder, "reworded", changed, policy)[:2], *runs.data[2:]]
    second = write(folder, "second", other, policy, model_files="2")
    mixed = ["--samples", runs.data[1], second[1], "--scores", runs.data[3], second[3]]
    alone = write(folder, "alone", random_samples(4, seed=3, least=1), policy)
    tied = write(folder, "tied", rows, policy, [[[1.0, 0.0, 0.0, 1.0]] * len(row["responses"]) for row in rows])
    of_other = write(folder, "of_other", rows, runs.other)
    return {
        "another policy": ([], of_other, "sample from it, or set any_policy"),
        "other scores": ([], wrong, "the scores have no row with the id '0/0'"),
        "reworded": ([], reworded, "the scores are of other samples with the same ids"),
        "two judges": ([], mixed, "different preference models: model_files is 1 and 2"),
        "one response": ([], alone, "has one response and nothing to be compared with"),
        "vocabulary": ([], write(folder, "wide", wide, policy), "has the token 5000, but the policy has"),
        "no pair": (["--select", "pair"], tied, "there is no best and no worst to train on"),
        "no hybrid": (["--target", "dynamic"], None, "it needs a hybrid head, not D = 4"),
        "judge as policy": (["--policy", saved()], None, "not a policy: give a causal language model"),
        "other rank": (["--policy", "{folder}/lora", "--lora_rank", "4"], None, "is a LoRA adapter of rank 2"),
        "held": ([], None, "another run"),
        "small reference": (
            ["--anchors", "ref=1", "--reference", str(folder / "small")], None, "but the policy has 200 embeddings"
        ),
        "into the reference": (
            ["--anchors", "ref=1", "--reference", "{folder}/whole", "--save_path", "{folder}/whole"], None, "save_path"
        ),
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(model_folder, saved, tmp_path_factory):
    """All runs on one process, then two on two."""
    folder = tmp_path_factory.mktemp("policies")
    runs = Runs(folder, model_folder("llama"), model_folder("qwen2"))
    small = AutoModelForCausalLM.from_pretrained(runs.policy)
    small.resize_token_embeddings(200)
    small.save_pretrained(folder / "small")
    base = ["--policy", runs.policy, "--learning_rate", "1e-4", "--warmup_ratio", "0", "--adam_betas", "0.9", "0.95"]
    base += ["--lr_schedule", "constant", "--beta", str(BETA)]
    cases = {name: runs.flags(name, flags) for name, flags in STEPS.items()}
    two = write(folder, "two", random_samples(4, seed=5), runs.policy)
    data = ["--samples", runs.data[1], two[1], "--scores", runs.data[3], two[3]]
    data += ["--eval_samples", two[1], "--eval_scores", two[3]]
    cases["several"] = runs.flags("several", ["--micro_train_batch_size", "12"], data)
    cases["any policy"] = runs.flags("any", [*STEP, "--policy", runs.other, "--any_policy"])
    cases["uninterrupted"] = runs.flags("uninterrupted", LONG)
    cases["stopped"] = runs.flags("stopped", LONG)
    cases["continued"] = [*runs.flags("stopped", LONG), "--load_checkpoint"]
    cases["again"] = ["--config", str(folder / "dpo" / "arguments.json"), "--save_path", str(folder / "again")]
    adapter = write(folder, "adapter", runs.rows, runs.policy, runs.embeddings)
    lora = ["--policy", str(folder / "lora"), "--any_policy", "--lora_rank", "2"]
    cases["adapter"] = runs.flags("adapter_continued", [*STEP, *lora], adapter)
    refused = refusals(runs, saved, folder)
    cases |= {name: runs.flags(name.replace(" ", "_"), flags, data) for name, (flags, data, _) in refused.items()}
    cases["altered"] = [*runs.flags("altered", LONG), "--load_checkpoint"]
    (folder / "held").mkdir()
    options = {"script": "train_policy_general_preference", "stops": {"stopped": str(folder / "stopped/metrics.jsonl")}}
    with lock_folder(folder / "held", "save_path") or contextlib.nullcontext():
        first = {name: flags for name, flags in cases.items() if name != "altered"}
        runs.results |= run_cases(base, first, folder, **options)
    halves = {f"{name}_2": ["--zero_stage", stage] for name, stage in (("zero2", "2"), ("zero3", "3"), ("zero0", "0"))}
    half = ["--micro_train_batch_size", "4", "--loss", "regression"]
    cases = {name: runs.flags(name, [*half, *flags]) for name, flags in halves.items()}
    runs.results |= run_cases(base, cases, folder, processes=2, **options)
    runs.refused = refused
    return runs


def test_a_run_starts_at_its_anchors(runs):
    targets = runs.targets()
    for name in ("whole", "centered", "lora"):
        (row,) = runs.metrics(name)
        assert abs(row["train/kl"]) < 1e-5 and row["train/log_ratio_sd"] < 1e-5
        assert row["train/tied"] == 1 / 8
        assert row["train/unfinished"] == pytest.approx(8 / sum(map(len, targets)))
    assert runs.metrics("whole")[0]["train/loss"] == pytest.approx(
        torch.stack([t.square().mean() for t in targets]).mean().item(), rel=1e-5
    )
    assert runs.metrics("centered")[0]["train/loss"] == pytest.approx(
        torch.stack([t.var(unbiased=False) for t in targets]).mean().item(), rel=1e-5
    )


@pytest.mark.parametrize("name", ["accumulated", "zero0", "zero3", "zero2_2", "zero3_2", "zero0_2"])
def test_one_step_however_it_is_divided(runs, name):
    assert runs.metrics(name)[0]["train/loss"] == pytest.approx(runs.metrics("whole")[0]["train/loss"], rel=1e-5)
    whole, found = runs.weights("whole"), runs.weights(name)
    before = AutoModelForCausalLM.from_pretrained(runs.policy).state_dict()
    assert max((whole[key] - before[key]).abs().max() for key in whole) > 5e-5
    for key in whole:
        torch.testing.assert_close(found[key], whole[key], rtol=0, atol=1e-6, msg=key)
