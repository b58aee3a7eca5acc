"""Policies trained by the real script on tiny models: log-probs, first steps, resuming, selections, refusals.

Starting costs many seconds, so two starts (one process, two processes) of script_worker.py serve all runs.
"""

import contextlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, GPT2Config, GPTNeoXConfig, OPTConfig

from general_preference.alignment.policy_arguments import RECIPES, parse_policy_arguments
from general_preference.alignment.samples import samples_checksum
from general_preference.alignment.targets import policy_target
from general_preference.alignment.training import select_and_target
from general_preference.datasets.packing import SampleCollator
from general_preference.errors import InputError
from general_preference.files import lock_folder
from general_preference.models.attention import RowLayout
from general_preference.models.config import weights_digest
from general_preference.models.policy import get_policy
from general_preference.trainer.metrics import MEASURED, read_metrics
from scripts.make_tiny_model import make_tiny_model
from scripts.train_policy_general_preference import is_finished
from tests.conftest import FAMILIES
from tests.test_training import ROOT, forked, run_cases

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

TAU, BETA = 0.5, 2.0


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
    sampling = {"asked": {}, "policy_digest": weights_digest(policy), "temperature": 1.0, "top_p": 1.0}
    written = {"samples": (rows, sampling), "scores": (scores, judge)}
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


@torch.no_grad()
def test_log_probs_while_it_trains_are_without_dropout(tmp_path):
    common = {"vocab_size": 300, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    gpt2, neox = GPT2Config(**common), GPTNeoXConfig(hidden_dropout=0.2, attention_dropout=0.2, **common)
    opt = OPTConfig(dropout=0.1, attention_dropout=0.1, ffn_dim=64, word_embed_proj_dim=32, **common)
    for config in (gpt2, neox, opt):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / config.model_type)
        model, rows = get_policy(str(tmp_path / config.model_type), bf16=False), random_samples(5)
        training, evaluating = (policy_log_probs(one(), rows) for one in (model.train, model.eval))
        torch.testing.assert_close(training, evaluating, rtol=0, atol=1e-5, msg=config.model_type)


@torch.no_grad()
def test_log_probs_of_a_model_whose_prompts_are_not_shared(tmp_path):
    """ALiBi counts positions by itself, so its responses are separate rows."""
    torch.manual_seed(0)
    plain = BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)).eval()
    for weight in plain.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.15)
    plain.save_pretrained(tmp_path)
    model, rows = get_policy(str(tmp_path), bf16=False).eval(), random_samples(5)
    assert not model.layout_on().shared
    expected = torch.cat([plain_log_probs(plain, row) for row in rows])
    torch.testing.assert_close(policy_log_probs(model, rows), expected, rtol=1e-5, atol=1e-5)


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
    "small_beta": [*STEP, "--beta", "0.001", "--max_epochs", "3"],
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

    def metrics(self, name: str, code: int = 0) -> list[dict]:
        found, said = self.results[name]
        assert found == code, said
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
    cases["any policy"] = runs.flags("any policy", [*STEP, "--policy", runs.other, "--any_policy"])
    cases["uninterrupted"] = runs.flags("uninterrupted", LONG)
    cases["stopped"] = runs.flags("stopped", LONG)
    cases["continued"] = [*runs.flags("stopped", LONG), "--load_checkpoint"]
    cases["again"] = [
        "--config",
        str(folder / "dpo" / "arguments.json"),
        "--save_path",
        str(folder / "again"),
        "--beta",
        "0.3",
    ]
    adapter = write(folder, "adapter", runs.rows, runs.policy, runs.embeddings)
    lora = ["--policy", str(folder / "lora"), "--any_policy", "--lora_rank", "2"]
    cases["adapter"] = runs.flags("adapter", [*STEP, *lora], adapter)
    refused = refusals(runs, saved, folder)
    cases |= {name: runs.flags(name.replace(" ", "_"), flags, data) for name, (flags, data, _) in refused.items()}
    (folder / "held").mkdir()
    options = {"script": "train_policy_general_preference", "stops": {"stopped": str(folder / "stopped/metrics.jsonl")}}
    with lock_folder(folder / "held", "save_path") or contextlib.nullcontext():
        runs.results |= run_cases(base, cases, folder, **options)
    halves = {f"{name}_2": ["--zero_stage", stage] for name, stage in (("zero2", "2"), ("zero3", "3"), ("zero0", "0"))}
    half = ["--micro_train_batch_size", "4", "--loss", "regression"]
    cases = {name: runs.flags(name, [*half, *flags]) for name, flags in halves.items()}
    runs.results |= run_cases(base, cases, folder, processes=2, **options)
    for name in ("altered", "rescored"):
        shutil.copytree(folder / "stopped", folder / name)
    file = folder / "altered" / "anchors" / "train_t.jsonl"
    first, *others = file.read_text().splitlines(keepends=True)
    row = json.loads(first)
    row["log_probs"][0] += 0.5
    file.write_text(json.dumps(row) + "\n" + "".join(others))
    rescored = write(folder, "rescored", runs.rows, runs.policy)
    cases = {"altered": runs.flags("altered", [*LONG, "--load_checkpoint"])}
    cases["rescored"] = runs.flags("rescored", [*LONG, "--load_checkpoint"], rescored)
    runs.results |= run_cases(base, cases, folder, **options)
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


