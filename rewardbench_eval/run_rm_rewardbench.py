#!/usr/bin/env python3
"""Run a preference model on RewardBench 1, RewardBench 2 or the prior sets.

    python rewardbench_eval/run_rm_rewardbench.py --model MODEL                          RewardBench 1, from the hub
    python rewardbench_eval/run_rm_rewardbench.py --model MODEL --rewardbench_version 2 --dataset rows.parquet
    python scripts/launch.py --nproc-per-node 8 rewardbench_eval/run_rm_rewardbench.py --model MODEL       on 8 devices

Writes into --output_dir, all named after the model: .json (the official layout), .jsonl (one line per row, in their
order), .summary.json (sections, intervals, and what the run was made with) and .png. Started again after a stop, it
continues where it was. Exit codes, each with one line that says why: 1 the run failed, 2 what was given cannot be used,
130 interrupted.
"""

import json
import logging
import os
import platform
import sys
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath

if __name__ == "__main__":
    from general_preference.cli import restart_with_cpu_settings

    restart_with_cpu_settings()

import datasets
import torch

from general_preference import GPMPipeline
from general_preference.cli import exit_code, flag, parse_flags, quiet_other_libraries
from general_preference.datasets.preparation import Summary, summarize_table, tokenize
from general_preference.datasets.sources import parse_sources
from general_preference.datasets.tokenization import DEFAULT_TEMPLATE, load_tokenizer, plain_template, stable_hash
from general_preference.distributed import DistributedContext
from general_preference.errors import InputError
from general_preference.files import replace_text
from general_preference.inference.arguments import ModelArguments, check_positive
from general_preference.inference.batch import ASKED, ResultStore, result_row, score_remaining
from general_preference.models.config import checkpoint_identity
from general_preference.rewardbench.data import (
    PREF_SETS,
    REWARDBENCH_1,
    REWARDBENCH_2,
    Benchmark,
    content_fingerprint,
    load_benchmark,
)
from general_preference.rewardbench.pictures import draw_subsets
from general_preference.rewardbench.report import (
    WHAT_DECIDES,
    aggregate,
    best_of_n_row,
    format_report,
    judge,
    official_results,
    summarize,
)
from general_preference.rewardbench.scoring import WINNERS

logger = logging.getLogger("rewardbench")

OF_THE_MODEL = ("model_files", "tokens", "max_length", "dtype", "tau")
OFFICIAL, PICTURE = ".json", ".png"
DTYPES = ("float16", "bfloat16", "float32", "float64")
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "safetensors", "peft", "flash-attn")


