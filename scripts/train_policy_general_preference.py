#!/usr/bin/env python3
"""Train a policy on its own samples, scored by a preference model: General Preference Optimization and its relatives.

    python scripts/train_policy_general_preference.py --policy MODEL --samples samples.jsonl --scores scored.jsonl
    python scripts/launch.py --nproc-per-node 8 scripts/train_policy_general_preference.py ...     the same on 8 devices

`generate_responses.py` and `score_responses.py` make the files; `run_align_general_preference.sh` does all of it, over
several iterations. `--recipe gpo|ln_gpo|sppo|dsppo|inpo|dpo|best_of_n` sets published values. Exit codes as those of
train_rm_general_preference.py.
"""

import functools
import json
import logging
import signal
import sys
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # importing takes seconds, in which Ctrl-C should print no traceback
    from general_preference.cpu_settings import restart_with_cpu_settings

    restart_with_cpu_settings()

from general_preference.alignment.policy_arguments import GAPS, RECIPES, PolicyRunArguments, parse_policy_arguments
from general_preference.alignment.samples import scores_checksum, summary_path
from general_preference.cli import exit_code, format_table, quiet_other_libraries
from general_preference.datasets.tokenization import load_tokenizer, stable_hash
from general_preference.errors import InputError
from general_preference.files import read_object, replace_text
from general_preference.inference.batch import ASKED
from general_preference.models.policy import check_policy, get_policy
from general_preference.trainer.session import hold_run

logger = logging.getLogger("train")

REPORT = "train_report.json"
_FREE = ("local_rank", "load_checkpoint", "skip_finished", "dist_timeout", "wandb_run_name", "start")  # may differ
_REGIME = 0.05  # below it the policy has not come near its targets


def main(argv: list[str] | None = None) -> int:
    """Parse, train, and turn what can go wrong into one line and an exit code."""
    arguments = parse_policy_arguments(argv)
    return exit_code(lambda: train(arguments), kept="metrics and checkpoints written so far stay where they are")


def train(arguments: PolicyRunArguments) -> None:
    """The run, from paths to a saved policy."""
    arguments.check()
    quiet_other_libraries()
    if (recipe := arguments.loss.recipe) is not None:
        logger.info("recipe %s: %s", recipe, ", ".join(f"{name} {value}" for name, value in RECIPES[recipe].items()))
        if recipe in GAPS:
            logger.info("recipe %s: %s", recipe, GAPS[recipe])
    if not is_finished(arguments):
        hold_run(arguments, run)


def is_finished(arguments: PolicyRunArguments) -> bool:
    """Whether --skip_finished was given and the run is done. InputError if it was done with other flags or samples."""
    folder = Path(arguments.output.save_path)
    if not arguments.output.skip_finished or not (folder / REPORT).is_file():
        return False
    found, mine = read_object(folder / "arguments.json"), json.loads(json.dumps(arguments.to_dict()))
    if "ref" in arguments.loss.weights():
        for flags in (found, mine):
            flags["reference"] = flags.get("reference") or flags.get("start")
    if different := [name for name in sorted(mine) if name not in _FREE and found.get(name) != mine[name]]:
        name = different[0]
        was = f"{folder} was trained with {name} {found.get(name)}, now it is {mine[name]}"
        raise InputError(f"{was}: choose another --save_path, or use the same flags")
    if read_object(folder / REPORT).get("made_of") != made_of(arguments):
        was = f"{folder} was trained on other samples or scores than those that are in its files now"
        raise InputError(f"{was}: remove it, or choose another --save_path")
    logger.info("%s is finished", folder)
    return True


def _settings(*paths: str) -> list[dict]:
    """What files of samples or scores were made with, without what was asked for."""
    return [read_object(summary_path(Path(path))).get("settings", {}) | {ASKED: None} for path in paths]


def made_of(arguments: PolicyRunArguments) -> str:
    """A checksum of the settings of all that is trained on; those of scores have a checksum of the samples."""
    return stable_hash(_settings(*arguments.data.sources))


def estimates_kl(arguments: PolicyRunArguments) -> bool:
    """Whether the mean log-ratio is of the sampling policy, and of samples that are its own, all of them."""
    drawn = _settings(*arguments.data.samples)
    own = not arguments.data.any_policy and all((one.get("temperature"), one.get("top_p")) == (1, 1) for one in drawn)
    return own and arguments.loss.select == "all" and arguments.loss.weights() == {"t": 1.0}


