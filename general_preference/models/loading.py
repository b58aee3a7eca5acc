"""Preference models made from a language model, or loaded as they were trained.

What their folders hold, and how it is read without loading a model, stands in config.py; adapters in adapters.py.
"""

import logging

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils import is_accelerate_available

from general_preference.errors import InputError
from general_preference.models.adapters import add_lora, four_bit_options, load_adapter
from general_preference.models.attention import VERIFIED
from general_preference.models.config import (
    HEAD_NAMES,
    PreferenceConfig,
    adapter_base,
    load_config,
    read_tensors,
    reason,
    resolve,
    saved_preference,
    trained_preference,
)
from general_preference.models.kernels import asked_of_transformers
from general_preference.models.reward_model import RewardModel
from general_preference.models.saving import read_card_facts

logger = logging.getLogger(__name__)


def get_reward_model(
    model_name_or_path: str,
    *,
    bf16: bool = True,
    load_in_4bit: bool = False,
    lora_rank: int = 0,
    lora_alpha: int = 16,
    target_modules: str | list[str] | None = None,
    lora_dropout: float = 0.0,
    use_flash_attention_2: bool = False,
    ds_config: dict | None = None,
    init_value_head: bool = False,
    init_prompt_head: bool = False,
    add_prompt_head: bool = False,
    is_general_preference: bool = False,
    value_head_dim: int | None = None,
    preference: PreferenceConfig | None = None,
    attn_implementation: str = "auto",
    trust_remote_code: bool = False,
    seed: int = 42,
) -> RewardModel:
    """A preference model to train, on top of a language model or of an earlier preference model.

    Takes the keyword arguments of the paper's function. From a plain language model the heads are new (N(0, 1/hidden),
    by `seed`). From a preference model they are kept, unless `init_value_head` / `init_prompt_head` ask for new ones.

    Args:
        bf16: load the backbone in bfloat16, else in fp32. Heads compute in fp32 either way.
        is_general_preference, value_head_dim, add_prompt_head: the head when `preference` is not given: D = 2 by
            default, 1 for Bradley-Terry.
        preference: the whole head description; wins over the three above.
        ds_config: a DeepSpeed configuration. With ZeRO stage 3 the backbone is loaded partitioned: no process ever
            holds it whole. In 4 bits every process loads all of it, and the engine partitions it later.
        load_in_4bit: the backbone in 4 bits (bitsandbytes), frozen under adapters. Heads are never quantized.
        attn_implementation: one of `kernels.CHOICES`; the kernel is chosen where the model runs.

    Raises:
        InputError: no such model, a folder that is none, or a request that contradicts a checkpoint's own head.
    """
    if preference is None:
        preference = _preference_from_flags(is_general_preference, value_head_dim, add_prompt_head)
    saved = saved_preference(model_name_or_path, trust_remote_code)
    if saved is not None:
        saved.check(
            str(model_name_or_path), head=preference.head, dim=preference.dim, prompt_gate=preference.prompt_gate
        )
    if use_flash_attention_2:
        attn_implementation = "flash_attention_2"
    partitioned = _partitioned_loading(ds_config)
    backbone = _load_backbone(
        model_name_or_path,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        load_in_4bit=load_in_4bit,
    )
    if lora_rank > 0:
        if hasattr(backbone, "peft_config"):
            raise InputError(f"{model_name_or_path} already is a LoRA adapter: drop lora_rank to go on training it")
        backbone = add_lora(backbone, lora_rank, lora_alpha, target_modules or "all-linear", lora_dropout, seed)
    model = RewardModel(backbone, preference, attn_implementation)
    model.card.base_model = str(model_name_or_path)
    model.initialize_heads(seed)
    if saved is not None:
        keep = [name for name, new in zip(HEAD_NAMES, (init_value_head, init_prompt_head), strict=True) if not new]
        _copy_heads(model, str(model_name_or_path), keep)
    _check_sharing(model, partitioned)
    return model


