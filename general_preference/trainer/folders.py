"""What a run may write over: only files that a run wrote, and nothing that it reads.

A folder is a run's if it holds a run's arguments.json; checkpoints and models in it are known by their files.
"""

import fnmatch
import os
import re
from pathlib import Path

from general_preference.errors import InputError
from general_preference.files import check_outputs, read_object
from general_preference.models.config import ADAPTER_CONFIG, HEADS_FILE, MERGED_FROM, OWN_BASE, base_chain
from general_preference.trainer.run_arguments import RunArguments

MANIFEST = "manifest.json"
CHECKPOINT_FILE = re.compile(r"manifest\.json|process_\d+\.safetensors|\..*")  # file systems leave hidden files behind
# All that a new model replaces in a folder, and the rest of what a run writes there.
MODEL_FILE = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|config\.json")
REPLACED = (HEADS_FILE, ADAPTER_CONFIG)
WRITTEN = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", ADAPTER_CONFIG),
    *("README.md", "arguments.json", "data_summary.json", "eval_metrics.json", "metrics.jsonl", "training_curves.png"),
    *("embeddings.png", "tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json", "vocab.*"),
    *("merges.txt", "chat_template*", "additional_chat_templates", "best", OWN_BASE),
)


def check_folders(arguments: RunArguments) -> None:
    """Refuse folders in which the run would destroy something. Reads no weights and asks no hub.

    Raises:
        InputError: an output folder is, contains or lies in what the run reads, or holds files that no run wrote.
    """
    read = [place for place in (arguments.engine.deepspeed_config,) if place]
    for model in filter(None, arguments.model.paths):
        for place in base_chain(model):
            read.append(place)
            if not os.path.isdir(place):
                break
    folder, checkpoints = Path(arguments.output.save_path), arguments.output.checkpoint_folder
    inner = {folder / name: "save_path" for name in ("best", OWN_BASE)}  # which may be links
    check_outputs(output_folders(arguments) | inner, read, arguments.data.sources)
    if found := foreign_file(folder):
        raise InputError(f"save_path {folder} holds {found}, which no training run wrote: choose another folder")
    for path in sorted(checkpoints.glob("step_*")):
        if found := foreign_in_checkpoint(path):
            what = f"ckpt_path {checkpoints} holds {path.name}/{found}"
            raise InputError(f"{what}, which is no checkpoint's: choose another folder")
    latest = checkpoints / "latest"
    if latest.is_dir() or (latest.is_file() and not re.match(rb"(step_\d+)?\s*\Z", latest.read_bytes()[:4096])):
        raise InputError(f"ckpt_path {checkpoints} holds checkpoints of another tool ({latest}): choose another folder")


def output_folders(arguments: RunArguments) -> dict[Path, str]:
    """The folders that this run alone may write, and the arguments that name them."""
    folder, checkpoints = Path(arguments.output.save_path), arguments.output.checkpoint_folder
    inside = checkpoints.resolve().is_relative_to(folder.resolve())
    return {folder: "save_path"} | ({} if inside else {checkpoints: "ckpt_path"})


def foreign_file(folder: Path) -> str | None:
    """A file in `folder` that a run would replace, if `folder` is not a run's already."""
    if read_object(folder / "arguments.json").keys() >= {"pretrain", "save_path", "resolved"}:
        return None
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in entries:
        known = path.name == OWN_BASE and (path / MERGED_FROM).is_file()
        empty = path.is_dir() and not any(path.iterdir())
        if not known and not empty and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in WRITTEN):
            return path.name
    return None


def foreign_in_checkpoint(path: Path) -> str | None:
    """The first entry of a folder `step_N` that is no file of a checkpoint; None if there is none."""
    entries = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() and path.stat().st_size else []
    names = (entry.name for entry in entries if entry.is_dir() or not CHECKPOINT_FILE.fullmatch(entry.name))
    return next(names, None)


def is_own_model(folder: Path) -> bool:
    """Whether a model that stands, or was being written, in `folder` is one that a run saved."""
    if not folder.exists() or not any(folder.iterdir()) or (folder / ".writing_model").is_dir():
        return True
    return "preference" in read_object(folder / "config.json")


def is_replaced(name: str) -> bool:
    """Whether a new model in a folder replaces this file of the one before, or removes it."""
    return MODEL_FILE.fullmatch(name) is not None or name in REPLACED
