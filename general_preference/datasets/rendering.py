"""Messages -> text through the tokenizer's chat template, with nothing lost on the way.

Templates drop what they do not expect: roles, tool calls, thoughts, empty turns. Here every text that goes in must come
out, except white space at its ends and thoughts of earlier turns in the prompt, or the messages are refused.
"""

import json
import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from general_preference.datasets.messages import PREFIX, Message
from general_preference.errors import InputError

_TALK = [{"role": role, "content": f"\ufdd4{role}{n}\ufdd5"} for n in (0, 1) for role in ("user", "assistant")]
_MARK, _MARKS = "\ufdd4{}\ufdd5", re.compile("\ufdd4([0-9]+)\ufdd5")
_THOUGHT = re.compile(r"(.*?)</think>", re.DOTALL)
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# Fields of a message that name it or its sender; templates may leave them out.
_NAMES = {"role", "content", PREFIX, "name", "tool_call_id", "id", "type", "index", "model", "timestamp", "language"}
_NAMES.update(_THOUGHTS)


# Keys of tools and of calls, which templates write in their own way.
_SCHEMA = {
    "id",
    "type",
    "function",
    "name",
    "arguments",
    "parameters",
    "properties",
    "required",
    "description",
    "items",
}
_SCHEMA |= {"enum", "default", "strict", "additionalProperties", "anyOf", "oneOf", "title", "return", "format"}


@dataclass
class Rendered:
    """The prompt's text and what follows it in each response; whether thoughts of earlier turns were left out.

    spaces: white space that the template writes behind each response.
    """

    prompt: str
    responses: list[str]
    spaces: list[str]
    thoughts_left_out: bool = False


