"""Where a model folder keeps its preference head, and what it says about it; read by all that loads models.

Written by               tensor                                  settings
this package             value_head.weight, prompt_head.weight   `preference` in config.json
export.py                score.weight: those two, one below the other   the same, and `preference_digest`
published GPM weights    value_head.weight, prompt_head.weight   from their shapes
transformers, TRL        score.weight (1, hidden)                Bradley-Terry; also in a LoRA adapter
OpenRLHF                 <value_head_prefix>.weight (1, hidden)  Bradley-Terry; mean and std in config.json
LLaMA-Factory            v_head.summary.weight (1, hidden)       Bradley-Terry; in value_head.safetensors, with a bias
"""

import dataclasses
import functools
import hashlib
import logging
import math
import re
from dataclasses import dataclass

import torch
from transformers import AutoTokenizer

from general_preference.errors import InputError
from general_preference.models.config import (
    VALUE_HEAD_FILE,
    PreferenceConfig,
    adapter_base,
    first_line,
    load_config,
    read_tensors,
    resolve,
    tensor_files,
)

logger = logging.getLogger(__name__)

HEAD_NAMES = ("value_head.weight", "prompt_head.weight")
SCORE, SUMMARY = "score.weight", ("v_head.summary.weight", "v_head.summary.bias")
IN_ADAPTER = "base_model.model."  # what peft puts in front of names
DIGEST = "preference_digest"  # key in config.json: `score_digest` of the score.weight that this package wrote
_CRITICS = {"CriticModel": "a critic of OpenRLHF", "ForTokenClassification": "a token classifier"}
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_HEADS = re.compile(
    r"(^|\.)(score|classifier|classification_head|pooler|v_head|value_head|reward_head|rm_head|regression_head|regression_layer)\."
)


@dataclass(frozen=True)
class SavedHead:
    """The head of a model folder.

    tensors:  names of its weights as stored; their rows are the value head's D, then the prompt head's P
    recorded: whether the folder states its temperature
    std:      the weights are divided by it when they are read
    """

    preference: PreferenceConfig
    tensors: tuple[str, ...] = HEAD_NAMES
    recorded: bool = False
    std: float = 1.0


def saved_head(path: str, trust_remote_code: bool = False) -> SavedHead | None:
    """The head in the folder or hub repository `path`; None for a plain language model.

    Raises:
        InputError: a reward model of several scores, or one that needs more than a weight.
    """
    config, names = load_config(path, trust_remote_code), set(tensor_files(path))
    recorded, own = getattr(config, "preference", None), HEAD_NAMES[0] in names
    if recorded is not None and (own or _is_unchanged(path, config, names)):
        if own and SCORE in names and PreferenceConfig.from_dict(recorded).head == "bt":
            _check_twins(path)
        return SavedHead(PreferenceConfig.from_dict(recorded), HEAD_NAMES if own else (SCORE,), recorded=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in read_tensors(path, HEAD_NAMES).items()} if own else {}
    if own and (shapes[HEAD_NAMES[0]][0] > 1 or not _of_openrlhf(config)):
        return SavedHead(PreferenceConfig.from_shapes(*map(shapes.get, HEAD_NAMES)))
    foreign = _foreign_head(path, config, names)
    if recorded is None:
        return foreign or _check_plain(path, config)
    if foreign is None:  # the head is missing, which whoever reads it says
        return SavedHead(PreferenceConfig.from_dict(recorded), recorded=True)
    _warn_of_changes(path)
    return foreign


def saved_preference(path: str, trust_remote_code: bool = False) -> PreferenceConfig | None:
    """What the checkpoint at `path` says about its head; None for a plain language model."""
    head = saved_head(path, trust_remote_code)
    return None if head is None else head.preference


def trained_preference(path: str, trust_remote_code: bool = False, temperature: float | None = None):
    """The `PreferenceConfig` of a trained model; `temperature` is used where none is recorded (weights of others).

    Raises:
        InputError: no such model, no head, or another temperature is recorded.
    """
    head = saved_head(path, trust_remote_code)
    if head is None:
        if pickles := [name for name in PICKLES if resolve(path, name)]:
            raise InputError(f"{path} holds pickle ({pickles[0]}), which is never loaded: convert it to safetensors")
        check_no_head(path, tensor_files(path))
        raise InputError(f"{path} is a plain language model without value_head: train it first, or pass a trained one")
    if temperature is not None and not head.recorded:
        return dataclasses.replace(head.preference, temperature=temperature)
    head.preference.check(str(path), temperature=temperature)
    return head.preference


def read_heads(path: str, trust_remote_code: bool = False) -> dict[str, torch.Tensor]:
    """The weights of the head at `path` by their names in `HEAD_NAMES`: (D, hidden) and, with a gate, (P, hidden)."""
    head = saved_head(path, trust_remote_code)
    found = read_tensors(path, head.tensors)
    if not found and resolve(path, "modules.json"):
        raise InputError(f"{path} is an export for sentence-transformers: use the model that was exported")
    if head.tensors == HEAD_NAMES:
        return found
    weight, preference = found[head.tensors[0]].float() / head.std, head.preference
    rows = (preference.dim, preference.planes * preference.prompt_gate)
    if weight.shape[0] != sum(rows):
        raise InputError(f"{path}: {head.tensors[0]} has {weight.shape[0]} rows, expected {sum(rows)}")
    return {name: part for name, part in zip(HEAD_NAMES, weight.split(rows), strict=True) if len(part)}


