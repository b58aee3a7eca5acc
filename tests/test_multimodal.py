"""Models that read images as well: their text part is trained and run as a causal LM, all else is kept as it was."""

import re

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Florence2Config,
    Gemma3Config,
    LlamaConfig,
    LlavaConfig,
    PaliGemmaConfig,
    Qwen2VLConfig,
)

from general_preference import RewardModel, get_reward_model
from general_preference.datasets.packing import Collator
from general_preference.errors import InputError
from general_preference.models.attention import RowLayout
from general_preference.models.config import PreferenceConfig
from tests.conftest import COMMON, WINDOW, random_comparisons

PREFERENCE = PreferenceConfig("gpm", 4, True, normalize=True, temperature=0.1)
TEXT = COMMON | {"vocab_size": 300}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
ROTARY = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
FAMILIES = {
    "qwen2_vl": lambda: Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": ROTARY},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
    ),
    "gemma3": lambda: Gemma3Config(
        text_config=TEXT | {"sliding_window": WINDOW, "query_pre_attn_scalar": 8},
        vision_config=VISION,
        mm_tokens_per_image=4,
    ),
    "llava": lambda: LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**VISION)),
}


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(FAMILIES[request.param]()).float()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def embeddings(model, layout=None):
    batch = Collator(0, layout or model.layout_on(), "chosen")(random_comparisons(6, 300))
    with torch.no_grad():
        output = model.eval()(**batch.model_inputs())
    return output["embeddings"], output["log_probs"]


def test_the_text_part_is_trained_and_the_rest_kept(folder, tmp_path):
    model = get_reward_model(str(folder), bf16=False, preference=PREFERENCE)
    assert model.shares_prompts and model.config.hidden_size == 32
    found = embeddings(model)
    for shared, separate in zip(found, embeddings(model, RowLayout(shared=False)), strict=True):
        torch.testing.assert_close(shared, separate, rtol=1e-5, atol=1e-5)
    whole = AutoModelForImageTextToText.from_pretrained(folder)  # what it makes of a text by itself
    comparison = random_comparisons(6, 300)[0]
    ids = torch.tensor([comparison["prompt_ids"] + comparison["response_ids"][0]])
    with torch.no_grad():
        states = whole.eval()(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
    own = torch.nn.functional.normalize(model.value_head(states), dim=-1)
    torch.testing.assert_close(found[0][0], own.detach(), rtol=1e-4, atol=1e-4)

    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batch = Collator(0, model.layout_on())(random_comparisons(6, 300))
    model.train()(**batch.model_inputs())["embeddings"].square().mul(torch.rand(1, 4)).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    text = {name for name in before if re.search(r"language_model|(lm|value|prompt)_head", name)}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == text != set(before)
    assert {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])} <= text
    trained = embeddings(model)
    assert (trained[0] - found[0]).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "trained")
    again = RewardModel.from_pretrained(str(tmp_path / "trained"))
    torch.testing.assert_close(embeddings(again), trained, rtol=0, atol=0)
    named = dict(again.named_parameters())
    assert all(torch.equal(parameter, named[name]) for name, parameter in model.named_parameters())
    AutoModelForImageTextToText.from_pretrained(tmp_path / "trained")


def test_adapters_are_of_the_text_part_alone(folder, tmp_path):
    pytest.importorskip("peft")
    model = get_reward_model(str(folder), bf16=False, preference=PREFERENCE, lora_rank=2)
    adapted = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(adapted) == 2 * 7 * 2 and all("language_model.layers" in name for name in adapted)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    again = RewardModel.from_pretrained(str(tmp_path / "adapter"))
    torch.testing.assert_close(embeddings(again), embeddings(model), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Florence2Config, PaliGemmaConfig])
def test_others_are_refused_by_name(tmp_path, kind):
    kind().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"is a {kind.model_type} model"):
        get_reward_model(str(tmp_path))
