"""The load-balancing loss of mixtures of experts: transformers' own value, over real tokens, with its gradient."""

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, Qwen2MoeConfig

from general_preference import get_reward_model
from general_preference.datasets.packing import Collator
from general_preference.errors import InputError
from general_preference.models.acceleration import checkpoint_activations
from general_preference.models.attention import RowLayout
from general_preference.models.config import PreferenceConfig
from general_preference.models.losses import balance_coefficient, load_balancing_loss
from general_preference.trainer.arguments import parse_arguments
from general_preference.trainer.objectives import batch_loss
from tests.conftest import COMMON, random_comparisons

SPARSE = {
    "qwen2_moe": (Qwen2MoeConfig, {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 16}),
    "olmoe": (OlmoeConfig, {"num_experts": 8, "num_experts_per_tok": 2}),
}


@pytest.fixture(scope="module")
def make_sparse(model_folder, tokenizer, tmp_path_factory):
    """A function: family with experts -> RewardModel in fp32."""
    made = {"mixtral": model_folder("mixtral")}

    def make(family):
        if family not in made:
            kind, options = SPARSE[family]
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(kind(vocab_size=len(tokenizer), **COMMON, **options)).float()
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.15)
            made[family] = str(tmp_path_factory.mktemp(family))
            model.save_pretrained(made[family])
        preference = PreferenceConfig("gpm", 4, True, normalize=True, temperature=0.1)
        return get_reward_model(made[family], bf16=False, preference=preference, seed=3)

    return make


def arguments(*flags):
    return parse_arguments(["--dataset", "x", *flags]).loss


def alone(count, vocabulary):
    """Comparisons whose responses are each behind their own prompt, so that every layout computes the same tokens."""
    return [
        comparison | {"response_ids": comparison["response_ids"][:1], "first": [], "second": [], "label": []}
        for comparison in random_comparisons(count, vocabulary)
    ]


def aux_gradient(model, batch):
    model.zero_grad()
    aux = model(**batch.model_inputs())["aux_loss"]
    aux.backward()
    return aux, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["mixtral", *SPARSE])
