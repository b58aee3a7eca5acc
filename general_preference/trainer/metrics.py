"""Numbers of a run: one JSON line per logged step, and wandb when asked.

Metrics are a flat dict handed to one `MetricsLogger`; "train/..." and "eval/<set>/..." are the key families.
"""

import json
import logging
import os
import statistics
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch

from general_preference.datasets.packing import Batch
from general_preference.errors import InputError, NonFiniteError, RunError
from general_preference.models.statistics import empty_sums, preference_statistics, preference_sums
from general_preference.trainer.arguments import Arguments, OutputArguments
from general_preference.trainer.deepspeed_engine import DeepSpeedEngine

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


logger = logging.getLogger(__name__)

TOTALS = ("loss", "regularizer", "tokens", "positions", "prompt_tokens", "prompts", "aux")
SLOW = 10  # times the median makes a step worth a report
RECENT = 100  # steps whose median is taken
ENOUGH = 10  # steps before there is one: the first ones compile and warm up


@dataclass
class BatchLoss:
    """Losses of one micro-batch, per preference (M,): score, preference loss, regularizer or None; and their total.

    total: scalar, the weighted sum that is backpropagated. temperature: (1,). aux: scalar, the load-balancing loss
    times the micro-batch's share of the step, or None.
    """

    score: torch.Tensor
    preference: torch.Tensor
    regularizer: torch.Tensor | None
    total: torch.Tensor
    temperature: torch.Tensor
    aux: torch.Tensor | None = None


