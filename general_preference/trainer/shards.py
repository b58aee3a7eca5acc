"""Weights and optimizer states on disk as flat fragments: every process writes what it owns and reads what it owns now.

A safetensors file holds what one process owns under ZeRO, with a table of which part of which parameter lies where; a
reader takes what it owns from the files that hold it. So the number of processes and the ZeRO stage may change, nothing
is gathered in one place, and no pickle is loaded. (DeepSpeed's universal checkpoints make a second, whole copy first,
and know neither ZeRO 0 nor parameter groups with their own options under ZeRO 3.)
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from general_preference.errors import InputError

FIELDS = ("weight", "exp_avg", "exp_avg_sq")  # fp32 weights and Adam's two moments


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + count) of a flattened parameter, at [offset, offset + count) of flat tensor `flat`."""

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    flat: int
    offset: int


@dataclass
class Shard:
    """What one process owns: flat tensors, {field: (n,)} each, and the fragments of parameters that lie in them.

    The tensors are the engine's own memory. sizes: {name: elements} of all trained parameters, here or elsewhere.
    """

    flats: list[dict[str, torch.Tensor]]
    fragments: list[Fragment]
    sizes: dict[str, int]

    def counts(self) -> dict[str, int]:
        """{parameter: its elements in this shard}."""
        total: Counter = Counter()
        for fragment in self.fragments:
            total[fragment.name] += fragment.count
        return dict(total)


def check_complete(counts: Iterable[dict[str, int]], sizes: dict[str, int]) -> None:
    """Compare what all processes are about to write, `Shard.counts` of each, with the parameters' sizes.

    Raises:
        RuntimeError: a parameter would be saved in part, or twice.
    """
    total: Counter = Counter()
    for one in counts:
        total.update(one)
    for name, size in sizes.items():
        if total[name] != size:
            raise RuntimeError(f"a checkpoint would hold {total[name]} of the {size} elements of {name}: not written")


def write_shard(file: Path, shard: Shard, extra: dict[str, torch.Tensor]) -> None:
    """Write a process's shard, and `extra` tensors under their own names; on disk when this returns."""
    tensors = {f"{number}/{field}": flat[field] for number, flat in enumerate(shard.flats) for field in FIELDS}
    fragments = json.dumps([list(vars(fragment).values()) for fragment in shard.fragments])
    save_file(tensors | extra, str(file), metadata={"format": "pt", "fragments": fragments})
    with file.open("rb") as written:
        os.fsync(written.fileno())


def read_shard(files: Iterable[Path], shard: Shard) -> None:
    """Fill `shard` from the files of all processes that wrote.

    Raises:
        InputError: they do not hold a parameter, hold it in another shape, or hold parameters that the model lacks.
    """
    stored = _stored_fragments(files)
    missing, extra = shard.sizes.keys() - stored.keys(), stored.keys() - shard.sizes.keys()
    if missing:
        raise InputError(f"it is of another model: it has no {sorted(missing)[0]}, which this one trains")
    if extra:
        raise InputError(f"it is of another model: it trained {sorted(extra)[0]}, which this one does not")
    for fragment in shard.fragments:
        shape = stored[fragment.name][0][1].shape
        if shape != fragment.shape:
            raise InputError(f"it is of another model: its {fragment.name} is {shape}, this one's is {fragment.shape}")
        if _fill(shard.flats[fragment.flat], fragment, stored[fragment.name]) != fragment.count:
            raise InputError(f"it lacks a part of {fragment.name}")


def _fill(flat: dict[str, torch.Tensor], fragment: Fragment, stored: list) -> int:
    """Copy the stored parts of a parameter that overlap `fragment` into place; returns how many elements they cover."""
    covered = 0
    for tensors, part in stored:
        first = max(fragment.start, part.start)
        count = min(fragment.start + fragment.count, part.start + part.count) - first
        if count <= 0:
            continue
        source, target = part.offset + first - part.start, fragment.offset + first - fragment.start
        for field in FIELDS:
            values = tensors.get_slice(f"{part.flat}/{field}")[source : source + count]
            flat[field][target : target + count].copy_(values)
        covered += count
    return covered


def _stored_fragments(files: Iterable[Path]) -> dict[str, list]:
    """{parameter: [(open file, fragment)]} of all files."""
    stored: dict[str, list] = {}
    for file in files:
        tensors = safe_open(file, framework="pt")
        for name, shape, *numbers in json.loads(tensors.metadata()["fragments"]):
            stored.setdefault(name, []).append((tensors, Fragment(name, tuple(shape), *numbers)))
    return stored


def read_extra(file: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The tensors `names` beside the shard in one file, as far as they are there."""
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in names if name in tensors.keys()}  # noqa: SIM118


def file_digest(file: Path) -> str:
    """A fast checksum (128-bit XXH3, hexadecimal) of a file: finds damage, not forgery."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def describe_file(file: Path) -> dict:
    """What a manifest says about a file, for `verify_file` to compare with."""
    return {"bytes": file.stat().st_size, "xxh3_128": file_digest(file)}


def verify_file(file: Path, entry: dict) -> str | None:
    """What is wrong with a file that a manifest describes with `entry`; None if nothing is."""
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            return f"{file.name} has {size} bytes instead of {entry['bytes']}"
        return None if file_digest(file) == entry["xxh3_128"] else f"{file.name} is damaged (its checksum differs)"
    except (OSError, SafetensorError) as error:
        return f"{file.name} cannot be read ({error})"
