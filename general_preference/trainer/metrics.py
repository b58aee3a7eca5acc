"""Numbers of a run: one JSON line per logged step, and wandb when asked.

Metrics are a flat dict handed to one `MetricsLogger`; "train/..." and "eval/<set>/..." are the key families.
"""

import json
import logging
import os
from pathlib import Path

from general_preference.errors import InputError, RunError
from general_preference.trainer.arguments import OutputArguments

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
# What depends on the machine and the moment; everything else is the same whenever a run is repeated or continued.
MEASURED = tuple(
    f"train/{name}"
    for name in ("comparisons_per_second", "tokens_per_second", "step_seconds", "data_seconds", "memory_gb")
)


class MetricsLogger:
    """Appends to metrics.jsonl in the run's folder, and mirrors to wandb. Made on the main process only."""

    def __init__(
        self,
        folder: Path,
        output: OutputArguments,
        config: dict,
        resume_step: int = 0,
        evaluated: int = 0,
        wandb_id: str | None = None,
    ):
        """Start the file anew, or, when a run continues after `resume_step`, keep its lines up to that step.

        Args:
            evaluated: the last step whose evaluation the continued run counts as done.
            wandb_id: the wandb run to continue.
        """
        self.path = folder / METRICS_FILE
        last = {True: min(evaluated, resume_step), False: resume_step}
        rows = read_metrics(self.path) if resume_step else []
        kept = [row for row in rows if row["step"] <= last[any(key.startswith("eval/") for key in row)]]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        temporary.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._wandb = _start_wandb(folder, output, config, wandb_id) if output.use_wandb else None

    @property
    def wandb_id(self) -> str | None:
        """What a continued run names to go on with the same wandb run."""
        return None if self._wandb is None else self._wandb.id

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write one line {"step": step, ...}; it is on disk when this returns."""
        try:
            self._file.write(json.dumps({"step": step} | metrics) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror}") from error
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def flush(self) -> None:
        """Have the disk hold what was logged, before a checkpoint counts on it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and finish the wandb run."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(folder: Path, output: OutputArguments, config: dict, wandb_id: str | None):
    try:
        import wandb
    except ImportError as error:
        raise InputError("--use_wandb needs the package wandb: pip install wandb") from error
    mode = output.use_wandb
    try:
        if mode not in ("online", "offline"):
            wandb.login(key=output.use_wandb, relogin=True)
            mode = "online"
        return wandb.init(
            entity=output.wandb_org,
            project=output.wandb_project,
            group=output.wandb_group,
            name=output.wandb_run_name,
            id=wandb_id,
            resume="allow" if wandb_id is not None else None,
            config=config,
            dir=str(folder),
            mode=os.environ.get("WANDB_MODE", mode),
        )
    except (wandb.Error, ValueError) as error:
        reason = str(error).splitlines()[0].replace(output.use_wandb, "KEY")
        raise InputError(f"--use_wandb: {reason}; --use_wandb offline needs no account") from error


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line cut short by a crash is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows
