#!/usr/bin/env python3
"""Run a preference model on RewardBench 1, RewardBench 2 or the prior sets.

    python rewardbench_eval/run_rm_rewardbench.py --model MODEL                          RewardBench 1, from the hub
    python rewardbench_eval/run_rm_rewardbench.py --model MODEL --rewardbench_version 2 --dataset rows.parquet
    torchrun --nproc-per-node 8 rewardbench_eval/run_rm_rewardbench.py --model MODEL                     on 8 devices

Writes MODEL.json (the official layout), .jsonl (a line per row), .summary.json (sections, intervals, what the run was
made with) and .png into --output_dir. Started again after a stop, it continues. Exit codes, each with one line: 1 the
run failed, 2 what was given cannot be used, 130 interrupted.
"""

import json
import logging
import platform
import sys
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import distributions
from pathlib import Path, PurePosixPath

if __name__ == "__main__":
    from general_preference.cpu_settings import restart_with_cpu_settings

    restart_with_cpu_settings()

import torch

from general_preference import GPMPipeline
from general_preference.cli import check_at_least, exit_code, flag, parse_flags, quiet_other_libraries
from general_preference.datasets.preparation import Summary
from general_preference.datasets.sources import parse_sources
from general_preference.datasets.tokenization import DEFAULT_TEMPLATE, load_tokenizer, plain_template
from general_preference.distributed import DistributedContext
from general_preference.errors import InputError
from general_preference.evaluation.rewardbench import data, report
from general_preference.evaluation.rewardbench.data import PREF_SETS, REWARDBENCH_1, REWARDBENCH_2, Benchmark
from general_preference.evaluation.scoring import prepare_rows
from general_preference.files import replace_text
from general_preference.inference.arguments import InferenceArguments
from general_preference.inference.batch import ResultStore, result_row, run_settings, score_table
from general_preference.inference.ranking import SCORE_METHODS
from general_preference.plots import draw_subsets

logger = logging.getLogger("rewardbench")

OF_THE_MODEL = ("model_files", "tokens", "max_length", "dtype", "tau")
OFFICIAL, PICTURE = ".json", ".png"
DTYPES, WINNERS = ["float16", "bfloat16", "float32", "float64"], list(SCORE_METHODS)
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "safetensors", "peft", "flash-attn", "flash_attn")


