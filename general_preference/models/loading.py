"""Backbones from folders and hub names: the causal LM, its LoRA adapter, partitioned or in 4 bits."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import BitsAndBytesConfig
from transformers.utils import is_accelerate_available

from general_preference.errors import InputError
from general_preference.models.config import (
    ADAPTER_CONFIG,
    BASE_DIGEST,
    base_chain,
    base_of,
    first_line,
    load_config,
    naming_adapter,
    reason,
    resolve,
    tensor_files,
    weights_digest,
)
from general_preference.models.heads import IN_ADAPTER, check_no_head, head_tensors
from general_preference.models.kernels import asked_of_transformers
from general_preference.models.multimodal import auto_class, freeze_other_parts, text_modules

# NF4 with double quantization, computing in bf16 (QLoRA, arXiv 2305.14314).
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FOUR_BITS |= {"bnb_4bit_compute_dtype": torch.bfloat16}
ADAPTED = ("base_layer", "modules_to_save")  # attributes of peft's modules around one that an adapter changes
OLD_MASKS = re.compile(r"\.attn(\.attention)?\.(masked_)?bias$")  # causal masks that old checkpoints hold as tensors


def load_backbone(
    path: str, dtype: torch.dtype, attn_implementation="auto", trust_remote_code=False, load_in_4bit=False, device=None
):
    """The causal LM at `path`, with its LoRA adapter if the folder holds one.

    `made_up` of the LM is the prefix of an LM head that the checkpoint lacks, which only scoring can do without.

    Raises:
        InputError: no such model, tensors that it lacks or has no place for, or an adapter on another base.
    """
    path = os.path.expanduser(path)
    config = load_config(path, trust_remote_code)
    if (base := base_of(path)) is None:
        return _load_language_model(path, config, dtype, attn_implementation, trust_remote_code, load_in_4bit, device)
    with naming_adapter(path):
        model = load_backbone(base, dtype, attn_implementation, trust_remote_code, load_in_4bit, device)
        if hasattr(model, "peft_config"):
            raise InputError(f"{base} is an adapter as well: merge it first (scripts/merge_lora.py)")
    found, trained_on = weights_digest(base), getattr(config, BASE_DIGEST, None)
    if trained_on not in (None, found):
        what = f"{path} was trained on a base model whose weights have the checksum {trained_on}"
        cure = f"put the base model of its training there; earlier versions had other checksums: drop {BASE_DIGEST}"
        raise InputError(f"{what}, but those of {base} have {found}: {cure}")
    model.config.update({BASE_DIGEST: found})
    return load_adapter(model, path, trust_remote_code)


def _load_language_model(path: str, config, dtype, attention: str, trust_remote_code, load_in_4bit, device):
    options = {"quantization_config": BitsAndBytesConfig(**FOUR_BITS)} if load_in_4bit else {}
    if device is not None and is_accelerate_available():
        options["device_map"] = device
    options |= {"dtype": dtype, "trust_remote_code": trust_remote_code, "config": config}
    options |= {"use_safetensors": True, "output_loading_info": True}
    options["attn_implementation"] = asked_of_transformers(attention)
    try:
        with without_report():
            model, info = auto_class(config, path).from_pretrained(path, **options)
    except (torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:  # damaged files, and values in config.json that the architecture cannot be built with
        raise InputError(f"cannot load the model {path}: {reason(path, error)}") from error
    if model.get_output_embeddings() is None:
        raise InputError(f"{path} is a {config.model_type} model without a language-model head: use a decoder-only LM")
    model.made_up = _check_tensors(path, model, info, head_tensors(path, trust_remote_code))
    if conversions := getattr(model, "_weight_conversions", None):
        # Partitioned loading keeps what it had no use for, and saving would rename tensors by it.
        model._weight_conversions = [one for one in conversions if not hasattr(one, "was_used") or one.was_used()]
    if model.made_up:
        model.get_output_embeddings().requires_grad_(False)
    freeze_other_parts(model)
    return model


@contextlib.contextmanager
def without_report() -> Iterator[None]:
    """Around transformers' `from_pretrained`, where the caller checks what is missing or unexpected."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _check_tensors(path: str, model, info: dict, of_head: set[str]) -> str | None:
    """InputError for tensors that are missing or have no place; the prefix of an LM head that is missing."""
    unused = sorted(name for name in info["unexpected_keys"] if name not in of_head and not OLD_MASKS.search(name))
    check_no_head(path, unused)
    if unused:
        raise InputError(f"{path} holds weights that its configuration has no place for, the first {unused[0]}")
    modules = {module: name for name, module in model.named_modules()}
    head = modules.get(model.get_output_embeddings(), "lm_head") + "."
    if missing := sorted(name for name in info["missing_keys"] if not name.startswith(head)):
        raise InputError(f"{path} lacks {len(missing)} weights of its architecture, the first {missing[0]}")
    return head if info["missing_keys"] else None