def test_a_saved_policy_is_a_plain_language_model(runs):
    batch = torch.tensor([runs.rows[0]["prompt_ids"]])
    for name in ("whole", "lora", "adapter"):
        code, said = runs.results[name]
        assert code == 0, said
    with torch.no_grad():
        own = get_policy(str(runs.folder / "whole"), bf16=False).eval()
        plain = AutoModelForCausalLM.from_pretrained(runs.folder / "whole").eval()
        torch.testing.assert_close(own.language_model(batch).logits, plain(batch).logits, rtol=0, atol=0)
        start = AutoModelForCausalLM.from_pretrained(runs.policy).eval()
        before = start(batch).logits
        merged = PeftModel.from_pretrained(start, str(runs.folder / "lora")).eval()(batch).logits
        own = get_policy(str(runs.folder / "lora"), bf16=False).eval().backbone(batch).logits
    torch.testing.assert_close(own, merged, rtol=0, atol=0)
    assert not torch.equal(merged, before)
    for name in ("whole", "lora"):
        folder = runs.folder / name
        assert "preference" not in json.loads((folder / "config.json").read_text())
        assert not any("head" in file.name for file in folder.glob("*.safetensors"))
        card = (folder / "README.md").read_text()
        assert "# Aligned policy" in card and "Trained with: regression loss, score targets, beta 2." in card


def test_a_card_says_who_judged(runs, tmp_path):
    card = (runs.folder / "likelihood" / "README.md").read_text()
    assert "# Aligned policy" in card and "Trained with: likelihood loss." in card and "preference-alignment" in card
    model = get_policy(runs.policy, bf16=False)
    model.facts = {"method": "likelihood loss", "judge": None}
    model.save_pretrained(str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert "# Fine-tuned policy" in card and "Trained with: likelihood loss." in card and "aligned" not in card.lower()


def test_anchors_of_a_quantized_policy_are_its_own(tmp_path):
    """The unquantized policy's log-probabilities are a nat away, those of the same weights a rounding."""
    pytest.importorskip("bitsandbytes")
    make_tiny_model(tmp_path / "policy", hidden_size=64, vocab_size=300)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    for weight in filter(lambda one: one.dim() > 1, model.parameters()):
        torch.nn.init.normal_(weight, std=0.15)
    model.save_pretrained(tmp_path / "policy")
    rows, run = random_samples(8), tmp_path / "run"
    flags = ["--policy", str(tmp_path / "policy"), *write(tmp_path, "own", rows, str(tmp_path / "policy")), *STEP]
    flags += ["--save_path", str(run), "--lora_rank", "2", "--bf16", "--load_in_4bit"]
    done = forked(1, str(ROOT / "scripts" / "train_policy_general_preference.py"), *flags)
    if "has no bfloat16 arithmetic" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    (row,) = [row for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]
    assert abs(row["train/kl"]) < 0.1 and row["train/log_ratio_sd"] < 0.1
    assert "in 4 bits" in (run / "anchors" / "train_t.summary.json").read_text()


def test_an_adapter_goes_on_from_where_it_was(runs):
    (row,) = runs.metrics("adapter")
    assert abs(row["train/kl"]) < 1e-5
    start, end = (
        get_policy(str(runs.folder / name), bf16=False).eval().backbone.state_dict() for name in ("lora", "adapter")
    )
    assert start.keys() == end.keys()
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed and all("lora_" in name for name in changed)


def test_a_run_that_is_stopped_goes_on_to_the_bit(runs):
    code, said = runs.results["stopped"]
    assert code == 143 and "load_checkpoint continues" in said
    code, said = runs.results["continued"]
    assert code == 0 and "continuing from" in said

    def rows(name, code=0):
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in runs.metrics(name, code)]

    whole = rows("uninterrupted")
    assert [row["step"] for row in whole] == list(range(1, 9))
    assert rows("stopped", 143) == whole
    weights = [(runs.folder / name / "model.safetensors").read_bytes() for name in ("uninterrupted", "stopped")]
    assert weights[0] == weights[1]
    assert abs(whole[0]["train/kl"]) < 1e-5 and whole[-1]["train/log_ratio_sd"] > 1e-3


