"""Where a model runs and in which precision: the one place outside the training engine that chooses a device."""

import torch

from general_preference.errors import InputError


def choose_device(wanted: str | int | torch.device = "auto", index: int = 0) -> torch.device:
    """The device `wanted`, such as "cuda:1"; "auto" is a CUDA or ROCm GPU, else Apple's mps, else the CPU.

    A number, such as 0 or "0", is that of an accelerator.

    index: which GPU "auto" and a bare "cuda" mean, for the processes of one machine.

    Raises:
        InputError: no such device here.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    counts = {"cuda": gpus, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    best = next(kind for kind, count in counts.items() if count)
    if wanted == "auto":
        wanted = best
    elif str(wanted).isdecimal():
        wanted = f"{'cuda' if best == 'cpu' else best}:{wanted}"
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device {wanted!r} is none: use auto, cuda, cuda:N, mps or cpu") from error
    if device == torch.device("cuda"):
        device = torch.device("cuda", index % max(gpus, 1))
    if (device.index or 0) >= counts.get(device.type, 0):
        raise InputError(f"this machine has no device {wanted} ({gpus} GPUs): use auto, cuda, cuda:N, mps or cpu")
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 natively; emulation is many times slower than fp32."""
    if device.type == "cuda":  # torch.cuda.is_bf16_supported looks at the current device only
        return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return True


def inference_dtype(device: torch.device, bf16: bool | None) -> torch.dtype:
    """The backbone's dtype: as asked for, else bfloat16 on GPUs that are fast at it; on CPUs fp32, for equal scores."""
    if bf16 is None:
        bf16 = device.type == "cuda" and has_fast_bf16(device)
    return torch.bfloat16 if bf16 else torch.float32
