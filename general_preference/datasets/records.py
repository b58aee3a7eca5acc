"""Every accepted record becomes one `Comparison`: prompt messages, responses, who is preferred, margin.

    {"chosen": [messages], "rejected": [messages], "margin"?}              shared leading messages are the prompt
    {"prompt": str | [messages], "chosen": ..., "rejected": ..., "margin"?}                   explicit prompt
    {"instruction": str, "input"?, "chosen": str | {"response": str}, "reject": ...}          custom (cyclic) format
    {..., "chosen_probability": 0.8}                                       soft label for any of the above
    {"prompt": ..., "chosen": [text, ...], "rejected": [text, ...]}    each chosen over each rejected (RewardBench 2)
    {"prompt": ..., "responses": [...], "preferences": [[winner, loser], [i, j, probability], ...]}    a group
    {"prompt": ..., "responses": [...], "scores" | "ranks" | "ranking": [...]}                         a group

`known_sets.py` reads the field's public sets into these. A message is {"role", "content"} or ShareGPT's {"from",
"value"}; its content is text or parts of text, and its other fields go to the chat template. Optional in every shape:
"id", "subset", "system", "tools" and "chat_template_kwargs". Any other column with text is refused by name.
"""

import json
from dataclasses import dataclass, field
from itertools import combinations

from general_preference.datasets.known_sets import canonical_record
from general_preference.datasets.messages import (
    PREFIX,
    Message,
    parse_message,
    parse_messages,
    parse_prompt,
    without_nothing,
)
from general_preference.datasets.reading import Reading, by_merit, described
from general_preference.errors import InputError

_PRETOKENIZED = ("input_ids", "chosen_ids", "chosen_input_ids", "input_ids_chosen", "rejected_input_ids")


@dataclass
class Comparison:
    """A prompt, its responses and who is preferred.

    prompt:      the messages every response answers, at least one
    responses:   K >= 2 continuations, each a list of at least one message
    preferences: (first, second, probability in [0.5, 1] that first is preferred): indices into `responses`; 0.5: a tie
    margin:      how much the preferred side should win by, in units of the score
    id, subset:  names for people: which record it is, and which part of the set it belongs to
    options:     variables of the chat template: `tools` and what "chat_template_kwargs" holds
    reader:      what the record was read as. unread: names of its columns that hold text and were left out
    """

    prompt: list[Message]
    responses: list[list[Message]]
    preferences: list[tuple[int, int, float]]
    margin: float = 0.0
    id: str = ""
    subset: str = ""
    options: dict = field(default_factory=dict)
    reader: str = ""
    unread: list[str] = field(default_factory=list)


def parse_record(record: object, reading: Reading | None = None) -> Comparison:
    """One decoded JSON object (or table row) -> Comparison, read as `reading` says.

    Raises:
        InputError: what was found and what was expected; the caller adds file and line.
    """
    reading = reading or Reading()
    if not isinstance(record, dict):
        raise InputError(f"found {described(record)}, expected a JSON object")
    record = {key: value for key, value in record.items() if value is not None}
    if found := [key for key in _PRETOKENIZED if key in record]:
        raise InputError(f"'{found[0]}' holds token ids of another tokenizer: expected texts or messages")
    if reading.custom and "instruction" not in record:
        raise InputError(f"is_custom_dataset expects the key 'instruction', found {_keys(record)}")
    reader, record, unread = canonical_record(record, reading)
    if "responses" in record:
        prompt, responses, preferences = _parse_group(record, reading)
    elif _is_texts(record.get("chosen")) or _is_texts(record.get("rejected")):
        prompt, responses, preferences = _parse_texts(record, reading)
    else:
        prompt, responses = _parse_pair(record, reading)
        preferences = [(0, 1, _probability(record.get("chosen_probability", 1.0), "chosen_probability"))]
    preferences = [(i, j, p) if p >= 0.5 else (j, i, 1 - p) for i, j, p in preferences]
    margin = record.get("margin", 0.0)
    if not _is_finite(margin):
        raise InputError(f"'margin' is {described(margin)}, expected a finite number")
    for number, response in enumerate(responses):
        if response[-1]["role"] in ("user", "system"):
            raise InputError(f"response {number} ends with a {response[-1]['role']} turn, expected the assistant's")
    if prompt[-1]["role"] == "assistant" and "prompt" in record and all(r[0]["role"] == "assistant" for r in responses):
        prompt = [*prompt[:-1], prompt[-1] | {PREFIX: True}]
    prompt = _with_system(prompt, record.get("system"))
    names = (str(record.get(key, "")) for key in ("id", "subset"))
    return Comparison(prompt, responses, preferences, float(margin), *names, _options(record), reader, unread)


