"""Checkpoints of other tools: what is missing, unused or of another model is named and refused, never made up."""

import copy
import json
import shutil
import time

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from general_preference import GPMPipeline, RewardModel, get_reward_model
from general_preference.datasets.preparation import check_known_ids
from general_preference.errors import InputError
from general_preference.models.config import weights_digest
from general_preference.models.heads import saved_preference
from general_preference.models.merging import lacks_heads, merge_into_folder, merged_base
from tests.conftest import random_comparisons
from tests.test_multimodal import FAMILIES as MULTIMODAL
from tests.test_training import ROOT, run_cases

peft = pytest.importorskip("peft")


@pytest.fixture
def altered(model_folder, saved, tmp_path):
    """A function: copy a saved model with some tensors added and some removed."""

    def make(family="llama", add=(), remove=(), trained=False) -> str:
        folder = tmp_path / f"altered{len(list(tmp_path.iterdir()))}"
        shutil.copytree(saved(family) if trained else model_folder(family), folder)
        tensors = load_file(folder / "model.safetensors")
        tensors = {name: tensor for name, tensor in tensors.items() if name not in remove}
        tensors |= {name: torch.zeros(1, 32) for name in add}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("score.0.weight", "holds score.0.weight, a part of a classifier that is more than one weight"),
        ("classifier.dense.weight", "classifier.dense.weight, the head of an encoder that pools, or of another class"),
        ("v_head.summary.weight", "holds v_head.summary.weight, the head of a reward or value model of another kind"),
        (
            "value_head.summary.bias",
            "value model of another kind: of other tools, only decoder-only reward models with",
        ),
        (
            "model.layers.2.mlp.up_proj.weight",
            "holds weights that its configuration has no place for, the first model.l",
        ),
        ("mean", "no place for, the first mean"),
    ],
)
def test_a_tensor_without_a_place_is_refused(altered, name, said):
    with pytest.raises(InputError, match=said):
        get_reward_model(altered(add=[name]))
    with pytest.raises(InputError, match=said):
        RewardModel.from_pretrained(altered(add=[name], trained=True))
    if "layers" not in name and name != "mean":
        with pytest.raises(InputError, match=said):
            GPMPipeline(altered(add=[name]))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
    ],
)
def test_buffers_of_old_versions_are_passed_over(altered, family, name):
    assert name not in get_reward_model(altered(family, add=[name])).state_dict()


def test_a_missing_language_model_head_is_not_made_up(altered, tmp_path):
    for more, said in ([], r"lacks lm_head\.weight, its language"), (["model.norm.weight"], "lacks 1 weights .*norm"):
        with pytest.raises(InputError, match=said):
            get_reward_model(altered(remove=["lm_head.weight", *more]))
    folder = altered(remove=["lm_head.weight"], trained=True)
    scored = RewardModel.from_pretrained(folder)
    continued = get_reward_model(folder, bf16=False, preference=saved_preference(folder))
    assert torch.equal(continued.value_head.weight, scored.value_head.weight)
    assert not continued.language_model.lm_head.weight.requires_grad
    continued.freeze_unused(language_model_head=False)
    with pytest.raises(InputError, match=r"checkpoint has no lm_head\.weight"):
        continued.freeze_unused(language_model_head=True)
    continued.save_pretrained(tmp_path / "again")
    assert "lm_head.weight" not in load_file(tmp_path / "again" / "model.safetensors")
    RewardModel.from_pretrained(str(tmp_path / "again"))
    get_reward_model(altered("gemma"))  # its LM head is the embedding


def test_ids_beyond_the_embeddings_are_named(tokenizer, make_model):
    model = make_model()
    rows = random_comparisons(20_000, 290)
    table = Dataset.from_dict({name: [row[name] for row in rows] for name in ("id", "prompt_ids", "response_ids")})
    began = time.perf_counter()
    check_known_ids(table, model.vocabulary_size, tokenizer)
    assert time.perf_counter() - began < 1
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<new>"])
    for prompts, responses, place in (
        ([[1, 2], [1, 7]], [[[5], [5]], [[5], [3, 300, 5]]], r"row 2 \(id b\)"),
        ([[1, 300], [1]], [[[5]], [[5]]], r"f\.jsonl, line 1"),
    ):
        name = "f.jsonl, line 1" if "line" in place else "a"
        table = Dataset.from_dict({"id": [name, "b"], "prompt_ids": prompts, "response_ids": responses})
        with pytest.raises(InputError, match=rf"{place} has token 300 \('<new>'\), but the model has 300 embeddings"):
            check_known_ids(table.select([0, 1]), 300, more)
    check_known_ids(table.select([1]), 300, more)


