"""Shared-prompt rows equal separate sequences, for scores and gradients, in every architecture that is claimed."""

import pytest
import torch

from general_preference.datasets import packing
from general_preference.datasets.packing import Collator
from general_preference.errors import InputError
from general_preference.models import attention, kernels
from general_preference.models.attention import RowLayout
from general_preference.plots import embedded_cycle
from general_preference.trainer.arguments import LossArguments
from general_preference.trainer.objectives import batch_loss
from tests.conftest import FAMILIES, MAIN_FAMILIES, random_comparisons

PACKED, MASKED, SEPARATE = RowLayout(packed=True), RowLayout(), RowLayout(shared=False)
WINDOWED = ("mistral_window", "gemma2", "gemma3")
CPU = torch.device("cpu")


def relative(a, b):
    return (a - b).abs().max().item() / max(b.abs().max().item(), 1e-12)


def run(model, comparisons, layout=None, regularized=""):
    chosen = model.layout_on()
    batch = Collator(0, layout or chosen, regularized)(comparisons)
    return batch, model(**batch.model_inputs())


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompts_equal_separate_sequences(make_model, family):
    model = make_model(family)
    assert model.layout_on() == (MASKED if family in WINDOWED else PACKED), "every family here can be computed exactly"
    comparisons = random_comparisons(6, model.config.vocab_size)
    with torch.no_grad():
        _, separate = run(model, comparisons, SEPARATE, "both")
        for layout in {model.layout_on(), MASKED}:
            batch, shared = run(model, comparisons, layout, "both")
            assert (batch.sequences is not None) == layout.packed and batch.shared
            names = {"embeddings", "prompt_hidden_states", "temperature", "gates", "log_probs", "counts"}
            assert shared.keys() == separate.keys() == names
            for name in shared:
                assert relative(shared[name], separate[name]) < 1e-5, (name, layout)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", [PACKED, MASKED])
@pytest.mark.parametrize("family", MAIN_FAMILIES)
@pytest.mark.parametrize("kind", ["vanilla", "reference_free"])
def test_gradients_of_shared_prompts_equal_those_of_separate_sequences(make_model, family, kind, layout, checkpointing):
    model = make_model(family)
    if checkpointing:
        model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # it checkpoints only then; no model here has dropout
    arguments = LossArguments(add_pretrain_loss=True, ptx_loss=kind, ptx_loss_coef=0.3, margin_loss=True)
    comparisons = random_comparisons(5, model.config.vocab_size, seed=1)
    gradients = []
    for rows in (layout, SEPARATE):
        batch, output = run(model, comparisons, rows, "both")
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
        _, together = run(model, comparisons)
        start = 0
        for comparison in comparisons:
            _, alone = run(model, [comparison])
            count = len(comparison["response_ids"])
            assert relative(together["embeddings"][start : start + count], alone["embeddings"]) < 1e-5
            start += count
        _, backwards = run(model, comparisons[::-1])
        assert relative(backwards["gates"].flip(0), together["gates"]) < 1e-5
        padded = Collator(17, MASKED)(comparisons)
        assert relative(model(**padded.model_inputs())["embeddings"], together["embeddings"]) < 1e-6


