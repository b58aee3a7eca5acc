"""Making, saving and loading models: names, heads, contradictions, adapters, precision."""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from general_preference import RewardModel, get_reward_model
from general_preference.datasets.packing import Collator
from general_preference.errors import InputError
from general_preference.models.config import HEADS_FILE, PreferenceConfig
from general_preference.models.heads import saved_preference
from general_preference.models.preference_heads import Fp32Linear
from tests.conftest import MAIN_FAMILIES, random_comparisons

HEADS = [("bt", 1, False), ("gpm", 2, False), ("gpm", 6, True), ("hybrid", 3, True), ("hybrid", 5, False)]


def outputs(model, count=4):
    batch = Collator(0, model.layout_on(), "chosen")(random_comparisons(count, model.config.vocab_size))
    with torch.no_grad():
        return model(**batch.model_inputs())


@pytest.mark.parametrize("family", MAIN_FAMILIES)
@pytest.mark.parametrize(("head", "dim", "gate"), HEADS)
def test_what_is_saved_is_what_is_loaded(make_model, tmp_path, family, head, dim, gate):
    model = make_model(family, head, dim, gate)
    model.save_pretrained(tmp_path)
    loaded = RewardModel.from_pretrained(str(tmp_path))
    assert loaded.preference == model.preference
    expected, found = outputs(model), outputs(loaded)
    assert expected.keys() == found.keys() and ("gates" in found) == gate
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert found["embeddings"].shape[1] == dim
    if head == "gpm":
        torch.testing.assert_close(found["embeddings"].norm(dim=-1), torch.ones(len(found["embeddings"])))
    AutoModelForCausalLM.from_pretrained(tmp_path)  # the folder is still an ordinary language model


def test_published_tensor_names(make_model, tmp_path):
    make_model("llama", "gpm", 6, True).save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {"value_head.weight", "prompt_head.weight", "lm_head.weight", "model.embed_tokens.weight"} <= names
    assert all(name.startswith(("model.", "lm_head.", "value_head.", "prompt_head.")) for name in names)
    saved = json.loads((tmp_path / "config.json").read_text())["preference"]
    assert saved["head"] == "gpm" and saved["dim"] == 6 and saved["prompt_gate"] and saved["temperature"] == 0.1


def test_a_published_checkpoint_is_read_from_its_shapes(model_folder, tmp_path):
    tensors = load_file(f"{model_folder('llama')}/model.safetensors")
    tensors |= {"value_head.weight": torch.randn(6, 32), "prompt_head.weight": torch.randn(3, 32)}
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    model.config.save_pretrained(tmp_path)
    half = len(tensors) // 2
    parts = {
        "model-00001-of-00002.safetensors": list(tensors)[:half],
        "model-00002-of-00002.safetensors": list(tensors)[half:],
    }
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, tmp_path / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in parts.items() for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    loaded = RewardModel.from_pretrained(str(tmp_path))
    assert loaded.preference == PreferenceConfig("gpm", 6, True, "softmax", True, 0.1, input_format="released")
    assert torch.equal(loaded.value_head.weight, tensors["value_head.weight"])
    assert torch.equal(loaded.prompt_head.weight, tensors["prompt_head.weight"])


def test_the_papers_keyword_arguments(model_folder):
    model = get_reward_model(
        model_folder("llama"), bf16=False, load_in_4bit=False, lora_rank=0, lora_alpha=16, target_modules=None,
        lora_dropout=0, use_flash_attention_2=False, ds_config=None, init_value_head=True, init_prompt_head=True,
        add_prompt_head=True, is_general_preference=True, value_head_dim=4,
    )  # fmt: skip
    assert model.preference.head == "gpm" and model.value_head.weight.shape == (4, 32)
    assert model.prompt_head.weight.shape == (2, 32)
    assert get_reward_model(model_folder("llama")).preference.head == "bt"
    assert get_reward_model(model_folder("llama")).dtype == torch.bfloat16


def test_head_values_depend_on_the_seed_alone(make_model):
    torch.manual_seed(1)
    first = make_model(seed=7).value_head.weight
    torch.manual_seed(2)
    assert torch.equal(first, make_model(seed=7).value_head.weight)
    assert not torch.equal(first, make_model(seed=8).value_head.weight)
    assert 0.5 < first.std().item() * 32**0.5 < 1.5


def test_adapter_values_depend_on_the_seed_alone(make_model):
    pytest.importorskip("peft")

    def adapters(seed):
        found = make_model(seed=seed, lora_rank=2).named_parameters()
        return torch.cat([p.detach().flatten() for name, p in found if "lora_A" in name])

    adapters(1)
    torch.manual_seed(1)
    first, before = adapters(7), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, adapters(7)) and not torch.equal(first, adapters(8))
    torch.manual_seed(1)
    adapters(8)
    assert torch.equal(torch.get_rng_state(), before), "later draws do not depend on the adapters"


def test_heads_run_in_fp32_on_a_half_precision_backbone(model_folder, make_model):
    preference = PreferenceConfig("gpm", 4, True, normalize=True, temperature=0.1)
    model = get_reward_model(model_folder("llama"), bf16=True, preference=preference, seed=3).eval()
    found = outputs(model)
    assert all(found[name].dtype == torch.float32 for name in ("embeddings", "gates", "log_probs"))
    assert (found["embeddings"] - outputs(make_model())["embeddings"]).abs().max() < 0.15


