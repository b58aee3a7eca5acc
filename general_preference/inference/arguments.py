"""The flags with which a script names the model it runs, and the pipeline they make."""

import math
import os
from dataclasses import dataclass

import torch

from general_preference.cli import check_at_least, flag
from general_preference.errors import InputError
from general_preference.inference.pipeline import GPMPipeline
from general_preference.models.device import choose_device
from general_preference.models.kernels import CHOICES


@dataclass
class DeviceArguments:
    """How a model runs that is not trained."""

    bf16: bool | None = flag(None, "bfloat16 backbone; default on GPUs that compute it fast")
    attn_implementation: str = flag("auto", "attention kernel; auto: the fastest that is exact here", choices=CHOICES)
    trust_remote_code: bool = flag(False, "run code that comes with the model")
    device: str = flag("auto", "auto (one GPU per process, else mps or the CPU), cuda:N, mps or cpu")
    batch_tokens: int | None = flag(None, "tokens in one call at most, padding included; default fits the device")
    preprocessing_workers: int = flag(min(8, os.cpu_count() or 1), "processes that tokenize")
    local_rank: int = flag(-1, "set by launchers")


@dataclass
class InferenceArguments(DeviceArguments):
    """What the model is expected to be, and how it runs. The same in every script that runs a trained model."""

    is_general_preference: bool | None = flag(None, "what the model is expected to be; a contradiction is an error")
    value_head_dim: int | None = flag(None, "the size D the model is expected to have; a contradiction is an error")
    add_prompt_head: bool | None = flag(None, "whether the model is expected to have a gate; else an error")
    general_preference_tau: float | None = flag(None, "temperature of published weights (0.1)", aliases=["--tau"])
    flash_attn: bool = flag(False, "same as --attn_implementation flash_attention_2 (needs flash-attn and a GPU)")

    def check(self) -> None:
        """InputError for what cannot work, before anything is loaded."""
        check_at_least(self, 1, "batch_tokens", "preprocessing_workers")
        if (tau := self.general_preference_tau) is not None and not 0 < tau < math.inf:
            raise InputError(f"--general_preference_tau {tau} must be a number above 0")
        if self.flash_attn and self.attn_implementation not in ("auto", "flash_attention_2"):
            raise InputError(f"--flash_attn and --attn_implementation {self.attn_implementation} disagree: drop one")

    def load(self, path: str, local_rank: int, **options) -> GPMPipeline:
        """The model at `path` on this process's device; `options` are further arguments of `GPMPipeline`."""
        same = ("is_general_preference", "value_head_dim", "add_prompt_head", "bf16", "batch_tokens")
        options |= {name: getattr(self, name) for name in (*same, "trust_remote_code")}
        options["attn_implementation"] = "flash_attention_2" if self.flash_attn else self.attn_implementation
        device = choose_device(self.device, local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return GPMPipeline(path, device=device, tau=self.general_preference_tau, **options)
