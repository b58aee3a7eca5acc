"""What a model folder or hub repository says about itself: its preference head, tensors, adapter and identity.

`preference` in config.json is a `PreferenceConfig`; checkpoints without one (published GPM weights, the paper's code)
are described from the shapes of their head tensors.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
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
# A run's base model if it was merged from an adapter: its folder in the run's, and the note in it of which adapter.
OWN_BASE, MERGED_FROM = "base", "merged_from.json"
BASE_DIGEST = "base_model_digest"  # key in an adapter's config.json: `weights_digest` of the model that it belongs to
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SAMPLE = 1 << 16  # bytes at the start, middle and end of a weight file that its checksum covers
HEAD_NAMES = ("value_head.weight", "prompt_head.weight")
SINGLE_FILES = ("model.safetensors", "adapter_model.safetensors", HEADS_FILE)
FOREIGN_HEADS = re.compile(r"(^|\.)(score|classifier|v_head|value_head|reward_head|rm_head|regression_layer)\.")


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
        check_foreign_heads(path, tensor_names(path))
        raise InputError(f"{path} is a plain language model without value_head: train it first, or pass a trained one")
    recorded = getattr(load_config(path, trust_remote_code), "preference", None) is not None
    if temperature is not None and not recorded:
        return dataclasses.replace(preference, temperature=temperature)
    preference.check(str(path), temperature=temperature)
    return preference


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
            vars(config).pop("preference", None)
            return config
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except InputError:
        raise
    except Exception as error:  # a wrong value raises whatever the architecture's own checks raise
        what = f"cannot read the model configuration of {path}"
        if not folder.exists():
            what = f"there is no folder {path}, and no model of that name can be read from the hub"
        raise InputError(f"{what}: {first_line(error)}") from error


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
            for start in (0, size // 2, max(size - SAMPLE, 0)):
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
    found, single = {}, resolve(path, HEADS_FILE)
    with naming_damage(path):
        weight_map = {} if single else _weight_map(path)
        if not weight_map and (single := single or resolve(path, "model.safetensors")):
            weight_map = dict.fromkeys(names, single)
        for name in set(names) & set(weight_map):
            with safe_open(single or resolve(path, weight_map[name]), framework="pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118 (a file handle, not a dict)
                    found[name] = tensors.get_tensor(name)
    return found


def tensor_names(path: str) -> set[str]:
    """Names of all tensors of a checkpoint in safetensors, an adapter's and its heads' included."""
    names = set(_weight_map(path))
    for file in filter(None, (resolve(path, name) for name in SINGLE_FILES)) if not names else ():
        with naming_damage(path), safe_open(file, framework="pt") as tensors:
            names |= set(tensors.keys())
    return names


def check_foreign_heads(path: str, names) -> None:
    """InputError if one of these tensors is the head of a reward or value model that another tool made."""
    if found := sorted(name for name in names if name not in HEAD_NAMES and FOREIGN_HEADS.search(name)):
        what = "sequence classifier" if FOREIGN_HEADS.search(found[0])[2] in ("score", "classifier") else "value model"
        raise InputError(
            f"{path} is a {what} of another tool (it holds {found[0]}), which is not read as a language model: "
            "use the language model that it was made from"
        )


@contextlib.contextmanager
def naming_damage(path: str) -> Iterator[None]:
    """Around what reads tensors of `path`: damage becomes an InputError that names the file."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read the weights of {path}: {reason(path, error)}") from error


def _weight_map(path: str) -> dict[str, str]:
    """Which file holds each tensor of a sharded checkpoint; {} if it is not sharded."""
    index = resolve(path, "model.safetensors.index.json")
    return {} if index is None else json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]


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
