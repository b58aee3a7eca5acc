"""What a run tells about itself: rates, waiting, memory, slow steps; and one wandb run over several starts."""

import json
import logging
import time

import pytest
import torch

from general_preference.datasets.packing import Collator
from general_preference.models.attention import RowLayout
from general_preference.trainer.arguments import OutputArguments, parse_arguments
from general_preference.trainer.metrics import ENOUGH, BatchLoss, MetricsLogger, StepClock, Window, read_metrics
from tests.conftest import random_comparisons


class OneProcess:
    """The collectives of a world of one, without an engine."""

    device, world_size, is_main, micro_batches = torch.device("cpu"), 1, True, 1
    all_reduce = staticmethod(lambda sums: sums)
    all_reduce_max = staticmethod(lambda values: list(map(float, values)))
    gather_objects = staticmethod(lambda value: [value])
    peak_memory = staticmethod(lambda: 3_000_000_000)


def micro_batches():
    collator = Collator(0, RowLayout())
    for index, comparison in enumerate(random_comparisons(6, 50, groups=False)):
        batch = collator([comparison | {"weight": 1.0}])
        score = torch.full((1,), 0.1 * (index + 1))
        yield batch, BatchLoss(score, -score, None, -score.sum(), torch.ones(1))


def without_time(metrics: dict) -> dict:
    return {key: value for key, value in metrics.items() if "second" not in key and "memory" not in key}


def test_a_window_that_is_saved_and_continued_logs_the_same():
    arguments = parse_arguments(["--dataset", "x"])
    whole, parts = Window(OneProcess(), True), [Window(OneProcess(), True)]
    for step, (batch, losses) in enumerate(micro_batches(), 1):
        if step == 4:
            parts.append(Window(OneProcess(), True, json.loads(json.dumps(parts[0].state()))))
        for window in (whole, parts[-1]):
            window.add(step, batch, losses)
    expected, found = whole.reduce(arguments), parts[1].reduce(arguments)
    assert without_time(found) == without_time(expected)
    assert expected["train/loss"] == pytest.approx(-0.35) and expected["train/memory_gb"] == 3.0
    assert parts[1].state() is None, "nothing is left after a log line"


def test_rates_count_only_what_this_start_did():
    arguments = parse_arguments(["--dataset", "x"])
    batches = list(micro_batches())
    first = Window(OneProcess(), False)
    for step, (batch, losses) in enumerate(batches[:5], 1):
        first.add(step, batch, losses)
    second = Window(OneProcess(), False, first.state())
    second.add(6, *batches[5])
    time.sleep(0.05)
    metrics = second.reduce(arguments)
    assert metrics["train/step_seconds"] >= 0.05
    assert metrics["train/comparisons_per_second"] == pytest.approx(1 / metrics["train/step_seconds"], rel=0.01)


def test_a_slow_step_is_reported_with_its_lengths(caplog):
    clock, said = StepClock(), []
    (batch, _), *_ = micro_batches()
    for step in range(1, ENOUGH + 4):
        clock.start()
        clock.add(batch)
        time.sleep(0.2 if step in (3, ENOUGH + 2) else 0.002)
        if clock.stop():
            with caplog.at_level(logging.WARNING):
                clock.report(step, OneProcess())
            said.append(step)
    assert said == [ENOUGH + 2], "neither while there is no median yet, nor the usual ones"
    tokens = int((batch.segments >= 0).sum())
    assert f"step {ENOUGH + 2} took 0.2 s" in caplog.text and f"process 0: {tokens}" in caplog.text


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