@dataclass
class RewardBenchArguments:
    """Model, benchmark, and where the results go. Flags of the paper's script keep names and meaning."""

    model: str | None = flag(None, "trained preference model: folder or hub name")
    rewardbench_version: int = flag(1, "1: pairs in 23 subsets; 2: best of 4, and ties", choices=[1, 2])
    pref_sets: bool = flag(False, "run the prior sets (allenai/pref-test-sets) instead of RewardBench's own rows")
    dataset: str | None = flag(None, "rows with the hub's columns: files, folders or other hub names; see docs/data.md")
    winner: str = flag("borda", "version 2: what decides the best response; see inference/ranking.py", choices=WINNERS)
    debug: bool = flag(False, "the first ten rows only; results get .debug into their names")
    allow_empty_responses: bool = flag(False, "score empty responses as they are instead of refusing them")
    output_dir: str = flag("./results", "folder of the results")
    model_name: str | None = flag(None, "name of the result files; default the hub name or the folder's name")
    overwrite: bool = flag(False, "replace results of another model, other data or other settings of that name")
    tokenizer: str | None = flag(None, "folder or hub name of a tokenizer that is not the model's own")
    chat_template: str | None = flag(None, "file of a Jinja chat template; fastchat's names (raw, tulu) are not used")
    max_length: int | None = flag(None, "tokens of prompt and one response; default what the model was trained with")
    batch_size: int = flag(64, "rows in one call at most")
    torch_dtype: str | None = flag(None, "the backbone's dtype; default as for --bf16", choices=DTYPES)
    is_custom_model: bool | None = flag(None, "always so here: models of this repository; false is an error")
    not_quantized: bool | None = flag(None, "always so here: weights are never quantized; false is an error")
    do_not_save: bool | None = flag(None, "always so here: nothing is uploaded to the hub; false is an error")
    disable_beaker_save: bool = flag(False, "accepted and not used: nothing is written for Beaker jobs")

    def check(self) -> None:
        """InputError for what cannot work, before anything is loaded."""
        if not self.model:
            raise InputError("--model is missing")
        if empty := [name for name, value in vars(self).items() if value == ""]:
            raise InputError(f"--{empty[0]} is empty: give it a value, or drop it")
        check_at_least(self, 1, "batch_size")
        if False in (self.is_custom_model, self.not_quantized, self.do_not_save):
            raise InputError("--is_custom_model, --not_quantized, --do_not_save: false is not possible, see --help")
        if self.pref_sets and self.rewardbench_version == 2:
            raise InputError("--pref_sets belongs to --rewardbench_version 1: drop one")
        if self.winner != "borda" and self.rewardbench_version == 1:
            raise InputError(f"--winner {self.winner} needs --rewardbench_version 2: a pair has its own winner")
        if self.model_name is not None:
            name = PurePosixPath(self.model_name)
            if name.is_absolute() or ".." in name.parts or not name.name.strip():
                raise InputError(f"--model_name {self.model_name!r} is no name for files in --output_dir")

    @property
    def benchmark(self) -> Benchmark:
        """What is asked for."""
        return PREF_SETS if self.pref_sets else REWARDBENCH_2 if self.rewardbench_version == 2 else REWARDBENCH_1

    @property
    def name(self) -> str:
        """Of the results: the hub name or the folder's own name."""
        folder = Path(self.model).expanduser()
        return str(PurePosixPath(self.model_name or (folder.resolve().name if folder.is_dir() else self.model)))

    def output(self, benchmark: Benchmark, ending: str = ".jsonl") -> Path:
        """A result file of this model."""
        return Path(self.output_dir) / f"{self.name}{benchmark.ending}{'.debug' if self.debug else ''}{ending}"


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn what can go wrong into one line and an exit code."""
    parsed = parse_flags((RewardBenchArguments, InferenceArguments), argv, "Run a preference model on RewardBench.")
    return exit_code(lambda: run(*parsed), kept="finished rows are kept: the same command continues")


def run(arguments: RewardBenchArguments, inference: InferenceArguments) -> None:
    """From a model's name to its results."""
    arguments.check()
    inference.check()
    benchmark = arguments.benchmark
    store = ResultStore(arguments.output(benchmark), OFFICIAL, PICTURE)
    read = arguments.model, arguments.tokenizer, arguments.chat_template
    store.refuse_inputs(parse_sources(arguments.dataset) if arguments.dataset else [], *read)
    quiet_other_libraries()
    with DistributedContext.join() as context:
        wanted = (benchmark, arguments.dataset, arguments.debug, arguments.allow_empty_responses)
        rows = context.main_process_first(lambda: data.load_benchmark(*wanted))
        dtype = getattr(torch, arguments.torch_dtype) if arguments.torch_dtype else None
        options = {"max_length": arguments.max_length, "dtype": dtype}
        options["tokenizer"] = context.main_process_first(lambda: load_other_tokenizer(arguments, inference))
        rm = context.main_process_first(lambda: inference.load(arguments.model, context.local_rank, **options))
        table, read = prepare_rows(rm, rows, benchmark.title, inference.preprocessing_workers, context)
        names = ("model", "dataset", "rewardbench_version", "pref_sets", "debug", "tokenizer", "chat_template")
        asked = {name: getattr(arguments, name) for name in names}
        hashes = {"tokens": rm.encoder.fingerprint(), "data": data.content_fingerprint(rows)}
        settings = run_settings(rm, arguments.model, asked, **hashes)
        with store.open(context, len(table), settings, arguments.overwrite):
            make_row = partial(report.best_of_n_row if benchmark.best_of_n else result_row, tau=rm.tau)
            score_table(rm, table, store, context, make_row, arguments.batch_size)
            if context.is_main:
                finish(arguments, rm, read, store, context.world_size)