@dataclass
class RewardBenchArguments:
    """Model, benchmark, and where the results go. The paper's flags keep their names and meaning."""

    model: str | None = flag(None, "trained preference model: folder or hub name")
    rewardbench_version: int = flag(1, "1: pairs in 23 subsets; 2: best of 4, and ties", choices=[1, 2])
    pref_sets: bool = flag(False, "run the prior sets (allenai/pref-test-sets) instead of RewardBench's own rows")
    dataset: str | None = flag(
        None, "rows with the hub's columns instead of the hub's: json, jsonl, csv, parquet, folder, other hub name"
    )
    winner: str = flag(
        "borda", "version 2: what decides which response is best; see rewardbench/scoring.py", choices=list(WINNERS)
    )
    debug: bool = flag(False, "the first ten rows only; results get .debug into their names")
    allow_empty_responses: bool = flag(False, "score empty responses as they are instead of refusing them")
    output_dir: str = flag("./results", "folder of the results")
    model_name: str | None = flag(None, "name of the result files; default the hub name or the folder's name")
    overwrite: bool = flag(False, "replace results of another model, other data or other settings of that name")
    tokenizer: str | None = flag(None, "folder or hub name of a tokenizer that is not the model's own")
    chat_template: str | None = flag(
        None, "file of a Jinja chat template; names of fastchat's (raw, tulu) are accepted and not used"
    )
    max_length: int | None = flag(
        None, "tokens of prompt and one response together; default what the model was trained with"
    )
    batch_size: int = flag(64, "rows in one call at most")
    torch_dtype: str | None = flag(
        None, "the backbone's dtype; default bfloat16 on GPUs that compute it fast, else float32", choices=list(DTYPES)
    )
    is_custom_model: bool | None = flag(None, "always so here: models of this repository; false is an error")
    not_quantized: bool | None = flag(None, "always so here: weights are never quantized; false is an error")
    do_not_save: bool | None = flag(None, "always so here: nothing is uploaded to the hub; false is an error")
    disable_beaker_save: bool = flag(False, "in a Beaker job: do not also write /output/metrics.json")

    def check(self) -> None:
        """InputError for what cannot work, before anything is loaded."""
        if not self.model:
            raise InputError("--model is missing")
        for name in ("dataset", "tokenizer", "chat_template", "output_dir"):
            if getattr(self, name) == "":
                raise InputError(f"--{name} is empty: give it a value, or drop it")
        check_positive(self, "batch_size")
        for name in ("is_custom_model", "not_quantized", "do_not_save"):
            if getattr(self, name) is False:
                raise InputError(f"--{name} false is not possible here (--help says why): drop it")
        if self.pref_sets and self.rewardbench_version == 2:
            raise InputError("--pref_sets belongs to --rewardbench_version 1: drop one")
        if self.winner != "borda" and self.rewardbench_version == 1:
            raise InputError(f"--winner {self.winner} needs --rewardbench_version 2: a pair has its own winner")
        if self.model_name is not None:
            name = PurePosixPath(self.model_name)
            shown = self.model_name.isprintable() and self.model_name.strip() and len(name.name.encode()) <= 200
            if name.is_absolute() or ".." in name.parts or not name.name or not shown:
                raise InputError(f"--model_name {self.model_name!r} is no name for files in --output_dir")
        if Path(self.output_dir).is_file():
            raise InputError(f"--output_dir {self.output_dir} is a file: name a folder")

    @property
    def benchmark(self) -> Benchmark:
        """What is asked for."""
        return PREF_SETS if self.pref_sets else REWARDBENCH_2 if self.rewardbench_version == 2 else REWARDBENCH_1

    @property
    def name(self) -> str:
        """What results are called: a hub name as it is, a folder by its own name."""
        local = Path(self.model).expanduser().resolve().name if Path(self.model).expanduser().is_dir() else self.model
        return str(PurePosixPath(self.model_name or local))

    def output(self, benchmark: Benchmark, ending: str = ".jsonl") -> Path:
        """A result file of this model."""
        return Path(self.output_dir) / f"{self.name}{benchmark.ending}{'.debug' if self.debug else ''}{ending}"


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn what can go wrong into one line and an exit code."""
    arguments, model = parse_flags(
        (RewardBenchArguments, ModelArguments), argv, "Run a preference model on RewardBench. Every flag: --help."
    )
    return exit_code(lambda: run(arguments, model), kept="finished rows are kept: the same command continues")


def run(arguments: RewardBenchArguments, model: ModelArguments) -> None:
    """From a model's name to its results."""
    arguments.check()
    model.check()
    benchmark = arguments.benchmark
    refuse_own_input(arguments)
    quiet_other_libraries()
    with DistributedContext.join() as processes:
        rows = processes.main_process_first(
            lambda: load_benchmark(benchmark, arguments.dataset, arguments.debug, arguments.allow_empty_responses)
        )
        rm = processes.main_process_first(lambda: load_pipeline(arguments, model, processes.local_rank))
        table = processes.main_process_first(
            lambda: tokenize(rows, rm.encoder, model.preprocessing_workers, benchmark.title)
        )
        read = summarize_table(benchmark.title, table)
        logger.info("%s", read)
        if read.identical_after_cut and read.identical + read.identical_after_cut == len(table):
            raise InputError(
                "every row has responses with the same tokens: raise --max_length, or mend a chat template that leaves "
                "them out"
            )
        store = result_store(arguments, len(table), processes.rank)
        made_with = processes.main_process_first(lambda: settings(arguments, rm, rows))
        processes.main_process_first(lambda: store.claim(made_with, arguments.overwrite), main_only=True)
        try:
            make_row = partial(best_of_n_row if benchmark.best_of_n else result_row, tau=rm.tau)
            score_remaining(rm, table, store, processes, make_row, arguments.batch_size)
            if processes.is_main:
                report(arguments, rm, read, store, made_with, processes.world_size)
        finally:
            store.close()


def result_store(arguments: RewardBenchArguments, count: int, rank: int) -> ResultStore:
    """Where the rows go; the official result file and a picture stand beside them."""
    output = arguments.output(arguments.benchmark)
    return ResultStore(output, count, rank, flag="--output_dir", beside=(OFFICIAL, PICTURE))


def refuse_own_input(arguments: RewardBenchArguments) -> None:
    """InputError where a result would be written over, or into, the data."""
    written = result_store(arguments, 0, 0)
    for source in parse_sources(arguments.dataset) if arguments.dataset else []:
        if written.touches(Path(source.path)):
            raise InputError(f"{written.output} and what stands beside it would replace --dataset {source.path}")


def load_pipeline(arguments: RewardBenchArguments, model: ModelArguments, local_rank: int) -> GPMPipeline:
    """The model on this process's device."""
    return model.load(
        arguments.model,
        local_rank,
        max_length=arguments.max_length,
        dtype=None if arguments.torch_dtype is None else getattr(torch, arguments.torch_dtype),
        tokenizer=load_other_tokenizer(arguments, model.trust_remote_code),
    )


