"""What a checkpoint says about its preference head, so that loading needs the path and nothing else.

The `preference` object of a saved config.json is a `PreferenceConfig`. Checkpoints without one (published GPM weights,
the paper's own code) are described from the shapes of their head tensors.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Literal

from general_preference.errors import InputError

MIN_LENGTH = 8  # tokens that leave room for a prompt and a response
HEADS = ("bt", "gpm", "hybrid")


@dataclass
class PreferenceConfig:
    """Head, gate and input format of a preference model; saved as `preference` in config.json.

    head:                  "bt" (D = 1), "gpm" (even D) or "hybrid" (odd D >= 3)
    dim:                   D, the size of an embedding
    prompt_gate:           whether a head on the prompt weighs the D // 2 planes
    gate:                  "softmax" (weights sum to 1) or "scaled_softmax" (P * softmax(z / sqrt(hidden)))
    normalize:             L2-normalise the planes of an embedding
    temperature:           tau of P = sigmoid(score / tau); the learnt value if it was learnt
    learnable_temperature: whether training optimises it
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
        if self.head not in HEADS:
            raise InputError(f"unknown preference head {self.head!r}: choose one of {', '.join(HEADS)}")
        if self.head == "bt" and self.dim != 1:
            raise InputError(
                f"a Bradley-Terry head has dimension 1, not {self.dim}: drop value_head_dim or choose head gpm"
            )
        if self.head == "gpm" and (self.dim < 2 or self.dim % 2):
            raise InputError(f"a GPM head needs an even value_head_dim >= 2, not {self.dim}: an odd one is head hybrid")
        if self.head == "hybrid" and (self.dim < 3 or self.dim % 2 == 0):
            raise InputError(f"a hybrid head needs an odd value_head_dim >= 3, not {self.dim}: an even one is head gpm")
        if self.head == "bt" and self.prompt_gate:
            raise InputError(
                "add_prompt_head weighs planes, and a Bradley-Terry head has none: drop it or choose head gpm"
            )
        if self.gate not in ("softmax", "scaled_softmax"):
            raise InputError(f"unknown gate {self.gate!r}: choose softmax or scaled_softmax")
        if self.input_format not in ("chat", "released"):
            raise InputError(f"unknown input format {self.input_format!r}: choose chat or released")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature must be positive and finite, not {self.temperature}")

    @property
    def planes(self) -> int:
        """Number of planes P = D // 2."""
        return self.dim // 2

    def to_dict(self) -> dict:
        """The object that is written into config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "PreferenceConfig":
        """Read the object back; a field this version does not know is an error, never silently dropped."""
        if not isinstance(values, dict):
            raise InputError(f"config.json: preference is {values!r}, expected an object")
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise InputError(
                f"config.json has unknown preference fields {sorted(unknown)}: written by a newer version?"
            )
        kinds = {"dim": int, "max_length": int | None, "temperature": int | float}
        kinds |= dict.fromkeys(("prompt_gate", "normalize", "learnable_temperature"), bool)
        for name, kind in kinds.items():
            value = values.get(name, getattr(cls, name))
            if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
                raise InputError(f"config.json: preference has a value of the wrong kind ({name} is {value!r})")
        if values.get("max_length") is not None and values["max_length"] < MIN_LENGTH:
            raise InputError(f"config.json: max_length is {values['max_length']}, expected at least {MIN_LENGTH}")
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"config.json: preference has a value of the wrong kind ({error})") from error

    @classmethod
    def from_shapes(cls, value_head: tuple[int, ...], prompt_head: tuple[int, ...] | None) -> "PreferenceConfig":
        """Describe a checkpoint that has head tensors but no `preference` object: the published weights.

        Args:
            value_head: shape (D, hidden) of value_head.weight. prompt_head: (P, hidden) of prompt_head.weight, or None.
        """
        dim = value_head[0]
        head = "bt" if dim == 1 else ("gpm" if dim % 2 == 0 else "hybrid")
        if prompt_head is not None and prompt_head[0] != dim // 2:
            raise InputError(f"prompt_head has {prompt_head[0]} rows, but value_head has {dim // 2} planes")
        if head == "bt":
            return cls(input_format="released")
        gated = prompt_head is not None
        return cls(head, dim, gated, "softmax", True, 0.1, input_format="released")

    def check(self, path: str, **asked) -> None:
        """Refuse what contradicts the checkpoint at `path`; None means "not asked for"."""
        for name, value in asked.items():
            if value is not None and value != getattr(self, name):
                raise InputError(
                    f"{path} was saved with {name} = {getattr(self, name)!r}, but {value!r} was asked for: "
                    f"drop the setting, or start from the base model"
                )
