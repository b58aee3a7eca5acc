"""What a run leaves on disk to go on from, and its finished models.

`step_N/` holds one file per process (shards.py) and `manifest.json`: the run's state, size and checksum of each file.
It is written as `.writing_step_N`, flushed and renamed; `latest` names the newest. Loading skips what is damaged or
incomplete, says why, and takes the newest that is whole.
"""

import copy
import json
import logging
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from general_preference.errors import InputError
from general_preference.files import flush_folder, replace_text
from general_preference.trainer.engine import Engine
from general_preference.trainer.folders import MANIFEST, foreign_in_checkpoint, is_own_model, is_replaced
from general_preference.trainer.shards import verify_file

logger = logging.getLogger(__name__)

FORMAT = 3
SHOWN_WITHIN = 60  # seconds in which a network file system shows what another node has written


@dataclass
class RunState:
    """Where a run stands: all that is not a tensor.

    step: optimizer steps done. evaluated: the step of the last evaluation. best: [(evaluation loss, folder name)] of
    the kept best models, lowest first. wandb_id: the wandb run. fixed: values that a continued run must share. flags:
    those that it may change; a difference is logged.
    """

    step: int = 0
    evaluated: int = 0
    best: list = field(default_factory=list)
    wandb_id: str | None = None
    fixed: dict = field(default_factory=dict)
    flags: dict = field(default_factory=dict)


class CheckpointStore:
    """Resumable checkpoints under one folder, the oldest pruned first. Every method is collective."""

    def __init__(self, folder: Path, engine: Engine, max_number: int, max_gigabytes: float):
        """Raises InputError, on every process, if `folder` is a file."""
        self.folder, self.engine, self.context = folder, engine, engine.context
        self.max_number, self.max_bytes = max_number, max_gigabytes * 1e9
        self.newest: RunState | None = None  # of this run
        if folder.is_file():
            raise InputError(f"ckpt_path {folder} is a file: choose another folder")

    def save(self, state: RunState) -> None:
        """Write a checkpoint of `state.step`, make it the latest, prune the others.

        Raises:
            RunError: on every process, when the folder cannot be written.
        """
        temporary = self.folder / f".writing_step_{state.step}"
        self.context.write(self.folder, lambda: self._clear(temporary), main_only=True)
        try:
            entries = self.engine.save(temporary)
            self.context.write(self.folder, lambda: self._finish(temporary, state, entries), main_only=True)
        except BaseException:
            if self.context.is_main:  # a full disk should get its space back
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.newest = copy.deepcopy(state)

    def load(self, fixed: dict, flags: dict) -> RunState | None:
        """Continue from the newest checkpoint that is whole; None if there is none at all.

        Raises:
            InputError: it belongs to a run with another global batch, seed, data or model, or none is whole.
        """
        candidates = self.context.broadcast(self._candidates() if self.context.is_main else None)
        problems = []
        for folder in candidates:
            state, problem = self._verified(folder)
            if state is None:
                problems.append(f"{folder.name}: {problem}")
                logger.warning("checkpoint %s is skipped: %s", folder, problem)
                continue
            self._compare(folder, state, fixed, flags)
            try:
                self.engine.load(folder, state.step)
            except InputError as error:
                raise InputError(f"checkpoint {folder} cannot be loaded: {error}") from error
            self.newest = copy.deepcopy(state)
            state.fixed, state.flags = fixed, flags
            logger.info("continuing from %s", folder)
            return state
        if problems:
            why = "; ".join(problems[:3])
            raise InputError(f"no checkpoint in {self.folder} can be used ({why}): remove them, or do not load")
        logger.warning("no checkpoint in %s yet: starting from the beginning", self.folder)
        return None

    def _clear(self, temporary: Path) -> None:
        """Make the folder to write into, and remove what a killed run left half-written."""
        for left in self.folder.glob(".writing_step_*"):
            shutil.rmtree(left)
        temporary.mkdir(parents=True)

    def _finish(self, temporary: Path, state: RunState, entries: dict[str, dict]) -> None:
        _wait_until_visible(temporary, entries)
        content = {"format": FORMAT, "state": vars(state), "files": entries}
        text = json.dumps(content | {"xxh3_128": _digest(content)}, indent=1)
        replace_text(temporary / MANIFEST, text)
        flush_folder(temporary)
        final = self.folder / f"step_{state.step}"
        if found := foreign_in_checkpoint(final):
            raise InputError(f"{final} holds {found}, which is of no checkpoint")
        if final.is_dir():  # of an earlier run, or of this one before it went back
            shutil.rmtree(final)
        final.unlink(missing_ok=True)
        temporary.rename(final)
        flush_folder(self.folder)
        replace_text(self.folder / "latest", final.name)
        self._prune(state.step)

    def _candidates(self) -> list[Path]:
        """Folders to try: what `latest` names, then the others, newest first."""
        pointer = self.folder / "latest"
        named = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
        found = sorted(self.folder.glob("step_*"), key=_step_of, reverse=True)
        return sorted((path for path in found if path.is_dir()), key=lambda path: path.name != named)

    def _verified(self, folder: Path) -> tuple[RunState | None, str | None]:
        """(state, None) of a whole checkpoint, (None, what is wrong) of any other. Shared among processes."""
        content, problem = self.context.broadcast(_read_manifest(folder) if self.context.is_main else None)
        if content is None:
            return None, problem
        mine = sorted(content["files"])[self.context.rank :: self.context.world_size]
        found = [verify_file(folder / name, content["files"][name]) for name in mine]
        problems = [problem for part in self.context.gather_objects(found) for problem in part if problem]
        return (None, problems[0]) if problems else (RunState(**content["state"]), None)

    def _compare(self, folder: Path, state: RunState, fixed: dict, flags: dict) -> None:
        for name, value in fixed.items():
            if state.fixed.get(name) != value:
                before = f"checkpoint {folder} was made with {name} = {state.fixed.get(name)}"
                raise InputError(f"{before}, this run has {value}: use the same, or start without load_checkpoint")
        for name, value in flags.items():
            if state.flags.get(name) != value:
                logger.warning("%s is %s from here on; it was %s until now", name, value, state.flags.get(name))

    def _prune(self, newest: int) -> None:
        """Remove the oldest beyond the limits; those of later steps, left by an earlier run, count as oldest."""
        found = [path for path in self.folder.glob("step_*") if (path / MANIFEST).is_file()]
        found = [path for path in found if not foreign_in_checkpoint(path)]
        found.sort(key=lambda path: (_step_of(path) <= newest, _step_of(path)), reverse=True)
        total = 0
        for number, path in enumerate(found, 1):
            total += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            if number > 1 and (number > self.max_number or total > self.max_bytes):
                shutil.rmtree(path, ignore_errors=True)


