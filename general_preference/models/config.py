"""What a model folder or hub repository says about itself: its settings, tensors, adapter and identity.

`preference` in config.json is a `PreferenceConfig`; heads.py reads it, and describes the heads of other tools with it.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
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
INPUT_FORMATS = ("chat", "released", "sequence_classification", "openrlhf")
_WORDS = {"bt": "Bradley-Terry", "gpm": "GPM", "hybrid": "hybrid"}
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
    input_format:          one of INPUT_FORMATS (see datasets/tokenization.py)
    max_length:            tokens of prompt and response together, or None for no limit
    pad_token_id:          sequence_classification: tokens with this id at the end of a sequence are passed over
    reward_offset:         added to the scalar of a Bradley-Terry or hybrid head; scores do not depend on it
    """

    head: Literal["bt", "gpm", "hybrid"] = "bt"
    dim: int = 1
    prompt_gate: bool = False
    gate: Literal["softmax", "scaled_softmax"] = "softmax"
    normalize: bool = False
    temperature: float = 1.0
    learnable_temperature: bool = False
    input_format: Literal["chat", "released", "sequence_classification", "openrlhf"] = "chat"
    max_length: int | None = None
    pad_token_id: int | None = None
    reward_offset: float = 0.0

    def __post_init__(self):
        kinds = {"head": HEADS, "gate": ("softmax", "scaled_softmax"), "input_format": INPUT_FORMATS}
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
        if not math.isfinite(self.reward_offset):
            raise InputError(f"the constant of the reward must be finite, not {self.reward_offset}")

    @property
    def planes(self) -> int:
        """Number of planes P = D // 2."""
        return self.dim // 2

    def same_head(self, other: "PreferenceConfig") -> bool:
        """Whether the weights of one head fit the other."""
        return (self.head, self.dim, self.prompt_gate) == (other.head, other.dim, other.prompt_gate)

    def describe(self) -> str:
        """The head in words: Bradley-Terry, or its kind, D, and whether it has a gate."""
        return (
            f"{_WORDS[self.head]} D={self.dim}{' with gate' * self.prompt_gate}" if self.planes else _WORDS[self.head]
        )

    @classmethod
    def from_dict(cls, values: dict) -> "PreferenceConfig":
        """Read the object back; a field this version does not know is an error, never silently dropped."""
        if not isinstance(values, dict):
            raise InputError(f"config.json: preference is {values!r}, expected an object")
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise InputError(f"config.json has unknown preference fields {sorted(unknown)}: is it of a newer version?")
        kinds = {"dim": (int,), "temperature": (int, float), "reward_offset": (int, float)}
        kinds |= dict.fromkeys(("max_length", "pad_token_id"), (int, type(None)))
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
                raise InputError(f"{found}: drop the setting, or start with new heads")


HEADS_FILE = "preference_heads.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# A run's base model if it was merged from an adapter: its folder in the run's, and the note in it of which adapter.
OWN_BASE, MERGED_FROM = "base", "merged_from.json"
BASE_DIGEST = "base_model_digest"  # key in an adapter's config.json: `weights_digest` of the model that it belongs to
SAMPLE, SAMPLES = 1 << 12, 256  # bytes at so many even places of a weight file that its checksum covers
VALUE_HEAD_FILE = "value_head.safetensors"  # of LLaMA-Factory
SINGLE_FILES = ("model.safetensors", "adapter_model.safetensors", VALUE_HEAD_FILE, HEADS_FILE)


