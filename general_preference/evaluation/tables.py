"""Results of models on sets as tables: the field's seven columns with their mean, and what else the scores say."""

import textwrap

from general_preference.cli import format_table
from general_preference.evaluation.sets import SETS, TABLE

SHORT = {
    "rewardbench": "RewardBench", "rewardbench_2": "RewardBench 2", "ppe_preference": "PPE Pref",
    "ppe_correctness": "PPE Corr", "rmb": "RMB", "rm_bench": "RM-Bench", "judgebench": "JudgeBench",
}  # fmt: skip
AVERAGE = "Avg."
RESPONSES = "more than two responses"

Results = dict[str, dict[str, dict]]  # {model: {set: numbers of `summary.summarize_set`}}


def format_results(results: Results, markdown: bool = False) -> str:
    """All tables, as aligned text or in Markdown, and what a reader of the numbers has to know."""
    parts = [_format(seven_columns(results), "model", markdown)]
    if others := other_sets(results):
        parts.append(_format(others, "model", markdown))
    for model, found in results.items():
        title = f"{model}: 95 % intervals, calibration, length"
        parts += [title, _format(every_set(found), "set", markdown)]
        if groups := groups_of(found):
            parts += [f"{model}: records with {RESPONSES}", _format(groups, "set", markdown)]
    return "\n\n".join([*parts, "\n".join(remarks(results))])


def seven_columns(results: Results) -> dict[str, dict]:
    """{model: {set: its number in %, and their mean}}, "-" where a set was not run or is not whole."""
    rows = {}
    for model, found in results.items():
        scores = [found[name]["score"] if name in found else None for name in TABLE]
        mean = None if None in scores else sum(scores) / len(scores)
        columns = (*SHORT.values(), AVERAGE)
        rows[model] = dict(zip(columns, map(percent, [*scores, mean]), strict=True))
    return rows


def other_sets(results: Results) -> dict[str, dict]:
    """{model: {set that is none of the seven: its number in %}}."""
    names = dict.fromkeys(name for found in results.values() for name in found if name not in TABLE)
    rows: dict[str, dict] = {}
    for model, found in results.items() if names else ():
        rows[model] = {SETS[name].title: percent(found[name]["score"]) for name in names if name in found}
        if "if_rewardbench" in found:
            rows[model]["IF tau_b"] = percent(found["if_rewardbench"]["averages"]["tau_b"]["value"])
    return rows


def every_set(found: dict[str, dict]) -> dict[str, dict]:
    """{set: its number with interval, ties, calibration, length} of one model."""
    rows = {}
    for numbers in found.values():
        interval = (
            "-" if numbers["score_low"] is None else f"{percent(numbers['score_low'])}-{percent(numbers['score_high'])}"
        )
        length = numbers["length"]
        row = {"records": numbers["records"], "score": percent(numbers["score"]), "95 %": interval}
        row |= {"ties": percent(numbers["ties"])} | {
            name: f"{numbers[name]:.3f}" for name in ("ece", "brier", "log_loss")
        }
        correlation = length["correlation"]
        row |= {"length corr.": "-" if correlation is None else f"{correlation:+.3f}"}
        for name, title in (("preferred shorter", "right if shorter"), ("preferred longer", "if longer")):
            row[title] = percent(length[name]["accuracy"])
        rows[numbers["title"]] = row
    return rows


def groups_of(found: dict[str, dict]) -> dict[str, dict]:
    """{set with records of three or more responses: cycles, and whether the best response depends on the rule}."""
    rows = {}
    for numbers in found.values():
        if (groups := numbers["groups"])["n"]:
            apart = {name.replace("_not_", " is not "): groups[name] for name in groups if "_not_" in name}
            row = {"cycles": groups["cycles"], "cyclic share": groups["cyclic_share"]} | apart
            rows[numbers["title"]] = {"records": groups["n"]} | {name: percent(value) for name, value in row.items()}
    return rows


def percent(value: float | None) -> str:
    """0.8735 -> "87.4", as the field prints it; "-" for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def remarks(results: Results) -> list[str]:
    """What a reader of the numbers has to know."""
    found = {name: numbers for one in results.values() for name, numbers in one.items()}
    notes = ["all in %, but ece, brier, log_loss and length corr.; intervals: bootstrap over prompts"]
    for numbers in found.values():
        rows = numbers["records"] + numbers["left_out"]
        if numbers["official"] not in (None, rows):
            notes.append(
                f"{numbers['title']}: {rows} of {numbers['official']} rows: not comparable with published numbers"
            )
        if numbers["missing"]:
            notes.append(f"{numbers['title']}: not in the copy: {', '.join(numbers['missing'])}")
        if numbers["left_out"]:
            notes.append(f"{numbers['title']}: {numbers['left_out']} rows that state no decided pair are left out")
    for model, one in results.items():
        for numbers in one.values():
            if any((cut := numbers.get("cut", {})).values()):  # scores from a file have none
                where = f"{cut['prompts']} in the prompt, {cut['responses']} in a response"
                notes.append(f"{model} on {numbers['title']}: records longer than max_length are cut, {where}")
    macros = [f"{model} {percent(one['judgebench']['averages']['macro']['value'])}" for model, one in results.items()
              if "judgebench" in one]  # fmt: skip
    if macros:
        notes.append(f"JudgeBench counts every pair alike; as the mean of its four sources: {', '.join(macros)}")
    return [textwrap.fill(note, 110, subsequent_indent="  ", break_on_hyphens=False) for note in notes]


def _format(rows: dict[str, dict], title: str, markdown: bool) -> str:
    if not markdown:
        return format_table(rows, title, None)
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [[title, *columns], ["---", *["---:"] * len(columns)]]
    lines += [[name, *(str(row.get(column, "-")) for column in columns)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
