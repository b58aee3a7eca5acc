"""Preference models from disk or hub: making one from a language model, loading a trained one.

A folder keeps the published tensor names (`model.*`, `lm_head.weight`, `value_head.weight`, `prompt_head.weight`) and a
`preference` object in config.json. A LoRA run's folder holds the adapter, the heads and the same config.json. Only
safetensors are read: no pickle is ever loaded from a model folder.
"""

import dataclasses
import json
import logging
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file, is_accelerate_available

from general_preference.errors import InputError
from general_preference.models.attention import VERIFIED
from general_preference.models.attention_choice import asked_of_transformers
from general_preference.models.model_card import read_card_facts
from general_preference.models.preference_config import PreferenceConfig
from general_preference.models.reward_model import RewardModel

logger = logging.getLogger(__name__)

HEADS_FILE = "preference_heads.safetensors"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
HEAD_NAMES = ("value_head.weight", "prompt_head.weight")


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
        ds_config: a DeepSpeed configuration. With ZeRO stage 3 the backbone is loaded partitioned.
        attn_implementation: one of `attention_choice.CHOICES`; the kernel is chosen where the model runs.

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
        backbone = _add_lora(
            backbone, lora_rank, lora_alpha, target_modules or "all-linear", lora_dropout, load_in_4bit
        )
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
    model.card = read_card_facts(_resolve(path, "README.md"))
    _check_sharing(model)
    model.eval().layout_on(device)  # now, and not with the first batch: a kernel that cannot run should say so early
    return model


def saved_preference(path: str, trust_remote_code: bool = False) -> PreferenceConfig | None:
    """What the checkpoint at `path` says about its head; None for a plain language model."""
    config = load_config(path, trust_remote_code)
    if getattr(config, "preference", None) is not None:
        return PreferenceConfig.from_dict(config.preference)
    shapes = {name: tuple(tensor.shape) for name, tensor in _read_tensors(path, HEAD_NAMES).items()}
    if "value_head.weight" not in shapes:
        return None
    return PreferenceConfig.from_shapes(shapes["value_head.weight"], shapes.get("prompt_head.weight"))


def trained_preference(
    path: str, trust_remote_code: bool = False, temperature: float | None = None
) -> PreferenceConfig:
    """The head of a trained model; `temperature` is used where the checkpoint records none (published weights).

    Raises:
        InputError: no such model, a plain language model without heads, or another temperature is recorded.
    """
    preference = saved_preference(path, trust_remote_code)
    if preference is None:
        pickles = [name for name in PICKLES if _resolve(path, name)]
        if pickles:
            raise InputError(
                f"{path} holds its weights as pickle ({pickles[0]}), which is never loaded: convert it to safetensors"
            )
        raise InputError(
            f"{path} has no value_head: it is a plain language model. Train it first, or pass a trained folder"
        )
    recorded = getattr(load_config(path, trust_remote_code), "preference", None) is not None
    if recorded or temperature is None:
        preference.check(str(path), temperature=temperature)
        return preference
    return dataclasses.replace(preference, temperature=temperature)