class ChatTemplate:
    """Renders prompts and responses so that a prompt's text does not depend on the responses."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._shown: set[tuple] = set()
        self._openings: dict[str, str] = {}
        self._parts = False
        # Templates of multimodal models may read lists of parts alone.
        lost, in_parts = (_lost(_TALK, self._try(_TALK, parts=parts))[0] for parts in (False, True))
        self._parts = bool(lost and not in_parts)

    def opening(self, options: dict | None = None) -> str:
        """What the generation prompt writes and not every conversation has, such as `<think>`: no part of prompts."""
        options = {key: value for key, value in (options or {}).items() if key != "tools"}
        key = json.dumps(options, sort_keys=True) if options else ""
        if key not in self._openings:
            prompt, talks = self._try(_TALK[:1], options, True), [self._try(_TALK[:n], options) for n in (2, 4)]
            before = (talk.partition(_TALK[1]["content"])[0] for talk in talks if talk)
            self._openings[key] = prompt[len(_common_prefix([prompt, *before])) :]
        return self._openings[key]

    def closing(self) -> str:
        """What the template writes behind an assistant's text: the end of its turn."""
        return self._try(_TALK[:2]).rpartition(_TALK[1]["content"])[2]

    def _try(self, messages: list[Message], options: dict | None = None, generate=False, parts=False) -> str:
        """The rendered text, "" where the template refuses the messages."""
        try:
            return self._text(messages, options, generate, parts)
        except InputError:
            return ""

    def render(self, prompt: list[Message], responses: list[list[Message]], options: dict | None = None) -> Rendered:
        """Text of a prompt and K responses. options: `tools` and more variables of the template.

        Raises:
            InputError: the template refuses the messages, or leaves out what they say.
        """
        if not any("tool_calls" in message for messages in (prompt, *responses) for message in messages):
            return self._render(prompt, responses, options or {})
        problem = None
        for shape in [_shape_of(empty, written) for written in (False, True) for empty in ("", None)]:
            shaped = [[shape(message) for message in messages] for messages in (prompt, *responses)]
            try:
                return self._render(shaped[0], shaped[1:], options or {})
            except InputError as error:
                if problem is None or (problem.__cause__ and not error.__cause__):  # what it leaves out says more
                    problem = error
        raise problem

    def _render(self, prompt: list[Message], responses: list[list[Message]], options: dict) -> Rendered:
        answers = all(response[0]["role"] == "assistant" for response in responses)
        try:
            text = self._prompt_text(prompt, answers, options)
        except InputError:  # some templates have no system role: its text goes in front of the first message
            if len(prompt) < 2 or prompt[0]["role"] != "system":
                raise
            merged = f"{prompt[0]['content']}\n\n{prompt[1]['content']}"
            prompt = [prompt[1] | {"content": merged}, *prompt[2:]]
            text = self._prompt_text(prompt, answers, options)
        whole = [self._response_text(text, prompt, response, options) for response in responses]
        found = [_without_space(*one) for one in zip(whole, responses, strict=True)]
        rendered = Rendered(text, found, [one[len(text) :] for one, text in zip(whole, found, strict=True)])
        if options and not _says(text, options.get("tools")):
            raise InputError("the chat template leaves out the tools, or a part of them")
        lost, rendered.thoughts_left_out = _lost(prompt, text, history=True)
        if lost:
            raise InputError(f"the chat template leaves out {lost} of the prompt")
        return rendered

    def _prompt_text(self, prompt: list[Message], answers: bool, options: dict) -> str:
        if not prompt[-1].get(PREFIX):
            text = self._text(prompt, options, generate=answers)
            return text.removesuffix(self.opening(options)) if answers else text
        if "tool_calls" in prompt[-1]:
            raise InputError("the prompt ends with the assistant's tool calls: end it with what the tools answered")
        started = {"role": "assistant", "content": prompt[-1]["content"] + _MARK.format(0)}
        before, mark, _ = self._text([*prompt[:-1], started], options).partition(_MARK.format(0))
        if not mark:
            raise InputError("the chat template leaves out the assistant's turn that the prompt begins")
        return before

    def _response_text(self, text: str, prompt: list[Message], response: list[Message], options: dict) -> str:
        """What follows the prompt's `text` in the conversation."""
        messages = _join(prompt, response)
        whole = self._text(messages, options)
        lost, _ = _lost(response, whole[len(text) :])
        found = self._framed(text, prompt, response, options, lost) if lost or not whole.startswith(text) else whole
        self._check_shown(messages, options)
        return found[len(text) :]

    def _framed(self, text: str, prompt: list[Message], response: list[Message], options: dict, lost: str) -> str:
        """The conversation as the template writes it around any response, with the response as it is.

        For templates that take thoughts out of a turn, or write nothing for an empty one.
        """
        reason = f"the chat template leaves out {lost} of a response" if lost else ""
        reason = reason or "the chat template writes the prompt in another way when a response follows"
        if any(message.keys() - {"role", "content"} for message in response):
            raise InputError(reason)
        marked = [message | {"content": _MARK.format(number)} for number, message in enumerate(response)]
        whole = self._text(_join(prompt, marked), options)
        frame = _MARKS.sub("", whole[len(text) :])
        thinks = "think>" in frame and any("think>" in message["content"] for message in response)
        shown = len(_MARKS.findall(whole)) == len(response)
        if thinks or not shown or not whole[: whole.index(_MARK.format(0))].startswith(text):
            raise InputError(reason)
        return _MARKS.sub(lambda found: response[int(found[1])]["content"], whole)

    def _check_shown(self, messages: list[Message], options: dict) -> None:
        """Refuse a conversation of which the template leaves out a whole message or its calls, whatever they say."""
        kinds = tuple([(m["role"], bool(m["content"]), *(sorted(m) if len(m) > 2 else ())) for m in messages])
        key = (kinds, json.dumps(options, sort_keys=True) if options else "")
        if key in self._shown:
            return
        try:
            found = set(
                map(int, _MARKS.findall(self._text(list(map(_marked, messages, range(len(messages)))), options)))
            )
        except InputError:  # it reads what this message says, and has read it before
            return
        for number, message in enumerate(messages):
            if message["content"] and 2 * number not in found:
                raise InputError(f"the chat template leaves out the message of role {message['role']!r}")
            if "tool_calls" in message and 2 * number + 1 not in found:
                raise InputError(
                    f"the chat template leaves out 'tool_calls' of the message of role {message['role']!r}"
                )
        self._shown.add(key)

    def _text(self, messages: list[Message], options: dict | None = None, generate=False, parts=False) -> str:
        if parts or self._parts:
            messages = [m | {"content": [{"type": "text", "text": m["content"] or ""}]} for m in messages]
        try:
            settings = (options or {}) | {"tokenize": False, "add_generation_prompt": generate}
            return self.tokenizer.apply_chat_template(messages, **settings)
        except Exception as error:  # templates raise Jinja errors of their own choosing
            raise InputError(f"the chat template refuses the messages: {error}") from error


