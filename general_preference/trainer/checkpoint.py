"""Resumable checkpoints: complete, verified, and never half-written.

`step_N/` holds one file of weights, optimizer states and random states per process (shards.py) and `manifest.json`:
where the run stands, and size and checksum of every file. It is written as `.writing_step_N`, flushed and renamed;
`latest` names the newest and moves last. Reading begins there, passes over what is damaged, incomplete or not a
checkpoint, says why, and takes the newest that is whole. `latest` itself may be missing.
"""

import copy
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from general_preference.errors import InputError
from general_preference.files import flush_folder, replace_text
from general_preference.trainer.deepspeed_engine import DeepSpeedEngine
from general_preference.trainer.shards import verify_file

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SHOWN_WITHIN = 60  # seconds in which a network file system shows what another node has written


@dataclass
class RunState:
    """Where a run stands: all that is not a tensor.

    step: optimizer steps done. evaluated: the step of the last evaluation. best: [(evaluation loss, folder name)] of
    the kept best models, lowest first. window: sums of the steps that are done but not logged yet. wandb_id: the wandb
    run. fixed: values that a continued run must share. flags: those that it may change; a difference is said.
    """

    step: int = 0
    evaluated: int = 0
    best: list = field(default_factory=list)
    window: dict | None = None
    wandb_id: str | None = None
    fixed: dict = field(default_factory=dict)
    flags: dict = field(default_factory=dict)