def _parse_pair(record: dict, reading: Reading) -> tuple[list[Message], list[list[Message]]]:
    for key in ("chosen", "rejected"):
        if key not in record:
            if "label" in record and "completion" in record:
                raise InputError("'completion' and 'label' are one labeled response, expected chosen and rejected")
            expected = "expected chosen and rejected, or responses and preferences"
            raise InputError(f"no key '{key}', found {_keys(record)}; {expected}")
    base = parse_prompt(record["prompt"], "prompt", reading) if "prompt" in record else None
    if base is None and (isinstance(record["chosen"], str) or isinstance(record["rejected"], str)):
        raise InputError("'chosen' and 'rejected' are text without a 'prompt': expected that key, or lists of messages")
    sides = [_parse_side(record[key], key, reading) for key in ("chosen", "rejected")]
    if base is not None and not all(_may_repeat(messages, base) for messages in sides):
        return base, [_after(messages, base, key) for messages, key in zip(sides, ("chosen", "rejected"), strict=True)]
    chosen, rejected = sides
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise InputError("'chosen' and 'rejected' share no leading message: expected a common prompt in front")
    if base is not None and not _agree(base, chosen[:shared]):
        found = f"'prompt' {described(_text(base[-1]))} is not what 'chosen' and 'rejected' begin with"
        raise InputError(f"{found} ({described(_text(chosen[shared - 1]))})")
    return chosen[:shared], [chosen[shared:], rejected[shared:]]


def _may_repeat(messages: list[Message], base: list[Message]) -> bool:
    """Whether messages are a whole conversation, which begins with the prompt."""
    if _begins_with(messages, base):
        return True
    return messages[0]["role"] in ("user", "system") and base[-1]["role"] == "user"


def _begins_with(messages: list[Message], base: list[Message]) -> bool:
    beginning = messages[: len(base)]
    return len(messages) > len(base) and list(map(_said, beginning)) == list(map(_said, base))


def _said(message: Message) -> Message:
    """A message without white space around its text, which copies of a prompt may differ in."""
    return message | {"content": (message["content"] or "").strip()}


def _agree(base: list[Message], shared: list[Message]) -> bool:
    """Whether a stated prompt is that of the conversations: all of it, or one text that the user said in it."""
    base, shared = list(map(_said, base)), list(map(_said, shared))
    return base in (shared, [m for m in shared if m["role"] != "system"]) or (len(base) == 1 and base[0] in shared)


def _after(messages: list[Message], base: list[Message], name: str) -> list[Message]:
    """What follows the prompt in messages that may repeat it."""
    if _begins_with(messages, base):
        return messages[len(base) :]
    if messages[0]["role"] in ("user", "system") and base[-1]["role"] == "user":
        found = f"'{name}' begins with a {messages[0]['role']} turn {described(_text(messages[0]))}"
        raise InputError(f"{found}, expected the assistant's, or the messages of the prompt")
    return messages


def _parse_side(value: object, name: str, reading: Reading | None = None) -> list[Message]:
    """Text, one message, {"response": text} or messages."""
    if isinstance(value, dict) and "response" in value:
        value = value["response"]
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if isinstance(value, dict):
        return [parse_message(value, name, reading)]
    if not isinstance(value, list | tuple):
        raise InputError(f"'{name}' is {described(value)}, expected text or a list of messages")
    return parse_messages(value, name, reading)


