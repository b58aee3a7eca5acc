"""Training that starts from another preference or reward model: what is kept, what is new, and what is said."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from general_preference import GPMPipeline, get_reward_model
from general_preference.errors import InputError
from general_preference.models.config import PreferenceConfig
from general_preference.models.heads import SavedHead, saved_head
from general_preference.models.score import preference_matrix
from general_preference.trainer.arguments import ModelArguments
from scripts.make_tiny_model import PAD
from tests.test_reward_models_of_others import PROMPTS, RESPONSES, classifier
from tests.test_training import ROOT, run_cases

BT = PreferenceConfig("bt", max_length=256, temperature=2.0)
FOREIGN = PreferenceConfig(
    "bt", input_format="sequence_classification", pad_token_id=0, reward_offset=0.5, temperature=0.5
)
GPM = PreferenceConfig("gpm", 4, True, "scaled_softmax", True, 0.2)


@pytest.mark.parametrize(
    ("saved", "flags", "expected"),
    [
        (None, {}, PreferenceConfig(max_length=512)),
        (
            None,
            {"is_general_preference": True},
            PreferenceConfig("gpm", 2, normalize=True, temperature=0.1, max_length=512),
        ),
        (BT, {}, BT),
        (BT, {"preference_head": "bt", "general_preference_tau": 2.0, "new_head": False}, BT),
        (
            BT,
            {"is_general_preference": True, "value_head_dim": 6, "add_prompt_head": True},
            PreferenceConfig("gpm", 6, True, normalize=True, temperature=0.1, max_length=256),
        ),
        (BT, {"new_head": True}, PreferenceConfig("bt", max_length=256)),
        (
            FOREIGN,
            {"preference_head": "gpm"},
            PreferenceConfig("gpm", 2, False, "softmax", True, 0.1, False, "sequence_classification", 512, 0),
        ),
        (
            FOREIGN,
            {"keep_reward": True, "value_head_dim": 5},
            PreferenceConfig("hybrid", 5, False, "softmax", False, 0.5, False, "sequence_classification", 512, 0, 0.5),
        ),
        (GPM, {"value_head_dim": 6}, PreferenceConfig("gpm", 6, True, "scaled_softmax", True, 0.1, max_length=512)),
        (GPM, {"preference_head": "bt"}, PreferenceConfig("bt", max_length=512)),
    ],
)
def test_which_head_is_trained(saved, flags, expected):
    assert ModelArguments(**flags).preference(None, saved and SavedHead(saved, recorded=True)) == expected


@pytest.mark.parametrize(
    ("saved", "flags", "said"),
    [
        (
            None,
            {"keep_reward": True},
            "only a hybrid head on a Bradley-Terry model .* google/gemma-2b-it is a plain lang",
        ),
        (GPM, {"keep_reward": True}, "the head is hybrid, and .* is a GPM D=4 with gate model"),
        (BT, {"keep_reward": True, "new_head": True}, "--new_head forgets the reward"),
        (BT, {"keep_reward": True, "preference_head": "gpm"}, "only a hybrid head .*: the head is gpm"),
        (BT, {"keep_reward": True, "input_format": "released"}, "input_format = 'chat', but 'released' was asked for"),
        (BT, {"value_head_dim": 6}, "a Bradley-Terry head has dimension 1, not 6"),
        (BT, {"general_preference_tau": 1.0}, "temperature = 2.0, but 1.0 was asked for"),
        (GPM, {"gate": "softmax"}, "gate = 'scaled_softmax', but 'softmax' was asked for"),
    ],
)
def test_contradictions_are_refused(saved, flags, said):
    with pytest.raises(InputError, match=said):
        ModelArguments(**flags).preference(None, saved and SavedHead(saved, recorded=True))


def test_a_temperature_that_is_not_recorded_may_be_named():
    """Weights of other tools record none."""
    found = ModelArguments(general_preference_tau=2.0).preference(None, SavedHead(FOREIGN))
    assert found == dataclasses.replace(FOREIGN, temperature=2.0, max_length=512)


def test_padding_belongs_to_its_input_format():
    found = ModelArguments(new_head=True, input_format="chat").preference(None, SavedHead(FOREIGN))
    assert found.input_format == "chat" and found.pad_token_id is None


@pytest.fixture
def rewarded(model_folder, tmp_path):
    """A Bradley-Terry model of transformers."""
    return classifier(model_folder("qwen2"), tmp_path / "rm", PAD)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_hybrid_head_starts_as_the_reward(rewarded, tmp_path, normalize):
    flags = ModelArguments(rewarded, keep_reward=True, value_head_dim=5, normalize=normalize)
    old = GPMPipeline(rewarded)
    preference = flags.preference(None, saved_head(rewarded))
    model = get_reward_model(rewarded, bf16=False, preference=preference, keep_reward=True)
    model.save_pretrained(tmp_path / "hybrid")
    AutoTokenizer.from_pretrained(rewarded).save_pretrained(tmp_path / "hybrid")
    new = GPMPipeline(str(tmp_path / "hybrid"))
    for before, after in zip(old.embed(PROMPTS, RESPONSES), new.embed(PROMPTS, RESPONSES), strict=True):
        assert torch.equal(after.scores(), before.scores()) and before.scores().abs().max() > 0.05
        assert after.embeddings[:, 0:4:2].abs().min() > 0, "the planes are there"
    embeddings = new.embed(PROMPTS[:1], RESPONSES[:1])[0].embeddings.requires_grad_()
    preference_matrix(embeddings, None).triu().sum().backward()
    assert embeddings.grad[:, 1:4:2].abs().min() > 0, "and they learn"


def test_another_head_keeps_the_backbone(rewarded, saved, caplog):
    caplog.set_level("INFO")
    backbone = load_file(Path(rewarded) / "model.safetensors")
    model = get_reward_model(rewarded, bf16=False, is_general_preference=True, value_head_dim=6, add_prompt_head=True)
    state = model.state_dict()
    for name, tensor in backbone.items():
        assert name == "score.weight" or torch.equal(state[f"backbone.{name}"], tensor), name
    assert model.preference.input_format == "sequence_classification"
    assert model.value_head.weight.shape[0] == 6 and model.prompt_head.weight.shape[0] == 3
    said = [one.getMessage() for one in caplog.records if "keeps its backbone" in one.getMessage()]
    assert said == [f"{rewarded} (Bradley-Terry) keeps its backbone and gets a new GPM D=6 with gate head"]
    plain = get_reward_model(saved(), bf16=False, preference=PreferenceConfig("bt"))
    assert plain.prompt_head is None and "(GPM D=4 with gate)" in caplog.text
    for bad in (PreferenceConfig("gpm", 2), PreferenceConfig("bt")):
        with pytest.raises(InputError, match="only a hybrid head on a Bradley-Terry model"):
            get_reward_model(rewarded, bf16=False, preference=bad, keep_reward=True)


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_runs_that_start_from_reward_models(rewarded, model_folder, tmp_path):
    """Continued, with another head and as a hybrid; a Bradley-Terry run loads in transformers as training leaves it."""
    shutil.copytree(model_folder("llama"), tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "tiny")
    data = str(ROOT / "data" / "transitive" / "train.jsonl")
    base = ["--dataset", data, "--max_samples", "16", "--max_len", "256", "--pretrain", rewarded]
    gpm = ["--is_general_preference", "--value_head_dim", "4", "--add_prompt_head"]

    def to(name: str) -> list[str]:
        return ["--save_path", str(tmp_path / name)]

    cases = {
        "own": ["--pretrain", str(tmp_path / "tiny"), *to("own")],
        "continued": to("continued"),
        "gpm": [*gpm, "--lora_rank", "2", *to("gpm")],
        "kept": ["--keep_reward", "--learning_rate", "0", "--zero_stage", "3", *to("kept")],
        "new": ["--new_head", "--learning_rate", "0", *to("new")],
        "refused": ["--keep_reward", "--preference_head", "gpm", *to("refused")],
        "plan": ["--plan", "1", *gpm],
    }
    found = run_cases(base, cases, tmp_path)
    assert [code for code, _ in found.values()] == [0, 0, 0, 0, 0, 2, 0], found
    assert "(Bradley-Terry) keeps its backbone and gets a new GPM D=4 with gate head" in found["gpm"][1]
    assert "a new hybrid D=3 head whose scalar is its reward" in found["kept"][1]
    assert "new Bradley-Terry head" in found["new"][1] and "keeps its backbone" not in found["continued"][1]

    rm = {name: GPMPipeline(str(tmp_path / name)) for name in ("own", "continued", "gpm", "kept", "new")}
    old = GPMPipeline(rewarded).score_matrix(PROMPTS[0], RESPONSES[0])
    assert torch.equal(rm["kept"].score_matrix(PROMPTS[0], RESPONSES[0]), old)
    assert not torch.allclose(rm["new"].score_matrix(PROMPTS[0], RESPONSES[0]), old, atol=0.05)
    assert rm["gpm"].preference.input_format == "sequence_classification"
    for name in ("own", "continued"):
        folder = tmp_path / name
        config = json.loads((folder / "config.json").read_text())
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert config["num_labels" if "num_labels" in config else "id2label"] in (1, {"0": "LABEL_0"})
        assert config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        rows = rm[name].encoder.encode(*_encoded())
        ids = [row["prompt_ids"] + response for row in rows for response in row["response_ids"]]
        logits = model(**tokenizer.pad({"input_ids": ids}, return_tensors="pt")).logits[:, 0]
        own = torch.cat([one.embeddings[:, 0] for one in rm[name].embed(PROMPTS, RESPONSES)])
        assert (logits - own).abs().max() < 1e-5


def _encoded():
    prompts = [[{"role": "user", "content": one}] if isinstance(one, str) else one for one in PROMPTS]
    return prompts, [[[{"role": "assistant", "content": text}] for text in some] for some in RESPONSES]
