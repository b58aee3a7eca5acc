"""Which head a run trains on the model that it starts from: its own, another one, or one that keeps its reward."""

import dataclasses
import logging

from transformers import PreTrainedTokenizerBase

from general_preference.errors import InputError
from general_preference.models.config import PreferenceConfig
from general_preference.models.heads import SavedHead

logger = logging.getLogger(__name__)

_DEFAULTS = {
    "bt": PreferenceConfig("bt"),
    "gpm": PreferenceConfig("gpm", 2, normalize=True, temperature=0.1),
    "hybrid": PreferenceConfig("hybrid", 3, normalize=True, temperature=0.1),
}


def head_to_train(
    path: str, saved: SavedHead | None, kind: str | None = None, *, new=False, keep_reward=False, **asked
) -> PreferenceConfig:
    """The head of a run that starts from the model at `path`.

    Args:
        saved: the head that the model has, None for a plain language model.
        kind: bt, gpm or hybrid; None is the kind that it has, else bt.
        new: start over where it has the same. keep_reward: a hybrid head whose scalar starts as its reward.
        asked: fields of `PreferenceConfig`. What is None is as saved, where a head is continued or one of the same kind
            is started, else the default of its kind; the temperature of a new head is the default.

    Raises:
        InputError: settings that contradict each other or the head that is continued.
    """
    asked = {name: value for name, value in asked.items() if value is not None}
    old = None if saved is None else saved.preference
    if keep_reward:
        check_reward(path, old, kind or "hybrid")
        old.check(path, input_format=asked.get("input_format"))
        if saved.recorded:
            old.check(path, temperature=asked.get("temperature"))
        start = dataclasses.replace(old, head="hybrid", dim=3)
    elif old is not None and not new and kind in (None, old.head) and _has(old, asked):
        free = {"max_length", "learnable_temperature", *(() if saved.recorded else ("temperature",))}
        old.check(path, **{name: value for name, value in asked.items() if name not in free})
        return dataclasses.replace(old, **asked)
    else:
        kind = kind or (old.head if old else "bt")
        start = old if old and old.head == kind else _DEFAULTS[kind]
        start = dataclasses.replace(start, temperature=_DEFAULTS[kind].temperature, reward_offset=0.0)
        for name in ("input_format", "pad_token_id", "max_length"):
            start = dataclasses.replace(start, **{name: getattr(old or start, name)})
    if asked.get("normalize") and start.head == "bt":
        raise InputError("normalize has no meaning for a Bradley-Terry head (one number): drop it")
    if asked.get("input_format", start.input_format) != start.input_format:
        asked["pad_token_id"] = None  # of the other format
    return dataclasses.replace(start, **asked)


def _has(old: PreferenceConfig, asked: dict) -> bool:
    return all(asked.get(name, getattr(old, name)) == getattr(old, name) for name in ("dim", "prompt_gate"))


def check_reward(path: str, old: PreferenceConfig | None, kind: str) -> None:
    """InputError unless a head of this kind can keep the reward of the model at `path`."""
    if old is None or old.head != "bt" or kind != "hybrid":
        found = "a plain language model" if old is None else f"a {old.describe()} model"
        rule = "only a hybrid head on a Bradley-Terry model keeps its reward"
        raise InputError(f"{rule}: the head is {kind}, and {path} is {found}")


def settle_padding(config, tokenizer: PreTrainedTokenizerBase, preference: PreferenceConfig) -> None:
    """Have a model's configuration and tokenizer name one token that pads and that texts never hold.

    transformers reads a reward where the padding begins. A model that was trained so keeps its token; where no token is
    free, none is named, and transformers refuses several texts at once instead of reading them wrongly.
    """
    if preference.pad_token_id is not None:
        tokenizer.pad_token_id = preference.pad_token_id
    elif tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = _free_token(tokenizer) or tokenizer.eos_token
    same = tokenizer.pad_token_id == tokenizer.eos_token_id and preference.pad_token_id is None
    config.get_text_config().pad_token_id = None if same else tokenizer.pad_token_id
    if same:
        logger.warning("no token but %s can pad: transformers will run texts one by one", tokenizer.eos_token)


def _free_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    used = f"{tokenizer.bos_token}{tokenizer.eos_token}{tokenizer.chat_template}"
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    free = [name for name in special if name not in used]
    return min(free, key=lambda name: ("pad" not in name.lower(), name != tokenizer.unk_token), default=None)
