"""What other frameworks send, as prompts and responses: samples with labels, and objects of OpenAI's Responses API."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import ValidationError

from general_preference.datasets.messages import Message
from general_preference.errors import InputError
from general_preference.serving.barrier import Place
from general_preference.serving.protocol import SampleLabel

# Markers of chat templates. In a policy's text they are control tokens, which the preference model does not know.
_MARKER = r"(?:<\|[^|<>\s]{1,40}\|>|<(?:start|end)_of_turn>|</?s>|\[/?INST\]|<(?:bos|eos)>)"
_ENDS = re.compile(rf"({_MARKER})\s*$")
_TEMPLATE = re.compile(_MARKER)
_NEEDED = (
    'expected {"group": {"id", "size", "index"}}, with which a sample waits for its siblings, or '
    '{"reference": response}, which it is compared with'
)


@dataclass
class Sample:
    """A response with its prompt, and what it is compared with: its siblings (`place`) or `reference`."""

    prompt: str | list[Message]
    response: str | list[Message]
    place: Place | None = None
    reference: str | list[Message] | None = None


def read_sample(label: object, prompt: object, response: Callable[[], object], name: str = "label") -> Sample:
    """A sample from its label, which wins over `prompt` and `response()` beside it; errors call the label `name`.

    Raises:
        InputError: neither group nor reference, or text in the policy's chat template where plain text is needed.
    """
    if isinstance(label, str):
        try:
            label = json.loads(label)
        except ValueError:
            raise InputError(f"{name} is text that is no JSON: {_NEEDED}") from None
    if not isinstance(label, dict):
        raise InputError(f"{name} is {'missing' if label is None else 'no object'}: {_NEEDED}")
    try:
        found = SampleLabel.model_validate(label)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{'.'.join(map(str, (name, *first['loc'])))}: {first['msg']}") from error
    if (found.group is None) == (found.reference is None):
        raise InputError(f"{name} names {'neither' if found.group is None else 'both'}: {_NEEDED}")
    if found.messages is not None and found.prompt is not None:
        raise InputError(f"{name} has messages and prompt: drop one")
    own, group = found.prompt if found.messages is None else found.messages, found.group
    prompt = _plain(prompt, name) if own is None else own
    place = None if group is None else Place(group.id, group.attempt, group.size, group.index)
    return Sample(prompt, response() if found.response is None else found.response, place, found.reference)


def _plain(prompt: object, name: str) -> object:
    if isinstance(prompt, str) and (marker := _TEMPLATE.search(prompt)):
        found = f"the prompt is in a chat template ({marker[0]!r})"
        raise InputError(f"{found}, which is the policy's: put its messages into the {name}")
    return prompt


def split_query(query: str, prompt: str, ends: tuple[str, ...]) -> str:
    """The response in a query that begins with the prompt, without the policy's end token.

    ends: texts of end tokens. InputError where the query ends with another one, or does not begin with the prompt.
    """
    if not query.startswith(prompt):
        raise InputError("query does not begin with its prompt: put the response into the label")
    return without_end(query[len(prompt) :], ends)


def without_end(response: object, ends: tuple[str, ...]) -> object:
    """A response's text without one of `ends` behind it; InputError where it ends with another control token."""
    if not isinstance(response, str):
        return response
    text = next((response.rstrip().removesuffix(end) for end in ends if response.rstrip().endswith(end)), response)
    if marker := _ENDS.search(text):
        cure = "start the server with it among end_texts, or put the response into the label"
        raise InputError(f"the response ends with {marker[1]!r}, as a policy's chat template has it: {cure}")
    return text


def read_input(params: dict) -> list[Message]:
    """The prompt of `responses_create_params`: `instructions`, if any, and `input`, text or items."""
    if params.get("tools"):
        raise InputError("responses_create_params.tools is not read: put what matters of them into the input")
    items = params.get("input")
    items = [{"role": "user", "content": items}] if isinstance(items, str) else items
    if not isinstance(items, list) or not items:
        raise InputError("responses_create_params.input is no text and no list of items")
    system = params.get("instructions")
    return [{"role": "system", "content": system}] * bool(system) + read_items(items, "responses_create_params.input")


def read_output(response: dict, name: str) -> list[Message]:
    """The assistant's messages in an object of the Responses API; without any an empty one. Reasoning is not read."""
    items = response.get("output")
    if not isinstance(items, list):
        raise InputError(f"{name} has no list 'output', expected an object of OpenAI's Responses API")
    return read_items(items, f"{name}.output") or [{"role": "assistant", "content": ""}]


def read_items(items: list, name: str) -> list[Message]:
    """Items of the Responses API as messages; those of reasoning are left out, unknown ones are refused."""
    messages = []
    for index, item in enumerate(items):
        kind = item.get("type", "message") if isinstance(item, dict) else type(item).__name__
        if kind == "message":
            messages.append({"role": item.get("role"), "content": _content(item.get("content"), f"{name}[{index}]")})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        elif kind == "function_call_output":
            output = {"role": "tool", "content": item.get("output"), "tool_call_id": item.get("call_id")}
            messages.append(output)
        elif kind != "reasoning":
            raise InputError(f"{name}[{index}] is of type {kind!r}, which is not read")
    return messages


def _content(content: object, name: str) -> object:
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("input_text", "output_text", "text", "refusal"):
            raise InputError(f"{name} has content of type {kind!r}, expected text")
        parts.append(part.get("refusal" if kind == "refusal" else "text"))
    if not all(isinstance(text, str) for text in parts):
        raise InputError(f"{name} has content without text")
    return "".join(parts)