def test_anchors_of_a_continued_run_are_those_on_disk(runs):
    """Computed again they would be as they were, and nobody would see that one was altered."""
    code, said = runs.results["altered"]
    assert code == 2 and "was made with data_checksum = " in said
    code, said = runs.results["rescored"]
    assert code == 2 and "was made with scores_checksum = " in said
    model = get_policy(runs.policy, bf16=False).eval()
    rows = list(map(json.loads, (runs.folder / "stopped" / "anchors" / "train_t.jsonl").read_text().splitlines()))
    with torch.no_grad():
        expected = policy_log_probs(model, runs.rows)
    found = torch.tensor([value for row in rows for value in row["log_probs"]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert [row["tokens"] for row in rows] == [list(map(len, row["response_ids"])) for row in runs.rows]


def test_pairs_are_the_best_and_the_worst_and_ties_are_left_out(runs):
    (row,) = runs.metrics("pair")
    assert "train: 1 of 8 prompts are left out, whose responses all tie" in runs.results["pair"][1]
    squares = [torch.stack([t.max(), t.min()]).square().mean() for n, t in enumerate(runs.targets()) if n != 3]
    assert row["train/loss"] == pytest.approx(torch.stack(squares).mean().item(), rel=1e-4)
    assert row["train/tied"] == 0 and row["train/target_mean"] != 0


def test_dpo_starts_at_log_2_and_prefers_the_best(runs):
    (row,) = runs.metrics("dpo")
    assert row["train/loss"] == pytest.approx(math.log(2), rel=1e-6) and row["train/target_mean"] == 0.5
    arguments = json.loads((runs.folder / "dpo" / "arguments.json").read_text())
    assert (arguments["beta"], arguments["anchors"], arguments["loss"]) == (0.3, "ref=1", "logistic")
    assert "beta acts as a learning rate" not in runs.results["dpo"][1], "labels are no targets of log-ratios"
    best, worst = [], []
    model = AutoModelForCausalLM.from_pretrained(runs.folder / "dpo").eval()
    start = AutoModelForCausalLM.from_pretrained(runs.policy).eval()
    for number, (row, target) in enumerate(zip(runs.rows, runs.targets(), strict=True)):
        if number != 3:
            with torch.no_grad():
                moved = plain_log_probs(model, row) - plain_log_probs(start, row)
            best.append(moved[target.argmax()])
            worst.append(moved[target.argmin()])
    assert sum(best) > sum(worst)


def test_the_likelihood_of_the_best_needs_no_anchors(runs):
    (row,) = runs.metrics("likelihood")
    model, found = get_policy(runs.policy, bf16=False).eval(), []
    for number, (sample, target) in enumerate(zip(runs.rows, runs.targets(), strict=True)):
        if number != 3:
            best = int(target.argmax())
            with torch.no_grad():
                found.append(-policy_log_probs(model, [sample])[best] / len(sample["response_ids"][best]))
    assert row["train/loss"] == pytest.approx(torch.stack(found).mean().item(), rel=1e-5)
    assert not list((runs.folder / "likelihood" / "anchors").glob("*.jsonl"))


def test_two_anchors_are_weighed(runs):
    (row,) = runs.metrics("reference")
    policy, other = (get_policy(path, bf16=False).eval() for path in (runs.policy, runs.other))
    with torch.no_grad():
        ratio = policy_log_probs(policy, runs.rows) - policy_log_probs(other, runs.rows)
    assert row["train/kl"] == pytest.approx(-ratio.mean().item() / 3, rel=1e-3)


def test_a_report_states_kl_where_the_log_ratio_estimates_it(runs):
    """Not of the best and the worst alone, against a reference, of another's samples, or without an anchor."""
    for name in ("whole", "lora", "pair", "dpo", "likelihood", "reference", "any policy"):
        report = json.loads((runs.folder / name / "train_report.json").read_text())
        assert (report["kl"] is None) == (name not in ("whole", "lora")), name


def test_a_finished_run_against_another_reference_is_not_taken_for_this_one(runs):
    saved = str(runs.folder / "reference" / "arguments.json")
    arguments = parse_policy_arguments(["--config", saved, "--skip_finished"])
    arguments.model.reference, arguments.model.start = None, runs.other
    assert is_finished(arguments)
    arguments.model.start = runs.policy
    with pytest.raises(InputError, match="was trained with reference"):
        is_finished(arguments)
    saved = str(runs.folder / "whole" / "arguments.json")
    assert is_finished(parse_policy_arguments(["--config", saved, "--skip_finished", "--start", runs.other]))


def test_a_finished_run_of_other_scores_is_not_taken_for_this_one(runs):
    folder = runs.folder / "whole"
    arguments = parse_policy_arguments(["--config", str(folder / "arguments.json"), "--skip_finished"])
    assert is_finished(arguments)
    summary = Path(runs.data[3].replace(".jsonl", ".summary.json"))
    before = summary.read_text()
    summary.write_text(before.replace('"model_files": "1"', '"model_files": "2"'))
    try:
        with pytest.raises(InputError, match="was trained on other samples or scores"):
            is_finished(arguments)
    finally:
        summary.write_text(before)


def test_a_policy_with_any_matrix_changed_is_another_one(tmp_path):
    """As after merging an adapter of few modules: 100 MB, of which one matrix of 1 MB changes."""
    tensors, found = {f"layers.{number:02}.weight": torch.zeros(512, 512) for number in range(100)}, []
    for changed in (None, "layers.07.weight", "layers.49.weight", "layers.98.weight"):
        one = tensors if changed is None else tensors | {changed: torch.ones(512, 512)}
        save_file(one, tmp_path / "model.safetensors")
        found.append(weights_digest(str(tmp_path)))
    assert len(set(found)) == 4


def test_several_files_and_a_held_out_set(runs):
    (row,) = runs.metrics("several")
    assert row["train/tied"] == 1 / 12
    report = json.loads((runs.folder / "several" / "train_report.json").read_text())
    assert report["held_out"]["n"] == sum(len(one["responses"]) for one in random_samples(4, seed=5))
    assert (runs.folder / "several" / "anchors" / "held_out_t.jsonl").is_file()
    assert runs.metrics("any policy")


def test_a_beta_without_effect_is_said(runs):
    assert runs.metrics("small_beta") and "beta acts as a learning rate" in runs.results["small_beta"][1]


def test_saved_arguments_give_the_run_again(runs):
    assert runs.results["again"][0] == 0, runs.results["again"][1]
    files = [(runs.folder / name / "model.safetensors").read_bytes() for name in ("dpo", "again")]
    assert files[0] == files[1]


def test_what_does_not_go_together_is_one_line(runs):
    for name, (_, _, message) in runs.refused.items():
        code, said = runs.results[name]
        assert code == 2 and "Traceback" not in said, (name, said)
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and message in errors[0], (name, errors)


FILES = ["--policy", "p", "--samples", "a.jsonl", "--scores", "b.jsonl"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_set_what_no_flag_sets(recipe):
    arguments = parse_policy_arguments([*FILES, "--recipe", recipe])
    arguments.check()
    flat = arguments.to_dict()
    assert {name: flat[name] for name in RECIPES[recipe]} == RECIPES[recipe]
    arguments = parse_policy_arguments([*FILES, "--learning_rate", "3e-4", "--recipe", recipe])
    assert arguments.optimizer.learning_rate == 3e-4


def test_a_recipe_of_the_command_line_wins_over_a_file(tmp_path):
    first = parse_policy_arguments([*FILES, "--recipe", "inpo", "--max_norm", "0.5"])
    first.save(tmp_path)
    again = parse_policy_arguments(["--config", str(tmp_path / "arguments.json")])
    assert again.to_dict() == first.to_dict()
    other = parse_policy_arguments(["--config", str(tmp_path / "arguments.json"), "--recipe", "gpo"]).to_dict()
    assert {name: other[name] for name in RECIPES["gpo"]} == RECIPES["gpo"] and other["max_norm"] == 0.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "a", "b"], "--samples has 2 files, --scores 1"),
        (["--eval_samples", "a"], "--eval_samples and --eval_scores go together"),
        (["--beta", "0"], "--beta 0.0 must be above 0"),
        (["--clip", "-1"], "--clip -1.0 must be above 0"),
        (["--length_normalization", "-1"], "--length_normalization -1.0 must be at least 0"),
        (
            ["--recipe", "best_of_n", "--length_normalization", "1"],
            "1.0 is not read by --loss likelihood",
        ),
        (["--recipe", "ln_gpo", "--loss", "surrogate"], "is not read by --loss surrogate, which divides by the length"),
        (["--seed", "4294967296"], "--seed 4294967296 must be from 0 to 4294967295"),
        (["--iteration", "0"], "--iteration 0 must be at least 1"),
        (["--loss", "logistic"], "--loss logistic takes --target hard or win_rate, not score"),
        (["--loss", "surrogate", "--target", "dynamic"], "--loss surrogate takes --target planes or"),
        (["--target", "win_rate"], "--target win_rate labels pairs for --loss logistic, not centered"),
        (["--loss", "surrogate", "--target", "planes", "--anchors", "ref=1"], "takes ratios to the sampling policy"),
        (["--target", "planes"], "--target planes is an advantage for --loss surrogate, not centered"),
        (["--recipe", "dpo", "--target", "win_rate", "--clamp_target", "1"], "--clamp_target would distort"),
        (["--recipe", "dpo", "--select", "all"], "--loss logistic compares pairs: use --select pair, not all"),
        (["--select", "best"], "--select best leaves nothing to compare with"),
        (["--anchors", "t"], "--anchors t: expected t=1, ref=1 or both with weights"),
        (["--anchors", "t=nan"], "--anchors t=nan: the weights of t and ref must be positive and sum to 1"),
        (["--anchors", "t=0.5"], "must be positive and sum to 1"),
        (["--anchors", "t=2,ref=-1"], "must be positive and sum to 1"),
        (["--anchors", "x=1"], "must be positive and sum to 1"),
        (["--anchors", "t=0.5,t=1"], "--anchors t=0.5,t=1: t is given twice"),
        (["--reference", "r"], "--reference is read where --anchors has ref"),
        (["--recipe", "inpo", "--iteration", "2"], "name by --reference the one that the alignment started from"),
        (["--plan", "8"], "--plan is of the training of reward models"),
        (["--save_best_model", "1"], "add --eval_samples and --eval_scores"),
    ],
)
def test_flags_that_contradict_each_other(flags, message):
    with pytest.raises(InputError) as error:
        parse_policy_arguments([*FILES, *flags]).check()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("flags", "unread"),
    [
        (["--recipe", "gpo"], []),
        (["--recipe", "dsppo", "--dynamic_lambda", "2"], []),
        (["--dynamic_lambda", "2", "--clip", "0.1"], ["--dynamic_lambda 2.0", "--clip 0.1"]),
        (["--recipe", "best_of_n", "--beta", "2", "--target", "hard"], ["--target hard", "--beta 2.0"]),
        (["--recipe", "best_of_n", "--anchors", "ref=1"], ["--anchors ref=1"]),
        (["--loss", "surrogate", "--target", "planes", "--beta", "2", "--clip", "0.1"], ["--beta 2.0"]),
        (["--recipe", "inpo", "--count_self", "false"], ["--count_self False"]),
        (["--recipe", "dpo", "--clamp_target", "1"], ["--clamp_target 1.0"]),
    ],
)
def test_flags_that_a_loss_does_not_read_are_named(flags, unread):
    assert parse_policy_arguments([*FILES, *flags]).loss.unread() == unread


