"""The field's public preference sets, told by their columns and read into the shapes of records.py.

A reader takes the columns that it understands out of a record. What is left is checked: a text that nothing reads could
belong to the prompt, so it is refused by name, unless it is known to describe the record only.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from general_preference.datasets.reading import Reading, described, holds_text
from general_preference.errors import InputError


@dataclass(frozen=True)
class KnownSet:
    """A layout of columns.

    columns: all of these are there, and `fits` holds. read: takes the columns it understands out of a record.
    others: texts that it may leave out. rated: it has several ratings, of which `Reading.criterion` chooses one.
    """

    name: str
    columns: frozenset[str]
    read: Callable[[dict, Reading], dict]
    others: frozenset[str] = frozenset()
    rated: bool = False
    fits: Callable[[dict], bool] | None = None


_PAIR = ("prompt", "chosen", "rejected")
_RATED = ("prompt", "responses", "preferences", "scores", "ranks", "ranking")
_OPTIONAL = ("id", "subset", "margin", "chosen_probability", "system", "tools", "chat_template_kwargs")
_NUMBER = re.compile(r"-?\d{1,9}(\.\d+)?")
# Names of columns that say where a record comes from, or what a judge wrote about it.
DESCRIBES = re.compile(
    r"((.*[_.-])?(ids?|uuid|sha256|hash|sources?|models?|model_name|subset|split|category|categories|language|lang|url|date"
    r"|time|timestamp|tstamp|licen[sc]e|annotators?|worker|judge|rationale|justification|feedback|critique|origin|domain"
    r"|difficulty|tags?|version|metadata|ratings?|scores?|harm_category|policy)([_-](a|b|[0-9]|chosen|rejected))?)",
    re.IGNORECASE,
)


def canonical_record(record: dict, reading: Reading) -> tuple[str, dict, list[str]]:
    """(what a record is read as, the same in a canonical shape, names of the columns with text that are left out).

    Raises:
        InputError: a column is missing, says what cannot be, or holds a text that nothing reads.
    """
    rest = dict(record)
    left_out = [column for column in reading.ignore_columns if holds_text(rest.pop(column, None))]
    known = _find(rest, reading)
    if reading.criterion and not known.rated:
        raise InputError(f"criterion {reading.criterion!r} chooses among ratings, found {known.name} with none")
    found = known.read(rest, reading)
    found |= {key: rest.pop(key) for key in _OPTIONAL if key in rest and key not in found}
    for column in rest:
        if holds_text(rest[column]):
            if column not in known.others and not DESCRIBES.fullmatch(column):
                cure = "name it in ignore_columns if it is no part of the prompt, else map it (prompt_key, system_key)"
                raise InputError(f"nothing reads the text of column {column!r} ({known.name}): {cure}")
            left_out.append(column)
    return known.name, found, left_out


def _find(record: dict, reading: Reading) -> KnownSet:
    if reading.keys:
        return _MAPPED
    for known in _SETS:
        if known.columns <= record.keys() and (known.fits is None or known.fits(record)):
            return known
    if "responses" in record:
        return _GROUP
    return _PROMPT if "prompt" in record else _CONVERSATIONS


def _take(columns: dict, name: str, kind: type = str):
    value = columns.pop(name, None)
    if not isinstance(value, kind):
        names = {str: "text", list: "a list", dict: "an object"}
        raise InputError(f"column {name!r} is {described(value)}, expected {names[kind]}")
    return value


def _take_objects(columns: dict, name: str, *keys: str) -> list[dict]:
    """A column that is a list of objects, each with these keys."""
    value = _take(columns, name, list)
    for one in value:
        if not isinstance(one, dict) or not one.keys() >= set(keys):
            raise InputError(f"column {name!r} has {described(one)}, expected objects with {', '.join(keys)}")
    return value


def _take_instruction(columns: dict) -> str | list:
    """`instruction`, with the text of `input` below it where there is one."""
    asked, more = columns.pop("instruction"), columns.pop("input", "")
    if isinstance(asked, str) and isinstance(more, str):
        return "\n".join(filter(None, [asked, more]))
    if more or not isinstance(asked, list):
        raise InputError(f"'instruction' and 'input' are {described(asked)} and {described(more)}, expected texts")
    return asked


def _take_number(columns: dict, name: str) -> float:
    value = columns.pop(name, None)
    try:
        return float(value)  # in a CSV file numbers are texts
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"column {name!r} is {described(value)}, expected a number") from error


def _read_pair(columns: dict, reading: Reading) -> dict:
    return {key: columns.pop(key) for key in _PAIR if key in columns}


def _read_group(columns: dict, reading: Reading) -> dict:
    return {key: columns.pop(key) for key in _RATED if key in columns}


def _read_mapped(columns: dict, reading: Reading) -> dict:
    found, names = {}, sorted(columns)
    for name in ("prompt", "chosen", "rejected", "system"):
        column = reading.keys.get(name, name)
        if name in reading.keys and column not in columns:
            raise InputError(f"{name}_key names the column {column!r}, found columns {names}")
        if column in columns:
            found[name] = columns.pop(column)
    return found


def _turns(text: str, name: str) -> list[dict]:
    r"""hh-rlhf's text, "\n\nHuman: ...\n\nAssistant: ...", as messages."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", text if text.startswith("\n\n") else f"\n\n{text}")
    if before.strip() or not parts:
        raise InputError(f"{name} is {described(text)}, expected turns of 'Human:' and 'Assistant:'")
    roles = ("user" if role == "Human" else "assistant" for role in parts[::2])
    return [{"role": role, "content": said.strip()} for role, said in zip(roles, parts[1::2], strict=True)]


