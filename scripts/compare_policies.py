#!/usr/bin/env python3
"""The report of an iteration of policy alignment: the current policy against the start, the previous and all iterates.

    python scripts/compare_policies.py --model PREFERENCE_MODEL --output RUN/iter_2/report.json \\
        --samples start=RUN/start/eval.jsonl 1=RUN/iter_1/eval.jsonl 2=RUN/iter_2/eval.jsonl [--judge OTHER_MODEL]

    python scripts/launch.py --nproc-per-node 8 scripts/compare_policies.py ...              the same on 8 devices

Each policy has answered the same held-out prompts, K >= 2 times each. Writes OUTPUT, a picture beside it, and what the
preference models read as OUTPUT's name with .model.jsonl and .judge.jsonl, so that it continues after a stop:

    prompts, start, previous, current, resamples, seed
    made_of   what the numbers depend on: checksums of samples and models, and settings
    policies  {name: {file, settings, length_mean (tokens), unfinished_share, duplicate_share}}
    kl        of the current policy from the previous one, as --train_report states it, or null
    model     {path, head, temperature, and what `alignment.report.preference_report` lists}
    judge     the same by --judge, or null

Exit codes, each with one line: 1 it failed, 2 what was given cannot be used, 130 interrupted.
"""

import dataclasses
import json
import logging
import math
import sys
from pathlib import Path

if __name__ == "__main__":
    from general_preference.cpu_settings import restart_with_cpu_settings

    restart_with_cpu_settings()

from general_preference.alignment.arguments import ComparisonReportArguments
from general_preference.alignment.pictures import draw_policies
from general_preference.alignment.policies import Policy, check_same_prompts, make_contests, read_policy, rows_of_all
from general_preference.alignment.report import RESAMPLES, SEED, preference_report
from general_preference.alignment.samples import samples_checksum, summary_path
from general_preference.alignment.scoring import PROMPTS, SampleTable, score_row
from general_preference.cli import exit_code, format_table, parse_flags, quiet_other_libraries
from general_preference.datasets.tokenization import stable_hash
from general_preference.distributed import DistributedContext
from general_preference.errors import InputError
from general_preference.files import check_outputs, read_object, replace_text
from general_preference.inference.arguments import InferenceArguments
from general_preference.inference.batch import ResultStore, run_settings, score_table
from general_preference.models.config import checkpoint_identity, load_config

logger = logging.getLogger("compare_policies")


def main(argv: list[str] | None = None) -> int:
    """Parse, compare, and turn what can go wrong into one line and an exit code."""
    groups = (ComparisonReportArguments, InferenceArguments)
    parsed = parse_flags(groups, argv, "Compare the policies of an alignment run.")
    return exit_code(lambda: run(*parsed), kept="finished rows are kept: the same command continues")


def run(arguments: ComparisonReportArguments, inference: InferenceArguments) -> None:
    """From samples to tables, numbers and a picture."""
    arguments.check()
    inference.check()
    paths, output = arguments.named_samples(), Path(arguments.output)
    of_judge = dataclasses.replace(inference, general_preference_tau=arguments.judge_tau, is_general_preference=None,
                                   value_head_dim=None, add_prompt_head=None)  # fmt: skip
    views = {"model": (arguments.model, inference), "judge": (arguments.judge, of_judge)}
    views = {role: (path, flags) for role, (path, flags) in views.items() if path}
    stores = {role: ResultStore(output.with_suffix(f".{role}.jsonl")) for role in views}
    picture, found = output.with_suffix(".png"), read_object(output)
    check_places(arguments, paths, {output: "--output", picture: "the picture"}, found, stores)
    quiet_other_libraries()
    with DistributedContext.join() as context:
        policies = context.main_process_first(lambda: read_policies(paths))
        kl = None if arguments.train_report is None else read_kl(arguments.train_report)
        made_of = context.main_process_first(lambda: identity(arguments, views, policies)) | {"kl": kl}
        before = found.get("made_of", {})
        different = [name for name in made_of | before if made_of.get(name) != before.get(name)]
        if arguments.skip_finished and not different and picture.is_file():
            logger.info("%s is finished", output)
            return
        if arguments.skip_finished and found:
            logger.info("%s is made again: of other %s", output, " and ".join(different) or "pictures")
        names = list(policies)
        report = {"prompts": len(policies[names[0]].answers), "start": names[0], "previous": names[-2]}
        report |= {"current": names[-1], "resamples": RESAMPLES, "seed": SEED, "kl": kl, "made_of": made_of}
        shares = ({"file": one.path, "settings": one.settings} | one.shares() for one in policies.values())
        report |= {"policies": dict(zip(names, shares, strict=True)), "judge": None}
        for role, view in views.items():
            report[role] = judge_policies(stores[role], *view, arguments.max_length, policies, context)
        if context.is_main:
            replace_text(output, json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False))
            print(f"\n{format_report(report)}\n\nNumbers: {output}")
            if draw_policies(report, picture):
                print(f"Picture: {picture}")


