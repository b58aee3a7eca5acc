#!/usr/bin/env python3
"""Train a preference model (Bradley-Terry, GPM or hybrid) on comparisons.

    python scripts/train_rm_general_preference.py --pretrain MODEL --dataset FILE --is_general_preference
    python scripts/launch.py --nproc-per-node 8 scripts/train_rm_general_preference.py ...   the same on 8 devices
    python scripts/train_rm_general_preference.py --config RUN/arguments.json                a run once more

The launchers beside this file set it up; `--help` explains every flag. Exit codes: 0 done, 1 the run failed, 2 what was
given cannot be used (one line says why), 130 and 143 ended by SIGINT or SIGTERM.
"""

import dataclasses
import functools
import logging
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # importing takes seconds, in which Ctrl-C should print no traceback
    from general_preference.cpu_settings import restart_with_cpu_settings

    restart_with_cpu_settings()

from general_preference.cli import exit_code, format_table, quiet_other_libraries
from general_preference.datasets import preparation
from general_preference.datasets.sources import parse_sources
from general_preference.datasets.tokenization import ComparisonTokenizer, load_tokenizer
from general_preference.distributed import is_main_process
from general_preference.errors import InputError
from general_preference.files import replace_text
from general_preference.models.config import OWN_BASE, PreferenceConfig, adapter_base
from general_preference.models.heads import saved_head
from general_preference.models.merging import lacks_heads, merged_base
from general_preference.models.reward_model import get_reward_model
from general_preference.models.starting import settle_padding
from general_preference.trainer.arguments import Arguments, parse_arguments
from general_preference.trainer.deepspeed_config import without_keys
from general_preference.trainer.session import hold_run

logger = logging.getLogger("train")


def main(argv: list[str] | None = None) -> int:
    """Parse, train, and turn what can go wrong into one line and an exit code."""
    arguments = parse_arguments(argv)
    return exit_code(lambda: train(arguments), kept="metrics and checkpoints written so far stay where they are")


def train(arguments: Arguments) -> None:
    """The run, with its folders held, from paths to a saved model."""
    arguments.check()
    quiet_other_libraries()
    if arguments.output.plan is not None:
        print_plan(arguments)
        return
    hold_run(arguments, run)


def print_plan(arguments: Arguments) -> None:
    """What the run would need, from the main process."""
    from general_preference.trainer.plan import plan

    if not is_main_process():
        return
    if lacks_heads(arguments.model.pretrain, arguments.model.trust_remote_code):  # it would be merged
        arguments = on_base(arguments, adapter_base(arguments.model.pretrain))
    preference = resolve_preference(arguments)
    encoder = make_encoder(make_tokenizer(arguments), preference)
    lengths = prepare_data(arguments, encoder)[0]["length"][:]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    print(plan(arguments, preference, arguments.output.plan, world_size, lengths))


def run(arguments: Arguments, engine) -> None:
    """Data, model, training, and what is printed at the end."""
    from general_preference.trainer.objectives import PreferenceObjective
    from general_preference.trainer.trainer import Trainer

    context = engine.context
    folder = Path(arguments.output.save_path)
    if (folder / "config.json").is_file() and not arguments.output.load_checkpoint:
        logger.warning("%s holds a finished run; its files are replaced as this one writes its own", folder)
    given, arguments = arguments, merge_pretrain(arguments, context)
    preference = context.main_process_first(lambda: resolve_preference(arguments))
    tokenizer = context.main_process_first(lambda: make_tokenizer(arguments))
    encoder = make_encoder(tokenizer, preference)
    train_table, eval_tables, summaries = context.main_process_first(lambda: prepare_data(arguments, encoder))
    for summary in summaries:
        logger.info("%s", summary)
    model = make_model(arguments, preference, engine.config())
    model.card.base_model = given.model.pretrain
    settle_padding(model.language_model.config, tokenizer, preference)
    for table in (train_table, *eval_tables.values()):
        preparation.check_known_ids(table, model.vocabulary_size, tokenizer)
    objective = PreferenceObjective(arguments.loss, model, tokenizer, engine.device)
    arguments.check_routing(objective.aux_loss_coef)
    trainer = Trainer(arguments, engine, model, tokenizer, objective, train_table, eval_tables)
    kernel = model.config._attn_implementation
    logger.info(
        "%s on %s: %d steps of %d comparisons, %d process(es) on %s, ZeRO %d, attention %s",
        preference.describe(), arguments.model.pretrain, trainer.steps, engine.global_batch_size, context.world_size,
        engine.device, arguments.engine.zero_stage, kernel,
    )  # fmt: skip
    if context.world_size > 1:
        logger.info("tokens of the fullest process: %.1f %% above the mean", 100 * trainer.sampler.imbalance())
    if context.is_main:
        versions = {name: version(name) for name in ("torch", "transformers", "deepspeed", "datasets")}
        given.save(
            folder, world_size=context.world_size, steps=trainer.steps, attention=kernel,
            aux_loss_coef=objective.aux_loss_coef, versions=versions, deepspeed_config=without_keys(engine.config()),
        )  # fmt: skip
        replace_text(folder / "data_summary.json", "[" + ", ".join(summary.to_json() for summary in summaries) + "]")
    results = trainer.fit()
    if context.is_main:
        if results:
            print(f"\nHeld-out comparisons\n{format_table(results)}")
        print(f"\nModel, metrics and pictures: {folder}")


