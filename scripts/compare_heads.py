#!/usr/bin/env python3
"""Which head fits which data, and how sure: heads trained on the hidden states of one frozen backbone.

    python scripts/compare_heads.py --pretrain MODEL --dataset comparisons.jsonl --output results/heads
    python scripts/launch.py --nproc-per-node 8 scripts/compare_heads.py ...                 the same on 8 devices

The backbone runs once over all prompts and responses and its hidden states are kept in OUTPUT/features (numpy); a run
that was stopped continues. Then every head is trained on them in seconds: each with every learning rate of a grid, of
which validation prompts choose one, then with several seeds; splits, steps and grid are the same for all. Writes
OUTPUT/heads.json (all numbers), OUTPUT/heads.png, and with --save a model that GPMPipeline loads. A backbone that is
trained, too, may rank heads otherwise. Exit codes: 0 done, 1 it failed, 2 bad input, 130 interrupted.
"""

import contextlib
import json
import logging
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

if __name__ == "__main__":
    from general_preference.cpu_settings import restart_with_cpu_settings

    restart_with_cpu_settings()

import torch

from general_preference.cli import exit_code, format_table, parse_flags, quiet_other_libraries
from general_preference.datasets.preparation import check_known_ids
from general_preference.datasets.sources import parse_sources
from general_preference.datasets.tokenization import ComparisonTokenizer, load_tokenizer, stable_hash
from general_preference.distributed import DistributedContext
from general_preference.errors import InputError
from general_preference.files import check_new_folder, check_outputs, lock_folder, new_folder, read_object, replace_text
from general_preference.models.config import checkpoint_identity, load_config
from general_preference.models.device import choose_device, inference_dtype
from general_preference.models.heads import saved_head
from general_preference.models.reward_model import get_reward_model
from general_preference.models.starting import settle_padding
from general_preference.probing.arguments import ProbingArguments
from general_preference.probing.comparing import compare_scores, stated_preferences
from general_preference.probing.fitting import HeadSpec, parse_heads
from general_preference.probing.pictures import draw_heads
from general_preference.probing.running import Trials, describe_set, load_tables, with_subsets
from general_preference.probing.states import FrozenBackbone, StateStore, load_frozen, place_states
from general_preference.trainer.arguments import DEFAULT_MAX_LEN
from general_preference.trainer.run_arguments import OptimizerArguments

logger = logging.getLogger("compare_heads")