def check_places(arguments, paths: dict[str, str], outputs: dict[Path, str], found: dict, stores: dict) -> None:
    """InputError if the report would replace what is read, or what is no report."""
    read = [name for name in (arguments.model, arguments.judge, arguments.train_report) if name]
    read += [str(path) for file in paths.values() for path in (file, summary_path(Path(file)))]
    check_outputs(outputs, read)
    for store in stores.values():
        store.refuse_inputs([], *read)
    if strange := [path for path in outputs if path.exists() and not {"policies", "current", "judge"} <= found.keys()]:
        raise InputError(f"{strange[0]} is of no report and would be replaced: choose another --output")


def read_policies(paths: dict[str, str]) -> dict[str, Policy]:
    """The samples of all policies, of the same prompts."""
    policies = {name: read_policy(path) for name, path in paths.items()}
    check_same_prompts(policies)
    return policies


def read_kl(path: str) -> float | None:
    """The "kl" of a training's report, which may be null. InputError if it states none."""
    kl = read_object(Path(path)).get("kl", math.nan)
    if kl is not None and (type(kl) not in (int, float) or not math.isfinite(kl)):
        raise InputError(f"--train_report {path} states no finite 'kl': name the JSON file that training wrote")
    return None if kl is None else float(kl)


def identity(arguments: ComparisonReportArguments, views: dict, policies: dict[str, Policy]) -> dict:
    """What the numbers of a report depend on, up to rounding, as JSON holds it. InputError for what is no model."""
    for path, flags in views.values():
        load_config(path, flags.trust_remote_code)
    samples = {name: samples_checksum(list(policy.answers.values())) for name, policy in policies.items()}
    models = {role: [stable_hash(checkpoint_identity(path)), flags.general_preference_tau, flags.bf16]
              for role, (path, flags) in views.items()}  # fmt: skip
    return {"samples": samples, "max_length": arguments.max_length} | models


def judge_policies(
    store: ResultStore, path: str, inference: InferenceArguments, max_length: int | None, policies: dict[str, Policy],
    context: DistributedContext,
) -> dict | None:  # fmt: skip
    """One preference model's view of all policies, on the main process. Collective."""
    rm = context.main_process_first(lambda: inference.load(path, context.local_rank, max_length=max_length))
    rows = rows_of_all(policies)
    settings = run_settings(rm, path, {"model": path}, samples=samples_checksum(rows))
    with store.open(context, len(rows), settings, overwrite=True):
        score_table(rm, SampleTable(rm, rows), store, context, score_row, PROMPTS)
        if not context.is_main:
            return None
        store.finish({})
    head = {"path": path, "head": rm.preference.describe(), "temperature": rm.tau}
    return head | preference_report(make_contests(policies, rows, list(store.rows()), rm.tau), list(policies))


def format_report(report: dict) -> str:
    """The tables on screen, from what is written to the output."""
    views = {role: report[role] for role in ("model", "judge") if report[role] is not None}
    rows = {}
    for name, policy in report["policies"].items():
        rows[name] = {"tokens": policy["length_mean"]}
        rows[name] |= {key: policy[f"{key}_share"] for key in ("unfinished", "duplicate")}
        for role, view in views.items():
            by = "" if role == "model" else f" ({role})"
            found = {"against start": _rate(view["against_start"][name]), "Nash": view["nash"][name]}
            found["exploitability"] = view["exploitability"]["responses"]["each"][name]
            rows[name] |= {f"{key}{by}": value for key, value in found.items()}
    columns = {role: _column(view) for role, view in views.items()}
    lines = {key: {role: column[key] for role, column in columns.items()} for key in columns["model"]}
    kl = "" if report["kl"] is None else f", KL {report['kl']:.3f} from {report['previous']}"
    return "\n\n".join(
        [
            f"{report['prompts']} prompts; win rates with 95 % intervals over prompts",
            format_table(rows, "policy", None),
            format_table(lines, f"policy {report['current']}{kl}", None),
        ]
    )


def _rate(row: dict) -> str:
    interval = "" if row["low"] is None else f" ({row['low']:.3f}-{row['high']:.3f})"
    return f"{row['win_rate']:.3f}{interval}"


def _column(view: dict) -> dict:
    """What one preference model says about the current policy, and about the start's best of n beside it."""
    exploited = view["exploitability"]["responses"]
    found = {f"win rate against {name}": _rate(row) for name, row in view["win_rate"].items()}
    found["win rate at equal length"] = view["length"]["controlled_win_rate"]
    found |= {f"exploitability of {name}": exploited[name] for name in ("last", "mixture", "nash")}
    found["cyclic share"] = view["cyclic_share"]
    best = {f"start, best of {row['n']}, KL at most {row['kl_bound']:.3f}": _rate(row) for row in view["best_of_n"]}
    return found | best


if __name__ == "__main__":
    sys.exit(main())