def _wait_until_visible(folder: Path, entries: dict[str, dict]) -> None:
    """Return once all processes' files are there; InputError if they never are: a disk that is not shared."""
    deadline = time.monotonic() + SHOWN_WITHIN
    while missing := [name for name in entries if not (folder / name).is_file()]:
        if time.monotonic() > deadline:
            where = f"{folder.parent}: {missing[0]} of another process does not show up"
            raise InputError(f"{where}: checkpoints need a disk that all nodes share")
        time.sleep(0.5)


def _step_of(folder: Path) -> int:
    number = folder.name.removeprefix("step_")
    return int(number) if number.isascii() and number.isdigit() else -1


def _digest(content: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _read_manifest(folder: Path) -> tuple[dict | None, str | None]:
    """(content, None), or (None, why it cannot be used)."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, f"it has no {MANIFEST}"
    except (OSError, ValueError, RecursionError) as error:
        return None, f"its {MANIFEST} cannot be read ({str(error).splitlines()[0]})"
    if not isinstance(content, dict) or content.pop("xxh3_128", None) != _digest(content):
        return None, f"its {MANIFEST} is damaged (its checksum differs)"
    if content["format"] != FORMAT:
        return None, f"it has format {content['format']}, this version reads {FORMAT}"
    return content, None


def save_model(engine: Engine, tokenizer, folder: Path) -> None:
    """Save the model and its tokenizer into `folder`, written beside it and then moved in. Collective.

    While files are moved the folder has no config.json, so nobody takes a half of them for a model.

    Raises:
        RunError: on every process, when the folder cannot be written; a full disk leaves the earlier model.
    """
    state_dict = engine.full_state_dict()

    def write() -> None:
        temporary = folder / ".writing_model"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            engine.model.save_pretrained(str(temporary), state_dict=state_dict)
            tokenizer.save_pretrained(str(temporary))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _move_model(temporary, folder)

    engine.context.write(folder, write, main_only=True)


def _move_model(temporary: Path, folder: Path) -> None:
    for stale in sorted(folder.iterdir(), key=lambda path: path.name != "config.json"):
        if is_replaced(stale.name):
            stale.unlink()
    for file in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
        if file.is_dir():
            shutil.rmtree(folder / file.name, ignore_errors=True)
        file.replace(folder / file.name)
    temporary.rmdir()


class BestModels:
    """The `number` models of lowest evaluation loss under one folder, in `step_N`; `best.json` ranks them."""

    def __init__(self, folder: Path, engine: Engine, tokenizer, number: int):
        self.folder, self.engine, self.tokenizer, self.number = folder, engine, tokenizer, number
        self.own = {entry["model"] for entry in _read_table(folder / "best.json")}  # the folders that may be removed

    def consider(self, state: RunState, loss: float, recorded: Iterable) -> None:
        """Save the model if its `loss` is among the lowest so far, and remove those that no longer are. Collective.

        Args:
            loss: reduced over all processes; the main process decides for all of them.
            recorded: entries of the newest resumable checkpoint, kept until the next one: a run that continues from it
                finds every model that it lists.
        """
        name, context = f"step_{state.step}", self.engine.context
        kept = context.broadcast([entry for entry in state.best if self._exists(entry[1]) and entry[1] != name])
        ranked = sorted([*map(tuple, kept), (loss, name)], key=lambda entry: entry[0])[: self.number]
        if any(kept == name for _, kept in ranked):
            context.write(self.folder, lambda: self._check(name), main_only=True)
            save_model(self.engine, self.tokenizer, self.folder / name)
        state.best = ranked
        table = json.dumps([{"loss": value, "model": kept} for value, kept in ranked], indent=2)
        context.write(self.folder, lambda: replace_text(self.folder / "best.json", table), main_only=True)
        self.prune([*ranked, *recorded])

    def prune(self, entries: Iterable) -> None:
        """Remove every model that a run saved here and `entries` do not name."""
        keep = {entry[1] for entry in entries}
        self.own |= keep
        if self.engine.context.is_main and self.number:
            for path in self.folder.glob("step_*"):
                if path.name in self.own - keep and self._exists(path.name):
                    shutil.rmtree(path, ignore_errors=True)

    def _check(self, name: str) -> None:
        if name not in self.own and not is_own_model(self.folder / name):
            raise InputError(f"{name} is there already, and no run saved it")

    def _exists(self, name: str) -> bool:
        return (self.folder / name / "config.json").is_file()


def _read_table(path: Path) -> list[dict]:
    """The entries of a best.json; none if there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [entry for entry in found if isinstance(entry["model"], str)]
    except (OSError, ValueError, TypeError, KeyError):
        return []