def load_reward_model(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "auto",
    trust_remote_code: bool = False,
    preference: PreferenceConfig | None = None,
    device: torch.device | str = "cpu",
) -> RewardModel:
    """Load a trained preference model (full, sharded or LoRA adapter) from a folder or hub name.

    Args:
        preference: the head, if the caller has read it already (`saved_preference`).
        device: where the model goes; with accelerate installed its weights go there straight from the files.

    Returns:
        the model in eval mode, its head as the checkpoint describes it.

    Raises:
        InputError: no such model, a plain language model without heads, or weights that cannot be read.
    """
    if preference is None:
        preference = trained_preference(path, trust_remote_code)
    device = torch.device(device)
    backbone = _load_backbone(path, dtype, attn_implementation, trust_remote_code, device=device)
    model = RewardModel(backbone, preference, attn_implementation)
    _copy_heads(model, path, HEAD_NAMES)
    model.to(device)  # before the self-check: that is where its kernels have to be right
    model.card = read_card_facts(resolve(path, "README.md"))
    _check_sharing(model)
    model.eval().layout_on(device)  # now, and not with the first batch: a kernel that cannot run should say so early
    return model


def _preference_from_flags(is_general_preference: bool, dim: int | None, gate: bool) -> PreferenceConfig:
    if not is_general_preference:
        return PreferenceConfig("bt", 1 if dim is None else dim, gate)
    return PreferenceConfig("gpm", 2 if dim is None else dim, gate, normalize=True, temperature=0.1)


def _load_backbone(
    path: str,
    dtype: torch.dtype,
    attn_implementation: str = "auto",
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
    device: torch.device | None = None,
):
    """The causal LM at `path`, with its LoRA adapter if the folder holds one."""
    config = load_config(path, trust_remote_code)
    base = adapter_base(path)
    if base is not None:
        try:
            model = _load_backbone(base, dtype, attn_implementation, trust_remote_code, load_in_4bit, device)
        except InputError as error:
            raise InputError(f"{path} is an adapter, and its base model cannot be used: {error}") from error
        return load_adapter(model, path)
    options = four_bit_options() if load_in_4bit else {}
    if device is not None and is_accelerate_available():
        options["device_map"] = device
    asked = asked_of_transformers(attn_implementation)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # heads are "unexpected" to a causal LM; missing weights are checked
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=asked,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # damaged files, and values in config.json that the architecture cannot be built with
        raise InputError(f"cannot load the model {path}: {reason(path, error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    # Of another kind are tensors that the architecture itself says to leave out, and the heads.
    beyond = [name for name in info["unexpected_keys"] if "layers." in name]
    if beyond:
        raise InputError(f"{path} holds weights that its configuration has no place for, the first {sorted(beyond)[0]}")
    missing = [name for name in info["missing_keys"] if "lm_head" not in name and "embed_out" not in name]
    if missing:
        raise InputError(f"{path} lacks {len(missing)} weights of its architecture, the first {sorted(missing)[0]}")
    if model.get_output_embeddings() is None:
        raise InputError(f"{path} is a {config.model_type} model without a language-model head: use a decoder-only LM")
    return model


def _partitioned_loading(ds_config: dict | None):
    """Make transformers load into ZeRO-3 partitions; the returned object must live until loading is done."""
    if ds_config is None or ds_config.get("zero_optimization", {}).get("stage") != 3:
        return None
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(ds_config)


def _check_sharing(model: RewardModel, partitioned=None) -> None:
    """For an architecture nobody compared yet, compare once; where that is impossible, do not share prompts."""
    if not model.shares_prompts:
        logger.info(
            "%s: responses are run as separate sequences (no exact shared-prompt mask)", model.config.model_type
        )
    elif model.config.model_type not in VERIFIED:
        if partitioned is not None:
            model.shares_prompts = False
            logger.info("%s: not compared yet, so responses are run as separate sequences", model.config.model_type)
            return
        difference = model.verify_shared_prompts()
        verdict = "shared prompts are exact" if model.shares_prompts else "responses are run as separate sequences"
        logger.info("%s: difference of shared prompts %.1e, so %s", model.config.model_type, difference, verdict)


def _copy_heads(model: RewardModel, path: str, names) -> None:
    """Fill the model's heads `names` from the checkpoint at `path`; a head without weights is never left random."""
    tensors = read_tensors(path, names)
    for name in names:
        head = getattr(model, name.split(".")[0])
        if head is None:
            if name in tensors:
                raise InputError(f"{path} has {name}, but its configuration says prompt_gate = False")
            continue
        if name not in tensors:
            raise InputError(f"{path} has no {name}, which its configuration promises")
        if head.weight.shape != tensors[name].shape:
            shapes = tuple(tensors[name].shape), tuple(head.weight.shape)
            raise InputError(f"{path}: {name} has shape {shapes[0]}, but the head needs {shapes[1]}")
        head.weight.data.copy_(tensors[name])
