"""Numbers of a run: summed over steps and processes, one JSON line per logged step, and wandb when asked.

Metrics are a flat dict handed to one `MetricsLogger`; "train/..." and "eval/<set>/..." are the key families.
"""

import contextlib
import json
import math
import os
import time
from pathlib import Path

import torch

from general_preference.datasets.packing import Batch
from general_preference.errors import InputError, NonFiniteError, RunError
from general_preference.trainer.engine import Engine
from general_preference.trainer.objectives import BatchLoss, Objective
from general_preference.trainer.run_arguments import OutputArguments

TOTALS = ("loss", "tokens", "prompt_tokens", "positions", "comparisons")
METRICS_FILE = "metrics.jsonl"
# What depends on the machine and the moment; everything else is the same whenever a run is repeated or continued.
SPEEDS = ("comparisons_per_second", "tokens_per_second", "step_seconds", "data_seconds", "memory_gb")
MEASURED = tuple(f"train/{name}" for name in SPEEDS)


class MetricsLogger:
    """Appends to metrics.jsonl in the run's folder, and mirrors to wandb. Made on the main process only."""

    def __init__(
        self, folder: Path, output: OutputArguments, config: dict,
        resume_step: int = 0, evaluated: int = 0, wandb_id: str | None = None,
    ):  # fmt: skip
        """Start the file anew, or continue after `resume_step` with the lines up to it.

        Args:
            evaluated: the last step whose evaluation counts as done. wandb_id: the wandb run to continue.
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
        raise InputError("use_wandb needs the package wandb: pip install wandb") from error
    mode = output.use_wandb
    try:
        if mode not in ("online", "offline"):
            wandb.login(key=output.use_wandb, relogin=True)
            mode = "online"
        return wandb.init(
            entity=output.wandb_org, project=output.wandb_project, group=output.wandb_group, name=output.wandb_run_name,
            id=wandb_id, resume="allow" if wandb_id is not None else None, config=config, dir=str(folder),
            mode=os.environ.get("WANDB_MODE", mode),
        )  # fmt: skip
    except (wandb.Error, ValueError) as error:
        reason = str(error).splitlines()[0].replace(output.use_wandb, "KEY")
        raise InputError(f"use_wandb: {reason}; 'offline' needs no account") from error


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


class MetricsAccumulator:
    """Sums of the micro-batches since the last log line; on the device until `reduce` reads them."""

    def __init__(self, engine: Engine, objective: Objective, prompt_length: bool = False):
        """prompt_length: also log the mean prompt length."""
        self.engine, self.objective, self.prompt_length = engine, objective, prompt_length
        self._clear()

    def _clear(self) -> None:
        self.steps = 0
        self.totals = torch.zeros(len(TOTALS), dtype=torch.float64, device=self.engine.device)
        self.sums: torch.Tensor | float = 0.0  # the objective's own
        self.losses: list[tuple[int, list[str], torch.Tensor, torch.Tensor]] = []
        self.norms: list[tuple[int, torch.Tensor]] = []
        self.started, self.waited = time.perf_counter(), 0.0

    def add(self, step: int, batch: Batch, loss: BatchLoss) -> None:
        """Take in one micro-batch without waiting for the device."""
        comparisons = len(batch.prompt_ends)
        prompt_tokens = batch.position_ids.flatten()[batch.prompt_ends].sum() + comparisons
        parts = (loss.total, (batch.segments >= 0).sum(), prompt_tokens)
        self.totals[:3] += torch.stack([part.detach().double() for part in parts])
        self.totals[3] += batch.segments.numel()
        self.totals[4] += comparisons
        self.sums = self.sums + loss.sums
        self.losses.append((step, batch.ids, loss.each, batch.comparison_index))

    def end_step(self, step: int, norm: torch.Tensor) -> None:
        """An optimizer step is done; norm: of its gradient, scalar, the same on all processes."""
        self.steps += 1
        self.norms.append((step, norm.detach()))

    def reduce(self) -> dict[str, float]:
        """Means over all processes since the last call, as {"train/...": value}. Collective.

        Raises:
            NonFiniteError: on every process, if a loss or gradient was not finite on any.
        """
        both = self.engine.context.all_reduce(torch.cat([self.totals, self.sums])).cpu()
        total = dict(zip(TOTALS, both[: len(TOTALS)].tolist(), strict=True))
        self._check_finite(total["loss"])
        micro_batches = self.steps * self.engine.micro_batches
        metrics = {"loss": total["loss"] / micro_batches}
        metrics |= self.objective.metrics(both[len(TOTALS) :], micro_batches)
        if self.prompt_length:
            metrics["prompt_length"] = total["prompt_tokens"] / total["comparisons"]
        metrics["padding_share"] = 1 - total["tokens"] / total["positions"]
        metrics |= self._speed(total)
        metrics["grad_norm"] = self.norms[-1][1].item()
        self._clear()
        return {f"train/{name}": value for name, value in metrics.items()}

    def _speed(self, total: dict[str, float]) -> dict[str, float]:
        """Rates of all processes together since the last log line, and the longest wait and most memory of any."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        mine = torch.tensor([self.waited / self.steps, self.engine.peak_memory() / 1e9], dtype=torch.float64)
        waited, memory = self.engine.context.all_reduce_max(mine).tolist()
        rates = total["comparisons"] / seconds, total["tokens"] / seconds, seconds / self.steps
        return dict(zip(SPEEDS, (*rates, waited, memory), strict=True))

    @contextlib.contextmanager
    def paused(self):
        """What is done inside does not count as training time."""
        before = time.perf_counter()
        yield
        self.started += time.perf_counter() - before

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            bad = []
            for step, ids, each, index in self.losses:
                bad += [(step, ids[number]) for number in index[~torch.isfinite(each)].unique().tolist()]
            found = [entry for part in self.engine.context.gather_objects(bad) for entry in part]
            first = min((step for step, _ in found), default=0)
            names = list(dict.fromkeys(name for step, name in found if step == first))
            shown = "; ".join(names[:4] + ["..."] * (len(names) > 4))
            where = f"at step {first}, in {len(names)} comparisons: {shown}"
            advice = "Look at these records, or lower the learning rate"
            raise NonFiniteError(f"the loss is not finite {where}. {advice}", everywhere=True)
        finite = torch.isfinite(torch.stack([norm for _, norm in self.norms])).tolist()
        for (step, _), fine in zip(self.norms, finite, strict=True):
            if not fine:  # the engine skips such a step, or spoils the weights
                problem = f"the gradient is not finite at step {step}, though the loss is"
                raise NonFiniteError(f"{problem}: lower the learning rate", everywhere=True)
