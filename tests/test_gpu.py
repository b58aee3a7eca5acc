"""On a GPU: packed rows equal separate sequences, up to what the rounding of their number format makes of it."""

import pytest
import torch

from general_preference.datasets.packing import Collator
from general_preference.errors import InputError
from general_preference.models.attention import RowLayout
from general_preference.models.attention_choice import TOLERANCE, choose_attention, kernel_error
from tests.conftest import random_comparisons

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")


def model_with(make_model, kernel, dtype):
    """A small Llama on the GPU that runs `kernel`, or a skipped test where it cannot be had here."""
    model = make_model("llama").to(GPU, dtype)
    try:
        choose_attention(model.config, kernel, GPU, dtype, training=True)
    except InputError as error:
        if "off by" in str(error) or "failed here" in str(error):
            raise
        pytest.skip(str(error))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["auto", "varlen", "flash_attention_2", "flex_attention", "sdpa"])
def test_packed_rows_equal_separate_sequences(make_model, kernel, dtype):
    model = model_with(make_model, kernel, dtype)
    assert model.row_layout.packed or kernel == "sdpa" or dtype == torch.float32
    comparisons = random_comparisons(6, model.config.vocab_size)
    found = {}
    for layout in (model.row_layout, RowLayout(shared=False)):
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
def test_kernels_of_usual_head_sizes(make_model, kernel, size):
    wanted = {"packed_varlen": "varlen", "packed_flash": "flash_attention_2"}.get(kernel, kernel)
    model_with(make_model, wanted, torch.bfloat16)

    class Config:
        num_attention_heads, num_key_value_heads, head_dim, hidden_size = 8, 2, size, 8 * size

    assert kernel_error(Config, kernel, GPU, torch.bfloat16) < TOLERANCE[torch.bfloat16]
