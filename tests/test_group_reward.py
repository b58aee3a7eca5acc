"""Rewards of groups: each mode by hand, groups found or refused, and the trainers that call them."""

import asyncio
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from general_preference import GPMPipeline
from general_preference.errors import InputError
from general_preference.inference import ranking
from general_preference.models.score import plane_advantages
from general_preference.serving import AsyncGroupReward, GroupReward
from general_preference.serving.group_reward import MODES
from tests.forks import ENVIRONMENT, run_forks

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["Which throw wins?", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name one."}]]
TEXTS = [["rock", "the paper, the paper", "", "rock"], ["scissors wins", "a system", "prompt", "the rock äöü"]]
ROWS = [prompt for prompt in PROMPTS for _ in range(4)], [text for texts in TEXTS for text in texts]


@pytest.fixture(scope="module")
def model(saved) -> str:
    return saved()


@pytest.fixture(scope="module")
def embedded(model):
    return GPMPipeline(model).embed(PROMPTS, TEXTS)


@pytest.mark.parametrize("mode", MODES)
def test_modes_by_hand(model, embedded, mode):
    reference = ["the reference", [{"role": "assistant", "content": "another"}]]
    columns = {"reference": [one for one in reference for _ in range(4)]}
    found = torch.tensor(GroupReward(model, mode)(*ROWS, **columns)).view(2, 4)
    tau = 0.1
    for rewards, one, prompt, texts, other in zip(found, embedded, PROMPTS, TEXTS, reference, strict=True):
        scores = one.scores()
        probabilities = torch.sigmoid(scores / tau)
        if mode == "win_rate":
            expected = torch.stack([torch.cat([row[:i], row[i + 1 :]]).mean() for i, row in enumerate(probabilities)])
            assert rewards.sum().item() == pytest.approx(2, abs=1e-5)
        elif mode == "nash":
            expected = ranking.nash(probabilities).float()
        elif mode == "score":
            expected = scores.sum(dim=1) / 3
        elif mode == "planes":
            expected = torch.zeros(4)
            for plane, weight in enumerate(one.gate):
                a, b = one.embeddings[:, 2 * plane], one.embeddings[:, 2 * plane + 1]
                means = (a[:, None] * b[None] - b[:, None] * a[None]).mean(dim=1)
                expected += weight * (means - means.mean()) / means.std(correction=0)
        else:
            rm = GPMPipeline(model)
            expected = torch.tensor([rm.compare(prompt, text, other) for text in texts])
        torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=1e-5)
        assert rewards.std() > 1e-3
    assert found[0, 0] == found[0, 3], "equal completions tie exactly"


@pytest.mark.parametrize("head", [("llama", "bt", 1, False), ("llama", "hybrid", 3, True)])
def test_planes_of_other_heads(saved, head):
    """The scalar is a plane of weight 1; the sum over a group is 0, and ties add nothing."""
    one = GPMPipeline(saved(*head)).embed(PROMPTS[:1], TEXTS[:1])[0]
    found = plane_advantages(one.embeddings, one.gate)
    assert abs(found.sum()) < 1e-5
    if head[1] == "bt":
        rewards = one.embeddings[:, 0]
        torch.testing.assert_close(found, (rewards - rewards.mean()) / rewards.std(correction=0))
    assert plane_advantages(one.embeddings[:1].expand(4, -1), one.gate).abs().max() == 0


def groups(prompts, **settings) -> list[list[int]]:
    columns = settings.pop("columns", {})
    return GroupReward("unused", **settings).groups(prompts, columns)


