"""What a run tells about itself: means over a log window, rates, what is not finite; one wandb run, several starts."""

import time

import pytest
import torch

from general_preference.datasets.packing import Collator
from general_preference.errors import NonFiniteError
from general_preference.models.attention import RowLayout
from general_preference.trainer.metrics import MetricsAccumulator, MetricsLogger, read_metrics
from general_preference.trainer.objectives import BatchLoss
from general_preference.trainer.run_arguments import OutputArguments
from tests.conftest import random_comparisons


class OneProcess:
    """The engine and the collectives of a world of one."""

    device, micro_batches = torch.device("cpu"), 1
    all_reduce = all_reduce_max = staticmethod(lambda values: values)
    gather_objects = staticmethod(lambda value: [value])
    peak_memory = staticmethod(lambda: 3_000_000_000)
    context = property(lambda self: self)


class Mean:
    """An objective that logs the mean of one number."""

    metrics = staticmethod(lambda sums, micro_batches: {"number": sums[0].item() / micro_batches})


def accumulator(losses, norms) -> MetricsAccumulator:
    """A window with a step of one comparison for each loss and norm."""
    window, collator = MetricsAccumulator(OneProcess(), Mean(), prompt_length=True), Collator(0, RowLayout())
    comparisons = random_comparisons(len(losses), 50, groups=False)
    for step, (comparison, value, norm) in enumerate(zip(comparisons, losses, norms, strict=True), 1):
        loss = torch.tensor(float(value))
        window.add(step, collator([comparison]), BatchLoss(loss, loss[None], torch.full((1,), 2.0 * step).double()))
        window.end_step(step, torch.tensor(float(norm)))
    return window


def test_a_log_line_is_the_mean_since_the_last_one():
    window = accumulator([1, 2, 6], [0.1, 0.2, 0.3])
    time.sleep(0.05)
    metrics = window.reduce()
    assert metrics["train/loss"] == 3 and metrics["train/number"] == 4
    assert metrics["train/grad_norm"] == pytest.approx(0.3) and metrics["train/memory_gb"] == 3
    assert metrics["train/step_seconds"] >= 0.05 / 3 and metrics["train/prompt_length"] > 3
    assert metrics["train/comparisons_per_second"] == pytest.approx(1 / metrics["train/step_seconds"], rel=0.01)
    assert window.steps == 0 and window.losses == []


def test_a_pause_is_no_training_time():
    window = accumulator([1], [1])
    with window.paused():
        time.sleep(0.3)
    assert window.reduce()["train/step_seconds"] < 0.3


def test_what_is_not_finite_is_named():
    with pytest.raises(NonFiniteError, match="the loss is not finite at step 2, in 1 comparisons: c1"):
        accumulator([1, float("nan"), float("inf")], [1, 1, 1]).reduce()
    with pytest.raises(NonFiniteError, match="the gradient is not finite at step 3"):
        accumulator([1, 1, 1, 1], [1, 1, float("inf"), float("nan")]).reduce()


def test_a_continued_run_keeps_its_wandb_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    output = OutputArguments(use_wandb="offline")
    first = MetricsLogger(tmp_path, output, {})
    for step in (1, 2, 3):
        first.log(step, {"train/loss": float(step)})
    first.log(2, {"eval/x/loss": 0.5})
    first.log(3, {"eval/x/loss": 0.4})
    first.flush()
    name = first.wandb_id
    first.close()
    again = MetricsLogger(tmp_path, output, {}, resume_step=2, wandb_id=name)
    again.log(3, {"train/loss": 3.5})
    assert again.wandb_id == name
    again.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    # The evaluation of step 2 is not among what the checkpoint knows: it will be made again.
    assert rows == [{"step": step, "train/loss": loss} for step, loss in ((1, 1.0), (2, 2.0), (3, 3.5))]
