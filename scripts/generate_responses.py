#!/usr/bin/env python3
"""A policy answers prompts: K responses to each, as text and as tokens. The first stage of policy alignment.

    python scripts/generate_responses.py --policy MODEL --prompts FILE --output samples.jsonl --samples 8
    python scripts/launch.py --nproc-per-node 8 scripts/generate_responses.py ...            the same on 8 devices
    GENERATE_PYTHON=/path/to/vllm/bin/python python scripts/generate_responses.py ...        the same with vLLM

Writes OUTPUT (a JSON line per prompt, in the order of the data; see general_preference/alignment/samples.py) and beside
it .summary.json. Started again after a stop, it continues. Exit codes, each with one line: 1 the run failed, 2 what was
given cannot be used, 130 interrupted.
"""

import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":
    from general_preference.cpu_settings import restart_with_cpu_settings

    restart_with_cpu_settings()

from tqdm.auto import tqdm

from general_preference.alignment import generation
from general_preference.alignment.arguments import GenerationArguments
from general_preference.alignment.generation import Found, Sampling
from general_preference.alignment.prompts import Prompt, PromptCounts, prompts_checksum, read_prompts
from general_preference.cli import exit_code, parse_flags, quiet_other_libraries
from general_preference.datasets.sources import parse_sources
from general_preference.datasets.tokenization import ComparisonTokenizer, load_tokenizer
from general_preference.distributed import DistributedContext
from general_preference.errors import InputError
from general_preference.inference.batch import ASKED, ResultStore
from general_preference.models.config import base_of, weights_digest
from general_preference.models.device import choose_device, inference_dtype

logger = logging.getLogger("generate_responses")