def test_scores_agree_with_a_plain_forward_of_the_backbone(make_model):
    model = make_model("llama", "bt", 1, False)
    comparison = random_comparisons(1, model.config.vocab_size)[0]
    with torch.no_grad():
        _, output = run(model, [comparison])
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
        batch, output = run(model, [comparison], None, "chosen")
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
    batch = Collator(0, MASKED, "chosen")(comparisons)
    assert batch.input_ids.tolist() == [[1, 7, 8, 5, 9, 10, 5], [1, 6, 5, 7, 5, 8, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4], [0, 1, 2, 1, 2, 1, 2]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 2, 2, 3, 3]]
    assert batch.response_ends.tolist() == [3, 6, 9, 11, 13] and batch.prompt_ends.tolist() == [1, 7]
    assert batch.first.tolist() == [0, 4, 2] and batch.second.tolist() == [1, 2, 3]
    assert batch.comparison_index.tolist() == [0, 1, 1] and batch.weight.tolist() == [2.0, 0.5, 0.5]
    predict_positions, target_ids, sequence_index = batch.targets
    assert predict_positions.tolist() == [0, 1, 2, 7, 8, 7, 12]
    assert target_ids.tolist() == [7, 8, 5, 6, 5, 8, 5]
    assert sequence_index.tolist() == [5, 0, 0, 2, 2, 4, 4]
    separate = Collator(0, SEPARATE)(comparisons)
    assert separate.input_ids.shape == (5, 5) and separate.segments.max() == 1
    assert separate.prompt_ends.tolist() == [1, 10]
    packed = Collator(0, PACKED, "chosen")(comparisons)
    assert packed.input_ids.tolist() == [[1, 7, 8, 5, 9, 10, 5, 1, 6, 5, 7, 5, 8, 5]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1, 2, 1, 2, 1, 2]]
    assert packed.response_ends.tolist() == [3, 6, 9, 11, 13] and packed.prompt_ends.tolist() == [1, 7]
    assert [part.tolist() for part in packed.targets] == [part.tolist() for part in batch.targets]
    assert packed.sequences.queries == [4, 3, 3, 2, 2] and packed.sequences.keys == [4, 5, 3, 3, 3]
    assert packed.sequences.key_index.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8, 9, 7, 10, 11, 7, 12, 13]
    assert packed.sequences.query_ends.tolist() == [0, 4, 7, 10, 12, 14]
    assert packed.sequences.key_ends.tolist() == [0, 4, 9, 12, 15, 18]
    rounded = Collator(0, RowLayout(packed=True, rounded=True))(comparisons)
    assert rounded.input_ids.shape == (1, 128) and rounded.sequences is None and rounded.segments[0, 14] == -1


def test_architectures_without_an_exact_mask_fall_back():
    class Config:
        _attn_implementation, model_type = "sdpa", "llama4_text"
        layer_types = ("chunked_attention", "full_attention")

    assert not attention.shares_prompts(Config)
    Config.layer_types = ("linear_attention", "full_attention")
    assert not attention.shares_prompts(Config)
    Config.layer_types = ("full_attention",)
    assert attention.shares_prompts(Config)
    assert attention.packs_rows(Config) is False, "an architecture that nobody compared"
    Config._attn_implementation = "flash_attention_2"
    assert not attention.shares_prompts(Config)


def test_an_architecture_that_drops_the_sequences_is_noticed(make_model, monkeypatch):
    model = make_model("llama")
    forward = model.language_model.base_model.forward
    monkeypatch.setattr(model.language_model.base_model, "forward", lambda sequences, **rest: forward(**rest))
    with pytest.raises(RuntimeError, match="llama did not hand the sequences"):
        run(model, random_comparisons(2, model.config.vocab_size))


@pytest.mark.parametrize("family", sorted(attention.FLEX_VERIFIED & FAMILIES.keys()))
def test_flex_attention_equals_separate_sequences(make_model, family):
    """Forward, and not compiled: on CPUs FlexAttention has no backward."""
    model = make_model(family)
    assert attention.packs_rows(model.config)
    comparisons = random_comparisons(6, model.config.vocab_size)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        _, separate = run(model, comparisons, SEPARATE, "both")
        model.config._attn_implementation = attention.FLEX
        layout = attention.row_layout(model.config, True)
        batch = Collator(0, layout, "both")(comparisons)
        shared = model(**batch.model_inputs())
    assert layout == RowLayout(packed=True, rounded=True)
    assert batch.input_ids.shape[1] % 128 == 0 and batch.segments.min() == -1
    for name in separate:
        assert relative(shared[name], separate[name]) < 1e-5, name