NUMBERS, PICTURE = "heads.json", "heads.png"


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and turn what can go wrong into one line and an exit code."""
    (arguments,) = parse_flags((ProbingArguments,), argv, "Compare heads on the hidden states of a frozen backbone.")
    return exit_code(
        lambda: run(arguments), kept="the hidden states computed so far are kept: the same command continues"
    )


def run(arguments: ProbingArguments) -> None:
    """From comparisons to a table, numbers, a picture and a model."""
    arguments.check()
    check_folders(arguments)
    quiet_other_libraries()
    with DistributedContext.join() as context:
        path = arguments.pretrain
        device = choose_device(arguments.device, context.local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        specs = context.main_process_first(lambda: read_heads(arguments))
        encoder = context.main_process_first(lambda: make_encoder(arguments))
        tables, summaries = context.main_process_first(lambda: load_tables(arguments, encoder))
        for summary in summaries:
            logger.info("%s", summary)
        prompts, placed = place_states(tables.values())
        rows = dict(zip(tables, placed, strict=True))
        dtype = inference_dtype(device, arguments.bf16)

        def load() -> FrozenBackbone:
            model = load_frozen(path, dtype, arguments.attn_implementation, arguments.trust_remote_code, device)
            for table in tables.values():
                check_known_ids(table, model.vocabulary_size, encoder.tokenizer)
            return model

        hidden = load_config(path, arguments.trust_remote_code).get_text_config().hidden_size
        settings = {"model_files": stable_hash(checkpoint_identity(path)), "dtype": str(dtype).removeprefix("torch.")}
        if arguments.attn_implementation != "auto":
            settings["attention"] = arguments.attn_implementation
        store = StateStore(arguments.features_folder, prompts, hidden, settings)
        claim = context.main_process_first(lambda: lock_folder(Path(arguments.output), "output"), main_only=True)
        with claim or contextlib.nullcontext(), store.open(context):
            began = time.perf_counter()
            computed = store.fill(context, load, arguments.batch_tokens)
            seconds = {"states": time.perf_counter() - began}
            logger.info(
                "hidden states of %d prompts, %d of them new: %.0f s", len(prompts), computed, seconds["states"]
            )
            optimizer = OptimizerArguments(
                l2=arguments.l2,
                max_epochs=arguments.epochs,
                micro_train_batch_size=arguments.batch_size,
                seed=arguments.seed,
            )
            trials = Trials(context, device, store.states, rows, optimizer)
            sets = {name: some for name, some in rows.items() if name not in ("fit", "validation")}
            began = time.perf_counter()
            chosen, results, seconds["head"] = compare(trials, specs, arguments, sets)
            seconds["heads"] = time.perf_counter() - began
            if context.is_main:
                sizes = {name: len(some) for name, some in rows.items()}
                found = {"arguments": vars(arguments), "comparisons": sizes, "prompts": len(prompts)}
                found |= {"states": list(store.shape), "seconds": seconds, "chosen": chosen, "results": results}
                found["data"] = list(map(asdict, summaries))
                report(found, Path(arguments.output))
                if arguments.save:
                    save_best(arguments, trials, specs, chosen, encoder.tokenizer)
            context.barrier()


def check_folders(arguments: ProbingArguments) -> None:
    """InputError if results would replace what is no comparison of heads, or what is read."""
    output, features = Path(arguments.output), arguments.features_folder
    sources = [
        source.path for text in (arguments.dataset, arguments.eval_dataset) if text for source in parse_sources(text)
    ]
    check_outputs({output: "--output", features: "--features"}, [arguments.pretrain], sources)
    numbers = output / NUMBERS
    if numbers.exists() and "chosen" not in read_object(numbers):
        raise InputError(f"{numbers} is no comparison of heads and would be replaced: choose another --output")
    if output.resolve() == features.resolve():
        raise InputError(f"--features {features} is --output, too: choose a folder of its own")
    if arguments.save:
        check_new_folder(arguments.model_folder, [arguments.pretrain, *sources])
        model = arguments.model_folder.resolve()
        if any(folder.resolve().is_relative_to(model) for folder in (output, features)):
            raise InputError(f"--save_path {arguments.model_folder} gets other results: choose a folder of its own")


def read_heads(arguments: ProbingArguments) -> list[HeadSpec]:
    """What is compared, with the input format and length of the backbone."""
    saved = saved_head(arguments.pretrain, arguments.trust_remote_code)
    length = arguments.max_len or (saved and saved.preference.max_length) or DEFAULT_MAX_LEN
    asked = {"max_length": length, "learnable_temperature": arguments.learnable_temperature or None}
    return parse_heads(arguments.heads, arguments.pretrain, saved, **asked)


def make_encoder(arguments: ProbingArguments) -> ComparisonTokenizer:
    """What turns messages into the tokens that the backbone reads, as in training."""
    saved = saved_head(arguments.pretrain, arguments.trust_remote_code)
    (spec,) = parse_heads("bt", arguments.pretrain, saved)
    length = arguments.max_len or spec.preference.max_length or DEFAULT_MAX_LEN
    tokenizer = load_tokenizer(arguments.pretrain, trust_remote_code=arguments.trust_remote_code)
    return ComparisonTokenizer(tokenizer, length, spec.preference.input_format, spec.preference.pad_token_id)


def compare(trials: Trials, specs: list[HeadSpec], arguments: ProbingArguments, sets: dict) -> tuple[dict, dict, float]:
    """(chosen learning rates, {set: numbers}, seconds of a training)."""
    chosen = trials.choose_rates(specs, arguments.rates())
    rates = {name: found["learning_rate"] for name, found in chosen.items()}
    sets = with_subsets(sets)
    scored, seconds = trials.score_sets(specs, rates, arguments.seeds, sets)
    hidden = trials.states.shape[1]
    for spec in specs:
        head = spec.make(hidden, 0)
        chosen[spec.name]["weights"] = sum(weight.numel() for weight in head.parameters())
    results = {}
    for name, rows in sets.items():
        heads = compare_scores(scored[name], stated_preferences(rows))
        results[name] = describe_set(rows) | {"heads": heads}
    return chosen, results, seconds


def report(found: dict, output: Path) -> None:
    """Tables, numbers, picture."""
    replace_text(output / NUMBERS, json.dumps(found, indent=2, default=str))
    for name, one in found["results"].items():
        notes = f"the longer response wins {one['longer_response']:.4f}"
        if one["scalar_ceiling"] is not None:
            notes += f"; a scalar gets at most {one['scalar_ceiling']:.4f}"
        print(f"\n{name}: {one['n']} comparisons of {one['prompts']} prompts; {notes}")
        rows = {head: table_row(found["chosen"][head], numbers) for head, numbers in one["heads"].items()}
        print(format_table(rows, "head", None))
    print("\n+-: 95 % interval over seeds.")
    if others := len(found["chosen"]) - 1:
        print(f"Differences from the first head, with intervals over prompts (bootstrap) that hold for all {others} at")
        print("once; better or worse only if the interval over seeds says so, too.")
    if edges := [name for name, one in found["chosen"].items() if one["at_edge"]]:
        print(f"The chosen learning rate is the lowest or highest of --learning_rates for {', '.join(edges)}.")
    seconds = found["seconds"]
    print(f"Hidden states: {seconds['states']:.0f} s; heads: {seconds['heads']:.0f} s, {seconds['head']:.2f} s each")
    print(f"Numbers: {output / NUMBERS}")
    if draw_heads(found["results"], output / PICTURE):
        print(f"Picture: {output / PICTURE}")


def table_row(chosen: dict, numbers: dict) -> dict:
    """A head's line on screen."""
    accuracy = numbers["accuracy"]
    spread = "" if accuracy["low"] is None else f" +-{accuracy['mean'] - accuracy['low']:.4f}"
    row = {"weights": chosen["weights"], "rate": f"{chosen['learning_rate']:g}"}
    row |= {"accuracy": f"{accuracy['mean']:.4f}{spread}", "loss": numbers["loss"]["mean"]}
    row |= {"calibration": numbers["calibration_error"]["mean"], "longer": numbers["longer"]}
    if "difference" in numbers:
        one = numbers["difference"]
        interval = "" if one["low"] is None else f" ({one['low']:+.4f} to {one['high']:+.4f})"
        row |= {"difference": f"{one['difference']:+.4f}{interval}", "verdict": numbers["verdict"]}
    return row


def save_best(arguments: ProbingArguments, trials: Trials, specs: list[HeadSpec], chosen: dict, tokenizer) -> None:
    """A head, trained with the first seed, on its backbone, as a model folder."""
    name = arguments.save
    if name == "best":
        name = min(arguments.savable(), key=lambda one: chosen[one]["validation_loss"])
    spec = next(one for one in specs if one.name == name)
    head = trials.train(spec, chosen[name]["learning_rate"], arguments.seed).cpu()
    dtype = inference_dtype(trials.device, arguments.bf16)
    model = get_reward_model(
        arguments.pretrain, bf16=dtype == torch.bfloat16, preference=replace(spec.preference),
        trust_remote_code=arguments.trust_remote_code, init_value_head=True, init_prompt_head=True,
    )  # fmt: skip
    model.load_state_dict(head.state_dict(), strict=False)
    settle_padding(model.language_model.config, tokenizer, spec.preference)
    model.card.datasets = [source.path for source in parse_sources(arguments.dataset)]
    with new_folder(arguments.model_folder) as folder:
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    print(f"Model: {arguments.model_folder} ({spec.preference.describe()})")


if __name__ == "__main__":
    sys.exit(main())
