"""Ways to run the same layers in less memory or time. None changes what is computed beyond rounding."""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import is_liger_kernel_available

from general_preference.errors import InputError

# What selective checkpointing keeps: the results that take a matrix product or an attention kernel to make again.
_ATTENTION = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
_EXPENSIVE = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "_grouped_mm")}
_EXPENSIVE |= {f"aten::_scaled_dot_product_{name}" for name in _ATTENTION}
_EXPENSIVE |= {"torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward"}


def checkpoint_activations(language_model, *, reentrant: bool, selective: bool) -> None:
    """Recompute each layer's activations in backward; `selective` keeps matrix products and attention.

    FlexAttention is compiled as a whole and always recomputed. reentrant: the older kind of `torch.utils.checkpoint`.
    """
    context = {"context_fn": functools.partial(create_selective_checkpoint_contexts, _policy)} if selective else {}
    language_model.gradient_checkpointing_enable({"use_reentrant": reentrant} | context)
    if reentrant:
        language_model.enable_input_require_grads()


def _policy(_context, operator, *_, **__):
    kept = operator.name().split(".")[0] in _EXPENSIVE
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def use_liger_kernels(language_model, device: torch.device) -> None:
    """Replace norms, rotary embeddings and gated MLPs by Liger's fused kernels.

    Raises:
        InputError: no GPU, liger-kernel is not installed, or it does not know the architecture.
    """
    kind = language_model.config.model_type
    if device.type != "cuda":
        raise InputError(f"use_liger_kernel needs a GPU, and this runs on {device.type}: turn it off")
    if not is_liger_kernel_available():
        raise InputError("use_liger_kernel needs the package liger-kernel: pip install liger-kernel, or turn it off")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise InputError(f"use_liger_kernel: liger-kernel does not know {kind}: turn it off")
    # Its cross-entropies would patch the causal LM's own loss, which is not used here.
    apply_liger_kernel(language_model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def compile_layers(language_model: nn.Module) -> None:
    """Compile every decoder layer by itself (they share one graph); the first steps then take a minute longer.

    Raises:
        InputError: the architecture's layers are not found.
    """
    layers = [module for module in language_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(f"torch_compile: {language_model.config.model_type} has no layers that are known here")
    for layer in layers:
        layer.compile()