def load_config(path: str, trust_remote_code: bool = False):
    """The transformers configuration of a folder or hub name; InputError with the reason if there is none."""
    folder = Path(path)
    if folder.is_file():
        raise InputError(f"{path} is a file: a model is a folder (config.json, *.safetensors) or a hub name")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"{path} is not a model folder: it has no config.json")
    if not folder.exists() and (folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") > 1):
        raise InputError(f"model folder {path} does not exist: check the path")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # a wrong value raises whatever the architecture's own checks raise
        raise InputError(f"cannot read the model configuration of {path}: {_first_line(error)}") from error


def checkpoint_identity(path: str) -> list:
    """What changes when the checkpoint at `path` does: names, sizes and times of its files, or its hub snapshot.

    Of an adapter, also what changes when its base model does.
    """
    adapter = _resolve(path, "adapter_config.json")
    base = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"] if adapter else None
    of_base = checkpoint_identity(base) if base else []
    if not Path(path).is_dir():
        return [_resolve(path, "config.json"), of_base]
    written = {"arguments.json", "data_summary.json", "eval_metrics.json"}  # by training, beside the model
    suffixes = (".json", ".safetensors", ".jinja", ".model", ".py")
    files = sorted(file for file in Path(path).iterdir() if file.suffix in suffixes and file.name not in written)
    return [[(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files], of_base]


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
    adapter = _resolve(path, "adapter_config.json")
    if adapter is not None:
        return _load_adapter(path, adapter, dtype, attn_implementation, trust_remote_code, load_in_4bit, device)
    options = {"quantization_config": _four_bit()} if load_in_4bit else {}
    if device is not None and is_accelerate_available():
        options["device_map"] = device
    config = load_config(path, trust_remote_code)
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
        raise InputError(f"cannot load the model {path}: {_reason(path, error)}") from error
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


def _load_adapter(path: str, config: str, dtype, attn_implementation, trust_remote_code, load_in_4bit, device):
    """A base model under the LoRA adapter at `path`, whose adapter_config.json is the local file `config`."""
    weights = _resolve(path, "adapter_model.safetensors")
    if weights is None:
        raise InputError(f"{path} has no adapter_model.safetensors: adapters in other formats are not loaded")
    try:
        from peft import PeftModel  # only LoRA folders need peft

        base = json.loads(Path(config).read_text(encoding="utf-8"))["base_model_name_or_path"]
        model = _load_backbone(base, dtype, attn_implementation, trust_remote_code, load_in_4bit, device)
        folder = str(Path(weights).parent)  # of the hub's snapshot, if it came from there
        return PeftModel.from_pretrained(model, folder, is_trainable=True, use_safetensors=True)
    except ImportError as error:
        raise InputError(f"{path} is a LoRA adapter and needs the package peft: pip install peft") from error
    except (SafetensorError, KeyError, RuntimeError, OSError, ValueError) as error:
        raise InputError(f"cannot load the adapter {path}: {_reason(path, error)}") from error


def _four_bit():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _add_lora(backbone, rank: int, alpha: int, target_modules, dropout: float, quantised: bool):
    try:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    except ImportError as error:
        raise InputError("lora_rank > 0 needs the package peft: pip install peft") from error
    if quantised:
        backbone = prepare_model_for_kbit_training(backbone)
    backbone.enable_input_require_grads()
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=target_modules, lora_dropout=dropout, bias="none")
    try:
        return get_peft_model(backbone, lora)
    except ValueError as error:
        raise InputError(f"LoRA does not fit this model: {_first_line(error)}") from error


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


def _read_tensors(path: str, names) -> dict[str, torch.Tensor]:
    """The named tensors of a checkpoint that are there, read without touching the others."""
    try:
        files = _files_of(path, names)
        found = {}
        for name, file in files.items():
            with safe_open(file, framework="pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118 (a file handle, not a dict)
                    found[name] = tensors.get_tensor(name)
        return found
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read the weights of {path}: {_reason(path, error)}") from error


def _files_of(path: str, names) -> dict[str, str]:
    """Which file holds each of the named tensors, as far as the checkpoint says."""
    heads = _resolve(path, HEADS_FILE)
    if heads is not None:
        return dict.fromkeys(names, heads)
    index = _resolve(path, "model.safetensors.index.json")
    if index is not None:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        return {name: _resolve(path, weight_map[name]) for name in names if name in weight_map}
    single = _resolve(path, "model.safetensors")
    return {} if single is None else dict.fromkeys(names, single)


def _resolve(path: str, file: str) -> str | None:
    """Local path of one file of a model folder or hub repository, None if it has no such file."""
    if Path(path).is_dir():
        return str(Path(path) / file) if (Path(path) / file).is_file() else None
    return cached_file(path, file, _raise_exceptions_for_missing_entries=False)


def _copy_heads(model: RewardModel, path: str, names) -> None:
    """Fill the model's heads `names` from the checkpoint at `path`; a head without weights is never left random."""
    tensors = _read_tensors(path, names)
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


def _reason(path: str, error: Exception) -> str:
    """Why weights could not be loaded: the damaged file, if there is one, else what the library says."""
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as damage:
            return f"{file.name} is damaged or cut short ({_first_line(damage)})"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