def _is_transcript(record: dict) -> bool:
    sides = record["chosen"], record["rejected"]
    return "prompt" not in record and all(isinstance(one, str) and re.match(r"\s*Human:", one) for one in sides)


def _read_hh(columns: dict, reading: Reading) -> dict:
    return {side: _turns(columns.pop(side), f"'{side}'") for side in ("chosen", "rejected")}


def _read_binarized(columns: dict, reading: Reading) -> dict:
    if columns["messages"] == columns["chosen"]:  # a copy for supervised training
        del columns["messages"]
    return _read_pair(columns, reading)


def _read_completions(columns: dict, reading: Reading) -> dict:
    completions = _take_objects(columns, "completions", "response")
    for one in completions:
        columns |= {f"completions.{key}": one[key] for key in one if key not in ("response", "annotations")}
    scores = [_rating(one, reading.criterion, f"completion {number}") for number, one in enumerate(completions)]
    responses = [one["response"] for one in completions]
    return {"prompt": _take(columns, "instruction"), "responses": responses, "scores": scores}


def stated_ratings(completion: dict, name: str) -> dict[str, float | str]:
    """{criterion: number, or the text in its place such as "N/A"} of a completion in UltraFeedback's layout."""
    annotations = completion.get("annotations") or {}
    if not isinstance(annotations, dict):
        raise InputError(f"the annotations of {name} are {described(annotations)}, expected an object")
    stated = {key: str(one.get("Rating")) for key, one in annotations.items() if isinstance(one, dict)}
    return {key: float(value) if _NUMBER.fullmatch(value) else value for key, value in stated.items()}


def _rating(completion: dict, criterion: str | None, name: str) -> float:
    """The rating by a criterion, or the mean of all that were given ("N/A" is none)."""
    ratings = {key: value for key, value in stated_ratings(completion, name).items() if isinstance(value, float)}
    if criterion in ("overall_score", "fine-grained_score") and _NUMBER.fullmatch(str(completion.get(criterion))):
        ratings[criterion] = float(completion[criterion])
    if criterion is not None and criterion not in ratings:
        raise InputError(f"{name} has no rating {criterion!r}, found {', '.join(ratings) or 'none'}")
    if not ratings:
        raise InputError(f"{name} has no ratings: expected annotations {{criterion: {{'Rating': number}}}}")
    return ratings[criterion] if criterion else sum(ratings.values()) / len(ratings)


