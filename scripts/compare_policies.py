#!/usr/bin/env python3
"""The report of an iteration of policy alignment: the current policy against the start, the previous and all iterates.

    python scripts/compare_policies.py --model PREFERENCE_MODEL --output RUN/iter_2/report.json \\
        --samples start=RUN/start/eval.jsonl 1=RUN/iter_1/eval.jsonl 2=RUN/iter_2/eval.jsonl [--judge OTHER_MODEL]

Each policy has answered the same held-out prompts, K >= 2 times each. Writes OUTPUT and a picture beside it:

    prompts, start, previous, current, resamples, seed
    policies  {name: {file, settings, length_mean (tokens), unfinished_share, duplicate_share}}
    kl        of the current policy from the previous one, as --train_report states it, or null
    model     {path, head, temperature, and what `alignment.report.preference_report` lists}
    judge     the same by --judge, or null

Exit codes, each with one line: 1 it failed, 2 what was given cannot be used, 130 interrupted.
"""

import json
import math
import sys
from pathlib import Path

if __name__ == "__main__":
    from general_preference.cpu_settings import restart_with_cpu_settings

    restart_with_cpu_settings()

from general_preference import GPMPipeline
from general_preference.alignment.arguments import ComparisonReportArguments
from general_preference.alignment.pictures import draw_policies
from general_preference.alignment.policies import Policy, check_same_prompts, read_policy, score_policies
from general_preference.alignment.report import RESAMPLES, SEED, preference_report
from general_preference.cli import exit_code, format_table, parse_flags, quiet_other_libraries
from general_preference.errors import InputError
from general_preference.files import check_outputs, read_object, replace_text
from general_preference.inference.batch import ResultStore


def main(argv: list[str] | None = None) -> int:
    """Parse, compare, and turn what can go wrong into one line and an exit code."""
    (arguments,) = parse_flags((ComparisonReportArguments,), argv, "Compare the policies of an alignment run.")
    quiet_other_libraries()
    return exit_code(lambda: run(arguments), kept="nothing was written")


def run(arguments: ComparisonReportArguments) -> None:
    """From samples to tables, numbers and a picture."""
    arguments.check()
    paths, output = arguments.named_samples(), Path(arguments.output)
    picture = output.with_suffix(".png")
    read = [name for name in (arguments.model, arguments.judge, arguments.train_report) if name]
    read += [str(path) for file in paths.values() for path in (file, ResultStore(Path(file)).summary)]
    check_outputs({output: "--output", picture: "the picture"}, read)
    ours = {"policies", "current", "judge"} <= read_object(output).keys()
    if strange := [path for path in (output, picture) if path.exists() and not ours]:
        raise InputError(f"{strange[0]} is of no report and would be replaced: choose another --output")
    policies = {name: read_policy(path) for name, path in paths.items()}
    check_same_prompts(policies)
    kl = None if arguments.train_report is None else read_kl(arguments.train_report)
    names = list(policies)
    report = {"prompts": len(policies[names[0]].answers), "start": names[0], "previous": names[-2]}
    report |= {"current": names[-1], "resamples": RESAMPLES, "seed": SEED, "kl": kl}
    shares = ({"file": one.path, "settings": one.settings} | one.shares() for one in policies.values())
    report["policies"] = dict(zip(names, shares, strict=True))
    report["model"] = judge_policies(arguments, arguments.model, arguments.general_preference_tau, policies)
    report["judge"] = arguments.judge and judge_policies(arguments, arguments.judge, arguments.judge_tau, policies)
    replace_text(output, json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False))
    print(f"\n{format_report(report)}\n\nNumbers: {output}")
    if draw_policies(report, picture):
        print(f"Picture: {picture}")


def read_kl(path: str) -> float:
    """The "kl" of a training's report. InputError if it states none."""
    kl = read_object(Path(path)).get("kl")
    if type(kl) not in (int, float) or not math.isfinite(kl):
        raise InputError(f"--train_report {path} states no finite 'kl': name the JSON file that training wrote")
    return float(kl)


def judge_policies(
    arguments: ComparisonReportArguments, path: str, tau: float | None, policies: dict[str, Policy]
) -> dict:
    """One preference model's view of all policies."""
    same = ("max_length", "bf16", "attn_implementation", "trust_remote_code", "device", "batch_tokens")
    rm = GPMPipeline(path, tau=tau, **{name: getattr(arguments, name) for name in same})
    head = {"path": path, "head": rm.preference.describe(), "temperature": rm.tau}
    return head | preference_report(score_policies(rm, policies), list(policies))


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
