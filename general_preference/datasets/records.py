"""Every accepted record shape becomes one `Comparison`: prompt messages, responses, who is preferred, margin.

    {"chosen": [messages], "rejected": [messages], "margin"?}              shared leading messages are the prompt
    {"prompt": str | [messages], "chosen": ..., "rejected": ..., "margin"?}                   explicit prompt
    {"instruction": str, "chosen": str | {"response": str}, "reject": ..., "margin"?}         custom (cyclic) format
    {..., "chosen_probability": 0.8}                                       soft label for any of the above
    {"prompt": ..., "chosen": [text, ...], "rejected": [text, ...]}    each chosen over each rejected (RewardBench 2)
    {"prompt": ..., "responses": [...], "preferences": [[winner, loser], [i, j, probability], ...]}    a group

A message is {"role": str, "content": str}. Optional in every shape: "id" and "subset".
"""

import math
from dataclasses import dataclass

from general_preference.errors import InputError

Message = dict[str, str]


@dataclass
class Comparison:
    """A prompt, its responses and who is preferred.

    prompt:      the messages every response answers, at least one
    responses:   K >= 2 continuations, each a list of at least one message
    preferences: (first, second, probability in [0.5, 1] that first is preferred): indices into `responses`; 0.5: a tie
    margin:      how much the preferred side should win by, in units of the score
    id, subset:  names for people: which record it is, and which part of the set it belongs to
    """

    prompt: list[Message]
    responses: list[list[Message]]
    preferences: list[tuple[int, int, float]]
    margin: float = 0.0
    id: str = ""
    subset: str = ""


def parse_record(record: object, custom: bool = False) -> Comparison:
    """One decoded JSON object (or table row) -> Comparison; `custom` requires the custom format (`is_custom_dataset`).

    Raises:
        InputError: what was found and what was expected; the caller adds file and line.
    """
    if not isinstance(record, dict):
        raise InputError(f"found {_describe(record)}, expected a JSON object")
    record = {key: value for key, value in record.items() if value is not None}
    if custom and "instruction" not in record:
        raise InputError(f"is_custom_dataset expects the key 'instruction', found {_keys(record)}")
    if "responses" in record:
        prompt, responses, preferences = _parse_group(record)
    elif _is_texts(record.get("chosen")) or _is_texts(record.get("rejected")):
        prompt, responses, preferences = _parse_texts(record)
    else:
        prompt, responses = _parse_pair(record)
        preferences = [(0, 1, _probability(record.get("chosen_probability", 1.0), "chosen_probability"))]
    preferences = [(i, j, p) if p >= 0.5 else (j, i, 1 - p) for i, j, p in preferences]
    margin = record.get("margin", 0.0)
    if not _is_number(margin) or not math.isfinite(margin):
        raise InputError(f"'margin' is {_describe(margin)}, expected a finite number")
    names = (str(record.get(key, "")) for key in ("id", "subset"))
    return Comparison(prompt, responses, preferences, float(margin), *names)


def _parse_pair(record: dict) -> tuple[list[Message], list[list[Message]]]:
    other = "reject" if "instruction" in record and "rejected" not in record else "rejected"
    for key in ("chosen", other):
        if key not in record:
            expected = f"expected chosen and {other}, or responses and preferences"
            raise InputError(f"no key '{key}', found {_keys(record)}; {expected}")
    chosen, rejected = record["chosen"], record[other]
    if "instruction" in record:
        prompt = parse_prompt(record["instruction"], "instruction")
        sides = [side.get("response", side) if isinstance(side, dict) else side for side in (chosen, rejected)]
        return prompt, [parse_response(side, key, prompt) for side, key in zip(sides, ("chosen", other), strict=True)]
    if "prompt" in record:
        prompt = parse_prompt(record["prompt"], "prompt")
        return prompt, [parse_response(chosen, "chosen", prompt), parse_response(rejected, other, prompt)]
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise InputError("'chosen' and 'rejected' are text without a 'prompt': expected that key, or lists of messages")
    chosen, rejected = parse_messages(chosen, "chosen"), parse_messages(rejected, "rejected")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise InputError("'chosen' and 'rejected' share no leading message: expected a common prompt in front")
    return chosen[:shared], [chosen[shared:], rejected[shared:]]


