"""What saves memory or time changes no gradient, and what cannot run here is refused."""

import contextlib
import shutil
from collections import Counter
from importlib.util import find_spec

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from general_preference.datasets.packing import Collator
from general_preference.errors import InputError
from general_preference.models.acceleration import checkpoint_activations, compile_layers, use_liger_kernels
from general_preference.trainer.arguments import parse_arguments
from tests.conftest import random_comparisons


class Count(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.found[operator.name().split(".")[0]] += 1
        return operator(*args, **(kwargs or {}))


def gradients(model, watch=None):
    """(flat gradient, operators that ran, bytes that autograd kept between forward and backward)."""
    model.zero_grad()
    model.train()
    batch = Collator(0, model.layout_on())(random_comparisons(4, model.config.vocab_size))
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with watch or Count() as operators:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(**batch.model_inputs())
        (output["embeddings"].pow(3).sum() + output["gates"].pow(2).sum()).backward()
    flat = torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None])
    return flat, getattr(operators, "found", None), sum(kept.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral_window"])
def test_checkpointing_recomputes_what_it_says_and_changes_no_gradient(make_model, family):
    plain, operators, kept = gradients(make_model(family))
    found = {}
    for selective in (False, True):
        model = make_model(family)
        checkpoint_activations(model.language_model, reentrant=False, selective=selective)
        found[selective] = gradients(model)
        torch.testing.assert_close(found[selective][0], plain, rtol=1e-5, atol=1e-6)
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    for selective in (False, True):
        again = found[selective][1] - operators
        assert again["aten::mul"] > 0 and again["aten::cat"] > 0
        dear = again["aten::mm"] + again["aten::addmm"], again[attention]
        assert dear == (0, 0) if selective else min(dear) > 0
    assert found[False][2] < kept, "inputs of layers alone"


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_layers_change_no_gradient(make_model):
    plain, *_ = gradients(make_model("llama"))
    model = make_model("llama")
    compile_layers(model.language_model)
    torch._dynamo.utils.counters.clear()
    compiled, *_ = gradients(model, contextlib.nullcontext())  # under a dispatch mode nothing is compiled
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"


def test_what_cannot_run_here_is_refused(make_model):
    with pytest.raises(InputError, match="use_liger_kernel needs a GPU, and this runs on cpu"):
        use_liger_kernels(make_model("llama").language_model, torch.device("cpu"))
    if find_spec("liger_kernel") is None:
        with pytest.raises(InputError, match="pip install liger-kernel"):
            use_liger_kernels(make_model("llama").language_model, torch.device("cuda"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--selective_checkpointing"], "add --gradient_checkpointing"),
        (
            ["--selective_checkpointing", "--gradient_checkpointing", "--gradient_checkpointing_use_reentrant"],
            "exclude each other",
        ),
        (["--torch_compile", "--zero_stage", "3"], "--zero_stage 2, not 3"),
    ],
)
def test_contradictions_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        parse_arguments(["--dataset", "x", *flags]).check()
