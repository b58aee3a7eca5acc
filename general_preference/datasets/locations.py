"""Where the records of a source lie: a path becomes the files of one split, or a hub dataset.

A path is a file, a folder, a glob or a hub name, with a configuration and a split if it has some: `path@split`,
`path:configuration@split`. Without a split it is `train`, which is everything where no names tell splits apart.
"""

import difflib
import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets

from general_preference.datasets.readers import COMPRESSED, READERS, file_format, one_line, show
from general_preference.errors import InputError

SAVED = "state.json"  # stands for all files of a folder written by `Dataset.save_to_disk`
SPLITS = "dataset_dict.json"  # marks a folder written by `DatasetDict.save_to_disk`
# Written beside data by `datasets`, or beside a model, which may lie in the same folder. Only names that say so: what
# else holds no comparisons is refused aloud.
METADATA = re.compile(
    r"(dataset_infos?|dataset_dict|state)\.json|cache-[0-9a-f]{16}.*\.arrow"
    r"|(arguments|data_summary|eval_metrics|.*\.summary)\.json|metrics\.jsonl"
    r"|(((tokenizer|generation|adapter)_)?config|tokenizer|special_tokens_map|added_tokens|vocab|.*\.index)\.json"
)
HUB_NAME = re.compile(r"(?P<path>\w[\w.-]*/[\w.-]+)(:(?P<configuration>[^@]+))?(@(?P<split>.+))?")
# How `datasets` tells splits apart: by shards in data/, else by folders, else by file names with one of these words.
WORDS = {"train": "train|training", "validation": "validation|valid|dev|val", "test": "test|testing|eval|evaluation"}
BETWEEN = "[-._ 0-9]"
EXPECTED = f"expected {', '.join(READERS)}, as they are or compressed ({', '.join(COMPRESSED)})"


@dataclass(frozen=True)
class Location:
    """A path without its configuration and split."""

    path: str
    configuration: str = ""
    split: str = "train"
    on_hub: bool = False

    def __str__(self) -> str:
        return f"{show(self.path)}{':' if self.configuration else ''}{self.configuration}@{self.split}"

    @property
    def place(self) -> Path:
        """The path on this machine."""
        return Path(os.path.expanduser(self.path))


def locate(text: str) -> Location:
    """What `text` names: the longest part that is there on disk is the path; else it is a hub name.

    Raises:
        InputError: no such path, and no hub name either.
    """
    for location in _on_disk(text):
        return location
    hub = HUB_NAME.fullmatch(text)
    if hub and not file_format(hub["path"]):
        return Location(hub["path"], hub["configuration"] or "", hub["split"] or "train", on_hub=True)
    raise InputError(f"dataset {show(text)} does not exist{neighbors(text)}: check the path")


def is_on_disk(text: str) -> bool:
    """Whether a path, with or without configuration and split, or a glob names something on this machine."""
    return any(True for _ in _on_disk(text))


def _on_disk(text: str) -> Iterator[Location]:
    head, _, split = text.rpartition("@")
    readings = [Location(text)]
    for path, name in ((head, split), (text, "train")):
        start, _, configuration = path.rpartition(":")
        readings += [Location(path, "", name), Location(start, configuration, name)]
    for location in readings:
        if location.path and location.split and (os.path.exists(location.place) or _matches(location)):
            yield location


def _matches(location: Location) -> list[str]:
    path = str(location.place)
    return sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []


def neighbors(text: str) -> str:
    """A hint at what is there instead of a path, to stand behind it in a message; "" if there is nothing like it."""
    place = Location(text).place
    names = sorted(glob.glob("*", root_dir=place.parent))
    names = difflib.get_close_matches(place.name, names) or list(filter(_is_data, names))[:5]
    return f" (there is {', '.join(show(place.parent / name) for name in names)})" if names else ""


def find_files(location: Location) -> tuple[list[Path], dict[Path, str]]:
    """The files of a location on disk, in the order they are read, and {file left out: why}.

    The file `SAVED` stands for the folder that it lies in.

    Raises:
        InputError: no data files, or none of the split or configuration.
    """
    splits, every_file = _find_splits(location)
    if location.split not in splits:
        names = f"it has {', '.join(splits)}: name one, as in {show(location.path)}@{next(iter(splits))}"
        raise InputError(f"{show(location.path)} has no split '{location.split}'; {names}")
    files = splits[location.split]
    for file in files:
        if file.name != SAVED and not file_format(file):
            raise InputError(f"{show(file)} ends in '{file.suffix}': {EXPECTED}")
    left_out = dict.fromkeys(every_file, "in no split")
    left_out |= {file: f"split {name}" for name, others in splits.items() for file in others}
    return files, {file: left_out[file] for file in sorted(left_out.keys() - set(files))}


