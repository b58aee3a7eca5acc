"""Shared-prompt rows equal separate sequences, for scores and gradients, in every architecture that is claimed."""

import pytest
import torch

from general_preference.datasets.packing import Collator
from general_preference.models import attention
from general_preference.trainer.arguments import LossArguments
from general_preference.trainer.reward_trainer import batch_loss
from tests.conftest import FAMILIES, MAIN_FAMILIES, random_comparisons

# What a kernel call must save for blocks to be used: nothing, so that they always are, or more than there is.
BLOCKS, DENSE = 0, 10**12
WINDOWED = ("mistral_window", "gemma2", "gemma3")


def relative(a, b):
    return (a - b).abs().max().item() / max(b.abs().max().item(), 1e-12)


def run(model, comparisons, shared, regularized=""):
    batch = Collator(0, shared, regularized)(comparisons)
    return batch, model(**batch.model_inputs())


@pytest.mark.parametrize("call_cost", [BLOCKS, DENSE])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompts_equal_separate_sequences(make_model, monkeypatch, family, call_cost):
    monkeypatch.setattr(attention, "_CALL_COST", call_cost)
    model = make_model(family)
    assert model.shares_prompts, "every family here can be masked exactly"
    comparisons = random_comparisons(6, model.config.vocab_size)
    segments = Collator(0, True)(comparisons).segments
    by_blocks = call_cost == BLOCKS and family not in WINDOWED
    assert (attention.row_blocks(model.config, segments, model.dtype, True) is not None) == by_blocks
    with torch.no_grad():
        _, shared = run(model, comparisons, True, "both")
        _, separate = run(model, comparisons, False, "both")
    names = {"embeddings", "prompt_hidden_states", "temperature", "gates", "log_probs", "counts"}
    assert shared.keys() == separate.keys() == names
    for name in shared:
        assert relative(shared[name], separate[name]) < 1e-5, name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("call_cost", [BLOCKS, DENSE])
@pytest.mark.parametrize("family", MAIN_FAMILIES)
@pytest.mark.parametrize("kind", ["vanilla", "reference_free"])
def test_gradients_of_shared_prompts_equal_those_of_separate_sequences(
    make_model, monkeypatch, family, kind, call_cost, checkpointing
):
    monkeypatch.setattr(attention, "_CALL_COST", call_cost)
    model = make_model(family)
    if checkpointing:
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # it checkpoints only then; no model here has dropout
    arguments = LossArguments(add_pretrain_loss=True, ptx_loss=kind, ptx_loss_coef=0.3, margin_loss=True)
    comparisons = random_comparisons(5, model.config.vocab_size, seed=1)
    gradients = []
    for shared in (True, False):
        batch, output = run(model, comparisons, shared, "both")
        losses = batch_loss(output, batch, arguments)
        model.zero_grad()
        losses.total.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    flat = [torch.cat([g.flatten() for g in some.values()]) for some in gradients]
    assert (flat[0] - flat[1]).norm() / flat[1].norm() < 1e-5
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_padding_mates_and_order_do_not_matter(make_model, family):
    model = make_model(family)
    comparisons = random_comparisons(7, model.config.vocab_size, seed=2)
    with torch.no_grad():
        _, together = run(model, comparisons, True)
        start = 0
        for comparison in comparisons:
            _, alone = run(model, [comparison], True)
            count = len(comparison["response_ids"])
            assert relative(together["embeddings"][start : start + count], alone["embeddings"]) < 1e-5
            start += count
        _, backwards = run(model, comparisons[::-1], True)
        assert relative(backwards["gates"].flip(0), together["gates"]) < 1e-5
        padded = Collator(17, True)(comparisons)
        assert relative(model(**padded.model_inputs())["embeddings"], together["embeddings"]) < 1e-6


def test_scores_agree_with_a_plain_forward_of_the_backbone(make_model):
    model = make_model("llama", "bt", 1, False)
    comparison = random_comparisons(1, model.config.vocab_size)[0]
    with torch.no_grad():
        _, output = run(model, [comparison], True)
        for index, response in enumerate(comparison["response_ids"]):
            ids = torch.tensor([comparison["prompt_ids"] + response])
            hidden = model.language_model.base_model(ids).last_hidden_state[0, -1]
            assert relative(hidden @ model.value_head.weight[0], output["embeddings"][index, 0]) < 1e-5