def _parse_group(record: dict):
    for key in ("prompt", "preferences"):
        if key not in record:
            raise InputError(f"a group needs the key '{key}', found {_keys(record)}")
    prompt = parse_prompt(record["prompt"], "prompt")
    if not isinstance(record["responses"], list) or len(record["responses"]) < 2:
        raise InputError(f"'responses' is {_describe(record['responses'])}, expected a list of at least two")
    responses = [parse_response(value, f"responses[{i}]", prompt) for i, value in enumerate(record["responses"])]
    if not isinstance(record["preferences"], list) or not record["preferences"]:
        raise InputError(f"'preferences' is {_describe(record['preferences'])}, expected [[winner, loser], ...]")
    return prompt, responses, [_preference(value, len(responses)) for value in record["preferences"]]


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _parse_texts(record: dict):
    for key in ("prompt", "chosen", "rejected"):
        if key not in record:
            raise InputError(f"lists of chosen and rejected texts need the key '{key}', found {_keys(record)}")
        if key != "prompt" and not _is_texts(record[key]):
            raise InputError(f"'{key}' is {_describe(record[key])}, expected a list of texts like the other side")
    if "chosen_probability" in record:
        raise InputError("'chosen_probability' belongs to one chosen and one rejected response, found lists of them")
    prompt = parse_prompt(record["prompt"], "prompt")
    texts = [(key, i, text) for key in ("chosen", "rejected") for i, text in enumerate(record[key])]
    responses = [parse_response(text, f"{key}[{i}]", prompt) for key, i, text in texts]
    chosen = len(record["chosen"])
    return prompt, responses, [(i, j, 1.0) for i in range(chosen) for j in range(chosen, len(texts))]


def _preference(value: object, count: int) -> tuple[int, int, float]:
    expected = f"expected [winner, loser] or [i, j, probability] with different indices below {count}"
    if not isinstance(value, list | tuple) or len(value) not in (2, 3):
        raise InputError(f"a preference is {_describe(value)}, {expected}")
    first, second = value[0], value[1]
    for index in (first, second):
        if not _is_number(index) or index != int(index) or not 0 <= index < count:
            raise InputError(f"a preference names response {index!r}, {expected}")
    if first == second:
        raise InputError(f"a preference compares response {first} with itself, {expected}")
    probability = value[2] if len(value) == 3 and value[2] is not None else 1.0
    return int(first), int(second), _probability(probability, "a preference's probability")


def _probability(value: object, name: str) -> float:
    if not _is_number(value) or not 0 <= value <= 1:
        raise InputError(f"{name} is {_describe(value)}, expected a number from 0 to 1")
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def parse_prompt(value: object, name: str = "prompt") -> list[Message]:
    """Text or messages -> messages. InputError calls the value `name`."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    return parse_messages(value, name)


def parse_response(value: object, name: str, prompt: list[Message]) -> list[Message]:
    """Text or messages, with or without `prompt` in front -> the messages after it. InputError calls it `name`."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if not isinstance(value, list):
        raise InputError(f"'{name}' is {_describe(value)}, expected text or a list of messages")
    messages = parse_messages(value, name)
    repeats_prompt = len(messages) > len(prompt) and messages[: len(prompt)] == prompt
    return messages[len(prompt) :] if repeats_prompt else messages


def parse_answer(value: object, name: str, prompt: list[Message]) -> list[Message]:
    """A response that begins and ends with the assistant's turn. InputError calls the value `name`."""
    messages = parse_response(value, name, prompt)
    if any(message["role"] != "assistant" for message in (messages[0], messages[-1])):
        raise InputError(f"{name} must begin and end with an assistant turn: {_describe(value)}")
    return messages


def parse_conversation(value: object, name: str) -> tuple[list[Message], list[Message]]:
    """Messages that end in an assistant's turn -> (those before it, that turn). InputError calls the value `name`."""
    messages = parse_messages(value, name)
    if all(message["role"] != "assistant" for message in messages):
        raise InputError(f"{name} has no assistant turn, which is what gets scored: {_describe(value)}")
    if (role := messages[-1]["role"]) != "assistant":
        raise InputError(f"{name} ends with a {role} turn, expected the assistant's: {_describe(value)}")
    if len(messages) == 1:
        raise InputError(f"{name} has no turn before the assistant's, expected a prompt: {_describe(value)}")
    return messages[:-1], messages[-1:]


def parse_messages(value: object, name: str) -> list[Message]:
    """A non-empty list of {"role": text, "content": text}, other keys left out. InputError calls the value `name`."""
    if not isinstance(value, list) or not value:
        raise InputError(f"'{name}' is {_describe(value)}, expected a list of messages {{'role', 'content'}}")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InputError(f"'{name}' has {_describe(message)}, expected a message {{'role': text, 'content': text}}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _keys(record: dict) -> str:
    return f"keys {sorted(record)}" if record else "no keys"


def _describe(value: object) -> str:
    """A short name for any value in an error message."""
    text = repr(value)
    kinds = {list: "a list", dict: "an object", str: "text", type(None): "nothing"}
    return f"{kinds.get(type(value), type(value).__name__)} {text if len(text) <= 60 else text[:57] + '...'}"
