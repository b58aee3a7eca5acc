"""A comparison of heads from comparisons to numbers: tables, splits, learning rates, seeds, over all processes.

Called by scripts/compare_heads.py.
"""

import logging
import math
import time
from dataclasses import dataclass, field, replace

import datasets
import numpy as np
from tqdm.auto import tqdm

from general_preference.datasets.cycles import scalar_ceiling
from general_preference.datasets.preparation import Summary, load_tokenized, split_by_prompt, summarize_table
from general_preference.datasets.sources import parse_sources
from general_preference.datasets.tokenization import ComparisonTokenizer
from general_preference.distributed import DistributedContext
from general_preference.errors import InputError, RunError
from general_preference.probing.arguments import ProbingArguments
from general_preference.probing.comparing import compare_scores, longer_accuracy, stated_preferences
from general_preference.probing.fitting import HeadSpec, Scored, fit_head, score_rows, training_batches
from general_preference.probing.states import Placed, StateBatch
from general_preference.trainer.run_arguments import OptimizerArguments

logger = logging.getLogger(__name__)

HELD_OUT = "held_out"


def load_tables(arguments: ProbingArguments, encoder: ComparisonTokenizer) -> tuple[dict, list[Summary]]:
    """({"fit", "validation", then each set to compare on: table}, what was read).

    No prompt is in two of fit, validation and held_out. Of several sources without subsets, each is one.
    """
    options = {"skip_bad": arguments.on_bad_record == "skip", "workers": arguments.preprocessing_workers}
    options |= {"reading": arguments.reading()}
    sources = parse_sources(arguments.dataset)
    tables, read = load_tokenized(sources, encoder, **options)
    if len(tables) > 1:
        for number, (source, table) in enumerate(zip(sources, tables, strict=True)):
            subsets = [subset or source.name for subset in table["subset"][:]]
            tables[number] = table.remove_columns("subset").add_column("subset", subsets)
    whole = datasets.concatenate_datasets(tables) if len(tables) > 1 else tables[0]
    split = {"seed": arguments.seed, "max_samples": arguments.max_samples}
    train, held_out = split_by_prompt(whole, arguments.train_ratio, **split)
    training = whole.select(train)
    fit, validation = split_by_prompt(training, 1 - arguments.validation_ratio, seed=arguments.seed)
    if not validation:
        raise InputError(f"validation_ratio {arguments.validation_ratio} of {len(training)} leaves none: raise it")
    found = {"fit": training.select(fit), "validation": training.select(validation)}
    keys = set(training["prompt_key"][:])
    summaries = [summarize_table("train", training, read)]
    if not held_out and not arguments.eval_dataset:
        raise InputError(f"train_split_ratio {arguments.train_ratio} of {len(whole)} holds none out: lower it")
    if held_out:
        found[HELD_OUT] = whole.select(held_out)
        summaries.append(summarize_table(HELD_OUT, found[HELD_OUT], (), keys))
    eval_sources = parse_sources(arguments.eval_dataset) if arguments.eval_dataset else []
    for source, table, one in zip(eval_sources, *load_tokenized(eval_sources, encoder, **options), strict=True):
        if source.name in found:
            raise InputError(f"eval_dataset: a set is called {source.name}, which is another here: name it otherwise")
        found[source.name] = table
        summaries.append(summarize_table(source.name, table, [one], keys))
    return found, summaries


def with_subsets(sets: dict[str, list[Placed]]) -> dict[str, list[Placed]]:
    """Each set, and behind it its subsets if it has several."""
    found = {}
    for name, rows in sets.items():
        found[name] = rows
        subsets = dict.fromkeys(row.subset for row in rows)
        if len(subsets) > 1:
            found |= {f"{name}: {subset or '-'}": [row for row in rows if row.subset == subset] for subset in subsets}
    return found


