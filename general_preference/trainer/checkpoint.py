"""Folders that survive a stop: resumable checkpoints, published models, the best models.

Everything is written beside its place and renamed into it, so a reader never sees half a folder. A resumable
checkpoint is `step_N/engine` (DeepSpeed: weights, optimizer, schedule, random states) and `step_N/state.json` (step,
best models, what the run was started with); `latest` names the newest and moves last.
"""

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from general_preference.errors import InputError
from general_preference.files import replace_text
from general_preference.trainer.strategy import Strategy

logger = logging.getLogger(__name__)


@dataclass
class RunState:
    """Where a run stands: all that is not inside the engine.

    step: optimizer steps done. best: [(evaluation loss, folder name)] of the kept best models, lowest first.
    fixed: values that a continued run must share (global batch, seed, number of comparisons).
    """

    step: int = 0
    best: list = field(default_factory=list)
    fixed: dict = field(default_factory=dict)


class CheckpointStore:
    """Resumable checkpoints under one folder, the oldest pruned first. Every method is collective."""

    def __init__(self, folder: Path, strategy: Strategy, max_number: int, max_gigabytes: float):
        self.folder, self.strategy = folder, strategy
        self.max_number, self.max_bytes = max_number, max_gigabytes * 1e9

    def save(self, state: RunState) -> None:
        """Write a checkpoint of `state.step`, make it the latest, prune the others."""
        final = self.folder / f"step_{state.step}"
        temporary = self.folder / f".writing_step_{state.step}"
        if self.strategy.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.strategy.barrier()
        self.strategy.save_engine(temporary, {})
        if self.strategy.is_main:
            (temporary / "state.json").write_text(json.dumps(vars(state)), encoding="utf-8")
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            replace_text(self.folder / "latest", final.name)
            self._prune(final)
        self.strategy.barrier()

    def load(self, expected: dict) -> RunState | None:
        """Continue from the latest checkpoint; None if there is none.

        Raises:
            InputError: it belongs to a run with another global batch, seed or data.
        """
        folder = self.strategy.from_main(self._latest())
        if folder is None:
            logger.warning("no checkpoint in %s yet: starting from the beginning", self.folder)
            return None
        state = RunState(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
        for name, value in expected.items():
            if state.fixed.get(name) != value:
                raise InputError(
                    f"checkpoint {folder} was made with {name} = {state.fixed.get(name)}, this run has {value}: "
                    f"use the same, or drop --load_checkpoint"
                )
        self.strategy.load_engine(folder)
        logger.info("continuing from %s", folder)
        return state

    def _latest(self) -> Path | None:
        pointer = self.folder / "latest"
        folder = self.folder / pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None
        return folder if folder is not None and (folder / "state.json").is_file() else None

    def _prune(self, newest: Path) -> None:
        found = [(path.stat().st_mtime, path) for path in self.folder.glob("step_*") if path.is_dir()]
        total = 0
        for number, (_, path) in enumerate(sorted(found, reverse=True), 1):
            total += folder_bytes(path)
            if path != newest and (number > self.max_number or total > self.max_bytes):
                shutil.rmtree(path)


def publish_model(strategy: Strategy, tokenizer, folder: Path) -> None:
    """Save the model and its tokenizer into `folder`, all files or none visible at a time. Collective."""
    state_dict = strategy.full_state_dict()
    if strategy.is_main:
        temporary = folder / ".writing_model"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        strategy.model.save_pretrained(str(temporary), state_dict=state_dict)
        tokenizer.save_pretrained(str(temporary))
        for stale in [
            *folder.glob("*.safetensors"),
            *folder.glob("*.safetensors.index.json"),
            folder / "adapter_config.json",
        ]:
            stale.unlink(missing_ok=True)
        # config.json comes last: without it the folder is no model yet.
        for file in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
            file.replace(folder / file.name)
        temporary.rmdir()
    strategy.barrier()


def keep_best(strategy: Strategy, tokenizer, folder: Path, state: RunState, loss: float, number: int) -> None:
    """Save the model under `folder` if its evaluation loss is among the `number` lowest so far. Collective.

    `loss` must be reduced over all processes; the main process decides for all of them.
    """
    name = f"step_{state.step}"
    state.best = [tuple(entry) for entry in state.best if (folder / entry[1] / "config.json").is_file()]
    ranked = sorted([*state.best, (loss, name)], key=lambda entry: entry[0])[:number]
    ranked = [tuple(entry) for entry in strategy.from_main(ranked)]
    if any(kept == name for _, kept in ranked):
        publish_model(strategy, tokenizer, folder / name)
    dropped = [entry[1] for entry in state.best if entry[1] not in {kept for _, kept in ranked}]
    state.best = ranked
    if strategy.is_main:
        for old in dropped:
            shutil.rmtree(folder / old, ignore_errors=True)
        replace_text(
            folder / "best.json", json.dumps([{"loss": value, "model": kept} for value, kept in ranked], indent=2)
        )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