def load_config(path: str, trust_remote_code: bool = False):
    """The transformers configuration of a folder or hub name; InputError with the reason if there is none.

    An adapter without one (peft writes none) has that of its base model, but not its head.
    """
    path = os.path.expanduser(path)
    folder = Path(path)
    if folder.is_file():
        raise InputError(f"{path} is a file: a model is a folder (config.json, *.safetensors) or a hub name")
    if folder.is_dir() and not (folder / "config.json").is_file() and adapter_base(path) is None:
        raise InputError(f"{path} is not a model folder: it has no config.json")
    if not folder.exists() and (folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") > 1):
        raise InputError(f"model folder {path} does not exist: check the path")
    try:
        if resolve(path, "config.json") is None and (base := base_of(path)) is not None:
            with naming_adapter(path):
                config = load_config(base, trust_remote_code)
            for key in ("preference", "value_head_prefix"):
                vars(config).pop(key, None)
            return config
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except Exception as error:  # a wrong value raises whatever the architecture's own checks raise
        what = f"cannot read the model configuration of {path}"
        if not folder.exists():
            what = f"there is no folder {path}, and no model of that name can be read from the hub"
        raise InputError(f"{what}: {first_line(error)}") from error


def learned_positions(config) -> int | None:
    """Tokens that fit a table of learned positions; None where positions are computed (rotary, ALiBi)."""
    rotary = getattr(config, "rope_parameters", None) is not None
    return None if rotary else getattr(config, "max_position_embeddings", None)


def checkpoint_identity(path: str) -> list:
    """Names, sizes and times of the files at `path`, or its hub snapshot; of an adapter, also its base model's."""
    identity: list = []
    for place in reversed(list(base_chain(path))):
        identity = [_files_of(place), identity]
    return identity


def _files_of(path: str) -> list | str | None:
    if not Path(path).is_dir():
        return resolve(path, "config.json")
    written = {"arguments.json", "data_summary.json", "eval_metrics.json"}  # by training, beside the model
    suffixes = (".json", ".safetensors", ".jinja", ".model", ".py")
    files = sorted(file for file in Path(path).iterdir() if file.suffix in suffixes and file.name not in written)
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def weights_digest(path: str) -> str:
    """A checksum of samples of the weights at `path` and of its adapter's base; copies have the same."""
    return " on ".join(map(_sampled_digest, base_chain(path)))


def _sampled_digest(path: str) -> str:
    digest = hashlib.blake2b(digest_size=8)
    names = set(_weight_map(path).values()) or SINGLE_FILES
    for file in filter(None, (resolve(path, name) for name in sorted(names))):
        with open(file, "rb") as weights:
            size = weights.seek(0, 2)
            for start in range(0, size, max(size // SAMPLES, SAMPLE)):
                weights.seek(start)
                digest.update(weights.read(SAMPLE))
    return digest.hexdigest()


def adapter_base(path: str) -> str | None:
    """Folder or hub name of the model under the adapter at `path`; None if `path` holds no adapter."""
    file = resolve(path, ADAPTER_CONFIG)
    if file is None:
        return None
    try:
        base = os.path.expanduser(json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: {ADAPTER_CONFIG} does not name the base model ({first_line(error)})") from error
    if not os.path.isdir(base) and os.path.isdir(path):  # a run that has a base of its own, and was moved with it
        folders = (os.path.join(os.path.realpath(path), place, OWN_BASE) for place in ("", "../.."))
        base = next((own for own in folders if os.path.isfile(os.path.join(own, MERGED_FROM))), base)
    return base


def base_chain(path: str) -> Iterator[str]:
    """`path`, the model under it if it is an adapter, and so on through folders; InputError if one comes twice."""
    seen: set[str] = set()
    current: str | None = os.path.expanduser(path)
    while current is not None:
        place = os.path.realpath(current) if os.path.isdir(current) else current
        if place in seen:
            cure = f"set base_model_name_or_path in its {ADAPTER_CONFIG} to the model that it was trained on"
            raise InputError(f"{current} is an adapter that has itself as its base model: {cure}")
        first = not seen
        seen.add(place)
        yield current
        current = adapter_base(current) if first or os.path.isdir(current) else None


def base_of(path: str) -> str | None:
    """As `adapter_base`, and InputError for adapters that are each other's base."""
    return [*base_chain(path), None][1]


@contextlib.contextmanager
def naming_adapter(path: str) -> Iterator[None]:
    """Around what reads the base model of the adapter at `path`: its InputErrors name the adapter too."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path} is an adapter, and its base model cannot be used: {error}") from error


def read_tensors(path: str, names) -> dict[str, torch.Tensor]:
    """The named tensors of a checkpoint that are there, read without touching the others."""
    found = {}
    with naming_damage(path):
        files = tensor_files(path)
        for name in set(names) & set(files):
            with safe_open(resolve(path, files[name]), framework="pt") as tensors:
                found[name] = tensors.get_tensor(name)
    return found


def tensor_files(path: str) -> dict[str, str]:
    """{tensor: its file} of a checkpoint in safetensors, an adapter's and its heads' included."""
    found = _weight_map(path)
    singles = SINGLE_FILES[1:] if found else SINGLE_FILES
    for name, file in ((name, resolve(path, name)) for name in singles):
        with naming_damage(path):
            if file is not None:
                with safe_open(file, framework="pt") as tensors:
                    found |= dict.fromkeys(tensors.keys(), name)
    return found


@contextlib.contextmanager
def naming_damage(path: str) -> Iterator[None]:
    """Around what reads tensors of `path`: damage becomes an InputError that names the file."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read the weights of {path}: {reason(path, error)}") from error


def _weight_map(path: str) -> dict[str, str]:
    """Which file holds each tensor of a sharded checkpoint; {} if it is not sharded."""
    index = None if resolve(path, SINGLE_FILES[0]) else resolve(path, "model.safetensors.index.json")
    if index is None:
        return {}
    try:
        return dict(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index} is damaged, it has no weight_map of tensors and files") from error


def resolve(path: str, file: str) -> str | None:
    """Local path of one file of a model folder or hub repository, None if it has no such file."""
    path = os.path.expanduser(path)
    if Path(path).is_dir():
        return str(Path(path) / file) if (Path(path) / file).is_file() else None
    return cached_file(path, file, _raise_exceptions_for_missing_entries=False)


def reason(path: str, error: Exception) -> str:
    """Why weights could not be loaded: the damaged file, if there is one, else what the library says."""
    for file in sorted(Path(os.path.expanduser(path)).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as damage:
            return f"{file.name} is damaged or cut short ({first_line(damage)})"
    return first_line(error)


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind; two where the first only leads to the second."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