def partitioned_loading(ds_config: dict | None, path: str, trust_remote_code: bool = False):
    """Make transformers load into ZeRO-3 partitions; the returned object must live until loading is done.

    Raises:
        InputError: the tensors at `path` do not fit its architecture, which loading in parts would not report.
    """
    if ds_config is None or ds_config.get("zero_optimization", {}).get("stage") != 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    *_, base = base_chain(path)
    load_backbone(base, torch.bfloat16, trust_remote_code=trust_remote_code, device="meta")  # names and shapes alone
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
    options = {"target_modules": target_modules, "exclude_modules": text_modules(backbone, excluded=True)}
    lora = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none", **options)
    try:
        with torch.random.fork_rng(devices=[]):  # how much was drawn so far differs where loading is partitioned
            torch.manual_seed(seed)
            return get_peft_model(backbone, lora)
    except ValueError as error:
        raise InputError(f"LoRA does not fit this model: {first_line(error)}") from error


def load_adapter(model, path: str, trust_remote_code: bool = False):
    """The adapter at `path` on its base `model`, trainable; InputError without peft or readable weights."""
    weights = resolve(path, "adapter_model.safetensors")
    if weights is None:
        raise InputError(f"{path} has no adapter_model.safetensors: adapters in other formats are not loaded")
    try:
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict

        of_head = head_tensors(path, trust_remote_code)
        held = set(tensor_files(path)) - of_head
        check_no_head(path, held)
        folder = str(Path(weights).parent)  # of the hub's snapshot, if it came from there
        settings = PeftConfig.from_pretrained(folder)
        settings.task_type = None  # whatever it was made for, it adapts the layers alone
        heads = {name.removeprefix(IN_ADAPTER).split(".")[0] for name in of_head}
        settings.modules_to_save = [name for name in settings.modules_to_save or () if name not in heads] or None
        _match_vocabulary(model, weights)
        loaded = PeftModel.from_pretrained(model, folder, config=settings, is_trainable=True, use_safetensors=True)
        missing = set(get_peft_model_state_dict(loaded, save_embedding_layers=False)) - held
        unused = held - set(get_peft_model_state_dict(loaded, save_embedding_layers=True))
    except ImportError as error:
        raise InputError(f"{path} is a LoRA adapter and needs the package peft: pip install peft") from error
    except InputError:
        raise
    except (SafetensorError, KeyError, RuntimeError, OSError, TypeError, ValueError) as error:
        raise InputError(f"cannot load the adapter {path}: {reason(path, error)}") from error
    for problem, names in (("lacks", missing), ("has, but its base model has no place for,", unused)):
        if names:
            raise InputError(f"the adapter {path} {problem} {len(names)} tensors, the first {min(names)}")
    return loaded


def _match_vocabulary(model, weights: str) -> None:
    """Give a base model the vocabulary of an adapter that was trained with another one and holds all embeddings."""
    names = {module: name for name, module in model.named_modules()}
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    keys = [f"base_model.model.{names[end]}.weight" for end in ends]
    with safe_open(weights, framework="pt") as tensors:
        held = set(keys) <= set(tensors.keys())
        sizes = {tensors.get_slice(key).get_shape()[0] for key in keys} if held else set()
    if len(sizes) == 1 and sizes != {ends[0].num_embeddings}:
        model.resize_token_embeddings(*sizes, mean_resizing=False)


def merge_adapter(model) -> None:
    """Fold a model's adapters into its backbone, in place: W becomes W + alpha / rank * B A.

    Raises:
        InputError: no adapter, an adapter on embeddings tied to the LM head, or a sum that is not finite.
    """
    if not hasattr(model.backbone, "peft_config"):
        raise InputError(f"this model has no adapter to fold in: there is no {ADAPTER_CONFIG}")
    language_model = model.language_model
    ends = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    if model.config.tie_word_embeddings and any(hasattr(end, kind) for end in ends for kind in ADAPTED):
        raise InputError("the adapter changes embeddings that are the LM head as well: it cannot be folded into one")
    try:
        model.backbone = model.backbone.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise InputError(f"the adapter cannot be folded in: {first_line(error)}") from error
