"""Finished models in a run's folder: the model itself, and the best ones of its evaluations."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from general_preference.files import replace_text
from general_preference.trainer.checkpoint import RunState
from general_preference.trainer.strategy import Strategy


def publish_model(strategy: Strategy, tokenizer, folder: Path) -> None:
    """Save the model and its tokenizer into `folder`, written beside it and then moved in. Collective.

    While files are moved the folder has no config.json, so nobody takes a half of them for a model.

    Raises:
        RunError: on every process, when the folder cannot be written; a full disk leaves what stood there before.
    """
    state_dict = strategy.full_state_dict()
    temporary = folder / ".writing_model"
    needed = sum(tensor.nbytes for tensor in state_dict.values())
    strategy.write(folder, needed, lambda: _write_model(strategy, tokenizer, temporary, state_dict), main_only=True)
    strategy.write(folder, 0, lambda: _move_model(temporary, folder), main_only=True)


def _write_model(strategy: Strategy, tokenizer, temporary: Path, state_dict: dict) -> None:
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

    def __init__(self, folder: Path, strategy: Strategy, tokenizer, number: int):
        self.folder, self.strategy, self.tokenizer, self.number = folder, strategy, tokenizer, number

    def consider(self, state: RunState, loss: float, recorded: Iterable) -> None:
        """Save the model if its `loss` is among the lowest so far, and let go of what is not any more. Collective.

        Args:
            loss: reduced over all processes; the main process decides for all of them.
            recorded: the entries of the newest resumable checkpoint, kept until one is written that forgets them: a run
                that continues from there finds every model that it believes to have.
        """
        name = f"step_{state.step}"
        kept = self.strategy.from_main([entry for entry in state.best if self._stands(entry[1]) and entry[1] != name])
        ranked = sorted([*map(tuple, kept), (loss, name)], key=lambda entry: entry[0])[: self.number]
        if any(kept == name for _, kept in ranked):
            publish_model(self.strategy, self.tokenizer, self.folder / name)
        state.best = ranked
        table = json.dumps([{"loss": value, "model": kept} for value, kept in ranked], indent=2)
        self.strategy.write(self.folder, 0, lambda: replace_text(self.folder / "best.json", table), main_only=True)
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