@pytest.mark.parametrize("layout", ["model's", "padded"])
def test_it_is_transformers_own_with_its_gradient(make_sparse, family, layout):
    model = make_sparse(family)
    comparisons = alone(5, model.config.vocab_size)
    batch = Collator(0, model.layout_on() if layout == "model's" else RowLayout(), balanced=True)(comparisons)
    if layout == "padded":
        model.config._attn_implementation = "sdpa"
    aux, gradients = aux_gradient(model, batch)

    ids = [comparison["prompt_ids"] + comparison["response_ids"][0] for comparison in comparisons]
    padded = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, tokens in enumerate(ids):
        padded[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    model.zero_grad()
    model.config._attn_implementation = "sdpa"
    expected = model.language_model(input_ids=padded, attention_mask=mask, output_router_logits=True).aux_loss
    expected.backward()
    torch.testing.assert_close(aux, expected)
    routers = [name for name in gradients if name.endswith("mlp.gate.weight")]
    assert len(routers) == model.config.num_hidden_layers
    parameters = dict(model.named_parameters())
    for name in routers:
        assert gradients[name].norm() > 1e-4
        torch.testing.assert_close(gradients[name], parameters[name].grad, rtol=1e-4, atol=1e-6)


def test_its_range():
    even = torch.zeros(12, 4)
    counted = torch.ones(3, 4, dtype=torch.bool)
    even[torch.arange(12), torch.arange(12) % 4] = 1e-4  # one choice a token, every expert as often
    assert load_balancing_loss((even, even), 1, counted).item() == pytest.approx(1, abs=1e-3)
    collapsed = torch.zeros(12, 4)
    collapsed[:, 2] = 50.0
    assert load_balancing_loss((collapsed,), 1, counted).item() == pytest.approx(4)
    assert load_balancing_loss((collapsed,), 1, ~counted).item() == 0


def test_only_tokens_that_count_are_counted(make_sparse):
    model = make_sparse("mixtral")
    comparisons = random_comparisons(5, model.config.vocab_size)
    repeat = random_comparisons(9, model.config.vocab_size)[8] | {"weight": 0.0}
    assert len(repeat["response_ids"]) == 4
    for layout in (RowLayout(packed=True), RowLayout(), RowLayout(shared=False)):
        model.config._attn_implementation = "packed_sdpa" if layout.packed else "sdpa"
        collate = Collator(0, layout, balanced=True)
        batch, more = collate(comparisons), collate([comparisons[0], repeat, *comparisons[1:]])
        assert more.counted.sum() == batch.counted.sum() < (more.segments >= 0).sum()
        with torch.no_grad():
            expected, found = (model(**part.model_inputs())["aux_loss"] for part in (batch, more))
        torch.testing.assert_close(found, expected)
        nothing = collate([repeat])
        found = batch_loss(model(**nothing.model_inputs()), nothing, arguments("--aux_loss_coef", "1"))
        assert found.aux.item() == 0 and found.total.item() == 0


@pytest.mark.parametrize("selective", [False, True])
def test_checkpointed_layers_keep_their_routers_gradient(make_sparse, selective):
    def gradients(model):
        batch = Collator(0, model.train().layout_on(), balanced=True)(random_comparisons(4, model.config.vocab_size))
        loss = batch_loss(model(**batch.model_inputs()), batch, arguments("--aux_loss_coef", "0.5"))
        loss.total.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, model = gradients(make_sparse("mixtral")), make_sparse("mixtral")
    checkpoint_activations(model.language_model, reentrant=False, selective=selective)
    torch.testing.assert_close(gradients(model), plain, rtol=1e-4, atol=1e-6)


def test_the_total_and_a_weight_of_nothing(make_sparse):
    model = make_sparse("olmoe").eval()
    comparisons = [c | {"weight": 0.5} for c in random_comparisons(4, model.config.vocab_size)]
    plain = Collator(0, model.layout_on())(comparisons)
    batch = Collator(0, model.layout_on(), balanced=True)(comparisons)
    assert plain.counted is None
    without = batch_loss(model(**plain.model_inputs()), plain, arguments())
    assert without.aux is None
    zero = batch_loss(model(**batch.model_inputs()), batch, arguments("--aux_loss_coef", "0"))
    assert torch.equal(zero.total, without.total)
    found = batch_loss(model(**batch.model_inputs()), batch, arguments("--aux_loss_coef", "0.25"))
    aux = model(**batch.model_inputs())["aux_loss"]
    torch.testing.assert_close(found.aux, 2 * aux)  # the comparisons' weights add up to 4 * 0.5
    torch.testing.assert_close(found.total, without.total + 0.25 * 2 * aux)


def test_where_the_weight_comes_from(make_sparse, make_model):
    sparse, dense = make_sparse("olmoe").language_model, make_model("llama").language_model
    assert balance_coefficient(sparse, None) == balance_coefficient(dense, None) == balance_coefficient(dense, 0.0) == 0
    assert balance_coefficient(sparse, 0.3) == 0.3
    sparse.config.output_router_logits = True
    assert balance_coefficient(sparse, None) == sparse.config.router_aux_loss_coef == 0.01
    assert balance_coefficient(sparse, 0.0) == 0
    with pytest.raises(InputError, match=r"aux_loss_coef 0\.1: llama records no choice"):
        balance_coefficient(dense, 0.1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--aux_loss_coef", "-1"], "must be at least 0"),
        (["--aux_loss_coef", "nan"], "must be at least 0"),
        (
            ["--aux_loss_coef", "0.1", "--gradient_checkpointing", "--gradient_checkpointing_use_reentrant"],
            r"no gradient, and --aux_loss_coef is 0\.1",
        ),
    ],
)
def test_contradictions_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        parse_arguments(["--dataset", "x", *flags]).check()
