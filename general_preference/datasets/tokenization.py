"""Messages -> token ids of the prompt and of each response, with the one truncation rule.

Input formats, saved with the model:

chat      the prompt, rendered with the generation prompt, is tokenized separately, so its ids are a true prefix of
          each response; the end token is appended; exactly one BOS where the tokenizer or its template wants one;
          texts never become control tokens (control_tokens.py), and none is lost (rendering.py).
released  as the published GPM checkpoints were trained: template text tokenized with special tokens again, the last
          token overwritten by the end token, the first message being the prompt (for the gate).
sequence_classification
          as transformers' reward models are trained and run: the conversation as `apply_chat_template` tokenizes it,
          nothing added; the last token that is not padding is read. Texts never become control tokens here either.
openrlhf  as OpenRLHF trains reward models: that conversation without new lines at its end, but with the end token.
"""

import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from general_preference.datasets.control_tokens import ControlTokens, is_protected
from general_preference.datasets.messages import PREFIX, Message
from general_preference.datasets.rendering import ChatTemplate, Rendered
from general_preference.errors import InputError

logger = logging.getLogger(__name__)

TOKENIZER_VERSION = 2  # part of the cache key: raise it when the same text gets other ids
DEFAULT_TEMPLATE = "Human:\n{}\nAssistant:\n"
DATE = datetime(2024, 7, 26)  # for templates that write today's: the default of Llama 3.1's
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def load_tokenizer(
    path: str, *, use_fast=True, input_template: str | None = None, trust_remote_code=False, needs_template=False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name, ready for comparisons.

    Without a chat template, or with an explicit `input_template` ("{}" is the user's text), it gets a chat template
    made from that, which is saved with the model; with `needs_template` a tokenizer without one is refused.

    Raises:
        InputError: no tokenizer there, no end token, no chat template, or an input template without "{}".
    """
    path = os.path.expanduser(path)
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
    if Path(path).is_dir() and not any((Path(path) / file).is_file() for file in files):
        raise InputError(f"{path} has no tokenizer ({files[0]}): save the one it was trained with beside it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=use_fast, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot load the tokenizer of {path}: {str(error).strip().splitlines()[0]}") from error
    if not (Path(path) / files[0]).is_file() and (Path(path) / files[1]).is_file():
        _check_conversion(tokenizer, path)
    if needs_template and not tokenizer.chat_template:
        raise InputError(f"{path} has no chat template, so its prompts cannot be written: save one with its tokenizer")
    return prepare_tokenizer(tokenizer, path, input_template)


def _check_conversion(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Refuse a tokenizer that drops characters: some versions of transformers make one of a tokenizer.model alone."""
    text = "Which throw wins? ÄÖ 你好"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.unk_token_id not in ids and tokenizer.decode(ids).strip() != text:
        cure = "upgrade transformers, or save the tokenizer with it once (tokenizer.json)"
        raise InputError(f"{path}: transformers {transformers.__version__} reads tokenizer.model with losses: {cure}")


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str, input_template: str | None = None):
    """Make a tokenizer that is in memory ready for comparisons, as `load_tokenizer` does; errors call it `name`."""
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {name} has no end token (eos_token): the embedding is read there, set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if input_template is None and not tokenizer.chat_template:
        logger.warning("%s has no chat template: conversations are written as %r", name, DEFAULT_TEMPLATE)
    if input_template is not None or not tokenizer.chat_template:
        tokenizer.chat_template = plain_template(input_template or DEFAULT_TEMPLATE)
    return tokenizer


def fix_date(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have the chat template write `DATE` for today, so that ids are the same every day; saved with the model."""

    def fixed(template: str) -> str:
        found = _TODAY.sub(lambda call: repr(DATE.strftime(call[2])), template)
        if "strftime_now(" in found:
            raise InputError("the chat template writes today's date in a way that cannot be fixed: put a date there")
        return found

    template = tokenizer.chat_template  # tokenizers with tools may have several, by name
    several = {name: fixed(one) for name, one in template.items()} if isinstance(template, dict) else None
    tokenizer.chat_template = fixed(template) if several is None else several


def plain_template(text: str) -> str:
    """A chat template (Jinja) from a format string such as "Human:\\n{}\\nAssistant:\\n"; "{}" is the user's text."""
    before, separator, after = text.partition("{}")
    if not separator:
        raise InputError(f"input_template {text!r} has no '{{}}' to hold the user's text")
    return (
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}"
        f"{{{{- {before!r} + message['content'] + {after!r} -}}}}"
        "{%- else -%}{{- message['content'] + '\\n' -}}{%- endif -%}"
        "{%- endfor -%}"
    )


@dataclass
class ComparisonTokenizer:
    """Encodes prompts and responses the same way for training, evaluation and inference.

    max_length bounds prompt + one response in tokens, the end token included; None is no bound.
    pad_token_id: sequence_classification passes over tokens with this id at the end, as transformers does.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None
    input_format: str = "chat"
    pad_token_id: int | None = None

    def __post_init__(self):
        tokenizer = self.tokenizer
        fix_date(tokenizer)
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.adds_bos = self.bos is not None and tokenizer("a")["input_ids"][:1] == [self.bos]
        self.control, self.template = ControlTokens(tokenizer), ChatTemplate(tokenizer)
        # Whether conversations are tokenized whole; in parts they may get other ids where the parts meet.
        self.whole = self.input_format in ("sequence_classification", "openrlhf")
        self.end = [self.eos]  # what stays behind a response that is cut
        if self.input_format == "sequence_classification":
            self.end = self._without_padding(self._ids([self.template.closing()])[0])
        if self.max_length is not None and len(self.end) > self.max_length // 2:
            found = f"the chat template ends a turn with {len(self.end)} tokens"
            raise InputError(f"{found}, which leaves too little of max_length {self.max_length}: raise it")

    def fingerprint(self) -> str:
        """Changes whenever the same messages could get other ids."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab().items())
        special = (self.bos, self.eos, self.adds_bos, self.tokenizer.chat_template)
        passed_over = () if self.pad_token_id is None else (self.pad_token_id,)
        return stable_hash(TOKENIZER_VERSION, vocabulary, special, self.max_length, self.input_format, *passed_over)

    def encode(
        self,
        prompts: list[list[Message]],
        responses: list[list[list[Message]]],
        options: list[dict] | None = None,
    ) -> list[dict]:
        """Encode B prompts and their responses.

        Args:
            prompts: B lists of messages. responses: for each prompt, K lists of messages.
            options: for each prompt, `tools` and more variables of the chat template.

        Returns:
            B dicts: prompt_ids, response_ids (K lists that end in the end token), booleans prompt_cut, response_cut and
            thoughts_left_out (the template left thoughts of earlier turns out of the prompt).

        Raises:
            InputError: the chat template refuses these messages or leaves out what they say, or a prompt has no token.
        """
        options = options or [{}] * len(prompts)
        if self.input_format == "released":
            rows = [self._encode_released(*one) for one in zip(prompts, responses, options, strict=True)]
        else:
            found = [self._render(*one) for one in zip(prompts, responses, options, strict=True)]
            flat = iter(self._ids([text for one in found for text in self._texts(one)]))
            rows = []
            for one in found:
                prompt, *some = (next(flat) for _ in range(1 + len(one.responses)))
                row = self._truncate(*(self._split(prompt, some) if self.whole else (self._one_bos(prompt), some)))
                rows.append(row | {"thoughts_left_out": one.thoughts_left_out})
        if not all(row["prompt_ids"] for row in rows):
            raise InputError("the prompt has no tokens; expected some text before the responses")
        return rows

    def encode_prompt(self, prompt: list[Message], options: dict | None = None) -> list[int]:
        """Ids of a prompt as a policy continues it: with all of the generation prompt, or a begun turn as far as it is.

        Raises:
            InputError: the chat template refuses the messages or leaves out what they say, or there is no token.
        """
        opening = "" if prompt[-1].get(PREFIX) else self.template.opening(options)
        ids = self._one_bos(self._ids([self._render(prompt, [], options or {}).prompt + opening])[0])
        if not ids:
            raise InputError("the prompt has no tokens")
        return ids

    def _render(self, prompt: list[Message], responses: list[list[Message]], options: dict) -> Rendered:
        if any(map(self.control.spelled_by, (prompt, *responses))):
            prompt, responses = self.control.protect(prompt), self.control.protect(responses)
        return self.template.render(prompt, responses, options)

    def _texts(self, one: Rendered) -> list[str]:
        """What is tokenized: the prompt, and each response alone or in its whole conversation."""
        if not self.whole:
            return [one.prompt, *one.responses]
        whole = [one.prompt + "".join(end) for end in zip(one.responses, one.spaces, strict=True)]
        if self.input_format == "openrlhf":
            end, whole = self.tokenizer.eos_token, [text.rstrip("\n") for text in whole]
            whole = [text if text.endswith(end) else f"{text} {end}" for text in whole]
        return [one.prompt.rstrip(), *whole]  # white space there may join that of a response in one token

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        for index, text in enumerate(texts):
            if is_protected(text):
                ids[index] = self.control.encode(text)
        return ids

    def _split(self, prompt: list[int], whole: list[list[int]]) -> tuple[list[int], list[list[int]]]:
        """The tokens with which the prompt and all whole conversations begin, and what follows in each."""
        whole = list(map(self._without_padding, whole))
        rows = [prompt, *(ids[:-1] for ids in whole)]
        differ = (place for place, ids in enumerate(zip(*rows, strict=False)) if len(set(ids)) > 1)
        shared = next(differ, min(map(len, rows)))
        return prompt[:shared], [ids[shared:] for ids in whole]

    def _without_padding(self, ids: list[int]) -> list[int]:
        end = len(ids)
        while end and ids[end - 1] == self.pad_token_id:
            end -= 1
        return ids[:end]

    def _one_bos(self, ids: list[int]) -> list[int]:
        """Exactly one BOS in front, if the tokenizer or its template puts one there at all."""
        starts = 0
        while starts < len(ids) and ids[starts] == self.bos:
            starts += 1
        return ids[starts - 1 :] if starts else ([self.bos] if self.adds_bos else []) + ids

    def _truncate(self, prompt: list[int], responses: list[list[int]]) -> dict:
        """Cut the prompt's oldest tokens first, down to a quarter of the budget; then the responses' ends."""
        written = [_ends_with(ids, self.end) for ids in responses]
        responses = [ids[: -len(self.end)] if there else ids for ids, there in zip(responses, written, strict=True)]
        ends = [[] if self.whole and not there else self.end for there in written]  # an end token is always appended
        prompt_cut = response_cut = False
        if self.max_length is not None:
            longest, reserved = max(len(ids) for ids in responses), max(map(len, ends))
            keep = max(self.max_length // 4, self.max_length - reserved - longest)
            if prompt_cut := len(prompt) > keep:
                head = prompt[:1] if prompt[:1] == [self.bos] else []
                prompt = head + prompt[len(prompt) - max(keep - len(head), 1) :]
            room = self.max_length - reserved - len(prompt)
            response_cut = longest > room
            responses = [ids[:room] for ids in responses]
        responses = [ids + end for ids, end in zip(responses, ends, strict=True)]
        return {"prompt_ids": prompt, "response_ids": responses, "prompt_cut": prompt_cut, "response_cut": response_cut}

    def _encode_released(self, prompt: list[Message], responses: list[list[Message]], template_options: dict) -> dict:
        """As the published checkpoints were trained; kept only so that they score as published."""
        options = {"verbose": False, "truncation": self.max_length is not None, "max_length": self.max_length}
        render = partial(self.tokenizer.apply_chat_template, tokenize=False, **template_options)
        gate = len(self.tokenizer(render(prompt[:1]), **options)["input_ids"])
        whole = [self.tokenizer(render(prompt + some), **options)["input_ids"] for some in responses]
        cut = self.max_length is not None and any(len(ids) >= self.max_length for ids in whole)
        gate = min(gate, min(len(ids) for ids in whole) - 1)
        if any(ids[:gate] != whole[0][:gate] for ids in whole):
            raise InputError("input_format released needs a template that renders the first message the same each time")
        responses = [[*ids[gate:-1], self.eos] for ids in whole]
        cuts = {"prompt_cut": False, "response_cut": cut, "thoughts_left_out": False}
        return {"prompt_ids": whole[0][:gate], "response_ids": responses} | cuts


def _ends_with(ids: list[int], end: list[int]) -> bool:
    return len(ids) >= len(end) > 0 and ids[-len(end) :] == end


def stable_hash(*parts: object) -> str:
    """A short fingerprint of JSON-serializable parts, the same in every process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
