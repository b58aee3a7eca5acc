"""The loop: forward, loss, backward, step; log, evaluate, save. For any objective and engine."""

import functools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from general_preference.datasets.checksum import table_checksum
from general_preference.datasets.packing import Batch, Collator, Comparisons
from general_preference.datasets.sampler import StepSampler, evaluation_batches
from general_preference.errors import InputError, NonFiniteError, Stopped
from general_preference.files import replace_text
from general_preference.models.config import weights_digest
from general_preference.plots import draw_training_curves
from general_preference.trainer.checkpoint import BestModels, CheckpointStore, RunState, save_model
from general_preference.trainer.engine import Engine
from general_preference.trainer.metrics import METRICS_FILE, MetricsAccumulator, MetricsLogger, read_metrics
from general_preference.trainer.objectives import Objective
from general_preference.trainer.run_arguments import RunArguments
from general_preference.trainer.stopping import StopRequests, ignore_signals_in_worker


class Trainer:
    """Minimizes an objective over one table of comparisons and evaluates it on named others."""

    def __init__(
        self,
        arguments: RunArguments,
        engine: Engine,
        model,
        tokenizer,
        objective: Objective,
        train_table,
        eval_tables: dict,
    ):
        """Hand `model` to the engine, lay out the run and continue from a checkpoint if that is asked for.

        Args:
            eval_tables: {set name: tokenized table}.

        Raises:
            InputError: on every process; kernels or data differ between processes, or no checkpoint fits.
        """
        self.arguments, self.engine, self.objective, self.tokenizer = arguments, engine, objective, tokenizer
        self.context = engine.context
        optimizer, output = arguments.optimizer, arguments.output
        kernels = self.context.gather_objects(model.config._attn_implementation)
        if len(set(kernels)) > 1:  # then they would deal out a step in different ways
            raise InputError(f"processes chose different attention kernels ({kernels}): set attn_implementation")
        self.train_set = Comparisons(train_table)
        self.eval_sets = {name: Comparisons(table) for name, table in eval_tables.items()}
        self.sampler = StepSampler(
            train_table["length"][:],
            micro_batch_size=optimizer.micro_train_batch_size,
            accumulation=optimizer.accumulated_gradient,
            world_size=self.context.world_size,
            rank=self.context.rank,
            seed=optimizer.seed,
            group_size=arguments.data.group_size,
            groups=train_table["group"][:] if arguments.data.group_size > 1 else None,
            packed=objective.layout.packed,
        )
        self.steps = self.sampler.steps_per_epoch * optimizer.max_epochs
        engine.prepare(model, self.steps)
        self.folder = Path(output.save_path)
        self.window = MetricsAccumulator(engine, objective, arguments.data.return_prompt_length)
        self.logger: MetricsLogger | None = None  # of the main process, while fit runs
        self.learning_rate = engine.learning_rate()
        self.store = CheckpointStore(output.checkpoint_folder, engine, output.max_ckpt_num, output.max_ckpt_mem)
        self.best = BestModels(self.folder / "best", engine, tokenizer, output.save_best_model or 0)
        fixed, flags = self._identity(train_table)
        self.state = RunState(fixed=fixed, flags=flags)
        if output.load_checkpoint:
            self.state = self.store.load(fixed, flags) or self.state

    def fit(self) -> dict[str, dict]:
        """Train to the end, evaluate, save the model, metrics and pictures; returns the last evaluation per set.

        Raises:
            NonFiniteError: on every process, when the next log line is due at the latest.
            RunError: on every process; something cannot be written.
            Stopped: on every process, once a signal's checkpoint is written.
        """
        output, state, results = self.arguments.output, self.state, {}
        self.logger = self._open_logger()
        bar = tqdm(total=self.steps, initial=state.step, desc="train", unit="step",
                   disable=not self.context.is_main, mininterval=1)  # fmt: skip
        with bar, StopRequests(self.context, output.save_minutes) as requests:
            try:
                batches = self.batches()
                if self._evaluation_due():  # a signal ended the run before it
                    results = self._evaluate_all(requests)
                first = state.step + 1
                while state.step < self.steps:
                    self.train_step(batches)
                    if state.step == first:
                        self.engine.started()
                    bar.update()
                    stop, save = requests.agree()
                    save = save or (output.save_steps > 0 and state.step % output.save_steps == 0)
                    if save or stop or state.step % output.logging_steps == 0 or state.step == self.steps:
                        bar.set_postfix(self._log(), refresh=False)
                    if stop:
                        raise Stopped(stop)
                    if self._evaluation_due():
                        results = self._evaluate_all(requests)
                    if save:
                        self._save()
                        requests.saved()
            except Stopped as stop:
                raise Stopped(stop.signal_number, self._save_stopped()) from None
            finally:
                if self.logger is not None:
                    self.logger.close()
            if self.eval_sets and not results:  # a finished run that was continued: nothing was left to train
                results = {name: self.evaluate(name) for name in self.eval_sets}
            self._finish(results)
        return results

    def batches(self) -> Iterator[Batch]:
        """This process's micro-batches, on the CPU, from where the run is to its end."""
        items = self.sampler.micro_batches(self.arguments.optimizer.max_epochs, self.state.step)
        return iter(self._loader(self.train_set, items, self.objective.collate))

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step. Nothing in it waits for the device."""
        step = self.state.step + 1
        self.engine.train_mode(True)
        self.learning_rate = self.engine.learning_rate()  # of this step: the engine moves on with its last part
        for _ in range(self.arguments.optimizer.accumulated_gradient):
            asked = time.perf_counter()
            batch = next(batches)
            self.window.waited += time.perf_counter() - asked
            batch = batch.to(self.engine.device)
            loss = self.objective.loss(self.engine.forward(**batch.model_inputs()), batch)
            self.engine.backward(loss.total)
            self.engine.step()
            self.window.add(step, batch, loss)
        self.window.end_step(step, self.engine.gradient_norm())
        self.state.step = step

    def _log(self) -> dict[str, str]:
        """Write a line about the steps since the last one; returns what the bar shows."""
        metrics = self.window.reduce()
        epoch = self.state.step / self.sampler.steps_per_epoch
        metrics |= {"train/learning_rate": self.learning_rate, "train/epoch": epoch}
        if self.logger is not None:
            self.logger.log(self.state.step, metrics)
        shown = {"loss": "loss", "acc": "accuracy", "lr": "learning_rate", "cmp/s": "comparisons_per_second"}
        return {short: f"{metrics['train/' + name]:.3g}" for short, name in shown.items() if f"train/{name}" in metrics}

    def _evaluation_due(self) -> bool:
        step, every = self.state.step, self.arguments.output.eval_steps
        due = step % every == 0 if every > 0 else step % self.sampler.steps_per_epoch == 0
        return bool(self.eval_sets) and (due or step == self.steps) and 0 < step != self.state.evaluated

    def _evaluate_all(self, requests: StopRequests) -> dict[str, dict]:
        """Evaluate every set after the current step; Stopped if a signal comes, and then as if it had not begun."""
        step = self.state.step
        with self.window.paused():
            results = {name: self.evaluate(name, requests) for name in self.eval_sets}
            for name, row in results.items():
                if not math.isfinite(row["loss"]):
                    where = f"the evaluation loss on {name} is not finite after step {step}"
                    raise NonFiniteError(f"{where}: lower the learning rate", everywhere=True)
            rows = {f"eval/{name}/{key}": value for name, row in results.items() for key, value in row.items()}
            if self.logger is not None:
                self.logger.log(step, rows)
            self.engine.model.card.results = results
            if self.arguments.output.save_best_model:
                count = sum(row["n"] for row in results.values())
                loss = sum(row["loss"] * row["n"] for row in results.values()) / count
                newest = self.store.newest
                self.best.consider(self.state, loss, newest.best if newest is not None else [])
        self.state.evaluated = step
        return results

    @torch.no_grad()
    def evaluate(self, name: str, requests: StopRequests | None = None) -> dict[str, float]:
        """Statistics of one evaluation set, each comparison exactly once, the same numbers on every process."""
        comparisons, engine, context = self.eval_sets[name], self.engine, self.context
        lengths, micro = comparisons.table["length"][:], self.arguments.optimizer.micro_train_batch_size
        items = evaluation_batches(lengths, micro, context.world_size, context.rank)
        engine.train_mode(False)
        self.objective.begin_evaluation(name)
        loader = self._loader(comparisons, items, self.objective.collate_evaluation)
        sums = None
        shown = tqdm(loader, desc=f"eval {name}", leave=False, disable=not context.is_main, mininterval=1)
        for index, batch in enumerate(shown):
            stop = requests.agree()[0] if requests is not None and index % 8 == 0 else 0
            if stop:
                raise Stopped(stop)
            batch = batch.to(engine.device)
            found = self.objective.evaluation_sums(name, engine.forward(**batch.model_inputs()), batch)
            sums = found if sums is None else sums + found
        return self.objective.statistics(context.all_reduce(sums).cpu())

    def _save(self) -> None:
        """Write a checkpoint. It ends the log window, so that nothing of it needs to be kept."""
        if self.window.steps:
            self._log()
        with self.window.paused():
            if self.logger is not None:
                self.logger.flush()
            self.store.save(self.state)
            self.best.prune(self.state.best)

    def _save_stopped(self) -> str:
        """Save what is not saved yet; returns what the last line of a stopped run says."""
        newest = self.store.newest
        if self.state.step > 0 and (newest is None or newest.step != self.state.step):
            self._save()
        if self.store.newest is None:
            return "no step was done yet"
        return f"saved at step {self.state.step} in {self.store.folder}: load_checkpoint continues"

    def _finish(self, results: dict[str, dict]) -> None:
        """Save the model first; then what describes it."""
        self.engine.model.card.results = results
        save_model(self.engine, self.tokenizer, self.folder)
        self.best.prune(self.state.best)
        if self.context.is_main:
            replace_text(self.folder / "eval_metrics.json", json.dumps(results, indent=2))
            draw_training_curves(read_metrics(self.folder / METRICS_FILE), self.folder / "training_curves.png")
            self.objective.draw(self.folder)

    def _identity(self, train_table) -> tuple[dict, dict]:
        """What a continued run must share with this one, and the flags that it may change, which is then logged."""
        arguments, model, optimizer = self.arguments, self.arguments.model, self.arguments.optimizer
        checksum = table_checksum(train_table)
        if len(set(self.context.gather_objects(checksum))) > 1:
            raise InputError("processes read different training data: give every node the same files")
        digest = weights_digest(model.pretrain) if self.context.is_main else None
        fixed, flags = self.objective.identity()
        fixed |= {
            "global_batch_size": self.engine.global_batch_size, "seed": optimizer.seed, "comparisons": len(train_table),
            "data_checksum": checksum, "pretrain_checksum": self.context.broadcast(digest),
            "max_epochs": optimizer.max_epochs, "group_size": arguments.data.group_size,
            "load_in_4bit": model.load_in_4bit, "lora_rank": model.lora_rank, "lora_alpha": model.lora_alpha,
            "target_modules": model.target_modules if model.lora_rank else None,
        }  # fmt: skip
        free = ("learning_rate", "l2", "max_norm", "adam_betas", "lr_schedule", "warmup_ratio")
        flags |= {name: getattr(optimizer, name) for name in free} | {"lora_dropout": model.lora_dropout}
        precision = ("bf16", "grad_accum_dtype", "deepspeed_config")
        return fixed, flags | {name: getattr(arguments.engine, name) for name in precision}

    def _open_logger(self) -> MetricsLogger | None:
        def make() -> MetricsLogger:
            flags, state = self.arguments.to_dict(), self.state
            return MetricsLogger(self.folder, self.arguments.output, flags, state.step, state.evaluated, state.wandb_id)

        metrics_logger = self.context.main_process_first(make, main_only=True)
        found = None if metrics_logger is None else metrics_logger.wandb_id
        self.state.wandb_id = self.context.broadcast(found or self.state.wandb_id)
        return metrics_logger

    def _loader(self, comparisons: Comparisons, batches, collate: Collator) -> DataLoader:
        on_gpu = self.engine.device.type != "cpu"
        return DataLoader(
            comparisons,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=2 if on_gpu else 0,
            worker_init_fn=functools.partial(ignore_signals_in_worker, os.getpid()),
            generator=torch.Generator(),  # not the global one, whose draws belong to dropout
            pin_memory=on_gpu,
        )