def load_other_tokenizer(arguments: RewardBenchArguments, trust_remote_code: bool):
    """The tokenizer that --tokenizer and --chat_template ask for; None for the model's own."""
    if arguments.tokenizer is None and arguments.chat_template is None:
        return None
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model, trust_remote_code=trust_remote_code)
    wanted = arguments.chat_template
    if wanted is None:
        return tokenizer
    if "/" not in wanted and "." not in wanted and not Path(wanted).exists():
        logger.info("--chat_template %s is not used: texts are written as %s", wanted, template_name(tokenizer))
        return tokenizer
    try:
        tokenizer.chat_template = Path(wanted).read_text(encoding="utf-8")
        tokenizer.apply_chat_template([{"role": "user", "content": "text"}], tokenize=False)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"--chat_template {wanted} cannot be read ({reason}): name a Jinja file") from error
    except Exception as error:  # Jinja's own errors, and those that templates raise
        raise InputError(f"--chat_template {wanted} is no chat template: {error}") from error
    return tokenizer


def template_name(tokenizer) -> str:
    """What the result file calls the chat template: "tokenizer" for one of its own, else "plain"."""
    return "plain" if tokenizer.chat_template == plain_template(DEFAULT_TEMPLATE) else "tokenizer"


def settings(arguments: RewardBenchArguments, rm: GPMPipeline, rows: datasets.Dataset) -> dict:
    """What every result row depends on: rows made with other settings are never mixed with these.

    Device, attention kernel and batches are not among them: they change a score by rounding alone.
    """
    names = ("model", "dataset", "rewardbench_version", "pref_sets", "debug", "tokenizer", "chat_template")
    return {
        ASKED: {name: getattr(arguments, name) for name in names},
        "model_files": stable_hash(checkpoint_identity(arguments.model)),
        "tokens": rm.encoder.fingerprint(),  # tokenizer, template, input format, truncation
        "max_length": rm.max_length,
        "dtype": str(rm.model.dtype).removeprefix("torch."),
        "tau": rm.tau,
        "data": content_fingerprint(rows),
    }


def report(
    arguments: RewardBenchArguments,
    rm: GPMPipeline,
    read: Summary,
    store: ResultStore,
    made_with: dict,
    process_count: int,
) -> None:
    """Judge the rows, sum them up, draw, print."""
    benchmark, winner = arguments.benchmark, arguments.winner
    judged = [judge(benchmark, row, winner, rm.tau) for row in store.rows()]
    store.replace_rows([row for row, _ in judged])
    results = summarize(benchmark, judged)
    prior = prior_score_of(arguments, made_with) if benchmark is REWARDBENCH_1 else None
    scores = aggregate(benchmark, results, prior)
    template = template_name(rm.tokenizer)
    official = official_results(benchmark, results, arguments.name, rm.preference, template, winner)
    replace_text(store.beside(OFFICIAL), json.dumps(official, indent=4))
    title = f"{arguments.name} on {benchmark.title}" + (", first ten rows" if arguments.debug else "")
    drawn = draw_subsets(benchmark, results, title, store.beside(PICTURE))
    summary = {"benchmark": benchmark.title, "results": results, "scores": scores}
    if benchmark.best_of_n:
        summary["decided_by"] = {"winner": winner, "merit of a response": WHAT_DECIDES[winner]}
    store.finish(summary | {"run": provenance(rm, read, process_count)})
    print(f"\n{title}\n\n{format_report(benchmark, results, scores)}")
    if read.prompt_cut or read.response_cut:
        print(f"cut to {rm.max_length} tokens: {read.prompt_cut} prompts, responses of {read.response_cut} rows")
    print()
    print(f"Result:  {store.beside(OFFICIAL)}\nRows:    {store.output}\nSummary: {store.summary}")
    if drawn:
        print(f"Picture: {store.beside(PICTURE)}")
    if "BEAKER_JOB_ID" in os.environ and not (arguments.disable_beaker_save or arguments.debug):
        replace_text(Path("/output/metrics.json"), json.dumps(official))


def prior_score_of(arguments: RewardBenchArguments, made_with: dict) -> float | None:
    """The score of the same model on the prior sets, if it was run into the same folder; else None."""
    try:
        found = json.loads(arguments.output(PREF_SETS, ".summary.json").read_text(encoding="utf-8"))
        prior = found["scores"]["Prior Sets"]
        same = all(found["settings"][name] == made_with[name] for name in OF_THE_MODEL)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    if not same:
        logger.warning("%s is of another model or other settings: not averaged", arguments.output(PREF_SETS))
    return prior if same else None


def provenance(rm: GPMPipeline, read: Summary, process_count: int) -> dict:
    """What is needed to repeat the run."""
    return {
        "command": sys.argv,
        "preference": asdict(rm.preference),
        "input_format": rm.preference.input_format,
        "chat_template": rm.tokenizer.chat_template,
        "truncation": {"max_length": rm.max_length, **asdict(read)},
        "dtype": str(rm.model.dtype).removeprefix("torch."),
        "attn_implementation": rm.model.config._attn_implementation,
        "device": torch.cuda.get_device_name(rm.device) if rm.device.type == "cuda" else rm.device.type,
        "processes": process_count,
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := installed_version(name))},
    }


def installed_version(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