def test_training_continues_from_a_preference_model(make_model, tmp_path):
    model = make_model(seed=1)
    model.save_pretrained(tmp_path)
    again = get_reward_model(str(tmp_path), bf16=False, preference=saved_preference(str(tmp_path)), seed=2)
    assert torch.equal(again.value_head.weight, model.value_head.weight)
    fresh = get_reward_model(
        str(tmp_path), bf16=False, preference=saved_preference(str(tmp_path)), seed=2, init_value_head=True
    )
    assert not torch.equal(fresh.value_head.weight, model.value_head.weight)
    assert torch.equal(fresh.prompt_head.weight, model.prompt_head.weight)
    assert get_reward_model(str(tmp_path), bf16=False).preference == model.preference  # nothing was asked for


def test_scaled_softmax_gate(make_model):
    model = make_model(dim=6)
    hidden = torch.randn(5, 32)
    torch.testing.assert_close(model.gate(hidden).sum(-1), torch.ones(5))
    model.preference.gate = "scaled_softmax"
    expected = 3 * torch.softmax(model.prompt_head(hidden) / 32**0.5, dim=-1)
    torch.testing.assert_close(model.gate(hidden), expected)


def test_learned_temperature_is_saved(make_model, tmp_path, model_folder):
    preference = PreferenceConfig("gpm", 2, False, normalize=True, temperature=0.1, learnable_temperature=True)
    model = get_reward_model(model_folder("llama"), bf16=False, preference=preference)
    assert any("temperature" in name for name, p in model.named_parameters() if p.requires_grad)
    torch.testing.assert_close(outputs(model)["temperature"], torch.tensor([0.1]))
    model.temperature.log_value.data.fill_(-1.0)
    model.save_pretrained(tmp_path)
    loaded = RewardModel.from_pretrained(str(tmp_path))
    assert loaded.preference.temperature == pytest.approx(0.36787945)
    torch.testing.assert_close(outputs(loaded)["temperature"], torch.tensor([0.36787945]))


def test_lora_saves_adapter_and_heads_together(make_model, tmp_path):
    pytest.importorskip("peft")
    model = make_model("llama", lora_rank=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name in ("value_head.weight", "prompt_head.weight"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora_A" in name for name in trained) and "value_head.weight" in trained
    assert not any("embed_tokens" in name or "lm_head" in name for name in trained)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file() and (tmp_path / HEADS_FILE).is_file()
    loaded = RewardModel.from_pretrained(str(tmp_path))
    torch.testing.assert_close(outputs(loaded), outputs(model))


def test_an_adapter_names_what_is_wrong_with_its_base(make_model, tmp_path):
    pytest.importorskip("peft")
    make_model("llama", lora_rank=2).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text())
    for base, message in (
        ("/nowhere/base", "its base model cannot be used: model folder /nowhere/base does not"),
        (1, ""),
    ):
        file.write_text(json.dumps(content | {"base_model_name_or_path": base}) if message else "{}")
        with pytest.raises(InputError, match=message or "does not name the base model"):
            RewardModel.from_pretrained(str(tmp_path))


def test_four_bits_under_adapters(make_model, model_folder, tmp_path):
    """The backbone is quantized, the heads are not; nothing that was not asked for is switched on."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    model = make_model("llama", load_in_4bit=True, lora_rank=2)
    kinds = {type(module).__name__ for module in model.backbone.modules()}
    assert "Linear4bit" in kinds
    for head in (model.value_head, model.prompt_head):
        assert type(head) is Fp32Linear and head.weight.dtype == torch.float32 and head.weight.requires_grad
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or name in ("value_head.weight", "prompt_head.weight") for name in trained)
    language_model = model.language_model
    assert not any(getattr(module, "gradient_checkpointing", False) for module in language_model.modules())
    assert language_model.get_input_embeddings().weight.dtype == model.dtype == torch.float32
    whole = outputs(make_model("llama"))["embeddings"]
    assert 0 < (outputs(model)["embeddings"] - whole).norm() / whole.norm() < 0.5
    model.save_pretrained(tmp_path)  # in 4 bits the base is not part of the folder, and is loaded whole
    torch.testing.assert_close(outputs(RewardModel.from_pretrained(str(tmp_path)))["embeddings"], whole)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_four_bits_without_bitsandbytes(make_model):
    pytest.importorskip("peft")
    with pytest.raises(InputError, match="requires bitsandbytes"):
        make_model("llama", load_in_4bit=True, lora_rank=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "gpm", "dim": 3}, "even value_head_dim"),
        ({"head": "hybrid", "dim": 4}, "odd value_head_dim"),
        ({"head": "bt", "dim": 2}, "dimension 1, not 2"),
        ({"head": "bt", "prompt_gate": True}, "has none"),
        ({"head": "elo"}, "unknown preference head"),
        ({"head": "gpm", "dim": 2, "temperature": 0.0}, "must be positive"),
    ],
)
def test_heads_that_make_no_sense(options, message):
    with pytest.raises(InputError, match=message):
        PreferenceConfig(**options)


def test_folders_that_are_no_preference_model(model_folder, tmp_path):
    with pytest.raises(InputError, match="plain language model"):
        RewardModel.from_pretrained(model_folder("gpt2"))
    with pytest.raises(InputError, match=r"no config\.json"):
        RewardModel.from_pretrained(str(tmp_path))
    with pytest.raises(InputError, match="does not exist"):
        RewardModel.from_pretrained(str(tmp_path / "gone"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        RewardModel.from_pretrained(str(tmp_path / "file"))


def test_a_truncated_weight_file_is_named(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(InputError, match=str(tmp_path)):
        RewardModel.from_pretrained(str(tmp_path))