@pytest.mark.parametrize("response_only", [True, False])
def test_regulariser_equals_full_logits(make_model, response_only):
    from general_preference import language_model_loss

    model = make_model("qwen2")
    arguments = LossArguments(add_pretrain_loss=True, ptx_loss_coef=0.5, ptx_response_only=response_only)
    for comparison in random_comparisons(4, model.config.vocab_size, seed=3, groups=False):
        batch, output = run(model, [comparison], True, "chosen")
        losses = batch_loss(output, batch, arguments)
        ids = torch.tensor([comparison["prompt_ids"] + comparison["response_ids"][0]])
        mask = torch.ones_like(ids)
        if response_only:
            mask[:, : len(comparison["prompt_ids"])] = 0
        expected = language_model_loss(model.language_model(ids).logits, ids, mask)
        torch.testing.assert_close(losses.regularizer, expected[None], rtol=1e-5, atol=1e-6)
        mixed = 0.5 * losses.preference + 0.5 * losses.regularizer
        torch.testing.assert_close(losses.total, mixed.sum(), rtol=1e-5, atol=1e-6)


def test_exact_tensors_of_a_small_batch():
    comparisons = [
        {"prompt_ids": [1, 7], "response_ids": [[8, 5], [9, 10, 5]], "first": [0], "second": [1], "label": [1.0],
         "margin": 0.5, "id": "a", "weight": 2.0},
        {"prompt_ids": [1], "response_ids": [[6, 5], [7, 5], [8, 5]], "first": [2, 0], "second": [0, 1],
         "label": [0.9, 0.5], "margin": 0.0, "id": "b"},
    ]  # fmt: skip
    batch = Collator(0, True, "chosen")(comparisons)
    assert batch.input_ids.tolist() == [[1, 7, 8, 5, 9, 10, 5], [1, 6, 5, 7, 5, 8, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4], [0, 1, 2, 1, 2, 1, 2]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 2, 2, 3, 3]]
    assert batch.response_ends.tolist() == [3, 6, 9, 11, 13] and batch.prompt_ends.tolist() == [1, 7]
    assert batch.first.tolist() == [0, 4, 2] and batch.second.tolist() == [1, 2, 3]
    assert batch.owner.tolist() == [0, 1, 1] and batch.weight.tolist() == [2.0, 0.5, 0.5]
    sources, tokens, owners = batch.targets
    assert sources.tolist() == [0, 1, 2, 7, 8, 7, 12]
    assert tokens.tolist() == [7, 8, 5, 6, 5, 8, 5]
    assert owners.tolist() == [5, 0, 0, 2, 2, 4, 4]
    separate = Collator(0, False)(comparisons)
    assert separate.input_ids.shape == (5, 5) and separate.segments.max() == 1
    assert separate.prompt_ends.tolist() == [1, 10]


def test_architectures_without_an_exact_mask_fall_back():
    class Config:
        _attn_implementation, model_type = "sdpa", "llama4_text"
        layer_types = ("chunked_attention", "full_attention")

    assert not attention.shares_prompts(Config)
    Config.layer_types = ("linear_attention", "full_attention")
    assert not attention.shares_prompts(Config)
    Config.layer_types = ("full_attention",)
    assert attention.shares_prompts(Config)
    Config._attn_implementation = "flash_attention_2"
    assert not attention.shares_prompts(Config)


def test_an_architecture_that_drops_the_blocks_is_noticed(make_model, monkeypatch):
    monkeypatch.setattr(attention, "_CALL_COST", BLOCKS)
    model = make_model("llama")
    forward = model.language_model.base_model.forward
    monkeypatch.setattr(model.language_model.base_model, "forward", lambda row_blocks, **rest: forward(**rest))
    with pytest.raises(RuntimeError, match="llama did not hand the row blocks"):
        run(model, random_comparisons(2, model.config.vocab_size), True)


def test_the_self_check_notices_a_wrong_mask(make_model, monkeypatch):
    model = make_model("llama")
    assert model.verify_shared_prompts() < 1e-5 and model.shares_prompts
    monkeypatch.setattr(
        "general_preference.models.reward_model.attention_mask",
        lambda config, segments, positions, dtype, shared: (segments >= 0).long(),
    )
    assert model.verify_shared_prompts() > 1e-3 and not model.shares_prompts
    model.shares_prompts = True