def _read_chosen_response(columns: dict, reading: Reading) -> dict:
    sides = {side: columns.pop(f"{side}_response") for side in ("chosen", "rejected")}
    return {"prompt": _take(columns, "instruction"), **sides}


def _read_question(columns: dict, reading: Reading) -> dict:
    asked = next(key for key in ("question", "input") if key in columns)
    return {"prompt": columns.pop(asked)} | _read_pair(columns, reading)


def _read_alpaca(columns: dict, reading: Reading) -> dict:
    asked, past = _take_instruction(columns), columns.pop("history", None) or []
    if not isinstance(past, list) or not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in past):
        raise InputError(f"'history' is {described(past)}, expected [[question, answer], ...]")
    turns = [*(text for turn in past for text in turn), asked]
    prompt = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(turns)]
    prompt = prompt if past or isinstance(asked, str) else asked  # a list of messages
    other = "rejected" if "rejected" in columns else "reject"
    return {"prompt": prompt, "chosen": columns.pop("chosen"), "rejected": columns.pop(other)}


def _read_sharegpt(columns: dict, reading: Reading) -> dict:
    return {"prompt": columns.pop("conversations")} | _read_pair(columns, reading)


def _by_strength(first, second, strength: float, reading: Reading) -> dict:
    """HelpSteer's strength: -3 (the first is much better) to 3 (the second is)."""
    if not -3 <= strength <= 3:
        raise InputError(f"the strength of preference is {strength}, expected a number from -3 to 3")
    size, order = abs(strength), [0, 1] if strength <= 0 else [1, 0]
    found = {"responses": [first, second]}
    if reading.strength == "label" or size == 0:
        return found | {"preferences": [[*order, 0.5 + size / 6]]}
    return found | {"preferences": [order], "margin": size}


def _read_helpsteer_2(columns: dict, reading: Reading) -> dict:
    question, *more = re.split(r"\n?<extra_id_1>(User|Assistant)\n", _take(columns, "prompt"))
    roles, said = ["user", *(role.lower() for role in more[::2])], [question, *more[1::2]]
    prompt = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    sides = columns.pop("response_1"), columns.pop("response_2")
    return {"prompt": prompt} | _by_strength(*sides, _take_number(columns, "preference_strength"), reading)


def _read_helpsteer_3(columns: dict, reading: Reading) -> dict:
    sides = columns.pop("response1"), columns.pop("response2")
    return {"prompt": columns.pop("context")} | _by_strength(
        *sides, _take_number(columns, "overall_preference"), reading
    )


def _refuse_single(columns: dict, reading: Reading) -> dict:
    raise InputError("one rated response a record: expected two, and who is preferred (the set's preferences)")


def _refuse_labeled(columns: dict, reading: Reading) -> dict:
    raise InputError("'completion' and 'label' are one labeled response, expected chosen and rejected")


def _read_nectar(columns: dict, reading: Reading) -> dict:
    prompt, answers = _take(columns, "prompt"), _take_objects(columns, "answers", "answer", "rank")
    messages = _turns(prompt, "'prompt'") if re.match(r"\s*Human:", prompt) else [{"role": "user", "content": prompt}]
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    responses, ranks = ([one[key] for one in answers] for key in ("answer", "rank"))
    return {"prompt": messages, "responses": responses, "ranks": ranks}


def _read_shp(columns: dict, reading: Reading) -> dict:
    sides = [columns.pop("human_ref_A"), columns.pop("human_ref_B")]
    return {
        "prompt": _take(columns, "history"),
        **_chosen_of(sides, {1: 0, 0: 1}, _take_number(columns, "labels"), "labels"),
    }


