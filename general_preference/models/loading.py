"""Backbones from folders and hub names: the causal LM, its LoRA adapter, partitioned or in 4 bits."""

import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import is_accelerate_available

from general_preference.errors import InputError
from general_preference.models.adapters import load_adapter
from general_preference.models.config import adapter_base, load_config, reason
from general_preference.models.kernels import asked_of_transformers

# NF4 with double quantization, computing in bf16 (QLoRA, arXiv 2305.14314).
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FOUR_BITS |= {"bnb_4bit_compute_dtype": torch.bfloat16}


def load_backbone(
    path: str,
    dtype: torch.dtype,
    attn_implementation: str = "auto",
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
    device: torch.device | None = None,
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
