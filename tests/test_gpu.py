"""On a GPU: packed rows equal separate sequences, up to what the rounding of their number format makes of it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from general_preference.datasets.packing import Collator
from general_preference.errors import InputError
from general_preference.models.attention import RowLayout
from general_preference.models.config import PreferenceConfig
from general_preference.models.kernels import TOLERANCE, kernel_error
from general_preference.models.reward_model import get_reward_model
from tests.conftest import random_comparisons

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A small Llama with heads of 32, since FlexAttention's kernels take 16 and more."""
    path = tmp_path_factory.mktemp("gpu") / "model"
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def model_with(folder, kernel, dtype):
    """The model on the GPU with `kernel` chosen, or a skipped test where that cannot be had here."""
    preference = PreferenceConfig("gpm", 4, True, normalize=True, temperature=0.1)
    try:
        bf16 = dtype == torch.bfloat16
        model = get_reward_model(folder, bf16=bf16, preference=preference, attn_implementation=kernel).to(GPU)
        _ = model.layout_on()
    except InputError as error:
        if "off by" in str(error) or "failed here" in str(error):
            raise
        pytest.skip(str(error))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["auto", "varlen", "flash_attention_2", "flex_attention", "sdpa"])
def test_packed_rows_equal_separate_sequences(folder, kernel, dtype):
    model = model_with(folder, kernel, dtype)
    assert model.layout_on().packed or kernel == "sdpa" or dtype == torch.float32
    comparisons = random_comparisons(6, model.config.vocab_size)
    found = {}
    for layout in (model.layout_on(), RowLayout(shared=False)):
        model.zero_grad()
        batch = Collator(0, layout)(comparisons).to(GPU)
        if not layout.shared:
            model.config._attn_implementation = "sdpa"
        output = model(**batch.model_inputs())
        (output["embeddings"].sum() + output["gates"].pow(2).sum()).backward()
        gradient = model.language_model.get_input_embeddings().weight.grad
        found[layout.shared] = (output["embeddings"].detach().float(), gradient.float())
    for packed, separate in zip(found[True], found[False], strict=True):
        assert (packed - separate).abs().max() / separate.abs().max() < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("kernel", ["packed_varlen", "packed_flash", "flex_attention"])
def test_kernels_of_usual_head_sizes(folder, kernel, size):
    wanted = {"packed_varlen": "varlen", "packed_flash": "flash_attention_2"}.get(kernel, kernel)
    model_with(folder, wanted, torch.bfloat16)

    class Config:
        num_attention_heads, num_key_value_heads, head_dim, hidden_size = 8, 2, size, 8 * size

    assert kernel_error(Config, kernel, GPU, torch.bfloat16) < TOLERANCE[torch.bfloat16]