@pytest.fixture
def place(tmp_path, model_folder, monkeypatch):
    """A working folder with the base `tiny` and an adapter with heads that was trained on it."""
    shutil.copytree(model_folder("llama"), tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    model = get_reward_model(str(tmp_path / "tiny"), bf16=False, lora_rank=2)
    _draw(model)
    model.save_pretrained("adapter")
    AutoTokenizer.from_pretrained("tiny").save_pretrained("adapter")
    return tmp_path


def _draw(model) -> None:
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1, generator=torch.Generator().manual_seed(number))


def _other_base(folder) -> str:
    tensors = load_file(folder / "tiny" / "model.safetensors")
    tensors["model.embed_tokens.weight"] += 1
    save_file(tensors, folder / "tiny" / "model.safetensors", metadata={"format": "pt"})
    return weights_digest(str(folder / "tiny"))


def test_an_adapter_refuses_another_base(place):
    before = weights_digest("tiny")
    again = get_reward_model("adapter", bf16=False)
    again.save_pretrained("continued")
    assert json.loads((place / "continued" / "config.json").read_text())["base_model_digest"] == before
    after = _other_base(place)
    for load in (
        lambda: RewardModel.from_pretrained("adapter"),
        lambda: get_reward_model("continued"),
        lambda: merge_into_folder("adapter", place / "merged"),
    ):
        with pytest.raises(InputError, match=f"checksum {before}, but those of .*tiny have {after}"):
            load()
    content = json.loads((place / "adapter" / "config.json").read_text())
    del content["base_model_digest"]
    (place / "adapter" / "config.json").write_text(json.dumps(content))
    merge_into_folder("adapter", place / "merged")  # as before: it does not say
    assert "base_model_digest" not in (place / "merged" / "config.json").read_text()


def test_adapters_that_are_their_own_base(place):
    settings = json.loads((place / "adapter" / "adapter_config.json").read_text())
    shutil.copytree("adapter", "other")
    for name, base in (("adapter", "other"), ("other", str(place / "adapter"))):
        text = json.dumps(settings | {"base_model_name_or_path": base})
        (place / name / "adapter_config.json").write_text(text)
    shutil.copytree("other", "selfish")
    text = json.dumps(settings | {"base_model_name_or_path": "selfish"})
    (place / "selfish" / "adapter_config.json").write_text(text)
    for folder in ("adapter", "other", "selfish"):
        for load in (RewardModel.from_pretrained, weights_digest, get_reward_model):
            with pytest.raises(InputError, match="that has itself as its base model") as raised:
                load(folder)
            assert len(str(raised.value)) < 300
    (place / "selfish" / "config.json").unlink()
    with pytest.raises(InputError, match="that has itself as its base model"):
        saved_preference("selfish")


@pytest.mark.parametrize("base", ["gone", "owner/gone", "/nowhere/gone"])
def test_a_base_that_is_not_there_is_named(place, base):
    settings = json.loads((place / "adapter" / "adapter_config.json").read_text())
    (place / "adapter" / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))
    with pytest.raises(InputError, match=f"adapter is an adapter, and its base model .* folder {base}[, ]"):
        RewardModel.from_pretrained("adapter")


@pytest.fixture
def tuned(place):
    """An adapter as supervised fine-tuning leaves it, and the language model that it makes."""
    model = AutoModelForCausalLM.from_pretrained(place / "tiny")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear"))
    _draw(model)
    model.save_pretrained("sft")
    assert not (place / "sft" / "config.json").exists()
    return model.merge_and_unload()