def test_packed_rows_get_few_lengths():
    layout = RowLayout(packed=True, rounded=True)
    lengths = {layout.row_length(tokens) for tokens in range(1, 16385)}
    assert len(lengths) < 50
    assert all(tokens <= layout.row_length(tokens) <= tokens * 9 / 8 + 127 for tokens in range(1, 16385, 7))
    assert all(layout.row_length(tokens) % 128 == 0 for tokens in range(1, 16385, 7))
    assert PACKED.row_length(1001) == 1001


def test_a_kernel_is_compared_with_plain_attention(monkeypatch):
    class Config:
        num_attention_heads, num_key_value_heads, head_dim, hidden_size = 6, 2, 8, 48

    assert kernels.kernel_error(Config, "packed_sdpa", CPU, torch.float32) < 1e-5

    def looks_ahead(query, key, value, sequences, scale, dropout):
        everything = [torch.zeros(count, seen) for count, seen in zip(sequences.queries, sequences.keys, strict=True)]
        monkeypatch.setattr(sequences, "masks", lambda dtype: everything)
        return attention.by_sdpa(query, key, value, sequences, scale, dropout)

    monkeypatch.setitem(attention.KERNELS, "wrong", looks_ahead)
    assert kernels.kernel_error(Config, "wrong", CPU, torch.float32) > 0.1


@pytest.mark.parametrize("wanted", ["varlen", "flex_attention"])
def test_a_kernel_that_cannot_run_here_is_refused(make_model, wanted):
    with pytest.raises(
        InputError, match=f"attn_implementation {wanted}: it needs a GPU, and this runs on cpu: use auto"
    ):
        _ = make_model("llama", attn_implementation=wanted).layout_on()
    with pytest.raises(InputError, match="not known to be exact for gemma2"):
        _ = make_model("gemma2", attn_implementation=wanted).layout_on()
    with pytest.raises(InputError, match="'fastest' is none of auto, sdpa"):
        make_model("llama", attn_implementation="fastest")


def test_the_kernel_follows_the_device(make_model, monkeypatch):
    """What would be chosen on a GPU, without one: the check of the kernel itself is replaced."""
    tried = []

    def problem(config, kernel, device, dtype, training):
        tried.append(kernel)
        return None if kernel in works else "not here"

    monkeypatch.setattr(kernels, "kernel_problem", problem)
    model, gpu = make_model("llama"), torch.device("cuda")
    assert model.layout_on() == PACKED and not tried
    for training, works, chosen, layout in (  # noqa: B007 (works is read by the function above)
        (True, ("packed_varlen",), "packed_varlen", PACKED),
        (False, ("packed_flash",), "packed_flash", PACKED),
        (True, ("flex_attention",), "flex_attention", RowLayout(packed=True, rounded=True)),
        (False, ("flex_attention",), "sdpa", MASKED),  # compiling takes longer than a few forward passes
    ):
        model._chosen_for = None
        assert model.train(training).layout_on(gpu) == layout and model.config._attn_implementation == chosen
    assert tried[:1] == ["packed_varlen"]
    assert model.layout_on() == PACKED and model.config._attn_implementation == "packed_sdpa", "back on the CPU"
    assert make_model("gemma2").layout_on(gpu) == MASKED


@pytest.mark.parametrize("wanted", ["eager", "sdpa", "auto"])
def test_the_kernel_that_is_asked_for_runs(make_model, wanted):
    model = make_model("llama", attn_implementation=wanted)
    assert model.layout_on() == (MASKED if wanted == "eager" else PACKED)
    assert model.config._attn_implementation == ("eager" if wanted == "eager" else "packed_sdpa")
    comparisons = random_comparisons(3, model.config.vocab_size)
    with torch.no_grad():
        _, found = run(model, comparisons)
        _, expected = run(make_model("llama"), comparisons, SEPARATE)
    assert relative(found["embeddings"], expected["embeddings"]) < 1e-5


