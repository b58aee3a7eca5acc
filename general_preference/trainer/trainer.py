"""The loop: forward, loss, backward, step; evaluate, log, save. One for Bradley-Terry, GPM and hybrid heads.

Knows neither DeepSpeed nor ranks (deepspeed_engine.py) nor how rows are laid out (datasets/packing.py).
"""

import dataclasses
import functools
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import xxhash
from torch.utils.data import DataLoader
from tqdm import tqdm

from general_preference.datasets.packing import Batch, Collator, Comparisons
from general_preference.datasets.sampler import StepSampler, evaluation_batches
from general_preference.errors import InputError, NonFiniteError, Stopped
from general_preference.files import replace_text
from general_preference.models.config import weights_digest
from general_preference.models.experts import balance_coefficient
from general_preference.models.losses import preference_loss, regularizer
from general_preference.models.score import preference_score
from general_preference.models.statistics import empty_sums, preference_statistics, preference_sums
from general_preference.plots import EmbeddedCycle, draw_cycles, draw_training_curves, embedded_cycle
from general_preference.trainer.arguments import Arguments, LossArguments
from general_preference.trainer.checkpoint import BestModels, CheckpointStore, RunState, publish_model
from general_preference.trainer.metrics import METRICS_FILE, BatchLoss, MetricsLogger, StepClock, Window, read_metrics
from general_preference.trainer.stopping import StopRequests, ignore_signals_in_worker

logger = logging.getLogger(__name__)


def batch_loss(output: dict[str, torch.Tensor], batch: Batch, arguments: LossArguments) -> BatchLoss:
    """(1 - c) * preference + c * regularizer + a * load balance of a micro-batch, from the model's output.

    Without the regularizer c = 0. Weights are the batch's own, so any split into micro-batches gives one gradient.
    The load-balancing loss alone depends on the split: it is that of each micro-batch's tokens, and a step's is the
    mean over its micro-batches on all processes, weighted by their comparisons (as transformers' trainer has it).
    """
    embeddings, gates = output["embeddings"], output.get("gates")
    gate = None if gates is None else gates[batch.comparison_index]
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
        prompts = responses + batch.comparison_index
        return log_probs[index] + log_probs[prompts], counts[index] + counts[prompts]

    return regularizer(
        sequence(batch.first),
        sequence(batch.second) if arguments.ptx_loss == "reference_free" else None,
        kind=arguments.ptx_loss,
        beta=arguments.reward_scaler_beta,
        margin=arguments.reward_margin,
    )


