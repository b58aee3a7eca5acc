"""Backbones from folders and hub names: the causal LM, its LoRA adapter, partitioned or in 4 bits."""

from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import is_accelerate_available

from general_preference.errors import InputError
from general_preference.models.config import ADAPTER_CONFIG, adapter_base, first_line, load_config, reason, resolve
from general_preference.models.kernels import asked_of_transformers

# NF4 with double quantization, computing in bf16 (QLoRA, arXiv 2305.14314).
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FOUR_BITS |= {"bnb_4bit_compute_dtype": torch.bfloat16}


def load_backbone(
    path: str, dtype: torch.dtype, attn_implementation="auto", trust_remote_code=False, load_in_4bit=False, device=None
):
    """The causal LM at `path`, with its LoRA adapter if the folder holds one."""
    config = load_config(path, trust_remote_code)
    if (base := adapter_base(path)) is not None:
        try:
            model = load_backbone(base, dtype, attn_implementation, trust_remote_code, load_in_4bit, device)
        except InputError as error:
            raise InputError(f"{path} is an adapter, and its base model cannot be used: {error}") from error
        return load_adapter(model, path)
    options = {"quantization_config": BitsAndBytesConfig(**FOUR_BITS)} if load_in_4bit else {}
    if device is not None and is_accelerate_available():
        options["device_map"] = device
    asked = asked_of_transformers(attn_implementation)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # heads are "unexpected" to a causal LM; missing weights are checked
    options |= {"dtype": dtype, "trust_remote_code": trust_remote_code, "attn_implementation": asked}
    options |= {"use_safetensors": True, "output_loading_info": True}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(path, config=config, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # damaged files, and values in config.json that the architecture cannot be built with
        raise InputError(f"cannot load the model {path}: {reason(path, error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    if beyond := [name for name in info["unexpected_keys"] if "layers." in name]:  # the heads are none
        raise InputError(f"{path} holds weights that its configuration has no place for, the first {sorted(beyond)[0]}")
    if missing := [name for name in info["missing_keys"] if "lm_head" not in name and "embed_out" not in name]:
        raise InputError(f"{path} lacks {len(missing)} weights of its architecture, the first {sorted(missing)[0]}")
    if model.get_output_embeddings() is None:
        raise InputError(f"{path} is a {config.model_type} model without a language-model head: use a decoder-only LM")
    return model


def partitioned_loading(ds_config: dict | None):
    """Make transformers load into ZeRO-3 partitions; the returned object must live until loading is done."""
    if ds_config is None or ds_config.get("zero_optimization", {}).get("stage") != 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(ds_config)


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