def test_groups_are_found():
    assert groups(["a", "a", "b", "b"]) == [[0, 1], [2, 3]]
    assert groups(["a", "a", "a", "a"], group_size=2) == [[0, 1], [2, 3]], "two equal prompts side by side"
    assert groups(["a", "b", "a", "b"], group_size=2) == [[0, 2], [1, 3]], "TRL's OnlineDPO"
    assert groups(["a", "a", "b", "a", "a", "b"], group_size=2) == [[0, 3], [1, 4], [2, 5]], "and its equal prompts"
    assert groups(["a"] * 8 + ["b"] * 4, group_size=4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert groups(["a", "a", "b", "b"], group_size=8, eval_group_size=2) == [[0, 1], [2, 3]]
    assert groups(["a", "b"], group_size=8, eval_group_size=1) == [[0], [1]]
    assert groups(["a"] * 4, group_size=2, halves=True) == [[0, 2], [1, 3]], "OnlineDPO where all prompts are equal"
    assert groups(["a", "a", "b", "b"] * 2, group_size=2, halves=True) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    named = {"columns": {"uid": [1, 2, 2, 1, 3, 4, 4, 3]}, "group_size": 2}
    assert groups(list("abbaabba"), **named) == [[0, 3], [1, 2], [4, 7], [5, 6]], "the column counts, not the order"
    assert groups(["a"] * 8 + ["b"] * 8, group_size=4, eval_group_size=8) == [[*range(8)], [*range(8, 16)]]
    ids = {"columns": {"uid": [7, 8, 7, 8]}}
    assert groups(["a", "a", "a", "a"], **ids) == [[0, 2], [1, 3]], "equal prompts of two groups"
    assert groups(["a", "a"], columns={"k": [1, 2]}, group_column="k", group_size=1) == [[0], [1]]
    message = [{"role": "user", "content": "a"}]
    assert groups([message, list(message), "a", "a"]) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("prompts", "settings", "said"),
    [
        (["a", "a", "b", "b"], {"group_size": 4}, "a group has 4 completions, but this call has 2 .* of 4 in all"),
        (
            ["a"] * 4 + ["b"] * 2,
            {"group_size": 4},
            r"has 2 or 4 with the same prompt of 6 .*per_device_train_batch_size",
        ),
        (["a", "b"], {"group_size": 4, "eval_group_size": 2}, "a group has 4 or 2 completions"),
        (["a", "a", "b", "b"], {"group_size": 2, "halves": True}, "halves: the second half of the prompts is not"),
        (["a", "a", "b"], {}, "prompts with 1 and 2 completions: set group_size"),
        (["a", "b"], {}, "one completion and nothing to be compared with"),
        (["a", "b"], {"columns": {"uid": [1, 1]}}, "rows 0 and 1 have the same uid, but other prompts"),
        (["a", "a"], {"group_column": "k"}, "there is no column 'k': the call has none"),
        (["a", "a"], {"columns": {"prompt_id": [1]}}, "prompt_id has 1 values, but there are 2 prompts"),
    ],
)
def test_split_groups_are_refused(prompts, settings, said):
    with pytest.raises(InputError, match=said):
        groups(prompts, **settings)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": "m", "mode": "elo"}, "unknown mode 'elo': choose one of win_rate"),
        ({}, "one of model and url is needed"),
        ({"model": "m", "url": "http://x"}, "one of model and url is needed, and not both"),
        ({"model": "m", "group_size": 0}, "group_size is 0, expected at least 1"),
        ({"url": "http://x", "device": "cpu"}, "device would be of a model that is loaded here"),
    ],
)
def test_settings_that_cannot_work(arguments, said):
    with pytest.raises(InputError, match=said):
        GroupReward(**arguments)


def test_what_is_missing_is_never_a_reward(model):
    reward = GroupReward(model, "reference")
    with pytest.raises(InputError, match="row 1 has no 'reference', with which mode reference compares"):
        reward(["a", "a"], ["x", "y"], reference=["z", None])
    with pytest.raises(InputError, match="2 prompts, but 1 completions"):
        reward(["a", "a"], ["x"])
    assert reward([], []) == []
    assert GroupReward(model, group_size=1)(["a"], ["x"]) == [0.5]
    assert GroupReward(model, "score", group_size=1)(["a"], ["x"]) == [0]


