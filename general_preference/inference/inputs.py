"""What people hand to the pipeline, made plain: sequences of any library, dtypes by name, misspelled arguments."""

import difflib
import functools
import inspect
import logging
from collections.abc import Iterable, Mapping

import torch

from general_preference.errors import InputError
from general_preference.models.device import has_fast_bf16, inference_dtype

logger = logging.getLogger(__name__)

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
# What an argument is called elsewhere: transformers, TRL, RewardBench, and this package's own flags.
SYNONYMS = {
    "model": "model_name_or_path", "model_name": "model_name_or_path", "pretrain": "model_name_or_path",
    "torch_dtype": "dtype", "device_map": "device", "max_len": "max_length", "model_max_length": "max_length",
    "temperature": "tau", "general_preference_tau": "tau", "batch_size": "batch_tokens",
    "flash_attn": "attn_implementation", "chosen": "first", "rejected": "second", "messages": "samples",
    "conversations": "samples", "completions": "responses", "candidates": "responses",
}  # fmt: skip


def as_list(value: object, name: str, expected: str, least: int = 0) -> list:
    """The items of any ordered iterable, themselves as `plain` makes them.

    Raises:
        InputError: text, a dict, a set (it has no order), a table, nothing to iterate over, or fewer than `least`.
    """
    items = plain(value)
    if isinstance(items, list) and len(items) >= least:
        return items
    shown = isinstance(value, str | Mapping | int | float | None)
    found = repr(value)[:60] if shown else f"a {type(value).__name__}"
    raise InputError(f"the {name} are {'an empty list' if isinstance(items, list) else found}, expected {expected}")


def plain(value: object) -> object:
    """Lists instead of tuples, numpy arrays, pandas Series, `datasets` columns and generators, at any depth.

    Dicts stay dicts and text is `str`; everything else, also what has no order or several columns, stays as it is.
    """
    if isinstance(value, str):
        return str(value)  # of numpy, it would be numpy.str_
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    table = hasattr(value, "columns") or hasattr(value, "column_names")  # iterating over one gives names, or rows
    scalar = getattr(value, "shape", None) == ()
    if table or scalar or isinstance(value, bytes | set | frozenset) or not isinstance(value, Iterable):
        return value
    return [plain(item) for item in value]


def choose_dtype(wanted: torch.dtype | str | None, bf16: bool | None, device: torch.device) -> torch.dtype:
    """The floating-point type that `wanted` is or names ("bfloat16", "bf16"); for None and "auto", what suits `device`.

    Raises:
        InputError: another type, or one that contradicts `bf16`.
    """
    name = "auto" if wanted is None else str(wanted).removeprefix("torch.")
    name = next((long for long, short in DTYPES.items() if name == short), name)
    if name not in ("auto", *DTYPES):
        raise InputError(f"dtype {wanted!r} is none of auto, {', '.join(DTYPES)}")
    if name != "auto" and bf16 not in (None, name == "bfloat16"):
        raise InputError(f"bf16 = {bf16} and dtype = {name} disagree: drop one")
    dtype = inference_dtype(device, bf16) if name == "auto" else getattr(torch, name)
    if dtype == torch.bfloat16 and not has_fast_bf16(device):
        logger.warning("bf16 on this %s is emulated and many times slower than fp32", device.type)
    return dtype


def check_keywords(cls: type) -> type:
    """Class decorator: a keyword argument that a public method does not have is an InputError that names the right one.

    `help` shows the methods' own signatures.
    """
    members = {name: member for base in reversed(cls.__mro__[:-1]) for name, member in vars(base).items()}
    for name, member in members.items():
        function = getattr(member, "__func__", member)
        if inspect.isfunction(function) and (name in ("__init__", "__call__") or not name.startswith("_")):
            called = cls.__name__ if name in ("__init__", "__call__") else f"{cls.__name__}.{name}"
            checked = _checked(function, called)
            setattr(cls, name, classmethod(checked) if isinstance(member, classmethod) else checked)
    return cls


def _checked(function, called: str):
    known = list(inspect.signature(function).parameters)[1:]

    @functools.wraps(function)
    def check(*args, **keywords):
        for name in (name for name in keywords if name not in known):
            near = SYNONYMS.get(name)
            near = [near] if near in known else difflib.get_close_matches(name, known, 1)
            cure = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
            raise InputError(f"{called} has no argument {name!r}: {cure}")
        return function(*args, **keywords)

    return check