def run(arguments: PolicyRunArguments, engine) -> None:
    """Targets, anchors, training, and what is printed at the end."""
    from general_preference.alignment import training
    from general_preference.alignment.objective import PolicyObjective
    from general_preference.trainer.trainer import Trainer

    context, data, policy = engine.context, arguments.data, arguments.model.pretrain
    folder, first = Path(arguments.output.save_path), context.main_process_first
    if (folder / "config.json").is_file() and not arguments.output.load_checkpoint:
        logger.warning("%s holds a finished run; its files are replaced as this one writes its own", folder)
    if unread := arguments.loss.unread():
        logger.warning("%s: it does not read %s", arguments.loss, ", ".join(unread))
    first(lambda: check_policy(policy, arguments.model.trust_remote_code))
    sets = {"train": (data.samples, data.scores)}
    if data.evaluates:
        sets["held_out"] = [data.eval_samples], [data.eval_scores] if data.eval_scores else []
    model, tables, fixed, judge = load(arguments, policy, engine.config()), {}, {}, {}
    for name, (samples, scores) in sets.items():
        rows, settings = first(functools.partial(training.read_scored, samples, scores))
        if not data.any_policy:
            first(functools.partial(training.check_sampler, samples, policy))
        first(functools.partial(training.check_sizes, rows, model, compared=arguments.loss.loss != "likelihood"))
        judge = settings if name == "train" else judge
        if settings.get("model_files") != judge.get("model_files"):
            raise InputError("the scores to train on and those to evaluate on are of different preference models")
        tables[name] = make_table(arguments, engine, name, rows, settings.get("tau"))
        if name == "train" and settings:
            fixed = {"scores_checksum": scores_checksum(rows), "tau": settings["tau"]}
    model.facts = {"method": str(arguments.loss), "judge": Path(_judge(judge)).name if judge else None}
    tokenizer = first(lambda: load_tokenizer(policy, trust_remote_code=arguments.model.trust_remote_code))
    fixed |= {"preference_model": judge.get("model_files")}
    objective = PolicyObjective(arguments.loss, model, engine.device, fixed)
    arguments.check_routing(objective.aux_loss_coef)
    train_table = tables.pop("train")
    trainer = Trainer(arguments, engine, model, tokenizer, objective, train_table, tables)
    logger.info(
        "%s: %d prompts, %d steps of %d, %d process(es) on %s, ZeRO %d, attention %s",
        arguments.loss, len(train_table), trainer.steps, engine.global_batch_size, context.world_size, engine.device,
        arguments.engine.zero_stage, model.config._attn_implementation,
    )  # fmt: skip
    if context.is_main:
        versions = {name: version(name) for name in ("torch", "transformers", "deepspeed", "datasets")}
        arguments.save(folder, world_size=context.world_size, steps=trainer.steps, versions=versions)
    results = trainer.fit()
    if context.is_main:
        finish(arguments, results)


def load(arguments: PolicyRunArguments, path: str, deepspeed_config: dict | None = None):
    """The policy at `path` as it trains, or an anchor, which has no `deepspeed_config` and the same quantized weights:
    log-ratios are of what adapters change."""
    wanted, names = arguments.model, ("load_in_4bit", "trust_remote_code")
    names += ("lora_rank", "lora_alpha", "lora_dropout", "target_modules") if deepspeed_config is not None else ()
    options = {name: getattr(wanted, name) for name in names} | {"ds_config": deepspeed_config}
    options |= {"attn_implementation": "flash_attention_2" if wanted.flash_attn else wanted.attn_implementation}
    return get_policy(path, bf16=arguments.engine.bf16, seed=arguments.optimizer.seed, **options)


def make_table(arguments: PolicyRunArguments, engine, name: str, rows: list[dict], temperature: float | None):
    """What one set trains, or is evaluated, on; anchors are read from, or written to, SAVE_PATH/anchors."""
    from general_preference.alignment import training

    asked, context = arguments.loss, engine.context
    targeted = list(training.select_and_target(rows, asked, temperature))
    if not targeted:
        raise InputError(f"all {len(rows)} prompts have responses that tie: there is no best and no worst to train on")
    if left := len(rows) - len(targeted):
        logger.info("%s: %d of %d prompts are left out, whose responses all tie", name, left, len(rows))
    anchors, dtype = {}, "bfloat16" if arguments.engine.bf16 else "float32"
    dtype = f"{dtype} in 4 bits" if arguments.model.load_in_4bit else dtype
    folder = Path(arguments.output.save_path) / "anchors"
    context.write(folder, lambda: folder.mkdir(parents=True, exist_ok=True), main_only=True)
    for anchor in asked.weights():
        path = arguments.model.anchor_paths[anchor]
        store = training.AnchorStore(folder / f"{name}_{anchor}.jsonl")
        load_it = functools.partial(load, arguments, path)
        anchors[anchor] = store.load(load_it, path, rows, dtype, context, engine.device)
    return training.policy_table(targeted, anchors, asked.weights())


def finish(arguments: PolicyRunArguments, results: dict[str, dict]) -> None:
    """Print the end of the run, write train_report.json, and say if beta had no effect on log-ratios pulled to targets.

    "kl" of the report is null where no mean log-ratio estimates the divergence from the sampling policy.
    """
    from general_preference.trainer.metrics import METRICS_FILE, read_metrics

    folder = Path(arguments.output.save_path)
    rows = [row for row in read_metrics(folder / METRICS_FILE) if "train/kl" in row]
    last = {name.removeprefix("train/"): value for name, value in rows[-1].items() if name.startswith("train/")}
    names = ("loss", "kl", "log_ratio_sd", "target_mean", "target_sd", "correlation", "regime", "length")
    names += ("unfinished", "tied")
    report = {name: last[name] for name in names}
    more = {"held_out": results.get("held_out"), "made_of": made_of(arguments)}
    more |= {} if estimates_kl(arguments) else {"kl": None}
    replace_text(folder / REPORT, json.dumps(report | more, indent=2))
    print(f"\n{format_table({'train': report} | results, columns=None)}\n\nPolicy, metrics and pictures: {folder}")
    if arguments.loss.loss in ("centered", "regression") and 0 < report["regime"] < _REGIME:
        logger.warning(
            "mean |log-ratio| is %.3g of mean |target|: the loss is far from its minimum, so that beta acts as a "
            "learning rate (raise beta, or train longer, for it to regularize)", report["regime"],
        )  # fmt: skip


def _judge(settings: dict) -> str:
    return str(settings.get("asked", {}).get("model", "unknown"))


if __name__ == "__main__":
    sys.exit(main())
