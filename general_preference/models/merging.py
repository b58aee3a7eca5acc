"""An adapter folded into its base model and written as a model folder of its own.

Called by scripts/merge_lora.py, and by the training script for an adapter that a run starts from.
"""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig

from general_preference.errors import InputError
from general_preference.files import check_new_folder, new_folder, read_object, replace_text
from general_preference.models.backbone import PackedBackbone
from general_preference.models.config import (
    ADAPTER_CONFIG,
    BASE_DIGEST,
    MERGED_FROM,
    adapter_base,
    base_chain,
    first_line,
    load_config,
    resolve,
    weights_digest,
)
from general_preference.models.heads import saved_preference
from general_preference.models.loading import load_backbone, merge_adapter
from general_preference.models.reward_model import RewardModel, load_reward_model
from general_preference.models.starting import settle_padding


def lacks_heads(path: str, trust_remote_code: bool = False) -> bool:
    """Whether `path` is an adapter of a plain language model, such as one from supervised fine-tuning."""
    return saved_preference(path, trust_remote_code) is None and adapter_base(path) is not None


def merge_into_folder(
    adapter: str, output: Path, dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[str, torch.dtype]:
    """Write the model that an adapter and its base make, with tokenizer and card, to `output` at once.

    An adapter with preference heads gives a preference model, any other one a language model. Merging runs in fp32.

    Args:
        output: a folder that does not exist or is empty. dtype: of the backbone's weights; "auto" is the base model's.

    Returns:
        The base model's path and the dtype.

    Raises:
        InputError: no adapter, a base that cannot be used, or an output that is not empty or is read.
        RunError: it cannot be written.
    """
    trained = not lacks_heads(adapter, trust_remote_code)
    base = adapter_base(adapter)
    if base is None:
        raise InputError(f"{adapter} is not an adapter: it has no {ADAPTER_CONFIG}. A full model needs no merging")
    check_new_folder(output, base_chain(adapter))
    if not trained and saved_preference(base, trust_remote_code) is not None:
        raise InputError(f"{adapter} has no preference heads, but {base} under it has some: they would be lost")
    options = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
    model = load_reward_model(adapter, **options) if trained else PackedBackbone(load_backbone(adapter, **options))
    if not trained and (made_up := model.language_model.made_up):
        raise InputError(f"{base} lacks {made_up}weight, its language-model head: use a folder with all its weights")
    tokenizer = _tokenizer(adapter, base, trust_remote_code)
    merge_adapter(model)
    stored = getattr(load_config(base, trust_remote_code), "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    stored = stored or torch.float32
    model.backbone.to(stored)
    note = {"adapter": adapter, "weights": weights_digest(adapter)}
    with new_folder(output) as folder:
        if trained:
            settle_padding(model.language_model.config, tokenizer, model.preference)
            _save_preference_model(model, adapter, folder)
        else:
            _save_language_model(model, base, folder)
        tokenizer.save_pretrained(str(folder))
        replace_text(folder / MERGED_FROM, json.dumps(note, indent=2))
    return base, stored


def _save_preference_model(model: RewardModel, adapter: str, folder: Path) -> None:
    model.card.base_model = model.card.base_model or adapter_base(adapter)
    model.save_pretrained(str(folder))
    _copy(adapter, folder, "README.md")  # head, data and results are those of the merged model too


def _save_language_model(model: PackedBackbone, base: str, folder: Path) -> None:
    vars(model.language_model.config).pop(BASE_DIGEST, None)
    model.backbone.generation_config = GenerationConfig.from_model_config(model.language_model.config)
    model.backbone.save_pretrained(str(folder))
    _copy(base, folder, "generation_config.json")  # as it is: one that contradicts itself would refuse to be saved


def _copy(source: str, folder: Path, name: str) -> None:
    if (file := resolve(source, name)) is not None:
        shutil.copyfile(file, folder / name)


def _tokenizer(adapter: str, base: str, trust_remote_code: bool):
    """The tokenizer beside the adapter, else its base model's."""
    path = adapter if resolve(adapter, "tokenizer_config.json") else base
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot load the tokenizer of {path}: {first_line(error)}") from error


def merged_base(adapter: str, folder: Path, trust_remote_code: bool = False) -> bool:
    """Merge `adapter` into `folder`, or reuse what an earlier run merged there; True if it was merged now.

    Raises:
        InputError: the folder holds something else.
    """
    if folder.is_dir() and any(folder.iterdir()):
        if read_object(folder / MERGED_FROM).get("weights") != weights_digest(adapter):
            raise InputError(f"{folder} holds a model that was not merged from {adapter}: remove it, or choose another")
        return False
    merge_into_folder(adapter, folder, trust_remote_code=trust_remote_code)
    return True