def test_a_policy_and_samples_must_be_named():
    for flags, message in ((FILES[2:], "--policy names no model"), (FILES[:2], "--samples names no file")):
        with pytest.raises(InputError, match=message):
            parse_policy_arguments(flags).check()


def test_the_reference_of_later_iterations_is_the_start_of_the_first():
    later = [*FILES, "--recipe", "inpo", "--iteration", "2"]
    parse_policy_arguments([*later, "--start", "s"]).check()
    parse_policy_arguments([*later, "--reference", "r"]).check()
    parse_policy_arguments([*FILES, "--start", "s", "--iteration", "2"]).check()


def test_rounded_weights_of_anchors_sum_to_1():
    weights = parse_policy_arguments([*FILES, "--anchors", "ref=0.333,t=0.6665"]).loss.weights()
    assert sum(weights.values()) == pytest.approx(1, abs=1e-12) and weights["ref"] < 0.334


def test_the_label_of_a_pair_follows_mean_scores_where_the_two_alone_would_turn_it():
    angles = torch.tensor([-1.2, 1.4, 2.5, 1.1])  # by mean the first is best; the third, the worst, beats it
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1).tolist()
    row = random_samples(3)[2] | {"embeddings": embeddings, "gate": None}
    arguments = parse_policy_arguments([*FILES, "--recipe", "dpo"]).loss
    (found,) = select_and_target([row], arguments, TAU)
    assert found["target"] == [1.0, 0.0]