def merge_pretrain(arguments: Arguments, context) -> Arguments:
    """The same run; on SAVE_PATH/base, its own base model, if --pretrain is an adapter without preference heads."""
    model, folder = arguments.model, Path(arguments.output.save_path).resolve() / OWN_BASE
    if not context.main_process_first(lambda: lacks_heads(model.pretrain, model.trust_remote_code)):
        return arguments
    work = functools.partial(merged_base, model.pretrain, folder, model.trust_remote_code)
    merged = context.main_process_first(work, main_only=True)
    how = "is merged into" if merged else "was merged before into"
    logger.info("%s, an adapter without preference heads, %s %s, which is trained", model.pretrain, how, folder)
    return on_base(arguments, str(folder))


def on_base(arguments: Arguments, base: str) -> Arguments:
    """The same run with another --pretrain."""
    return dataclasses.replace(arguments, model=dataclasses.replace(arguments.model, pretrain=base))


def resolve_preference(arguments: Arguments) -> PreferenceConfig:
    """The head to train: what the flags ask for, or what the checkpoint in --pretrain already has."""
    model = arguments.model
    return model.preference(arguments.data.max_len, saved_head(model.pretrain, model.trust_remote_code))


def make_tokenizer(arguments: Arguments):
    """The tokenizer of --pretrain, with the chat template that the flags ask for."""
    model = arguments.model
    options = {"use_fast": not model.disable_fast_tokenizer, "trust_remote_code": model.trust_remote_code}
    return load_tokenizer(model.pretrain, input_template=model.input_template, **options)


def make_encoder(tokenizer, preference: PreferenceConfig) -> ComparisonTokenizer:
    """What turns messages into the tokens that the model reads."""
    return ComparisonTokenizer(tokenizer, preference.max_length, preference.input_format, preference.pad_token_id)


def prepare_data(arguments: Arguments, encoder: ComparisonTokenizer):
    """(training table, {set: evaluation table}, summaries) from --dataset and --eval_dataset."""
    data = arguments.data
    options = {"skip_bad": data.on_bad_record == "skip", "workers": data.preprocessing_workers}
    sources = parse_sources(data.dataset)
    probabilities = preparation.parse_probabilities(data.dataset_probs, len(sources))
    held_out_sources = parse_sources(data.eval_dataset) if data.eval_dataset else []
    reading = data.reading()
    tables, read = preparation.load_tokenized(sources, encoder, reading=reading, **options)
    split = {"max_samples": data.max_samples, "group_size": data.group_size, "seed": arguments.optimizer.seed}
    train_table, held_out = preparation.split_and_blend(tables, probabilities, data.train_split_ratio, **split)
    reading = dataclasses.replace(reading, custom=False)
    eval_tables, eval_read = preparation.load_tokenized(held_out_sources, encoder, reading=reading, **options)
    named = dict(zip((source.name for source in held_out_sources), eval_tables, strict=True))
    if arguments.loss.margin_loss and not any(train_table["margin"][:]):
        raise InputError("--margin_loss: no record of --dataset has a margin: drop the flag, or add margins")
    if len(held_out):
        if "held_out" in named:
            raise InputError("--eval_dataset has a set 'held_out', the name of the split: give it another, name=path")
        named["held_out"] = held_out
    elif data.train_split_ratio < 1:
        raise InputError(f"--train_split_ratio {data.train_split_ratio} leaves nothing to evaluate on: lower it")
    trained_on = set(train_table["prompt_key"][:])
    summarize = preparation.summarize_table
    summaries = [summarize("train", train_table, read)]
    for name, table in named.items():
        summaries.append(summarize(name, table, [one for one in eval_read if one.name == name], trained_on))
    return train_table, named, summaries


def make_model(arguments: Arguments, preference: PreferenceConfig, deepspeed_config: dict):
    """The model with its heads, adapters and frozen parts, before the engine wraps it."""
    wanted, names = arguments.model, ("load_in_4bit", "lora_rank", "lora_alpha", "lora_dropout", "target_modules")
    options = {name: getattr(wanted, name) for name in (*names, "attn_implementation", "trust_remote_code")}
    options |= {"use_flash_attention_2": wanted.flash_attn, "seed": arguments.optimizer.seed}
    options |= {"bf16": arguments.engine.bf16, "ds_config": deepspeed_config, "keep_reward": wanted.keep_reward}
    options |= dict.fromkeys(("init_value_head", "init_prompt_head"), wanted.new_head)
    model = get_reward_model(wanted.pretrain, preference=preference, **options)
    check_positions(model, preference.max_length)
    model.freeze_unused(language_model_head=arguments.loss.add_pretrain_loss)
    model.card.datasets = [source.path for source in parse_sources(arguments.data.dataset)]
    return model


def check_positions(model, max_length: int) -> None:
    """Refuse sequences longer than a model's learned positions; warn where rotary ones only get worse."""
    limit = model.learned_positions
    if limit is not None and max_length > limit:
        raise InputError(f"--max_len {max_length} exceeds the model's {limit} positions: use at most {limit}")
    trained = getattr(model.config, "max_position_embeddings", None)
    if trained is not None and max_length > trained:
        logger.warning("--max_len %d exceeds the %d positions this model was made for", max_length, trained)


if __name__ == "__main__":
    sys.exit(main())
