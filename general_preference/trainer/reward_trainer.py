"""The loop: forward, loss, backward, step; evaluate, log, save. One for Bradley-Terry, GPM and hybrid heads.

Knows neither DeepSpeed nor ranks (strategy.py) nor how rows are laid out (datasets/packing.py).
"""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from general_preference.datasets.packing import Batch, Collator
from general_preference.datasets.preparation import Comparisons
from general_preference.datasets.sampler import StepSampler, evaluation_batches
from general_preference.errors import InputError, NonFiniteError
from general_preference.files import replace_text
from general_preference.models.experts import balance_coefficient
from general_preference.models.losses import preference_loss, regularizer
from general_preference.models.score import preference_score
from general_preference.models.statistics import empty_sums, preference_statistics, preference_sums
from general_preference.trainer.arguments import Arguments, LossArguments
from general_preference.trainer.checkpoint import CheckpointStore, RunState, keep_best, publish_model
from general_preference.trainer.metrics import METRICS_FILE, MetricsLogger, read_metrics
from general_preference.trainer.pictures import EmbeddedCycle, draw_cycles, draw_training_curves, embedded_cycle
from general_preference.trainer.strategy import Strategy

logger = logging.getLogger(__name__)


@dataclass
class BatchLoss:
    """Losses of one micro-batch, per preference (M,): score, preference loss, regulariser or None; and their total.

    total: scalar, the weighted sum that is backpropagated. temperature: (1,). aux: scalar, the load-balancing loss
    times the micro-batch's share of the step, or None.
    """

    score: torch.Tensor
    preference: torch.Tensor
    regularizer: torch.Tensor | None
    total: torch.Tensor
    temperature: torch.Tensor
    aux: torch.Tensor | None = None


def batch_loss(output: dict[str, torch.Tensor], batch: Batch, arguments: LossArguments) -> BatchLoss:
    """(1 - c) * preference + c * regulariser + a * load balance of a micro-batch, from the model's output.

    Without the regulariser c = 0. Weights are the batch's own, so any split into micro-batches gives one gradient.
    The load-balancing loss alone depends on the split: it is that of each micro-batch's tokens, and a step's is the
    mean over its micro-batches on all processes, weighted by their comparisons (as transformers' trainer has it).
    """
    embeddings, gates = output["embeddings"], output.get("gates")
    gate = None if gates is None else gates[batch.owner]
    score = preference_score(embeddings[batch.first], embeddings[batch.second], gate)
    preference = preference_loss(
        score,
        kind=arguments.loss,
        temperature=output["temperature"],
        margin=batch.margin if arguments.margin_loss else 0.0,
        target=arguments.regression_target_margin,
        label=batch.label,
    )
    each, extra = preference, None
    if batch.targets is not None:
        extra = _regularizer(output, batch, arguments)
        each = (1 - arguments.ptx_loss_coef) * preference + arguments.ptx_loss_coef * extra
    total, aux = (batch.weight * each).sum(), None
    if "aux_loss" in output:
        aux = batch.weight.sum() * output["aux_loss"]  # 1 * aux_loss, but in the last step of an epoch
        total = total + arguments.aux_loss_coef * aux
    return BatchLoss(score, preference, extra, total, output["temperature"], aux)