class CheckpointStore:
    """Resumable checkpoints under one folder, the oldest pruned first. Every method is collective."""

    def __init__(self, folder: Path, strategy: DeepSpeedEngine, max_number: int, max_gigabytes: float):
        self.folder, self.strategy = folder, strategy
        self.max_number, self.max_bytes = max_number, max_gigabytes * 1e9
        self.newest: RunState | None = None  # of this run

    def save(self, state: RunState) -> None:
        """Write a checkpoint of `state.step`, make it the latest, prune the others.

        Raises:
            RunError: on every process, when the folder cannot be written; it names the folder and the reason.
        """
        temporary = self.folder / f".writing_step_{state.step}"
        self.strategy.write(self.folder, lambda: self._clear(temporary), main_only=True)
        try:
            entries = self.strategy.save_share(temporary)
            self.strategy.write(self.folder, lambda: self._finish(temporary, state, entries), main_only=True)
        except BaseException:
            if self.strategy.is_main:  # a full disk should get its space back
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.newest = copy.deepcopy(state)

    def load(self, fixed: dict, flags: dict) -> RunState | None:
        """Continue from the newest checkpoint that is whole; None if there is none at all.

        Raises:
            InputError: it belongs to a run with another global batch, seed, data or model, or none is whole.
        """
        self.strategy.write(self.folder, self._finish_rename, main_only=True)
        candidates = self.strategy.broadcast(self._candidates() if self.strategy.is_main else None)
        problems = []
        for folder in candidates:
            state, problem = self._verified(folder)
            if state is None:
                problems.append(f"{folder.name}: {problem}")
                logger.warning("checkpoint %s is passed over: %s", folder, problem)
                continue
            self._compare(folder, state, fixed, flags)
            try:
                self.strategy.load_share(folder, state.step)
            except InputError as error:
                raise InputError(f"checkpoint {folder} cannot be loaded: {error}") from error
            self.newest = copy.deepcopy(state)
            state.fixed, state.flags = fixed, flags
            logger.info("continuing from %s", folder)
            return state
        if problems:
            raise InputError(
                f"no checkpoint in {self.folder} can be used ({'; '.join(problems[:3])}): "
                "remove them, or drop --load_checkpoint"
            )
        logger.warning("no checkpoint in %s yet: starting from the beginning", self.folder)
        return None

    def check(self) -> None:
        """Look whether checkpoints can go here, long before the first is written; InputError if not."""
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"--ckpt_path {self.folder} is a file: choose another folder")
        if (self.folder / "latest").is_dir():
            raise InputError(
                f"{self.folder / 'latest'} is a folder, where the newest checkpoint is to be named: remove it"
            )

    def _clear(self, temporary: Path) -> None:
        """Make the folder to write into, and remove what a killed run left half-written."""
        for left in [*self.folder.glob(".writing_step_*"), *self.folder.glob(".replaced_step_*")]:
            _remove(left)
        temporary.mkdir(parents=True)

    def _finish(self, temporary: Path, state: RunState, entries: dict[str, dict]) -> None:
        _wait_until_visible(temporary, entries)
        content = {"format": 1, "state": vars(state), "files": entries}
        text = json.dumps(content | {"xxh3_128": _digest(content)}, indent=1)
        replace_text(temporary / MANIFEST, text)
        flush_folder(temporary)
        final, replaced = self.folder / f"step_{state.step}", self.folder / f".replaced_step_{state.step}"
        if os.path.lexists(final):
            final.rename(replaced)
        temporary.rename(final)
        flush_folder(self.folder)
        replace_text(self.folder / "latest", final.name)
        _remove(replaced)
        self._prune(state.step)

    def _finish_rename(self) -> None:
        """Put back a checkpoint that a killed run had moved aside for a new one that never came."""
        for replaced in self.folder.glob(".replaced_step_*"):
            final = self.folder / replaced.name.removeprefix(".replaced_")
            if not final.exists():
                replaced.rename(final)

    def _candidates(self) -> list[Path]:
        """Folders to try: what `latest` names, then the others, newest first."""
        pointer = self.folder / "latest"
        named = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
        found = sorted(self.folder.glob("step_*"), key=_step_of, reverse=True)
        return sorted((path for path in found if path.is_dir()), key=lambda path: path.name != named)

    def _verified(self, folder: Path) -> tuple[RunState | None, str | None]:
        """(state, None) of a whole checkpoint, (None, what is wrong with it) of any other. Shared among processes."""
        content, problem = self.strategy.broadcast(_read_manifest(folder) if self.strategy.is_main else None)
        if content is None:
            return None, problem
        mine = sorted(content["files"])[self.strategy.rank :: self.strategy.world_size]
        found = [verify_file(folder / name, content["files"][name]) for name in mine]
        problems = [problem for part in self.strategy.gather_objects(found) for problem in part if problem]
        return (None, problems[0]) if problems else (RunState(**content["state"]), None)

    def _compare(self, folder: Path, state: RunState, fixed: dict, flags: dict) -> None:
        for name, value in fixed.items():
            if state.fixed.get(name) != value:
                raise InputError(
                    f"checkpoint {folder} was made with {name} = {state.fixed.get(name)}, this run has {value}: "
                    f"use the same, or drop --load_checkpoint"
                )
        for name, value in flags.items():
            if state.flags.get(name) != value:
                logger.warning("%s is %s from here on; it was %s until now", name, value, state.flags.get(name))

    def _prune(self, newest: int) -> None:
        """Remove the oldest beyond the limits; those of later steps, from a line that was left, count as oldest."""
        found = [path for path in self.folder.glob("step_*") if (path / MANIFEST).is_file()]  # nobody else's
        found.sort(key=lambda path: (_step_of(path) <= newest, _step_of(path)), reverse=True)
        total = 0
        for number, path in enumerate(found, 1):
            total += folder_bytes(path)
            if number > 1 and (number > self.max_number or total > self.max_bytes):
                shutil.rmtree(path, ignore_errors=True)


def _wait_until_visible(folder: Path, entries: dict[str, dict]) -> None:
    """Return once all processes' files are there; InputError if they never are: a disk that is not shared."""
    deadline = time.monotonic() + SHOWN_WITHIN
    for name, entry in entries.items():
        file = folder / name
        while not file.is_file() or file.stat().st_size != entry["bytes"]:
            if time.monotonic() > deadline:
                raise InputError(
                    f"{file}, which another process wrote, is not visible on the first node: "
                    "put --ckpt_path (or --save_path) on a disk that all nodes share"
                )
            time.sleep(0.5)


