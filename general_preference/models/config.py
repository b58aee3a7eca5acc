"""What a model folder or hub repository says about itself: its preference head, tensors, adapter and identity.

`preference` in config.json is a `PreferenceConfig`; checkpoints without one (published GPM weights, the paper's code)
are described from the shapes of their head tensors.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.utils import cached_file

from general_preference.errors import InputError

MIN_LENGTH = 8  # tokens that leave room for a prompt and a response
HEADS = ("bt", "gpm", "hybrid")
_DIMENSIONS = {  # the least D (even heads are even), and how a message says it
    "bt": (1, "a Bradley-Terry head has dimension 1"),
    "gpm": (2, "a GPM head needs an even value_head_dim >= 2"),
    "hybrid": (3, "a hybrid head needs an odd value_head_dim >= 3"),
}


@dataclass
class PreferenceConfig:
    """Head, gate and input format of a preference model; saved as `preference` in config.json.

    head:                  "bt" (D = 1), "gpm" (even D) or "hybrid" (odd D >= 3)
    dim:                   D, the size of an embedding
    prompt_gate:           whether a head on the prompt weighs the D // 2 planes
    gate:                  "softmax" (weights sum to 1) or "scaled_softmax" (P * softmax(z / sqrt(hidden)))
    normalize:             L2-normalize the planes of an embedding
    temperature:           tau of P = sigmoid(score / tau); the learned value if it was learned
    learnable_temperature: whether training optimizes it
    input_format:          "chat" or "released" (see datasets/tokenization.py)
    max_length:            tokens of prompt and response together, or None for no limit
    """

    head: Literal["bt", "gpm", "hybrid"] = "bt"
    dim: int = 1
    prompt_gate: bool = False
    gate: Literal["softmax", "scaled_softmax"] = "softmax"
    normalize: bool = False
    temperature: float = 1.0
    learnable_temperature: bool = False
    input_format: Literal["chat", "released"] = "chat"
    max_length: int | None = None

    def __post_init__(self):
        kinds = {"head": HEADS, "gate": ("softmax", "scaled_softmax"), "input_format": ("chat", "released")}
        for name, known in kinds.items():
            if getattr(self, name) not in known:
                raise InputError(f"unknown preference {name} {getattr(self, name)!r}: choose one of {', '.join(known)}")
        least, rule = _DIMENSIONS[self.head]
        if self.dim < least or (self.head == "bt" and self.dim > 1) or self.dim % 2 != least % 2:
            raise InputError(f"{rule}, not {self.dim}")
        if self.head == "bt" and self.prompt_gate:
            raise InputError("add_prompt_head weighs planes, and a Bradley-Terry head has none: choose head gpm")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature must be positive and finite, not {self.temperature}")

    @property
    def planes(self) -> int:
        """Number of planes P = D // 2."""
        return self.dim // 2

    @classmethod
    def from_dict(cls, values: dict) -> "PreferenceConfig":
        """Read the object back; a field this version does not know is an error, never silently dropped."""
        if not isinstance(values, dict):
            raise InputError(f"config.json: preference is {values!r}, expected an object")
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise InputError(f"config.json has unknown preference fields {sorted(unknown)}: is it of a newer version?")
        kinds = {"dim": (int,), "max_length": (int, type(None)), "temperature": (int, float)}
        kinds |= dict.fromkeys(("prompt_gate", "normalize", "learnable_temperature"), (bool,))
        for name in kinds.keys() & values.keys():
            if type(values[name]) not in kinds[name]:
                raise InputError(f"config.json: preference has a value of the wrong kind ({name} is {values[name]!r})")
        if (values.get("max_length") or MIN_LENGTH) < MIN_LENGTH:
            raise InputError(f"config.json: max_length is {values['max_length']}, expected at least {MIN_LENGTH}")
        return cls(**values)

    @classmethod
    def from_shapes(cls, value_head: tuple[int, ...], prompt_head: tuple[int, ...] | None) -> "PreferenceConfig":
        """The published weights: head tensors of shapes (D, hidden) and (P, hidden) without a `preference` object."""
        dim, gated = value_head[0], prompt_head is not None
        if gated and prompt_head[0] != dim // 2:
            raise InputError(f"prompt_head has {prompt_head[0]} rows, but value_head has {dim // 2} planes")
        if dim == 1:
            return cls(input_format="released")
        return cls("hybrid" if dim % 2 else "gpm", dim, gated, "softmax", True, 0.1, input_format="released")

    def check(self, path: str, **asked) -> None:
        """Refuse what contradicts the checkpoint at `path`; None means "not asked for"."""
        for name, value in asked.items():
            if value is not None and value != getattr(self, name):
                found = f"{path} was saved with {name} = {getattr(self, name)!r}, but {value!r} was asked for"
                raise InputError(f"{found}: drop the setting, or start from the base model")