def test_the_self_check_notices_a_wrong_mask(make_model, monkeypatch):
    model = make_model("llama")
    assert model.verify_shared_prompts() < 1e-5 and model.shares_prompts
    monkeypatch.setattr(
        "general_preference.models.attention.attention_mask",
        lambda config, segments, positions, dtype, shared: (segments >= 0).long(),
    )
    assert model.verify_shared_prompts() > 1e-3 and not model.shares_prompts
    model.shares_prompts = True


def with_copies(comparisons: list[dict]) -> list[dict]:
    """The same comparisons with one more copy of a response in each, which takes part in a preference."""
    found = []
    for index, comparison in enumerate(comparisons):
        responses = comparison["response_ids"]
        copy, count = index % len(responses), len(responses)
        edges = {"first": [*comparison["first"], copy, count], "second": [*comparison["second"], count, 1 - copy % 2]}
        labels = {"label": [*comparison["label"], 0.5, 0.9]}
        found.append(comparison | edges | labels | {"response_ids": [*responses, list(responses[copy])]})
    pair = {"response_ids": [found[0]["response_ids"][0]] * 2, "first": [0], "second": [1], "label": [1.0]}
    return [*found, found[0] | pair | {"id": "pair"}]


@pytest.mark.parametrize("layout", [PACKED, MASKED, SEPARATE])
@pytest.mark.parametrize("kind", ["vanilla", "reference_free"])
def test_equal_responses_are_one_sequence_with_the_gradient_of_several(make_model, monkeypatch, layout, kind):
    model = make_model("llama")
    arguments = LossArguments(add_pretrain_loss=True, ptx_loss=kind, ptx_loss_coef=0.3)
    comparisons, found = with_copies(random_comparisons(5, model.config.vocab_size, seed=4)), []
    for copied in (False, True):
        if copied:
            monkeypatch.setattr(packing, "distinct_responses", lambda some: (some, list(range(len(some)))))
        batch, output = run(model, comparisons, layout, "both")
        losses = batch_loss(output, batch, arguments)
        model.zero_grad()
        losses.total.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((batch, losses, gradients))
    (batch, losses, gradients), (apart, separate, expected) = found
    assert (gradients - expected).norm() / expected.norm() < 1e-5
    for name in ("score", "preference", "regularizer"):
        torch.testing.assert_close(getattr(losses, name), getattr(separate, name), atol=1e-5, rtol=1e-5)
    stated = [tuple(ids) for comparison in comparisons for ids in comparison["response_ids"]]
    equal = [stated[i] == stated[j] for i, j in zip(batch.first.tolist(), batch.second.tolist(), strict=True)]
    assert (losses.score == 0).tolist() == equal and sum(equal) == 6
    once = sum(len(ids) for c in comparisons for ids in {tuple(ids) for ids in c["response_ids"]})
    prompts = sum(len(c["prompt_ids"]) for c in comparisons)
    assert (batch.segments >= 0).sum() < (apart.segments >= 0).sum()
    if layout is not SEPARATE:
        assert (batch.segments >= 0).sum() == once + prompts
    for name in ("first", "second", "label", "weight", "comparison_index"):
        assert torch.equal(getattr(batch, name), getattr(apart, name)), "indices count every stated response"
    assert [len(part) for part in batch.targets] == [len(part) for part in apart.targets]


@pytest.mark.parametrize("layout", [PACKED, MASKED, SEPARATE])
def test_the_texts_of_a_cycle_are_its_own(layout):
    class Tokenizer:
        decode = staticmethod(lambda ids, **_: " ".join(map(str, ids.tolist())))

    same = {"prompt_ids": [1, 2], "margin": 0.0}
    pair = same | {"response_ids": [[10, 5], [11, 5]], "first": [0], "second": [1], "label": [1.0]}
    cycle = same | {"response_ids": [[20, 5], [21, 5], [22, 5], [21, 5]], "first": [0, 1, 2], "second": [1, 2, 0]}
    batch = Collator(0, layout)([pair, cycle | {"label": [1.0] * 3}])
    found = embedded_cycle("set", batch, {"embeddings": torch.zeros(6, 2)}, Tokenizer)
    assert found.members == ["20 5", "21 5", "22 5"]