def _read_webgpt(columns: dict, reading: Reading) -> dict:
    question = columns.pop("question")
    prompt = question.get("full_text") if isinstance(question, dict) else question
    scores = [_take_number(columns, name) for name in ("score_0", "score_1")]
    return {"prompt": prompt, "responses": [columns.pop("answer_0"), columns.pop("answer_1")], "scores": scores}


def _read_summaries(columns: dict, reading: Reading) -> dict:
    """The posts as the models that summarized them saw them, up to blank lines."""
    info = _take(columns, "info", dict)
    parts = [("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post"), ("Article: ", "article")]
    texts = [f"{label}{info[key]}" for label, key in parts if info.get(key)]
    summaries = [one["text"] for one in _take_objects(columns, "summaries", "text")]
    chosen = _chosen_of(summaries, {0: 0, 1: 1}, _take_number(columns, "choice"), "choice")
    return {"prompt": "\n\n".join([*texts, "TL;DR:"]), **chosen}


def _chosen_of(sides: list, index: dict, choice: object, name: str) -> dict:
    if choice not in index or len(sides) != 2:
        raise InputError(f"{name!r} is {described(choice)} for {len(sides)} responses, expected 0 or 1 for two")
    return {"chosen": sides[index[choice]], "rejected": sides[1 - index[choice]]}


_VOTES = {"model_a": 1.0, "model_b": 0.0} | dict.fromkeys(("tie", "tie (bothbad)", "both_bad"), 0.5)


def _read_arena(columns: dict, reading: Reading) -> dict:
    winner = _take(columns, "winner")
    if winner not in _VOTES:
        raise InputError(f"'winner' is {described(winner)}, expected one of {', '.join(_VOTES)}")
    sides = {"chosen": columns.pop("conversation_a"), "rejected": columns.pop("conversation_b")}
    return sides | {"chosen_probability": _VOTES[winner]}


def _read_arena_55k(columns: dict, reading: Reading) -> dict:
    asked, *answers = (_json_turns(columns, name) for name in ("prompt", "response_a", "response_b"))
    votes = {name: _take_number(columns, f"winner_{name}") for name in ("model_a", "model_b", "tie")}
    winners = [name for name, vote in votes.items() if vote]
    if len(winners) != 1:
        raise InputError(f"the winner is {', '.join(winners) or 'nobody'}, expected one of model_a, model_b, tie")
    talks = []
    for side in answers:
        if len(side) != len(asked):
            raise InputError(f"{len(asked)} turns of the user, but {len(side)} answers")
        turns = (pair for one in zip(asked, side, strict=True) for pair in zip(("user", "assistant"), one, strict=True))
        talks.append([{"role": role, "content": text} for role, text in turns])
    return {"chosen": talks[0], "rejected": talks[1], "chosen_probability": _VOTES[winners[0]]}


def _json_turns(columns: dict, name: str) -> list[str]:
    text = columns.pop(name)
    try:
        turns = json.loads(text) if isinstance(text, str) else text
    except ValueError as error:
        raise InputError(f"{name!r} is {described(text)}, expected a JSON list of turns") from error
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise InputError(f"{name!r} is {described(text)}, expected a list of turns, all of them texts")
    return turns


def _read_safe_rlhf(columns: dict, reading: Reading) -> dict:
    name = {None: "better", "better": "better", "safer": "safer"}.get(reading.criterion)
    if name is None:
        raise InputError(f"criterion {reading.criterion!r} is none of better, safer")
    sides, chosen = [columns.pop("response_0"), columns.pop("response_1")], _take_number(columns, f"{name}_response_id")
    return {"prompt": columns.pop("prompt"), **_chosen_of(sides, {0: 0, 1: 1}, chosen, f"{name}_response_id")}