def _parse_group(record: dict, reading: Reading):
    if "prompt" not in record:
        raise InputError(f"a group needs the key 'prompt', found {_keys(record)}")
    stated = [key for key in ("preferences", "scores", "ranks", "ranking") if key in record]
    if len(stated) != 1:
        found = " and ".join(f"'{key}'" for key in stated) or _keys(record)
        raise InputError(f"a group needs one of the keys 'preferences', 'scores', 'ranks' or 'ranking', found {found}")
    if "chosen_probability" in record:
        raise InputError("'chosen_probability' belongs to one chosen and one rejected response, found a group")
    prompt = parse_prompt(record["prompt"], "prompt", reading)
    if not isinstance(record["responses"], list) or len(record["responses"]) < 2:
        raise InputError(f"'responses' is {described(record['responses'])}, expected a list of at least two")
    sides = [(_parse_side(value, f"responses[{i}]", reading), i) for i, value in enumerate(record["responses"])]
    responses = [_after(messages, prompt, f"responses[{i}]") for messages, i in sides]
    values, count = record[stated[0]], len(responses)
    if stated[0] == "preferences":
        if not isinstance(values, list) or not values:
            raise InputError(f"'preferences' is {described(values)}, expected [[winner, loser], ...]")
        return prompt, responses, [_preference(value, count) for value in values]
    if not isinstance(values, list) or len(values) != count or not all(map(_is_finite, values)):
        raise InputError(f"'{stated[0]}' is {described(values)}, expected one number for each of {count} responses")
    if stated[0] == "ranking":
        if sorted(values) != list(range(count)):
            expected = f"expected the indices 0 to {count - 1} of the responses, best first (ranks go into 'ranks')"
            raise InputError(f"'ranking' is {described(values)}, {expected}")
        return prompt, responses, [(int(i), int(j), 1.0) for i, j in combinations(values, 2)]
    return prompt, responses, by_merit([-value for value in values] if stated[0] == "ranks" else values)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _parse_texts(record: dict, reading: Reading):
    for key in ("prompt", "chosen", "rejected"):
        if key not in record:
            raise InputError(f"lists of chosen and rejected texts need the key '{key}', found {_keys(record)}")
        if key != "prompt" and not _is_texts(record[key]):
            raise InputError(f"'{key}' is {described(record[key])}, expected a list of texts like the other side")
    if "chosen_probability" in record:
        raise InputError("'chosen_probability' belongs to one chosen and one rejected response, found lists of them")
    prompt = parse_prompt(record["prompt"], "prompt", reading)
    responses = [_parse_side(text, key) for key in ("chosen", "rejected") for text in record[key]]
    chosen = len(record["chosen"])
    return prompt, responses, [(i, j, 1.0) for i in range(chosen) for j in range(chosen, len(responses))]


def _preference(value: object, count: int) -> tuple[int, int, float]:
    expected = f"expected [winner, loser] or [i, j, probability] with different indices below {count}"
    if not isinstance(value, list | tuple) or len(value) not in (2, 3):
        raise InputError(f"a preference is {described(value)}, {expected}")
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
        raise InputError(f"{name} is {described(value)}, expected a number from 0 to 1")
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return _is_number(value) and abs(value) < 1e300


def _with_system(prompt: list[Message], system: object) -> list[Message]:
    if system is None or system == "":
        return prompt
    if not isinstance(system, str):
        raise InputError(f"'system' is {described(system)}, expected text")
    if prompt[0]["role"] == "system":
        if prompt[0]["content"].strip() != system.strip():
            raise InputError("'system' differs from the system message of the conversation: drop one")
        return prompt
    return [{"role": "system", "content": system}, *prompt]


def _options(record: dict) -> dict:
    """Variables of the chat template."""
    options = {}
    for key, kind in (("tools", list), ("chat_template_kwargs", dict)):
        value = record.get(key)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except ValueError as error:
                raise InputError(f"'{key}' is no JSON ({error})") from error
        if value and not isinstance(value, kind):
            raise InputError(f"'{key}' is {described(value)}, expected a {kind.__name__}")
        if value:
            value = without_nothing(value)
            options |= {"tools": value} if key == "tools" else value
    return options


def parse_answer(value: object, name: str, prompt: list[Message]) -> list[Message]:
    """Text or messages that begin and end with the assistant's turn, with or without `prompt` in front.

    InputError calls the value `name`.
    """
    messages = _after(_parse_side(value, name), prompt, name)
    if any(message["role"] != "assistant" for message in (messages[0], messages[-1])):
        raise InputError(f"{name} must begin and end with an assistant turn: {described(value)}")
    return messages


def _text(message: Message) -> str:
    return message["content"] or ""


def _keys(record: dict) -> str:
    return f"keys {sorted(record)}" if record else "no keys"