def _regularizer(output: dict[str, torch.Tensor], batch: Batch, arguments: LossArguments) -> torch.Tensor:
    log_probs, counts = output["log_probs"], output["counts"]
    responses = len(batch.response_ends)

    def sequence(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if arguments.ptx_response_only:
            return log_probs[index], counts[index]
        prompts = responses + batch.owner
        return log_probs[index] + log_probs[prompts], counts[index] + counts[prompts]

    return regularizer(
        sequence(batch.first),
        sequence(batch.second) if arguments.ptx_loss == "reference_free" else None,
        kind=arguments.ptx_loss,
        beta=arguments.reward_scaler_beta,
        margin=arguments.reward_margin,
    )


class RewardTrainer:
    """Trains the model inside `strategy` on one table of comparisons and evaluates it on named others."""

    def __init__(self, arguments: Arguments, strategy: Strategy, model, tokenizer, train_table, eval_tables: dict):
        """Wrap `model` in the engine and lay out the run; `eval_tables` maps set names to tokenised tables."""
        self.arguments, self.strategy, self.tokenizer = arguments, strategy, tokenizer
        optimizer, loss = arguments.optimizer, arguments.loss
        kind = "both" if loss.ptx_loss == "reference_free" else "chosen"
        layout = model.train().layout_on(strategy.device)  # the engine will move the model there
        kernels = strategy.gather_objects(model.config._attn_implementation)
        if len(set(kernels)) > 1:  # then they would deal out a step in different ways
            raise InputError(f"processes chose different attention kernels ({kernels}): set --attn_implementation")
        loss.aux_loss_coef = balance_coefficient(model.language_model, loss.aux_loss_coef)
        arguments.check_routing()
        kind = kind if loss.add_pretrain_loss else ""
        self.collator = Collator(tokenizer.pad_token_id, layout, kind, loss.aux_loss_coef > 0)
        self.train_set = Comparisons(train_table)
        self.eval_sets = {name: Comparisons(table) for name, table in eval_tables.items()}
        self.sampler = StepSampler(
            train_table["length"][:],
            micro_batch_size=optimizer.micro_train_batch_size,
            accumulation=optimizer.accumulated_gradient,
            world_size=strategy.world_size,
            rank=strategy.rank,
            seed=optimizer.seed,
            group_size=arguments.data.group_size,
            groups=train_table["group"][:] if arguments.data.group_size > 1 else None,
            packed=layout.packed,
        )
        self.steps = self.sampler.steps_per_epoch * optimizer.max_epochs
        self.folder = Path(arguments.output.save_path)
        self.cycles: dict[str, EmbeddedCycle] = {}
        strategy.prepare(model, self.steps)
        fixed = {
            "global_batch_size": strategy.global_batch_size,
            "seed": optimizer.seed,
            "comparisons": len(train_table),
            "max_epochs": optimizer.max_epochs,
            "world_size": strategy.world_size,
            "zero_stage": arguments.engine.zero_stage,
            "value_head_dim": model.preference.dim,
            "lora_rank": arguments.model.lora_rank,
        }
        self.state = RunState(fixed=fixed)
        output = arguments.output
        ckpt_path = Path(output.ckpt_path) if output.ckpt_path else self.folder / "checkpoint"
        self.store = CheckpointStore(ckpt_path, strategy, output.max_ckpt_num, output.max_ckpt_mem)
        if output.load_checkpoint:
            self.state = self.store.load(fixed) or self.state

    def fit(self) -> dict[str, dict]:
        """Train to the end, evaluate, save the model, metrics and pictures; returns the last evaluation per set.

        Raises:
            NonFiniteError: on every process, in the step after which it is noticed at the latest.
        """
        output, start = self.arguments.output, self.state.step
        self.metrics = self._metrics_logger(start)
        window = Window(self.strategy, self.arguments.data.return_prompt_length)
        results: dict[str, dict] = {}
        quiet = not self.strategy.is_main
        with tqdm(total=self.steps, initial=start, desc="train", unit="step", disable=quiet, mininterval=1) as bar:
            for step in self.train_steps(window):
                if step % output.logging_steps == 0 or step == self.steps:
                    bar.set_postfix(self._log(window, step), refresh=False)
                bar.update()
                if self._evaluate_now(step):
                    window.check_finite()
                    results = window.pause(lambda: self._evaluate_all(self.state.step))
                if output.save_steps > 0 and step % output.save_steps == 0:
                    window.check_finite()
                    window.pause(lambda: self.store.save(self.state))
        if self.eval_sets and not results:  # a finished run that was continued: nothing was left to train
            results = {name: self.evaluate(name) for name in self.eval_sets}
        self._finish(results)
        return results

    def train_steps(self, window: "Window") -> Iterator[int]:
        """Optimizer steps from where the run stands to its end; yields the number of each when it is done."""
        epochs, start = self.arguments.optimizer.max_epochs, self.state.step
        batches = iter(self._loader(self.train_set, self.sampler.micro_batches(epochs, start)))
        for step in range(start + 1, self.steps + 1):
            self._step(batches, window, step)
            self.state.step = step
            yield step

    def _step(self, batches, window: "Window", step: int) -> None:
        self.strategy.train_mode(True)
        self.learning_rate = (
            self.strategy.learning_rate()
        )  # of this step: the engine moves on with its last micro-batch
        for _ in range(self.arguments.optimizer.accumulated_gradient):
            batch = next(batches).to(self.strategy.device)
            losses = batch_loss(self.strategy.forward(**batch.model_inputs()), batch, self.arguments.loss)
            self.strategy.backward(losses.total)
            self.strategy.step()
            window.add(step, batch, losses)

    def _log(self, window: "Window", step: int) -> dict[str, str]:
        """Reduce the window over all processes and write it; returns what the bar shows."""
        metrics = window.reduce(self.arguments)
        norm = self.strategy.gradient_norm()
        metrics |= {"train/grad_norm": norm} if norm == norm else {}  # NaN: the engine does not know it (ZeRO 0)
        metrics |= {
            "train/learning_rate": self.learning_rate,
            "train/epoch": step / self.sampler.steps_per_epoch,
        }
        if self.metrics is not None:
            self.metrics.log(step, metrics)
        shown = {"loss": "loss", "acc": "accuracy", "lr": "learning_rate", "cmp/s": "comparisons_per_second"}
        return {short: f"{metrics['train/' + name]:.3g}" for short, name in shown.items()}

    def _evaluate_now(self, step: int) -> bool:
        every = self.arguments.output.eval_steps
        due = step % every == 0 if every > 0 else step % self.sampler.steps_per_epoch == 0
        return bool(self.eval_sets) and (due or step == self.steps)

    def _evaluate_all(self, step: int) -> dict[str, dict]:
        self.cycles = {}
        results = {name: self.evaluate(name) for name in self.eval_sets}
        bad = [name for name, row in results.items() if not math.isfinite(row["loss"])]
        if bad:
            raise NonFiniteError(
                f"the evaluation loss on {bad[0]} is not finite after step {step}: lower --learning_rate",
                everywhere=True,
            )
        if self.metrics is not None:
            self.metrics.log(
                step, {f"eval/{name}/{key}": value for name, row in results.items() for key, value in row.items()}
            )
        self.strategy.model.card.results = results
        number = self.arguments.output.save_best_model
        if number:
            count = sum(row["n"] for row in results.values())
            loss = sum(row["loss"] * row["n"] for row in results.values()) / count
            keep_best(self.strategy, self.tokenizer, self.folder / "best", self.state, loss, number)
        return results

    @torch.no_grad()
    def evaluate(self, name: str) -> dict[str, float]:
        """Statistics of one evaluation set, each comparison exactly once, the same numbers on every process.

        Returns:
            the keys of `statistics.preference_statistics`; the loss is the preference loss without the regulariser.
        """
        comparisons, strategy = self.eval_sets[name], self.strategy
        items = evaluation_batches(
            comparisons.table["length"][:],
            micro_batch_size=self.arguments.optimizer.micro_train_batch_size,
            world_size=strategy.world_size,
            rank=strategy.rank,
        )
        strategy.train_mode(False)
        plain = dataclasses.replace(self.collator, regularized="", balanced=False)
        sums = empty_sums(strategy.device)
        loader = self._loader(comparisons, items, plain)
        for batch in tqdm(loader, desc=f"eval {name}", leave=False, disable=not strategy.is_main, mininterval=1):
            batch = batch.to(strategy.device)
            output = strategy.forward(**batch.model_inputs())
            losses = batch_loss(output, batch, self.arguments.loss)
            real = batch.weight > 0
            sums += preference_sums(losses.score, batch.label, losses.preference, losses.temperature, real)
            if strategy.is_main and name not in self.cycles:
                cycle = embedded_cycle(name, batch, output, self.tokenizer)
                self.cycles |= {name: cycle} if cycle is not None else {}
        return preference_statistics(strategy.all_reduce(sums).cpu())

    def _finish(self, results: dict[str, dict]) -> None:
        """Save the model first; then what describes it."""
        self.strategy.model.card.results = results
        publish_model(self.strategy, self.tokenizer, self.folder)
        if self.metrics is None:
            return
        self.metrics.close()
        replace_text(self.folder / "eval_metrics.json", json.dumps(results, indent=2))
        draw_training_curves(read_metrics(self.folder / METRICS_FILE), self.folder / "training_curves.png")
        draw_cycles(list(self.cycles.values())[:4], self.folder / "embeddings.png")

    def _metrics_logger(self, start: int) -> MetricsLogger | None:
        def make() -> MetricsLogger:
            return MetricsLogger(self.folder, self.arguments.output, self.arguments.to_dict(), start)

        return self.strategy.main_first(make, main_only=True)

    def _loader(self, comparisons: Comparisons, batches, collator: Collator | None = None) -> DataLoader:
        on_gpu = self.strategy.device.type != "cpu"
        return DataLoader(
            comparisons,
            batch_sampler=batches,
            collate_fn=collator or self.collator,
            num_workers=2 if on_gpu else 0,
            generator=torch.Generator(),  # not the global one, whose draws belong to dropout
            pin_memory=on_gpu,
        )


class Window:
    """Sums of the micro-batches since the last log line; on the device until `reduce` reads them."""

    def __init__(self, strategy: Strategy, prompt_length: bool):
        self.strategy, self.prompt_length = strategy, prompt_length
        self._clear()

    def _clear(self) -> None:
        self.sums = empty_sums(self.strategy.device)
        self.totals = torch.zeros(6, dtype=torch.float64, device=self.strategy.device)
        self.losses: list[tuple[int, list[str], torch.Tensor, torch.Tensor]] = []
        self.temperature: torch.Tensor | None = None
        self.started = time.perf_counter()
        self.steps: set[int] = set()

    def add(self, step: int, batch: Batch, losses: BatchLoss) -> None:
        """Take in one micro-batch without waiting for the device."""
        real = batch.weight > 0
        each = losses.preference if losses.regularizer is None else losses.preference + losses.regularizer
        self.steps.add(step)
        self.sums += preference_sums(losses.score, batch.label, losses.preference, losses.temperature, real)
        extra = torch.zeros_like(losses.preference) if losses.regularizer is None else losses.regularizer
        prompts = len(batch.prompt_ends)
        prompt_tokens = batch.position_ids.flatten()[batch.prompt_ends].sum() + prompts
        parts = (losses.total, (batch.weight * extra).sum(), (batch.segments >= 0).sum(), prompt_tokens)
        self.totals[:4] += torch.stack([part.detach().double() for part in parts])
        self.totals[4] += prompts
        if losses.aux is not None:
            self.totals[5] += losses.aux.detach()
        self.losses.append((step, batch.ids, each.detach(), batch.owner))
        self.temperature = losses.temperature.detach()

    def reduce(self, arguments: Arguments) -> dict[str, float]:
        """Means over all processes since the last call; raises NonFiniteError if a loss was not finite."""
        self.check_finite()
        divisor = len(self.steps) * arguments.optimizer.accumulated_gradient * self.strategy.world_size
        both = self.strategy.all_reduce(torch.cat([self.sums, self.totals])).cpu()
        statistics = preference_statistics(both[: len(self.sums)])
        total, extra, tokens, prompt_tokens, prompts, aux = both[len(self.sums) :].tolist()
        seconds = max(time.perf_counter() - self.started, 1e-9)
        metrics = {"train/loss": total / divisor}
        metrics |= {f"train/{name}": statistics[name] for name in ("accuracy", "ties", "probability", "margin")}
        if arguments.loss.add_pretrain_loss:
            metrics |= {"train/preference_loss": statistics["loss"], "train/regularizer": extra / divisor}
        if arguments.loss.aux_loss_coef:
            metrics["train/aux_loss"] = aux / divisor
        if arguments.model.learnable_temperature:
            metrics["train/temperature"] = self.temperature.item()
        if self.prompt_length:
            metrics["train/prompt_length"] = prompt_tokens / prompts
        metrics |= {"train/comparisons_per_second": prompts / seconds, "train/tokens_per_second": tokens / seconds}
        self._clear()
        return metrics

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