def load_other_tokenizer(arguments: RewardBenchArguments, inference: InferenceArguments):
    """The tokenizer that --tokenizer and --chat_template ask for; None for the model's own."""
    if arguments.tokenizer is None and arguments.chat_template is None:
        return None
    path = arguments.tokenizer or arguments.model
    tokenizer = load_tokenizer(path, trust_remote_code=inference.trust_remote_code)
    wanted = arguments.chat_template
    if wanted is not None and "/" not in wanted and "." not in wanted and not Path(wanted).exists():
        logger.info("--chat_template %s is not used: texts are written as %s", wanted, template_name(tokenizer))
    elif wanted is not None:
        try:
            tokenizer.chat_template = Path(wanted).read_text(encoding="utf-8")
            tokenizer.apply_chat_template([{"role": "user", "content": "text"}], tokenize=False)
        except Exception as error:  # no such file, Jinja's own errors, and those that templates raise
            raise InputError(f"--chat_template {wanted} is no chat template: {error}") from error
    return tokenizer


def template_name(tokenizer) -> str:
    """The chat template's name in the result file: "tokenizer" for one of its own, else "plain"."""
    return "plain" if tokenizer.chat_template == plain_template(DEFAULT_TEMPLATE) else "tokenizer"


def finish(arguments: RewardBenchArguments, rm: GPMPipeline, read: Summary, store: ResultStore, processes: int) -> None:
    """Grade the rows, sum them up, draw, print."""
    benchmark, winner = arguments.benchmark, arguments.winner
    graded = [report.grade(benchmark, row, winner, rm.tau) for row in store.rows()]
    store.replace_rows(row for row, _ in graded)
    results = report.summarize_subsets(benchmark, graded)
    prior = prior_score_of(arguments, store.settings) if benchmark is REWARDBENCH_1 else None
    scores = report.aggregate(benchmark, results, prior)
    of_model = arguments.name, rm.preference, template_name(rm.tokenizer)
    official = report.official_results(benchmark, results, *of_model, winner)
    replace_text(store.beside(OFFICIAL), json.dumps(official, indent=4))
    title = f"{arguments.name} on {benchmark.title}" + (", first ten rows" if arguments.debug else "")
    drawn = draw_subsets(results, *report.picture_labels(benchmark), title, store.beside(PICTURE))
    summary = {"benchmark": benchmark.title, "results": results, "scores": scores}
    if benchmark.best_of_n:
        summary["decided_by"] = {"winner": winner, "merit of a response": report.WHAT_DECIDES[winner]}
    store.finish(summary | {"run": provenance(rm, read, processes)})
    print(f"\n{title}\n\n{report.format_report(benchmark, results, scores)}")
    if read.prompt_cut or read.response_cut:
        print(f"cut to {rm.max_length} tokens: {read.prompt_cut} prompts, responses of {read.response_cut} rows")
    picture = f"\nPicture: {store.beside(PICTURE)}" if drawn else ""
    print(f"\nResult:  {store.beside(OFFICIAL)}\nRows:    {store.output}\nSummary: {store.summary}{picture}")


def prior_score_of(arguments: RewardBenchArguments, settings: dict) -> float | None:
    """The same model's score on the prior sets, if it is in the same folder; else None."""
    summary = arguments.output(PREF_SETS, ".summary.json")
    try:
        found = json.loads(summary.read_text(encoding="utf-8"))
        prior, same = found["scores"]["Prior Sets"], all(found["settings"][n] == settings[n] for n in OF_THE_MODEL)
    except (OSError, ValueError, LookupError, TypeError):  # they were not run, or this is no summary
        return None
    if not same:
        logger.warning("%s is of another model or other settings: not averaged", summary)
    return prior if same else None


def provenance(rm: GPMPipeline, read: Summary, processes: int) -> dict:
    """What is needed to repeat the run."""
    device = torch.cuda.get_device_name(rm.device) if rm.device.type == "cuda" else rm.device.type
    packages = {one.name: one.version for one in distributions() if one.name in PACKAGES}
    return {
        "command": sys.argv, "processes": processes, "python": platform.python_version(), "packages": packages,
        "preference": asdict(rm.preference), "input_format": rm.preference.input_format,
        "chat_template": rm.tokenizer.chat_template, "truncation": {"max_length": rm.max_length, **asdict(read)},
        "dtype": str(rm.model.dtype).removeprefix("torch."), "device": device,
        "attn_implementation": rm.model.config._attn_implementation,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