HEADS_FILE = "preference_heads.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SAMPLE = 1 << 16  # bytes at the start, middle and end of a weight file that its checksum covers
HEAD_NAMES = ("value_head.weight", "prompt_head.weight")


def saved_preference(path: str, trust_remote_code: bool = False) -> PreferenceConfig | None:
    """What the checkpoint at `path` says about its head; None for a plain language model."""
    if (recorded := getattr(load_config(path, trust_remote_code), "preference", None)) is not None:
        return PreferenceConfig.from_dict(recorded)
    shapes = {name: tuple(tensor.shape) for name, tensor in read_tensors(path, HEAD_NAMES).items()}
    value_head, prompt_head = map(shapes.get, HEAD_NAMES)
    return None if value_head is None else PreferenceConfig.from_shapes(value_head, prompt_head)


def trained_preference(path: str, trust_remote_code: bool = False, temperature: float | None = None):
    """The `PreferenceConfig` of a trained model; `temperature` is used where none is recorded (published weights).

    Raises:
        InputError: no such model, no heads, or another temperature is recorded.
    """
    preference = saved_preference(path, trust_remote_code)
    if preference is None:
        if pickles := [name for name in PICKLES if resolve(path, name)]:
            raise InputError(f"{path} holds pickle ({pickles[0]}), which is never loaded: convert it to safetensors")
        raise InputError(f"{path} is a plain language model without value_head: train it first, or pass a trained one")
    recorded = getattr(load_config(path, trust_remote_code), "preference", None) is not None
    if temperature is not None and not recorded:
        return dataclasses.replace(preference, temperature=temperature)
    preference.check(str(path), temperature=temperature)
    return preference


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
        raise InputError(f"cannot read the model configuration of {path}: {first_line(error)}") from error


def checkpoint_identity(path: str) -> list:
    """Names, sizes and times of the files at `path`, or its hub snapshot; of an adapter, also its base model's."""
    of_base = checkpoint_identity(base) if (base := adapter_base(path)) else []
    if not Path(path).is_dir():
        return [resolve(path, "config.json"), of_base]
    written = {"arguments.json", "data_summary.json", "eval_metrics.json"}  # by training, beside the model
    suffixes = (".json", ".safetensors", ".jinja", ".model", ".py")
    files = sorted(file for file in Path(path).iterdir() if file.suffix in suffixes and file.name not in written)
    return [[(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files], of_base]


def weights_digest(path: str) -> str:
    """A checksum of samples of the weights at `path` and of its adapter's base; copies have the same."""
    digest, base = hashlib.blake2b(digest_size=8), adapter_base(path)
    names = set(_weight_map(path).values()) or {"model.safetensors", "adapter_model.safetensors", HEADS_FILE}
    for file in filter(None, (resolve(path, name) for name in sorted(names))):
        with open(file, "rb") as weights:
            size = weights.seek(0, 2)
            for start in (0, size // 2, max(size - SAMPLE, 0)):
                weights.seek(start)
                digest.update(weights.read(SAMPLE))
    return digest.hexdigest() + (f" on {weights_digest(base)}" if base else "")


def adapter_base(path: str) -> str | None:
    """Folder or hub name of the model under the adapter at `path`; None if `path` holds no adapter."""
    file = resolve(path, ADAPTER_CONFIG)
    if file is None:
        return None
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: {ADAPTER_CONFIG} does not name the base model ({first_line(error)})") from error


def read_tensors(path: str, names) -> dict[str, torch.Tensor]:
    """The named tensors of a checkpoint that are there, read without touching the others."""
    found, single = {}, resolve(path, HEADS_FILE)
    try:
        weight_map = {} if single else _weight_map(path)
        if not weight_map and (single := single or resolve(path, "model.safetensors")):
            weight_map = dict.fromkeys(names, single)
        for name in set(names) & set(weight_map):
            with safe_open(single or resolve(path, weight_map[name]), framework="pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118 (a file handle, not a dict)
                    found[name] = tensors.get_tensor(name)
        return found
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read the weights of {path}: {reason(path, error)}") from error


def _weight_map(path: str) -> dict[str, str]:
    """Which file holds each tensor of a sharded checkpoint; {} if it is not sharded."""
    index = resolve(path, "model.safetensors.index.json")
    return {} if index is None else json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]


def resolve(path: str, file: str) -> str | None:
    """Local path of one file of a model folder or hub repository, None if it has no such file."""
    if Path(path).is_dir():
        return str(Path(path) / file) if (Path(path) / file).is_file() else None
    return cached_file(path, file, _raise_exceptions_for_missing_entries=False)


def reason(path: str, error: Exception) -> str:
    """Why weights could not be loaded: the damaged file, if there is one, else what the library says."""
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as damage:
            return f"{file.name} is damaged or cut short ({first_line(damage)})"
    return first_line(error)


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