def test_an_adapter_without_heads_is_merged_and_reused(place, tuned):
    assert lacks_heads("sft") and not lacks_heads("adapter") and not lacks_heads("tiny")
    with pytest.raises(InputError, match="sft is an adapter without preference heads: merge it first"):
        get_reward_model("sft")
    base = place / "run" / "base"
    assert merged_base("sft", base) and not merged_base("sft", base)
    found, expected = load_file(base / "model.safetensors"), tuned.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name])
    assert saved_preference(str(base)) is None and AutoTokenizer.from_pretrained(base).chat_template
    model = get_reward_model(str(base), bf16=False, lora_rank=2)
    model.save_pretrained("run")
    (place / "run").rename("moved")
    RewardModel.from_pretrained("moved")
    base = place / "moved" / "base"
    tensors = load_file("sft/adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, "sft/adapter_model.safetensors")
    with pytest.raises(InputError, match="base holds a model that was not merged from sft"):
        merged_base("sft", base)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_an_adapter_with_more_tokens(place, model_folder, family):
    """Its embeddings and LM head are its own; where they are one, an adapter cannot be folded in."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder(family)), AutoTokenizer.from_pretrained("tiny")
    tokenizer.add_tokens(["<new>"])
    model.resize_token_embeddings(len(tokenizer))
    names = ["embed_tokens", "lm_head"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=names))
    _draw(model)
    model.save_pretrained("sft")
    if family == "gemma":
        with pytest.raises(InputError, match="embeddings that are the LM head as well"):
            merge_into_folder("sft", place / "merged")
        return
    tokenizer.save_pretrained("sft")
    merge_into_folder("sft", place / "merged")
    ids = torch.tensor([[1, 300, 7, 5]])
    merged = AutoModelForCausalLM.from_pretrained(place / "merged")
    torch.testing.assert_close(merged(ids).logits, model(ids).logits)
    assert merged.config.vocab_size == len(AutoTokenizer.from_pretrained(place / "merged")) == 301


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors | {"base_model.model.score.weight": torch.zeros(2, 32)}, "score.weight has 2 labels"),
        (
            lambda tensors: tensors | {"base_model.model.v_head.weight": torch.zeros(1, 32)},
            "holds base_.*of another kind",
        ),
        (
            lambda tensors: tensors | {"base_model.model.x.lora_A.weight": torch.zeros(2, 32)},
            "has no place for, 1 tensors",
        ),
        (lambda tensors: dict(list(tensors.items())[1:]), "the adapter sft lacks 1 tensors, the first base_model"),
    ],
)
def test_tensors_of_an_adapter_are_all_there_and_all_used(place, tuned, change, said):
    tensors = change(load_file("sft/adapter_model.safetensors"))
    save_file(tensors, "sft/adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=said):
        merge_into_folder("sft", place / "merged")
    assert not (place / "merged").exists()


def test_merging_destroys_nothing(place, tuned):
    (place / ".writing_out").symlink_to("tiny")
    for output, said in (
        ("out", "tiny, which"),
        ("adapter", "is adapter"),
        ("tiny", "is read"),
        ("", "contains adapter"),
    ):
        with pytest.raises(InputError, match=said):
            merge_into_folder("adapter", place / output)
    assert (place / "tiny" / "model.safetensors").is_file()


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_runs_that_start_from_models_of_other_tools(place, tuned, altered):
    """A fine-tuned adapter is merged once, also where weights are partitioned; what cannot be used is one line."""
    more = AutoTokenizer.from_pretrained("tiny")
    more.add_tokens(["contest"])
    shutil.copytree("tiny", "grown")
    more.save_pretrained("grown")
    torch.manual_seed(0)
    images = str(place / "images")
    AutoModelForImageTextToText.from_config(MULTIMODAL["qwen2_vl"]()).float().save_pretrained(images)
    AutoTokenizer.from_pretrained("tiny").save_pretrained(images)
    run, data = str(place / "run"), str(ROOT / "data" / "transitive" / "train.jsonl")
    base = ["--dataset", data, "--max_samples", "8", "--max_len", "128", "--save_path", run, "--lora_rank", "2"]
    sft = ["--pretrain", str(place / "sft")]
    cases = {
        "merged": [*sft, "--zero_stage", "3"],
        "reused": sft,
        "head": ["--pretrain", altered(remove=["lm_head.weight"]), "--add_pretrain_loss"],
        "classifier": ["--pretrain", altered(add=["score.0.weight"])],
        "partitioned": ["--pretrain", altered(add=["score.0.weight"]), "--zero_stage", "3"],
        "images": ["--pretrain", images, "--zero_stage", "3", "--lora_rank", "0", "--save_path", str(place / "seen")],
        "ids": ["--pretrain", str(place / "grown")],
        "base": ["--pretrain", str(place / "adapter"), "--save_path", str(place / "tiny"), "--lora_rank", "0"],
        "plan": [*sft, "--plan", "1"],
    }
    found = run_cases(base, cases, place)
    assert [code for code, _ in found.values()] == [0, 0, 2, 2, 2, 0, 2, 2, 0], found
    said = {name: text for name, (_, text) in found.items()}
    assert f"sft, an adapter without preference heads, is merged into {run}/base" in said["merged"]
    assert "was merged before into" in said["reused"] and "Parameters:" in said["plan"]
    assert "its language-model head" in said["head"] and "score.0.weight" in said["classifier"]
    assert "score.0.weight" in said["partitioned"]
    names = set(load_file(place / "seen" / "model.safetensors"))
    assert names - {"value_head.weight", "score.weight"} == set(load_file(place / "images" / "model.safetensors"))
    assert "has token 300 ('contest'), but the model has 300 embeddings" in said["ids"]
    assert f"save_path {place}/tiny is {place}/tiny" in said["base"]
    assert json.loads((place / "run" / "arguments.json").read_text())["pretrain"] == str(place / "sft")
    assert "Base model: `sft`" in (place / "run" / "README.md").read_text()
    settings = json.loads((place / "run" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == f"{run}/base"
    RewardModel.from_pretrained(run)