class Trainer:
    """Trains the model inside `strategy` on one table of comparisons and evaluates it on named others."""

    def __init__(self, arguments: Arguments, strategy, model, tokenizer, train_table, eval_tables: dict):
        """Wrap `model` in the engine and lay out the run; `eval_tables` maps set names to tokenized tables."""
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
        self.clock = StepClock()
        strategy.prepare(model, self.steps)
        fixed, flags = self._identity(model, train_table)
        self.state = RunState(fixed=fixed, flags=flags)
        output = arguments.output
        self.store = CheckpointStore(output.checkpoint_folder, strategy, output.max_ckpt_num, output.max_ckpt_mem)
        self.best = BestModels(self.folder / "best", strategy, tokenizer, output.save_best_model or 0)
        strategy.main_process_first(self.store.check, main_only=True)
        if output.load_checkpoint:
            self.state = self.store.load(fixed, flags) or self.state

    def _identity(self, model, train_table) -> tuple[dict, dict]:
        """What a continued run must share with this one, and the flags that it may change, which is then said."""
        arguments, optimizer, head = self.arguments, self.arguments.optimizer, model.preference
        columns = [name for name in ("length", "prompt_key") if name in train_table.column_names]
        lengths_and_prompts = json.dumps([train_table[name][:] for name in columns])
        fixed = {
            "global_batch_size": self.strategy.global_batch_size,
            "seed": optimizer.seed,
            "comparisons": len(train_table),
            "data_checksum": xxhash.xxh3_64_hexdigest(lengths_and_prompts.encode()),
            "group_size": arguments.data.group_size,
            "max_epochs": optimizer.max_epochs,
            "pretrain_checksum": self.strategy.broadcast(
                weights_digest(arguments.model.pretrain) if self.strategy.is_main else None
            ),
            "preference_head": head.head,
            "value_head_dim": head.dim,
            "add_prompt_head": head.prompt_gate,
            "gate": head.gate,
            "normalize": head.normalize,
            "general_preference_tau": head.temperature,
            "learnable_temperature": head.learnable_temperature,
            "lora_rank": arguments.model.lora_rank,
            "lora_alpha": arguments.model.lora_alpha,
        }
        free = ("learning_rate", "l2", "max_norm", "warmup_ratio")
        flags = {name: value for name, value in vars(optimizer).items() if name in free} | vars(arguments.loss)
        return fixed, flags | {"lora_dropout": arguments.model.lora_dropout}

    def fit(self) -> dict[str, dict]:
        """Train to the end, evaluate, save the model, metrics and pictures; returns the last evaluation per set.

        Raises:
            NonFiniteError: on every process, in the step after which it is noticed at the latest.
            RunError: on every process; something cannot be written.
            Stopped: on every process, once a signal's checkpoint is written.
        """
        self.metrics = self._metrics_logger()
        window = Window(self.strategy, self.arguments.data.return_prompt_length, self.state.window)
        results: dict[str, dict] = {}
        bar = tqdm(total=self.steps, initial=self.state.step, desc="train", unit="step",
                   disable=not self.strategy.is_main, mininterval=1)  # fmt: skip
        with bar, StopRequests(self.strategy, self.arguments.output.save_minutes) as requests:
            try:
                if self._evaluation_due(self.state.step):  # the signal that ended the run came before it
                    results = window.pause(lambda: self._evaluate_all(requests))
                for step in self.train_steps(window):
                    bar.update()
                    results = self._after_step(step, window, requests, bar) or results
            except Stopped as stop:
                raise Stopped(stop.signal_number, self._save_stopped(window)) from None
            finally:
                self._close_metrics()
            if self.eval_sets and not results:  # a finished run that was continued: nothing was left to train
                results = {name: self.evaluate(name) for name in self.eval_sets}
            self._finish(results)
        return results

    def _after_step(self, step: int, window: Window, requests: StopRequests, bar: tqdm) -> dict[str, dict]:
        """Log, evaluate and save as it is due; returns the evaluation's results, if there was one."""
        output, results = self.arguments.output, {}
        number, by_clock, slow = requests.agree(self.clock.stop())
        if slow:
            self.clock.report(step, self.strategy)
        self._check_gradient(window, step)
        if step % output.logging_steps == 0 or step == self.steps:
            bar.set_postfix(self._log(window, step), refresh=False)
        if number:
            raise Stopped(number)
        if self._evaluation_due(step):
            window.check_finite()
            results = window.pause(lambda: self._evaluate_all(requests))
        if by_clock or (output.save_steps > 0 and step % output.save_steps == 0):
            window.check_finite()
            window.pause(lambda: self._save(window))
            requests.saved()
        return results

    def _check_gradient(self, window: Window, step: int) -> None:
        """Raise on every process if the step's gradient was not finite: the engine skips it, or spoils weights."""
        if not math.isfinite(self.strategy.gradient_norm()):
            window.check_finite()  # which can name the comparisons
            raise NonFiniteError(
                f"the gradient is not finite at step {step}, though the loss is: lower --learning_rate", everywhere=True
            )

    def _save(self, window: Window) -> None:
        self.state.window = window.state()
        if self.metrics is not None:
            self.metrics.flush()
        self.store.save(self.state)
        self.best.prune(self.state.best)

    def _save_stopped(self, window: Window) -> str:
        """Save what is not saved yet; returns what the last line of a stopped run says."""
        newest = self.store.newest
        if self.state.step > 0 and (newest is None or newest.step != self.state.step):
            window.check_finite()
            self._save(window)
        if self.store.newest is None:
            return "no step was done yet"
        return f"saved at step {self.state.step} in {self.store.folder}: --load_checkpoint continues"

    def train_steps(self, window: Window) -> Iterator[int]:
        """Optimizer steps from where the run stands to its end; yields the number of each when it is done."""
        epochs, start = self.arguments.optimizer.max_epochs, self.state.step
        batches = iter(self._loader(self.train_set, self.sampler.micro_batches(epochs, start)))
        for step in range(start + 1, self.steps + 1):
            self._step(batches, window, step)
            self.state.step = step
            yield step

    def _step(self, batches, window: Window, step: int) -> None:
        self.clock.start()
        self.strategy.train_mode(True)
        self.learning_rate = self.strategy.learning_rate()  # of this step: the engine moves on with its last part
        for _ in range(self.arguments.optimizer.accumulated_gradient):
            asked = time.perf_counter()
            batch = next(batches)
            window.waited += time.perf_counter() - asked
            self.clock.add(batch)
            batch = batch.to(self.strategy.device)
            losses = batch_loss(self.strategy.forward(**batch.model_inputs()), batch, self.arguments.loss)
            self.strategy.backward(losses.total)
            self.strategy.step()
            window.add(step, batch, losses)

    def _log(self, window: "Window", step: int) -> dict[str, str]:
        """Reduce the window over all processes and write it; returns what the bar shows."""
        metrics = window.reduce(self.arguments)
        metrics |= {
            "train/grad_norm": self.strategy.gradient_norm(),
            "train/learning_rate": self.learning_rate,
            "train/epoch": step / self.sampler.steps_per_epoch,
        }
        if self.metrics is not None:
            self.metrics.log(step, metrics)
        shown = {"loss": "loss", "acc": "accuracy", "lr": "learning_rate", "cmp/s": "comparisons_per_second"}
        return {short: f"{metrics['train/' + name]:.3g}" for short, name in shown.items()}

    def _evaluation_due(self, step: int) -> bool:
        every = self.arguments.output.eval_steps
        due = step % every == 0 if every > 0 else step % self.sampler.steps_per_epoch == 0
        return bool(self.eval_sets) and (due or step == self.steps) and 0 < step != self.state.evaluated

    def _evaluate_all(self, requests: StopRequests) -> dict[str, dict]:
        """Evaluate every set after the current step; Stopped if a signal comes, and then as if it had not begun."""
        step, self.cycles = self.state.step, {}
        results = {name: self.evaluate(name, requests) for name in self.eval_sets}
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
            newest = self.store.newest
            self.best.consider(self.state, loss, newest.best if newest is not None else [])
        self.state.evaluated = step
        return results

    @torch.no_grad()
    def evaluate(self, name: str, requests: StopRequests | None = None) -> dict[str, float]:
        """Statistics of one evaluation set, each comparison exactly once, the same numbers on every process.

        Returns:
            the keys of `statistics.preference_statistics`; the loss is the preference loss without the regularizer.
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
        shown = tqdm(loader, desc=f"eval {name}", leave=False, disable=not strategy.is_main, mininterval=1)
        for index, batch in enumerate(shown):
            number = requests.agree()[0] if requests is not None and index % 8 == 0 else 0
            if number:
                raise Stopped(number)
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
        self.best.prune(self.state.best)
        if not self.strategy.is_main:
            return
        replace_text(self.folder / "eval_metrics.json", json.dumps(results, indent=2))
        draw_training_curves(read_metrics(self.folder / METRICS_FILE), self.folder / "training_curves.png")
        draw_cycles(list(self.cycles.values())[:4], self.folder / "embeddings.png")

    def _metrics_logger(self) -> MetricsLogger | None:
        def make() -> MetricsLogger:
            flags = self.arguments.to_dict()
            state = self.state
            return MetricsLogger(self.folder, self.arguments.output, flags, state.step, state.evaluated, state.wandb_id)

        logger = self.strategy.main_process_first(make, main_only=True)
        found = None if logger is None else logger.wandb_id
        self.state.wandb_id = self.strategy.broadcast(found or self.state.wandb_id)
        return logger

    def _close_metrics(self) -> None:
        if self.metrics is not None:
            self.metrics.close()

    def _loader(self, comparisons: Comparisons, batches, collator: Collator | None = None) -> DataLoader:
        on_gpu = self.strategy.device.type != "cpu"
        return DataLoader(
            comparisons,
            batch_sampler=batches,
            collate_fn=collator or self.collator,
            num_workers=2 if on_gpu else 0,
            worker_init_fn=functools.partial(ignore_signals_in_worker, os.getpid()),
            generator=torch.Generator(),  # not the global one, whose draws belong to dropout
            pin_memory=on_gpu,
        )
