"""Messages as people write them, in the names of the field: {"role": ..., "content": text, more for the template}."""

import contextlib
import json

from general_preference.datasets.reading import Reading, described
from general_preference.errors import InputError

Message = dict  # {"role": str, "content": str, ...}
PREFIX = "prefix"  # field of a prompt's last message: the assistant's turn goes on in the response
_ROLES = dict.fromkeys(("human", "prompter"), "user")
_ROLES |= dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai"), "assistant") | {"observation": "tool"}


def parse_prompt(value: object, name: str = "prompt", reading: Reading | None = None) -> list[Message]:
    """Text or messages -> messages. InputError calls the value `name`."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    return parse_messages(value, name, reading)


def begun_prompt(prompt: list[Message]) -> list[Message]:
    """The prompt of answers: if it ends with the assistant's turn, they go on in that turn."""
    return prompt if prompt[-1]["role"] != "assistant" else [*prompt[:-1], prompt[-1] | {PREFIX: True}]


def parse_conversation(value: object, name: str) -> tuple[list[Message], list[Message]]:
    """Messages that end in an assistant's turn -> (those before it, that turn). InputError calls the value `name`."""
    messages = parse_messages(value, name)
    if all(message["role"] != "assistant" for message in messages):
        raise InputError(f"{name} has no assistant turn, which is what gets scored: {described(value)}")
    if (role := messages[-1]["role"]) != "assistant":
        raise InputError(f"{name} ends with a {role} turn, expected the assistant's: {described(value)}")
    if len(messages) == 1:
        raise InputError(f"{name} has no turn before the assistant's, expected a prompt: {described(value)}")
    return messages[:-1], messages[-1:]


def parse_messages(value: object, name: str, reading: Reading | None = None) -> list[Message]:
    """A non-empty list of messages, their roles in the field's names. InputError calls the value `name`."""
    if not isinstance(value, list | tuple) or not value:
        raise InputError(f"'{name}' is {described(value)}, expected a list of messages {{'role', 'content'}}")
    return [parse_message(message, name, reading) for message in value]


def parse_message(value: object, name: str, reading: Reading | None = None) -> Message:
    """A message with `role`, `content` (text) and the fields that the chat template may read."""
    if isinstance(value, dict):
        ignored = reading.ignore_columns if reading else ()
        fields = {key: one for key, one in value.items() if one is not None and key not in ignored}
        sharegpt = "from" in fields and "role" not in fields
        role, content = (fields.pop(key, None) for key in (("from", "value") if sharegpt else ("role", "content")))
        if role == "function_call":
            role, content, fields["tool_calls"] = "assistant", "", _function_calls(content, name)
        if content is None and {"tool_calls", "function_call"} & fields.keys():
            content = ""
        if isinstance(content, list) and all(isinstance(part, str | dict) for part in content):
            content = "".join(_part(part, name) for part in content)
        if isinstance(role, str) and isinstance(content, str):
            if fields.get("tool_calls") == []:  # as tables have it in messages without calls
                del fields["tool_calls"]
            calls = {"tool_calls": _calls(fields["tool_calls"], name)} if "tool_calls" in fields else {}
            fields = {key: without_nothing(one) for key, one in fields.items()} | calls if fields else fields
            return {"role": _ROLES.get(role.lower(), role), "content": content, **fields}
    raise InputError(f"'{name}' has {described(value)}, expected a message {{'role': text, 'content': text}}")


def _part(part: str | dict, name: str) -> str:
    text = part if isinstance(part, str) else part.get("text") if part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else part
        raise InputError(f"'{name}' has content of type {kind!r}, expected text: other inputs are not read")
    return text


def _calls(value: object, name: str) -> list[dict]:
    """Tool calls with their arguments as objects, as chat templates expect them."""
    if not isinstance(value, list | tuple) or not all(isinstance(call, dict) for call in value):
        raise InputError(f"'{name}' has tool_calls {described(value)}, expected a list of objects")
    calls = []
    for call in map(without_nothing, value):
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f"'{name}' has a tool call {described(call)}, expected a function with a name")
        if isinstance(function.get("arguments"), str):
            with contextlib.suppress(ValueError):  # not JSON: as it is
                function = function | {"arguments": json.loads(function["arguments"])}
        calls.append(call | {"function": function} if "function" in call else function)
    return calls


def _function_calls(content: object, name: str) -> list[dict]:
    """ShareGPT's turn of role function_call: one call, or a list of them, as JSON."""
    try:
        found = json.loads(content)
    except (ValueError, TypeError) as error:
        raise InputError(f"'{name}' has a function_call {described(content)}, expected JSON") from error
    return [{"type": "function", "function": call} for call in (found if isinstance(found, list) else [found])]


def without_nothing(value: object):
    """A value without the nulls that a table puts where rows have different fields."""
    if isinstance(value, dict):
        return {key: without_nothing(one) for key, one in value.items() if one is not None}
    return [without_nothing(one) for one in value] if isinstance(value, list | tuple) else value