PYTHON = "GENERATE_PYTHON"  # names the interpreter that has vLLM


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn what can go wrong into one line and an exit code."""
    (arguments,) = parse_flags((GenerationArguments,), argv, "Generate responses of a policy to prompts.")
    return exit_code(lambda: run(arguments), kept="finished rows are kept: the same command continues")


def run(arguments: GenerationArguments) -> None:
    """From paths to samples."""
    arguments.check()
    sources, path = parse_sources(arguments.prompts), arguments.policy
    store = ResultStore(Path(arguments.output))
    store.refuse_inputs(sources, path)
    quiet_other_libraries()
    with DistributedContext.join() as context:
        engine = choose_engine(arguments)
        device = choose_device("cpu" if engine == "vllm" else arguments.device, context.local_rank)
        remote = {"trust_remote_code": arguments.trust_remote_code}
        positions = context.main_process_first(lambda: generation.policy_positions(path, **remote))
        tokenizer = context.main_process_first(lambda: load_tokenizer(path, needs_template=True, **remote))
        prompts, counts = context.main_process_first(lambda: load_prompts(arguments, tokenizer))
        sampling = Sampling(
            *(getattr(arguments, name) for name in ("samples", "temperature", "top_p", "max_new_tokens", "seed")),
            generation.stop_tokens(path, tokenizer, **remote),
        )  # fmt: skip
        sampling.check_length(prompts, positions)
        bf16 = arguments.bf16 is not False if engine == "vllm" else arguments.bf16  # its device is not known here
        dtype = inference_dtype(device, bf16)
        names = ("policy", "prompts", "max_prompts", "max_prompt_tokens", "vllm_options")
        settings = {ASKED: {name: getattr(arguments, name) for name in names}, "policy_digest": weights_digest(path)}
        settings |= asdict(sampling) | {"dtype": str(dtype).removeprefix("torch."), "engine": engine}
        settings["prompts"] = prompts_checksum(prompts)
        if engine == "vllm":
            settings["dtype"] = arguments.vllm().get("dtype", settings["dtype"])
        if engine == "transformers":
            default = generation.CPU_TOKENS if device.type == "cpu" else generation.GPU_TOKENS
            settings["batch_tokens"] = arguments.batch_tokens or default
        with store.open(context, len(prompts), settings, arguments.overwrite):
            finished = context.broadcast(store.finished() if context.is_main else None)
            logger.info("%d prompts, %d done before; %s on %d process(es)", len(prompts), len(finished), engine,
                        context.world_size)  # fmt: skip
            generate(arguments, context, store, prompts, finished, sampling, settings, device, dtype, tokenizer)
            if context.is_main:
                finish(store, counts)


def choose_engine(arguments: GenerationArguments) -> str:
    """The engine that `auto` stands for.

    Raises:
        InputError: an adapter, which vLLM would have to merge; options of vLLM for another engine.
    """
    engine = arguments.engine
    if engine == "auto":
        engine = "vllm" if os.environ.get(PYTHON) else "transformers"
    if engine == "vllm" and base_of(arguments.policy) is not None:
        raise InputError(
            f"{arguments.policy} is an adapter, which engine vllm does not read: use scripts/merge_lora.py"
        )
    if engine != "vllm" and arguments.vllm():
        cure = f"set {PYTHON} to a Python that has vLLM, or drop them"
        raise InputError(f"--vllm_options {arguments.vllm_options} are not read by engine {engine}: {cure}")
    return engine


def load_prompts(arguments: GenerationArguments, tokenizer) -> tuple[list[Prompt], PromptCounts]:
    """The prompts to answer, and how many records gave none."""
    options = {"skip_bad": arguments.on_bad_record == "skip", "longest": arguments.max_prompt_tokens}
    options |= {"limit": arguments.max_prompts, "seed": arguments.seed}
    encoder = ComparisonTokenizer(tokenizer)
    return read_prompts(parse_sources(arguments.prompts), encoder, arguments.reading(), **options)


def generate(arguments, context, store, prompts, finished, sampling, settings, device, dtype, tokenizer) -> None:
    """Answer what the open `store` lacks, split over the processes; then merge."""
    if settings["engine"] == "transformers":
        batches = generation.make_batches(prompts, sampling, settings["batch_tokens"])
    else:
        batches = generation.make_batches(prompts, sampling, sys.maxsize)[0]
        batches = [batches[start : start + generation.CHUNK] for start in range(0, len(batches), generation.CHUNK)]
    mine = [batch for batch in batches if not finished.issuperset(batch)][context.rank :: context.world_size]
    wanted = [index for batch in mine for index in batch if index not in finished]

    def found() -> Found:
        if settings["engine"] == "vllm":
            script, python = Path(__file__).with_name("generate_with_vllm.py"), os.environ.get(PYTHON) or sys.executable
            options = {"trust_remote_code": arguments.trust_remote_code} | arguments.vllm()
            places = context.local_rank, context.world_size
            yield from generation.generate_with_vllm(
                script, python, arguments.policy, settings["dtype"], prompts, wanted, sampling, *places, options
            )
        elif mine:
            model = generation.load_policy(arguments.policy, dtype, device, arguments.trust_remote_code)
            generation.check_tokens(model, prompts)
            engine = settings["engine"]
            work = generation.generate_in_batches if engine == "transformers" else generation.generate_continuously
            yield from work(model, prompts, mine, sampling)

    shown = context.is_main and wanted
    with tqdm(total=len(wanted), desc="generating", unit="prompt", disable=not shown, mininterval=1) as bar:
        for index, response_ids in found():
            if index not in finished:  # of a batch that a kill cut short, which has to be made whole again
                store.append(index, generation.sample_row(prompts[index], response_ids, tokenizer, sampling.stop_ids))
                bar.update()
    context.barrier()
    if context.is_main:
        store.merge()


def finish(store: ResultStore, counts: PromptCounts) -> None:
    """Sum the rows up, print."""
    summary = generation.summarize_samples(store.rows())
    store.finish(summary | {"read": asdict(counts)})
    shown = ", ".join(
        f"{name} {value:.4g}" if "share" in name else f"{name} {value:.0f}" for name, value in summary.items()
    )
    print(f"{shown}\nSamples: {store.output}\nSummary: {store.summary}")


if __name__ == "__main__":
    sys.exit(main())