def _remove(path: Path) -> None:
    """Remove whatever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _step_of(folder: Path) -> int:
    number = folder.name.removeprefix("step_")
    return int(number) if number.isascii() and number.isdigit() else -1


def _digest(content: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _read_manifest(folder: Path) -> tuple[dict | None, str | None]:
    """(content, None), or (None, why it cannot be used)."""
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, f"it has no {MANIFEST}"
    except (OSError, ValueError, RecursionError) as error:
        return None, f"its {MANIFEST} cannot be read ({str(error).splitlines()[0]})"
    if not isinstance(content, dict) or content.pop("xxh3_128", None) != _digest(content):
        return None, f"its {MANIFEST} is damaged (its checksum differs)"
    if content["format"] != 1:
        return None, f"its format {content['format']} is not known to this version"
    return content, None


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def publish_model(strategy: DeepSpeedEngine, tokenizer, folder: Path) -> None:
    """Save the model and its tokenizer into `folder`, written beside it and then moved in. Collective.

    While files are moved the folder has no config.json, so nobody takes a half of them for a model.

    Raises:
        RunError: on every process, when the folder cannot be written; a full disk leaves what stood there before.
    """
    state_dict = strategy.full_state_dict()
    temporary = folder / ".writing_model"
    strategy.write(folder, lambda: _write_model(strategy, tokenizer, temporary, state_dict), main_only=True)
    strategy.write(folder, lambda: _move_model(temporary, folder), main_only=True)


def _write_model(strategy: DeepSpeedEngine, tokenizer, temporary: Path, state_dict: dict) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        strategy.model.save_pretrained(str(temporary), state_dict=state_dict)
        tokenizer.save_pretrained(str(temporary))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk should get its space back
        raise


def _move_model(temporary: Path, folder: Path) -> None:
    for stale in [
        folder / "config.json",
        *folder.glob("*.safetensors"),
        *folder.glob("*.safetensors.index.json"),
        folder / "adapter_config.json",
    ]:
        stale.unlink(missing_ok=True)
    # config.json comes last: without it the folder is no model yet.
    for file in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
        if file.is_dir():
            shutil.rmtree(folder / file.name, ignore_errors=True)
        file.replace(folder / file.name)
    temporary.rmdir()


class BestModels:
    """The `number` models of lowest evaluation loss under one folder, in `step_N`; `best.json` ranks them."""

    def __init__(self, folder: Path, strategy: DeepSpeedEngine, tokenizer, number: int):
        self.folder, self.strategy, self.tokenizer, self.number = folder, strategy, tokenizer, number

    def consider(self, state: RunState, loss: float, recorded: Iterable) -> None:
        """Save the model if its `loss` is among the lowest so far, and let go of what is not any more. Collective.

        Args:
            loss: reduced over all processes; the main process decides for all of them.
            recorded: the entries of the newest resumable checkpoint, kept until one is written that forgets them: a run
                that continues from there finds every model that it believes to have.
        """
        name = f"step_{state.step}"
        kept = self.strategy.broadcast([entry for entry in state.best if self._stands(entry[1]) and entry[1] != name])
        ranked = sorted([*map(tuple, kept), (loss, name)], key=lambda entry: entry[0])[: self.number]
        if any(kept == name for _, kept in ranked):
            publish_model(self.strategy, self.tokenizer, self.folder / name)
        state.best = ranked
        table = json.dumps([{"loss": value, "model": kept} for value, kept in ranked], indent=2)
        self.strategy.write(self.folder, lambda: replace_text(self.folder / "best.json", table), main_only=True)
        self.prune([*ranked, *recorded])

    def prune(self, entries: Iterable) -> None:
        """Remove every saved model that `entries` do not name."""
        keep = {entry[1] for entry in entries}
        if self.strategy.is_main and self.number:
            for path in self.folder.glob("step_*"):
                if path.name not in keep and self._stands(path.name):
                    shutil.rmtree(path, ignore_errors=True)

    def _stands(self, name: str) -> bool:
        return (self.folder / name / "config.json").is_file()