@dataclass
class Trials:
    """What a comparison trains with: heads, their data and optimizer; all processes share the work."""

    context: DistributedContext
    device: object
    states: np.ndarray
    rows: dict[str, list[Placed]]
    optimizer: OptimizerArguments
    _batches: dict[tuple, list[StateBatch]] = field(default_factory=dict)

    def choose_rates(self, specs: list[HeadSpec], rates: list[float]) -> dict[str, dict]:
        """{head: {"learning_rate", "validation_loss", "validation_accuracy", "at_edge", "losses"}}. Collective.

        Each head is trained on `fit` with every rate and takes the one with the lowest loss on `validation`. losses:
        {rate: its loss, None if not finite}; at_edge: the rate taken is the first or last.

        Raises:
            RunError: a head's losses are not finite whatever the rate.
        """
        jobs = [(spec, rate) for spec in specs for rate in rates]
        stated = stated_preferences(self.rows["validation"])

        def work(job) -> dict:
            spec, rate = job
            head = self.fit(spec, ("fit",), replace(self.optimizer, learning_rate=rate))
            scored = score_rows(head, self.states, self.rows["validation"], self.device)
            found = compare_scores({spec.name: [scored]}, stated)[spec.name]
            return {name: found[name]["mean"] for name in ("loss", "accuracy")}

        results = self._share(jobs, work, "learning rates")
        chosen = {}
        for spec in specs:
            tried = {rate: found for (one, rate), found in zip(jobs, results, strict=True) if one is spec}
            finite = {rate: found for rate, found in tried.items() if math.isfinite(found["loss"])}
            if not finite:
                raise RunError(f"{spec.name}: no learning rate of {rates} gives a finite loss: lower them", True)
            best = min(finite, key=lambda rate: finite[rate]["loss"])
            validation = {f"validation_{name}": value for name, value in finite[best].items()}
            losses = {f"{rate:g}": found["loss"] if rate in finite else None for rate, found in tried.items()}
            at_edge = len(rates) > 1 and best in (rates[0], rates[-1])
            chosen[spec.name] = {"learning_rate": best, **validation, "at_edge": at_edge, "losses": losses}
        return chosen

    def train(self, spec: HeadSpec, rate: float, seed: int):
        """A head trained on `fit` and `validation` together."""
        return self.fit(spec, ("fit", "validation"), replace(self.optimizer, learning_rate=rate, seed=seed))

    def fit(self, spec: HeadSpec, parts: tuple[str, ...], optimizer: OptimizerArguments):
        """A head trained on these parts of the rows; heads in a row with the same parts and seed share the batches."""
        key = (parts, optimizer.seed)
        if key not in self._batches:
            rows = [row for part in parts for row in self.rows[part]]
            self._batches = {key: training_batches(rows, optimizer, self.device)}
        return fit_head(spec, self.states, self._batches[key], optimizer, self.device)

    def score_sets(
        self, specs: list[HeadSpec], rates: dict[str, float], seeds: int, sets: dict[str, list[Placed]]
    ) -> tuple[dict[str, dict[str, list[Scored]]], float]:
        """({set: {head: one `Scored` a seed}}, mean seconds of a training). Collective.

        Raises:
            RunError: a head's losses are not finite.
        """
        jobs = [(spec, self.optimizer.seed + number) for number in range(seeds) for spec in specs]

        def work(job) -> tuple[dict[str, Scored], float]:
            spec, seed = job
            began = time.perf_counter()
            head = self.train(spec, rates[spec.name], seed)
            seconds = time.perf_counter() - began
            return {name: score_rows(head, self.states, rows, self.device) for name, rows in sets.items()}, seconds

        results = self._share(jobs, work, "heads")
        scored = {name: {spec.name: [] for spec in specs} for name in sets}
        for (spec, seed), (found, _) in zip(jobs, results, strict=True):
            for name in sets:
                if not found[name].loss.isfinite().all():
                    raise RunError(f"{spec.name}: losses with seed {seed} are not finite: lower learning_rates", True)
                scored[name][spec.name].append(found[name])
        return scored, sum(seconds for _, seconds in results) / len(results)

    def _share(self, jobs: list, work, title: str) -> list:
        """`work` on every job, each on one process; all results, in order, on all processes."""
        context, mine = self.context, {}
        numbers = range(context.rank, len(jobs), context.world_size)
        for number in tqdm(numbers, desc=title, unit="head", disable=not context.is_main, mininterval=1):
            mine[number] = work(jobs[number])
        found = {number: result for part in context.gather_objects(mine) for number, result in part.items()}
        return [found[number] for number in range(len(jobs))]


def describe_set(rows: list[Placed]) -> dict:
    """{n, prompts, longer_response: accuracy of that rule, scalar_ceiling: None if each prompt has one comparison}."""
    stated = stated_preferences(rows)
    outcomes = [(row.prompt, *pair) for row in rows for pair in row.outcomes]
    several = len({prompt for prompt, *_ in outcomes}) < len(outcomes)
    found = {"n": len(stated.label), "prompts": len(stated.cluster.unique())}
    found["longer_response"] = longer_accuracy(stated)
    return found | {"scalar_ceiling": scalar_ceiling(outcomes) if several else None}