def _read_candidates(columns: dict, reading: Reading) -> dict:
    candidates = _take_objects(columns, "candidates", "scores")
    scores = [one["scores"] if isinstance(one["scores"], dict) else {} for one in candidates]
    names = sorted(set.intersection(*map(set, scores))) if scores else []
    criterion = reading.criterion or (names[0] if len(names) == 1 else None)
    if criterion not in names:
        asked = "expected a criterion" if reading.criterion is None else f"expected no criterion {criterion!r}"
        raise InputError(f"the candidates have the scores {', '.join(names) or 'none in common'}: {asked}")
    prompt = _take_instruction(columns)
    texts = [one["text"] if "text" in one else one.get("output") for one in candidates]
    return {"prompt": prompt, "responses": texts, "scores": [one[criterion] for one in scores]}


def _read_unified(columns: dict, reading: Reading) -> dict:
    first, second = (_take_number(columns, f"conv_{side}_rating") for side in "AB")
    probability = 0.5 if first == second else float(first > second)
    return {"chosen": columns.pop("conv_A"), "rejected": columns.pop("conv_B"), "chosen_probability": probability}


def _set(name: str, columns: str, read, others: str = "", **options) -> KnownSet:
    return KnownSet(name, frozenset(columns.split()), read, frozenset(others.split()), **options)


_MAPPED = _set("columns named by keys", "", _read_mapped)
_GROUP = _set("group", "", _read_group)
_PROMPT = _set("prompt, chosen, rejected", "", _read_pair)
_CONVERSATIONS = _set("conversations", "", _read_pair)
_LABELING = "generations order labelling_model labelling_prompt raw_labelling_response status output_parsed"
# Layouts with more columns come first.
_SETS = [
    _set("hh-rlhf", "chosen rejected", _read_hh, fits=_is_transcript),
    _set("UltraFeedback, binarized", "prompt_id messages chosen rejected", _read_binarized),
    _set("UltraFeedback", "instruction completions", _read_completions,
         "correct_answers incorrect_answers completions.principle completions.custom_system_prompt", rated=True),
    _set("argilla", "instruction chosen_response rejected_response", _read_chosen_response, _LABELING),
    _set("PairRM candidates", "instruction candidates", _read_candidates, "output", rated=True),
    _set("custom format", "instruction chosen reject", _read_alpaca),
    _set("LLaMA-Factory, alpaca", "instruction chosen rejected", _read_alpaca, _LABELING),
    _set("LLaMA-Factory, sharegpt", "conversations chosen rejected", _read_sharegpt),
    _set("Orca", "question chosen rejected", _read_question, _LABELING),
    _set("Orca", "input chosen rejected", _read_question, _LABELING, fits=lambda record: "prompt" not in record),
    _set("HelpSteer 2", "prompt response_1 response_2 preference_strength", _read_helpsteer_2,
         "preference_statement preference_elaboration three_most_similar_preferences all_preferences_unprocessed"),
    _set("HelpSteer 3", "context response1 response2 overall_preference", _read_helpsteer_3, "individual_preference"),
    _set("HelpSteer, single responses", "prompt response helpfulness", _refuse_single),
    _set("labeled responses", "completion label", _refuse_labeled),
    _set("Nectar", "prompt answers", _read_nectar),
    _set("SHP", "history human_ref_A human_ref_B labels", _read_shp,
         "upvote_ratio created_at_utc_A created_at_utc_B seconds_difference score_ratio"),
    _set("WebGPT", "question answer_0 answer_1 score_0 score_1", _read_webgpt, "quotes_0 quotes_1 tokens_0 tokens_1"),
    _set("summarize_from_feedback", "info summaries choice", _read_summaries, "batch extra"),
    _set("Arena", "conversation_a conversation_b winner", _read_arena,
         "full_conversation conv_metadata turn user openai_moderation toxic_chat_tag"),
    _set("Arena, 55k", "prompt response_a response_b winner_model_a winner_model_b winner_tie", _read_arena_55k),
    _set("PKU-SafeRLHF", "prompt response_0 response_1 better_response_id", _read_safe_rlhf,
         "is_response_0_safe is_response_1_safe response_0_severity_level response_1_severity_level", rated=True),
    _set("Unified-Feedback", "conv_A conv_B conv_A_rating conv_B_rating", _read_unified),
]  # fmt: skip