def head_tensors(path: str, trust_remote_code: bool = False) -> set[str]:
    """Names of the tensors at `path` that belong to its head and not to the backbone."""
    head = saved_head(path, trust_remote_code)
    if head is None:
        return set()
    beside = {SCORE} if head.tensors == HEAD_NAMES and head.preference.head == "bt" else set()
    return {*head.tensors, *(SUMMARY if SUMMARY[0] in head.tensors else beside)}


def score_digest(weight: torch.Tensor) -> str:
    """A checksum of a score.weight, which other tools change when they train it further; the same in bfloat16."""
    rounded = weight.detach().to(torch.bfloat16).cpu().contiguous()
    return hashlib.blake2b(rounded.view(torch.int16).numpy().tobytes(), digest_size=8).hexdigest()


def _is_unchanged(path: str, config, names: set[str]) -> bool:
    """Whether score.weight is what this package wrote."""
    wanted = getattr(config, DIGEST, None)
    return wanted is not None and SCORE in names and wanted == score_digest(read_tensors(path, [SCORE])[SCORE])


def _check_plain(path: str, config) -> None:
    """InputError if what looks like a plain language model lacks a head that should be there."""
    prefix = getattr(config, "value_head_prefix", None)
    if prefix is not None and adapter_base(path) is None:
        raise InputError(f"{path} names its head in config.json (value_head_prefix), but holds no {prefix}.weight")
    if resolve(path, pickle := VALUE_HEAD_FILE.replace("safetensors", "bin")):
        raise InputError(f"{path} holds pickle ({pickle}), which is never loaded: convert it to safetensors")


def _check_twins(path: str) -> None:
    """InputError if the two copies of a Bradley-Terry head differ."""
    own, score = map(read_tensors(path, [HEAD_NAMES[0], SCORE]).get, (HEAD_NAMES[0], SCORE))
    if not torch.equal(own, score):
        raise InputError(f"{path} holds {HEAD_NAMES[0]} and another {SCORE}: remove the one that is out of date")


@functools.cache
def _warn_of_changes(path: str) -> None:
    what = "the temperature, input format and max_length that it was saved with are left out"
    logger.warning("%s was trained further by another tool and is read as a reward model of that: %s", path, what)


def _of_openrlhf(config) -> bool:
    of_transformers = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    named = any(hasattr(config, key) for key in ("value_head_prefix", "mean"))
    return not of_transformers and (named or "RewardModel" in (config.architectures or ()))


def _foreign_head(path: str, config, names: set[str]) -> SavedHead | None:
    """The head of a Bradley-Terry model that another tool made."""
    for kind, what in _CRITICS.items():
        if any(name.endswith(kind) for name in config.architectures or ()):
            raise InputError(f"{path} is {what} ({kind}), which gives every token a number: use a reward model")
    std, offset, input_format, pad_token_id = 1.0, 0.0, "sequence_classification", None
    score = next((name for name in (SCORE, IN_ADAPTER + SCORE) if name in names), None)
    prefix = getattr(config, "value_head_prefix", None) or ("score" if score == SCORE else "value_head")
    if _of_openrlhf(config) and f"{prefix}.weight" in names:
        weight, mean, std = f"{prefix}.weight", getattr(config, "mean", 0.0), getattr(config, "std", 1.0)
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in (mean, std)) or std <= 0:
            raise InputError(f"{path}: config.json has the reward's mean {mean!r} and std {std!r}, expected std > 0")
        offset, input_format = -mean / std, "openrlhf"
    elif score is not None:
        weight, pad_token_id = score, _pad_token_id(path, config)
    elif SUMMARY[0] in names and resolve(path, VALUE_HEAD_FILE):
        weight = SUMMARY[0]
        if (bias := read_tensors(path, SUMMARY).get(SUMMARY[1])) is not None:
            offset = bias.float().sum().item()
    else:
        return None
    check_no_head(path, names - {weight, *(SUMMARY if weight in SUMMARY else ())})
    shape = tuple(read_tensors(path, [weight])[weight].shape)
    if len(shape) != 2 or shape[0] != 1:
        labels = f"{shape[0]} labels" if len(shape) == 2 else f"the shape {shape}"
        raise InputError(f"{path}: {weight} has {labels}, but only reward models with one score are read")
    # With rewards in units of std, this temperature gives the probabilities that the model was trained with.
    options = {"input_format": input_format, "pad_token_id": pad_token_id, "reward_offset": offset}
    return SavedHead(PreferenceConfig(temperature=1 / std, **options), (weight,), std=std)


def _pad_token_id(path: str, config) -> int | None:
    """What transformers passes over at the end of a sequence: TRL sets it to the tokenizer's, which it saves."""
    if adapter_base(path) is None or resolve(path, "tokenizer_config.json") is None:
        number = config.get_text_config().pad_token_id
        return None if number is None or number < 0 else number  # -1 in some configurations, which is no token
    try:
        return AutoTokenizer.from_pretrained(path).pad_token_id
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot load the tokenizer of {path}: {first_line(error)}") from error


def check_no_head(path: str, names) -> None:
    """InputError if one of these tensors is a head of a reward or value model that cannot be read."""
    found = sorted(name for name in names if name not in HEAD_NAMES and _HEADS.search(name))
    if not found:
        return
    kind = _HEADS.search(found[0])[2]
    what = {
        "classifier": "the head of an encoder that pools, or of another classifier",
        "classification_head": "the head of an encoder-decoder",
        "pooler": "the pooling of an encoder",
        "score": "a part of a classifier that is more than one weight",
    }.get(kind, "the head of a reward or value model of another kind")
    raise InputError(
        f"{path} holds {found[0]}, {what}: of other tools, only decoder-only reward models with one score are read "
        f"(score.weight of one row, OpenRLHF's value_head_prefix, LLaMA-Factory's {VALUE_HEAD_FILE})"
    )