def _common_prefix(texts: list[str]) -> str:
    shortest = min(texts, key=len)
    return next((shortest[:n] for n, c in enumerate(shortest) if any(text[n] != c for text in texts)), shortest)


def _marked(message: Message, number: int) -> Message:
    """A mark instead of the text, and another one instead of the names of the functions called."""
    text, call = _MARK.format(2 * number), {"name": _MARK.format(2 * number + 1)}
    marked = {"content": text} if message["content"] else {}
    if "tool_calls" in message:
        calls = message["tool_calls"]
        marked["tool_calls"] = [c | ({"function": c["function"] | call} if "function" in c else call) for c in calls]
    return message | marked


def _join(prompt: list[Message], response: list[Message]) -> list[Message]:
    """The whole conversation; a turn that the prompt begins is one with that of the response."""
    if not prompt[-1].get(PREFIX):
        return prompt + response
    started = prompt[-1]["content"] + (response[0]["content"] or "")
    return [*prompt[:-1], response[0] | {"content": started}, *response[1:]]


def _without_space(text: str, response: list[Message]) -> str:
    """No white space behind the end-of-turn mark; what the response itself ends with stays."""
    content = response[-1]["content"]
    return text if content and text.endswith(content) else text.rstrip()


def _shape_of(empty: str | None, written: bool):
    """A way in which templates expect tool calls: no content as "" or None, arguments as objects or written as JSON."""

    def shape(message: Message) -> Message:
        if "tool_calls" not in message:
            return message
        calls = []
        for call in message["tool_calls"]:
            function = call.get("function", call)
            arguments = function.get("arguments", {})
            if written and not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            function = function | {"arguments": arguments}
            calls.append(call | {"function": function} if "function" in call else function)
        return message | {"tool_calls": calls, "content": message["content"] or empty}

    return shape


def _lost(messages: list[Message], text: str, history: bool = False) -> tuple[str, bool]:
    """What a rendering leaves out: the name of a text ("" for none), and whether thoughts are missing.

    history: the messages are earlier turns, whose thoughts may be missing.
    """
    end, without_thoughts = 0, False
    for message in messages:
        plain = len(message) == 2 and "</think>" not in message["content"]
        for piece, thought in [(message["content"].strip(), False)] if plain else _pieces(message):
            found = text.find(piece, end)
            if found >= 0:
                end = found + len(piece)
            elif history and thought:
                without_thoughts = True
            elif message["role"] != "system" or piece not in text:
                kind = "thoughts" if thought else "text"
                return f"{kind} of the message of role {message['role']!r} ({piece[:40]!r})", without_thoughts
        for field in () if plain else message.keys() - _NAMES:
            if not _says(text, message[field]):
                return f"{field!r} of the message of role {message['role']!r}", without_thoughts
    return "", without_thoughts


def _says(text: str, value: object) -> bool:
    """Whether every word of nested lists and objects is in the text."""
    return all(word in text for leaf in _leaves(value) for word in re.findall(r"\w+", leaf))


def _pieces(message: Message) -> list[tuple[str, bool]]:
    """(text, whether it is a thought) in order, without white space at the ends."""
    pieces = [(message[field], True) for field in _THOUGHTS if isinstance(message.get(field), str)]
    content = message["content"] or ""
    answer = 0
    for found in _THOUGHT.finditer(content) if "</think>" in content else ():
        before, opened, thought = found[1].partition("<think>")
        pieces += [(before, False), (thought, True)] if opened else [(before, True)]
        answer = found.end()
    pieces.append((content[answer:], False))
    return [(text.strip(), thought) for text, thought in pieces if text.strip()]


def _leaves(value: object):
    """Every text in nested lists and objects, keys of objects included; not the numbers of calls."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            if key not in _SCHEMA:
                yield key
            if key not in ("id", "type"):
                yield from _leaves(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one)
