"""Log-probabilities from chunks of logits equal those from all logits, with their gradients; and no chunk is kept."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from general_preference.models import losses
from general_preference.models.losses import can_fuse, linear_log_probs, token_log_probs
from general_preference.trainer.arguments import LossArguments
from general_preference.trainer.objectives import batch_loss
from tests.conftest import random_comparisons
from tests.test_packing import run


@pytest.mark.parametrize("elements", [1, 7 * 11, 10**6])  # chunks of one token, of seven, one chunk
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_chunks_equal_all_logits(monkeypatch, elements, dtype):
    monkeypatch.setattr(losses, "CPU_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in ((17, 5), (11, 5))
    )
    tokens, above = torch.randint(0, 11, (17,), generator=generator), torch.randn(17, generator=generator)
    found = linear_log_probs(hidden, weight, tokens)
    gradients = torch.autograd.grad((found * above).sum(), (hidden, weight))
    wide = [
        tensor.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_() for tensor in (hidden, weight)
    ]
    expected = token_log_probs(wide[0] @ wide[1].T, tokens)
    assert found.dtype == expected.dtype
    close = {"atol": 0.15, "rtol": 0.05} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(found, expected, **close)
    for one, other in zip(gradients, torch.autograd.grad((expected * above).sum(), wide), strict=True):
        torch.testing.assert_close(one.to(other.dtype), other, **close)


def test_gradient_is_that_of_finite_differences():
    hidden, weight = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in ((6, 4), (9, 4)))
    tokens = torch.tensor([0, 8, 3, 3, 1, 5])
    assert torch.autograd.gradcheck(lambda *inputs: linear_log_probs(*inputs, tokens), (hidden, weight))


def test_half_precision_keeps_the_slope_of_a_token_that_is_nearly_certain():
    hidden = torch.full((1, 8), 0.875, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(5, 8, dtype=torch.bfloat16)
    weight[2] = 1.0  # its logit is 7, the others' 0: p is 0.99636, of which half precision would leave 0 or 1/256
    linear_log_probs(hidden, weight, torch.tensor([2])).backward()
    wide = hidden.detach().float().requires_grad_()
    token_log_probs(wide @ weight.float().T, torch.tensor([2])).backward()
    torch.testing.assert_close(hidden.grad.float(), wide.grad, rtol=0.01, atol=0)


def test_no_tensor_is_larger_than_a_chunk(monkeypatch):
    monkeypatch.setattr(losses, "CPU_ELEMENTS", 4 * 1000)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            nonlocal largest
            result = operator(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (1000,):
                largest = max(largest, result.numel())
            return result

    hidden, weight = (torch.randn(shape, requires_grad=True) for shape in ((90, 3), (1000, 3)))
    with Watch():
        linear_log_probs(hidden, weight, torch.arange(90)).sum().backward()
    assert largest == 4 * 1000, "of 90 tokens, four at a time"


def test_a_frozen_matrix_gets_no_gradient_and_no_tokens_are_fine():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4)
    linear_log_probs(hidden, weight, torch.tensor([1, 2, 3])).sum().backward()
    assert hidden.grad.abs().max() > 0 and weight.grad is None
    assert linear_log_probs(hidden[:0], weight, torch.tensor([], dtype=torch.long)).shape == (0,)


def test_only_one_whole_plain_matrix_is_fused():
    assert can_fuse(nn.Linear(3, 4, bias=False)) and not can_fuse(nn.Linear(3, 4))
    partitioned = nn.Linear(3, 4, bias=False)
    partitioned.weight.data = torch.empty(0)  # what ZeRO-3 leaves of it

    class Adapter(nn.Linear):
        pass

    assert not can_fuse(partitioned) and not can_fuse(Adapter(3, 4, bias=False)) and not can_fuse(None)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_both_ways_of_the_model_agree(make_model, monkeypatch, family):
    model = make_model(family)
    arguments = LossArguments(add_pretrain_loss=True, ptx_loss="sum", ptx_loss_coef=0.3)
    found = []
    for fused in (True, False):
        monkeypatch.setattr("general_preference.models.backbone.can_fuse", lambda head, fused=fused: fused)
        model.zero_grad()
        batch, output = run(model, random_comparisons(4, model.config.vocab_size), None, "chosen")
        losses = batch_loss(output, batch, arguments)
        losses.total.backward()
        head = model.language_model.get_output_embeddings().weight.grad.clone()
        found.append((losses.regularizer.detach(), head, model.language_model.base_model.norm.weight.grad.clone()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
