"""Which attention kernel a model runs. `auto` takes the first of these that is exact, all with shared prompts:

    GPU, half precision   torch's variable-length attention, else flash-attn, else FlexAttention (compiled; training)
    GPU, fp32             FlexAttention (training), else sdpa with a mask over the row
    CPU                   sdpa, sequence by sequence, without padding

A GPU kernel is first compared with plain attention on the device where it will run (`kernel_error`). Models with other
layers than plain full attention keep transformers' kernel.
"""

import logging

import torch
import torch.nn.functional as F
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.utils import is_flash_attn_2_available

from general_preference.errors import InputError
from general_preference.models import attention
from general_preference.models.attention import FLEX, HALF, packs_rows
from general_preference.models.config import first_line

logger = logging.getLogger(__name__)

CHOICES = ["auto", "sdpa", "eager", "varlen", "flash_attention_2", FLEX]
_KERNEL = {"varlen": "packed_varlen", "flash_attention_2": "packed_flash", FLEX: FLEX}
# Largest error of an output or gradient, relative to the largest value: several times the rounding error.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def asked_of_transformers(wanted: str) -> str | None:
    """The `attn_implementation` to load a model with (None: transformers chooses), or InputError if there is none."""
    if wanted not in CHOICES:
        raise InputError(f"attn_implementation {wanted!r} is none of {', '.join(CHOICES)}")
    if wanted == "flash_attention_2" and not is_flash_attn_2_available():
        raise InputError("flash attention was asked for, but flash-attn is not installed or finds no GPU: use auto")
    return wanted if wanted in ("sdpa", "eager", "flash_attention_2") else None


def choose_kernel(config, wanted: str, loaded: str, device: torch.device, dtype: torch.dtype, training: bool) -> str:
    """The kernel (a value of `_attn_implementation`) that a model runs on `device` in `dtype`.

    wanted: one of `CHOICES`. loaded: what transformers chose. training: gradients and dropout are needed.

    Raises:
        InputError: `wanted` is a kernel that this model or device cannot run exactly.
    """
    if not packs_rows(config):
        if wanted in ("varlen", FLEX):
            raise InputError(f"attn_implementation {wanted} is not known to be exact for {config.model_type}: use auto")
        return loaded
    if wanted in _KERNEL:
        problem = kernel_problem(config, _KERNEL[wanted], device, dtype, training)
        if problem:
            raise InputError(f"attn_implementation {wanted}: {problem}: use auto")
        return _KERNEL[wanted]
    if wanted == "eager" or (wanted == "auto" and loaded != "sdpa"):
        return loaded
    if wanted == "auto" and device.type == "cuda":
        for kernel in ("packed_varlen", "packed_flash", FLEX)[: 3 if training else 2]:
            problem = kernel_problem(config, kernel, device, dtype, training)
            if problem is None:
                return kernel
            logger.info("attention kernel %s is not used: %s", kernel, problem)
    # One call per sequence costs an accelerator more than the mask over the row.
    return "packed_sdpa" if device.type == "cpu" else "sdpa"


def kernel_problem(config, kernel: str, device: torch.device, dtype: torch.dtype, training: bool) -> str | None:
    """Why `kernel` cannot be used for `config` on `device`, in a few words; None if it can."""
    if device.type != "cuda":
        return f"it needs a GPU, and this runs on {device.type}"
    if kernel != FLEX and dtype not in HALF:
        return f"it computes in half precision, and this model is {dtype}".replace("torch.", "")
    if kernel == FLEX and config.model_type not in attention.FLEX_VERIFIED:
        return f"it is not known to be exact for {config.model_type}"
    dropout = getattr(config, "attention_dropout", None) or getattr(config, "attn_pdrop", None)
    if training and dropout and kernel != "packed_flash":
        return f"it has no dropout, and the model's attention drops {dropout}"
    try:
        error = kernel_error(config, kernel, device, dtype, training)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # no other kernel would run after these
    except Exception as failure:  # the kernel is not installed or too old, or whatever a compiler raises
        return f"it failed here ({type(failure).__name__}: {first_line(failure)})"
    return None if error <= TOLERANCE[dtype] else f"it is off by {error:.1e} here"


def kernel_error(config, kernel: str, device: torch.device, dtype: torch.dtype, gradients: bool = True) -> float:
    """Largest relative error of `kernel` (and its gradients) on a random row, against fp32 attention per response."""
    lengths = [(70, [33, 50, 1]), (20, [9]), (3, [140, 17])]
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    segments, positions = [], []
    for prompt, responses in lengths:
        for number, count in enumerate([prompt, *responses]):
            segments += [number] * count
            positions += range(prompt, prompt + count) if number else range(prompt)
    total = len(segments)
    # Padded to FlexAttention's blocks of 128; padding sees itself alone and is cut off again.
    padding = -total % 128 if kernel == FLEX else 0
    rows = torch.tensor([[segments + [attention.PADDING] * padding], [positions + [0] * padding]], device=device)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, total + padding, size) for count in (heads, shared, shared, heads)]
    query, key, value, weight = (torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes)
    module = torch.nn.Module().train(gradients)
    module.config = type("Config", (), {"_attn_implementation": kernel})
    sequences = attention.pack_sequences(lengths).map(lambda tensor: tensor.to(device))

    def by_kernel(query, key, value):
        if kernel != FLEX:
            return attention.packed_attention(module, query, key, value, None, sequences=sequences)[0]
        return flex_attention_forward(module, query, key, value, attention.block_mask(*rows))[0][:, :total]

    def one_by_one(*tensors):
        found = []
        for seen, count in zip(sequences.key_index.split(sequences.keys), sequences.queries, strict=True):
            own = (tensor[:, :, seen].repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in tensors)
            found.append(F.scaled_dot_product_attention(*own, is_causal=True)[:, :, -count:])
        return torch.cat(found, dim=2).transpose(1, 2)

    def outputs(attend, dtype: torch.dtype) -> list[torch.Tensor]:
        with torch.set_grad_enabled(gradients):
            inputs = [tensor.detach().to(dtype).requires_grad_(gradients) for tensor in (query, key, value)]
            found = attend(*inputs)
            slopes = torch.autograd.grad((found * weight.transpose(1, 2)[:, :total]).sum(), inputs) if gradients else ()
        return [found.detach(), *slopes]

    pairs = zip(outputs(by_kernel, dtype), outputs(one_by_one, torch.float32), strict=True)
    errors = [(found.float() - expected).abs().max() / expected.abs().max() for found, expected in pairs]
    return torch.stack(errors).max().item()  # NaN if any is
