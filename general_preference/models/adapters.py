"""LoRA adapters on a backbone. Only this file needs peft."""

from pathlib import Path

import torch
from safetensors import SafetensorError

from general_preference.errors import InputError
from general_preference.models.config import ADAPTER_CONFIG, first_line, reason, resolve


def add_lora(backbone, rank: int, alpha: int, target_modules, dropout: float, seed: int):
    """New adapters on a frozen causal LM; the same values for the same seed on every process.

    peft's preparation for 4-bit training is not used: the engine would make its fp32 norms bf16 again.

    Raises:
        InputError: peft is not installed, or the modules named are not there.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError("lora_rank > 0 needs the package peft: pip install peft") from error
    backbone.enable_input_require_grads()
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=target_modules, lora_dropout=dropout, bias="none")
    try:
        with torch.random.fork_rng(devices=[]):  # how much was drawn so far differs where loading is partitioned
            torch.manual_seed(seed)
            return get_peft_model(backbone, lora)
    except ValueError as error:
        raise InputError(f"LoRA does not fit this model: {first_line(error)}") from error


def load_adapter(model, path: str):
    """The adapter at `path` on its base `model`, trainable; InputError without peft or readable weights."""
    weights = resolve(path, "adapter_model.safetensors")
    if weights is None:
        raise InputError(f"{path} has no adapter_model.safetensors: adapters in other formats are not loaded")
    try:
        from peft import PeftModel

        folder = str(Path(weights).parent)  # of the hub's snapshot, if it came from there
        return PeftModel.from_pretrained(model, folder, is_trainable=True, use_safetensors=True)
    except ImportError as error:
        raise InputError(f"{path} is a LoRA adapter and needs the package peft: pip install peft") from error
    except (SafetensorError, KeyError, RuntimeError, OSError, ValueError) as error:
        raise InputError(f"cannot load the adapter {path}: {reason(path, error)}") from error


def merge_adapter(model) -> None:
    """Fold a preference model's adapters into its backbone, in place: W becomes W + alpha / rank * B A.

    Raises:
        InputError: no adapter, an adapter on embeddings tied to the LM head, or a sum that is not finite.
    """
    if not hasattr(model.backbone, "peft_config"):
        raise InputError(f"this model has no adapter to fold in: there is no {ADAPTER_CONFIG}")
    language_model = model.language_model
    ends = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    if model.config.tie_word_embeddings and any(hasattr(module, "base_layer") for module in ends):
        raise InputError("the adapter changes embeddings that are the LM head as well: it cannot be folded into one")
    try:
        model.backbone = model.backbone.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise InputError(f"the adapter cannot be folded in: {first_line(error)}") from error