def _find_splits(location: Location) -> tuple[dict[str, list[Path]], list[Path]]:
    """({split: files}, all data files)."""
    place, shown = location.place, show(location.path)
    if place.is_dir():
        files = sorted(_walk(place))
        if not files:
            raise InputError(f"folder {shown} holds no data file: {EXPECTED}")
        readme = place / "README.md"
        if readme.is_file() and re.search(rb"^configs:", readme.read_bytes(), re.MULTILINE):
            return _configured_splits(location), files
        if not location.configuration:
            return _saved_splits(place) or split_files(files, place), files
    elif place.is_file():
        files = [place]
    else:
        files = [file for file in map(Path, _matches(location)) if file.is_file() and _is_data(file.name)]
        if not files:
            raise InputError(f"{shown} matches no data file: {EXPECTED}")
    if location.configuration:
        raise InputError(f"{shown} has no configuration '{location.configuration}': only a README.md defines some")
    return {"train": files}, files


def split_files(files: list[Path], folder: Path) -> dict[str, list[Path]]:
    """{split: files} by what their names below `folder` say to `datasets`; all are "train" where they say nothing."""
    for rule in (_split_of_shard, _splits_of_folders, _splits_of_name):
        found: dict[str, list[Path]] = {}
        for file in files:
            for split in rule(file.relative_to(folder)):
                found.setdefault(split, []).append(file)
        if found:
            return found
    return {"train": files}


def _split_of_shard(file: Path) -> list[str]:
    shard = re.fullmatch(r"(.+)-\d{5}-of-\d{5}.*\..*", file.name)
    return [shard[1]] if shard and str(file.parent) == "data" else []


def _splits_of_folders(file: Path) -> list[str]:
    return [split for split, words in WORDS.items() if any(_says(words, part) for part in file.parent.parts)]


def _splits_of_name(file: Path) -> list[str]:
    stem = file.name.rpartition(".")[0]
    return [split for split, words in WORDS.items() if _says(words, stem)]


def _says(words: str, name: str) -> bool:
    return bool(re.fullmatch(f"(.*{BETWEEN})?({words})({BETWEEN}.*)?", name))


def _saved_splits(folder: Path) -> dict[str, list[Path]]:
    """The splits of a saved `DatasetDict`, which may have any names; {} if it is none."""
    if not (folder / SPLITS).is_file():
        return {}
    try:
        names = json.loads((folder / SPLITS).read_bytes())["splits"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot read {show(folder / SPLITS)}: {one_line(error)}") from error
    return {name: [folder / name / SAVED] for name in names}


def _configured_splits(location: Location) -> dict[str, list[Path]]:
    """The splits of a configuration that the README.md of a hub repository defines."""
    try:
        builder = datasets.load_dataset_builder(os.path.abspath(location.place), location.configuration or None)
    except Exception as error:  # datasets has no base for what is wrong with a README.md
        reason = one_line(error).partition(" Example of usage")[0]
        raise InputError(f"cannot tell what to read of {show(location.path)}: {reason}") from error
    return {str(split): list(map(Path, files)) for split, files in builder.config.data_files.items()}


def parts(file: Path) -> list[Path]:
    """The files that hold what `file` stands for."""
    beside = sorted(file.parent.glob("*.arrow")) if file.name == SAVED else []
    return [file, *(part for part in beside if _is_data(part.name))]


def _is_data(name: str) -> bool:
    return bool(file_format(name)) and not name.startswith(".") and not METADATA.fullmatch(name)


def _walk(folder: Path) -> Iterator[Path]:
    """The data files below a folder; of a saved dataset `SAVED` alone, since maps leave their caches beside it."""

    def refuse(error: OSError):
        raise InputError(f"cannot read {show(error.filename)}: {error.strerror}") from error

    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        below = (name for name in folders if not name.startswith((".", "__")))
        own = os.path.realpath(root)  # a link to a folder above leads around for ever
        folders[:] = [
            name for name in below if not Path(own).is_relative_to(os.path.realpath(os.path.join(root, name)))
        ]
        saved = SAVED in names and "dataset_info.json" in names
        yield from (Path(root, name) for name in ([SAVED] if saved else filter(_is_data, names)))