def test_it_travels_and_is_awaited(model):
    first = GroupReward(model, group_size=4)
    before = first(*ROWS)
    again = pickle.loads(pickle.dumps(first))
    assert again._scorer is None and again(*ROWS) == before
    assert asyncio.run(AsyncGroupReward(model, group_size=4)(*ROWS)) == before
    together = AsyncGroupReward(model, group_size=4)

    async def at_once():
        return await asyncio.gather(*(together(*ROWS) for _ in range(4)))

    assert asyncio.run(at_once()) == [before] * 4
    assert GroupReward(GPMPipeline(model))(*ROWS) == before and first.__name__ == "preference_win_rate"


def train(kind: str, policy: str, reward, folder, **options):
    """Two steps of one of TRL's trainers; what it logged."""
    import trl
    from trl.experimental import online_dpo

    data = Dataset.from_list([{"prompt": [{"role": "user", "content": text}], "tag": 1} for text in "abcdefgh"])
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    base = {"report_to": [], "save_strategy": "no", "use_cpu": True, "bf16": False, "logging_steps": 1, "max_steps": 2}
    modules = {"GRPO": trl, "RLOO": trl, "OnlineDPO": online_dpo}
    config = getattr(modules[kind], f"{kind}Config")(str(folder), **base, **options)
    trainer = getattr(modules[kind], f"{kind}Trainer")(
        policy, reward_funcs=reward, args=config, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["GRPO", "RLOO", "OnlineDPO"])
def test_trainers_of_trl(model, model_folder, tmp_path, kind):
    options = {"per_device_train_batch_size": 4}
    options |= {"max_new_tokens": 8} if kind == "OnlineDPO" else {"max_completion_length": 8, "num_generations": 4}
    size = 2 if kind == "OnlineDPO" else 4
    rows = train(kind, model_folder("llama"), GroupReward(model, group_size=size), tmp_path, **options)
    assert len(rows) == 2
    if kind != "OnlineDPO":
        for row in rows:  # the mean win rate of a whole group is one half
            assert row["rewards/preference_win_rate/mean"] == pytest.approx(0.5, abs=1e-4)
            assert row["reward_std"] > 0


@pytest.mark.timeout(300)
def test_the_documented_run(model, model_folder, tmp_path, monkeypatch):
    """The lines of docs/serving.md as they stand, with models and prompts from here."""
    quiet = 'report_to=[], save_strategy="no"'
    code = (ROOT / "docs" / "serving.md").read_text().split("```python\n")[1].split("```")[0]
    Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in "abcdefgh"]).to_json(
        tmp_path / "p.jsonl"
    )
    for name, here in {
        '"trl-lib/ultrafeedback-prompt"': f'"json", data_files="{tmp_path}/p.jsonl"',
        "Qwen/Qwen2.5-0.5B-Instruct": model_folder("qwen2"),
        "general-preference/GPM-Gemma-2B": model,
        '"checkpoint/policy",': f'"{tmp_path}/policy", max_steps=1, use_cpu=True, bf16=False, {quiet},',
        "max_completion_length=512": "max_completion_length=8",
    }.items():
        assert code.count(name) == 1, name
        code = code.replace(name, here)
    found = {}
    exec(code, found)
    assert found["trainer"].state.log_history[0]["rewards/preference_win_rate/mean"] == pytest.approx(0.5, abs=1e-4)


@pytest.mark.engine
@pytest.mark.timeout(300)
def test_two_processes(model, model_folder, tmp_path):
    """Whole groups on each of two processes; split ones are refused by both, and so is a size that is not named."""
    runs = [(4, 4), (2, 4), (4, None)]  # completions on a process, size of a group
    job = {"model": model, "policy": model_folder("llama"), "folder": str(tmp_path), "runs": runs}
    done = run_forks(2, [str(ROOT / "tests" / "grpo_worker.py"), json.dumps(job)], os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in range(2):
        whole, split, unnamed = json.loads((tmp_path / f"found_{rank}.json").read_text())
        assert whole == [0.5, 0.5]
        assert "a group has 4 completions, but this call has 2 with the same prompt of 2 in all" in split
        assert "with 2 processes a group that is split over them cannot be seen" in unnamed