class Window:
    """Sums of the micro-batches since the last log line; on the device until `reduce` reads them."""

    def __init__(self, strategy: DeepSpeedEngine, prompt_length: bool, saved: dict | None = None):
        """saved: what `state` returned when a checkpoint was written between two log lines."""
        self.strategy, self.prompt_length = strategy, prompt_length
        self._clear()
        if saved is not None:
            self.steps = set(saved["steps"])
            self.carried = dict(zip(TOTALS, saved["totals"], strict=True)) | {"steps": len(self.steps)}
            if strategy.is_main:  # the sums of all processes; the others start at zero
                totals = dict(zip(TOTALS, saved["totals"], strict=True))
                if saved["micro_batches"] != strategy.micro_batches:  # losses are weighted so that these average
                    for name in ("loss", "regularizer", "aux"):
                        totals[name] *= strategy.micro_batches / saved["micro_batches"]
                self.sums += self.sums.new_tensor(saved["sums"])
                self.totals += self.totals.new_tensor(list(totals.values()))

    def _clear(self) -> None:
        self.sums = empty_sums(self.strategy.device)
        self.totals = torch.zeros(len(TOTALS), dtype=torch.float64, device=self.strategy.device)
        self.losses: list[tuple[int, list[str], torch.Tensor, torch.Tensor]] = []
        self.temperature: torch.Tensor | None = None
        self.started, self.waited = time.perf_counter(), 0.0
        self.steps: set[int] = set()
        self.carried = dict.fromkeys((*TOTALS, "steps"), 0.0)  # what another start of the run did, in its own time

    def state(self) -> dict | None:
        """The sums over all processes, for a checkpoint; None right after a log line. Collective."""
        if not self.steps:
            return None
        both = self.strategy.all_reduce(torch.cat([self.sums, self.totals])).tolist()
        sums, totals = both[: len(self.sums)], both[len(self.sums) :]
        counted = {"steps": sorted(self.steps), "micro_batches": self.strategy.micro_batches}
        return counted | {"sums": sums, "totals": totals}

    def add(self, step: int, batch: Batch, losses: BatchLoss) -> None:
        """Take in one micro-batch without waiting for the device."""
        real = batch.weight > 0
        each = losses.preference if losses.regularizer is None else losses.preference + losses.regularizer
        self.steps.add(step)
        self.sums += preference_sums(losses.score, batch.label, losses.preference, losses.temperature, real)
        extra = torch.zeros_like(losses.preference) if losses.regularizer is None else losses.regularizer
        prompts = len(batch.prompt_ends)
        prompt_tokens = batch.position_ids.flatten()[batch.prompt_ends].sum() + prompts
        parts = (losses.total, (batch.weight * extra).sum(), (batch.segments >= 0).sum())
        self.totals[:3] += torch.stack([part.detach().double() for part in parts])
        self.totals[3] += batch.segments.numel()
        self.totals[4] += prompt_tokens
        self.totals[5] += prompts
        if losses.aux is not None:
            self.totals[6] += losses.aux.detach()
        self.losses.append((step, batch.ids, each.detach(), batch.comparison_index))
        self.temperature = losses.temperature.detach()

    def reduce(self, arguments: Arguments) -> dict[str, float]:
        """Means over all processes since the last call; raises NonFiniteError if a loss was not finite."""
        self.check_finite()
        divisor = len(self.steps) * self.strategy.micro_batches
        both = self.strategy.all_reduce(torch.cat([self.sums, self.totals])).cpu()
        summary = preference_statistics(both[: len(self.sums)])
        total = dict(zip(TOTALS, both[len(self.sums) :].tolist(), strict=True))
        metrics = {"train/loss": total["loss"] / divisor}
        metrics |= {f"train/{name}": summary[name] for name in ("accuracy", "ties", "probability", "margin")}
        if arguments.loss.add_pretrain_loss:
            metrics |= {"train/preference_loss": summary["loss"], "train/regularizer": total["regularizer"] / divisor}
        if arguments.loss.aux_loss_coef:
            metrics["train/aux_loss"] = total["aux"] / divisor
        if arguments.model.learnable_temperature:
            metrics["train/temperature"] = self.temperature.item()
        if self.prompt_length:
            metrics["train/prompt_length"] = total["prompt_tokens"] / total["prompts"]
        metrics["train/padding_share"] = 1 - total["tokens"] / total["positions"]
        metrics |= self._speed(total)
        self._clear()
        return metrics

    def _speed(self, total: dict[str, float]) -> dict[str, float]:
        """Rates of all processes together since the window began, and the longest wait and most memory of any."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        steps = max(len(self.steps) - self.carried["steps"], 1)
        waited, memory = self.strategy.all_reduce_max([self.waited / steps, self.strategy.peak_memory() / 1e9])
        return {
            "train/comparisons_per_second": (total["prompts"] - self.carried["prompts"]) / seconds,
            "train/tokens_per_second": (total["tokens"] - self.carried["tokens"]) / seconds,
            "train/step_seconds": seconds / steps,
            "train/data_seconds": waited,
            "train/memory_gb": memory,
        }

    def pause(self, work):
        """Do `work` without counting its time as training."""
        before = time.perf_counter()
        result = work()
        self.started += time.perf_counter() - before
        return result

    def check_finite(self) -> None:
        """Raise on every process if any loss of the window is NaN or infinite on any of them. Collective."""
        if torch.isfinite(self.strategy.all_reduce(self.totals[:2].clone())).all():
            return
        bad = [
            (step, ids[index])
            for step, ids, each, owner in self.losses
            for index in owner[~torch.isfinite(each)].unique().tolist()
        ]
        found = [entry for part in self.strategy.gather_objects(bad) for entry in part]
        if found:
            first = min(step for step, _ in found)
            names = list(dict.fromkeys(name for step, name in found if step == first))
            raise NonFiniteError(
                f"the loss is not finite at step {first}, in {len(names)} comparisons: {'; '.join(names[:4])}"
                f"{'; ...' if len(names) > 4 else ''}. Look at these records, or lower --learning_rate",
                everywhere=True,
            )


class StepClock:
    """How long steps take, and which of them took very long."""

    def __init__(self):
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.seconds, self.tokens = 0.0, []

    def start(self) -> None:
        """A step begins."""
        self.started, self.tokens = time.perf_counter(), []

    def add(self, batch: Batch) -> None:
        """Remember how much a micro-batch of this step holds; `batch` is not on the device yet."""
        self.tokens.append(int((batch.segments >= 0).sum()))

    def stop(self) -> bool:
        """The step ends; whether it took more than `SLOW` times the median of those before."""
        self.seconds = time.perf_counter() - self.started
        slow = len(self.recent) >= ENOUGH and self.seconds > SLOW * statistics.median(self.recent)
        self.recent.append(self.seconds)
        return slow

    def report(self, step: int, strategy: DeepSpeedEngine) -> None:
        """Log a slow step with the tokens of its micro-batches on every process. Collective."""
        parts = strategy.gather_objects((self.seconds, self.tokens))
        longest, _ = max(parts)
        held = "; ".join(
            f"process {rank}: {', '.join(map(str, tokens))}" for rank, (_, tokens) in enumerate(parts[:16])
        )
        logger.warning(
            "step %d took %.1f s, the median is %.2f s; tokens of its micro-batches: %s%s",
            step, longest, statistics.median(self.recent), held, "; ..." if len(parts) > 16 else "",
        )  # fmt: skip
