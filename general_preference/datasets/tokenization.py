"""Messages -> token ids of the prompt and of each response, with the one truncation rule.

Two input formats, saved with the model:

chat      the prompt, rendered with the generation prompt, is tokenized separately, so its ids are a true prefix of
          each response; the end token is appended; exactly one BOS where the tokenizer or its template wants one.
released  as the published GPM checkpoints were trained: template text tokenized with special tokens again, the last
          token overwritten by the end token, the first message being the prompt (for the gate).
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from general_preference.datasets.records import Message
from general_preference.errors import InputError

TOKENIZER_VERSION = 1  # part of the cache key: raise it when the same text gets other ids
DEFAULT_TEMPLATE = "Human:\n{}\nAssistant:\n"


def load_tokenizer(
    path: str, *, use_fast: bool = True, input_template: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub name, ready for comparisons.

    Without a chat template, or with an explicit `input_template` ("{}" is the user's text), it gets a chat template
    made from that, which is saved with the model.

    Raises:
        InputError: no tokenizer there, no end token, or an input template without "{}".
    """
    path = os.path.expanduser(path)
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
    if Path(path).is_dir() and not any((Path(path) / file).is_file() for file in files):
        raise InputError(f"{path} has no tokenizer ({files[0]}): save the one it was trained with beside it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=use_fast, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"cannot load the tokenizer of {path}: {str(error).strip().splitlines()[0]}") from error
    return prepare_tokenizer(tokenizer, path, input_template)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str, input_template: str | None = None):
    """Make a tokenizer that is in memory ready for comparisons, as `load_tokenizer` does; errors call it `name`."""
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {name} has no end token (eos_token): the embedding is read there, set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if input_template is not None or not tokenizer.chat_template:
        tokenizer.chat_template = plain_template(input_template or DEFAULT_TEMPLATE)
    return tokenizer


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
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None
    input_format: str = "chat"

    def __post_init__(self):
        tokenizer = self.tokenizer
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.adds_bos = self.bos is not None and tokenizer("a")["input_ids"][:1] == [self.bos]

    def fingerprint(self) -> str:
        """Changes whenever the same messages could get other ids."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab().items())
        special = (self.bos, self.eos, self.adds_bos, self.tokenizer.chat_template)
        return stable_hash(TOKENIZER_VERSION, vocabulary, special, self.max_length, self.input_format)

    def encode(self, prompts: list[list[Message]], responses: list[list[list[Message]]]) -> list[dict]:
        """Encode B prompts and their responses.

        prompts: B lists of messages. responses: for each prompt, K lists of messages. Returns B dicts: prompt_ids,
        response_ids (K lists that end in the end token), booleans prompt_cut and response_cut.

        Raises:
            InputError: the chat template refuses these messages.
        """
        if self.input_format == "released":
            return [self._encode_released(prompt, some) for prompt, some in zip(prompts, responses, strict=True)]
        texts = [self._render(prompt, some) for prompt, some in zip(prompts, responses, strict=True)]
        prompt_ids = self._ids([prompt for prompt, _ in texts])
        flat = iter(self._ids([text for _, some in texts for text in some]))
        pairs = zip(prompt_ids, texts, strict=True)
        return [self._truncate(self._one_bos(ids), [next(flat) for _ in some]) for ids, (_, some) in pairs]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def _one_bos(self, ids: list[int]) -> list[int]:
        """Exactly one BOS in front, if the tokenizer or its template puts one there at all."""
        starts = 0
        while starts < len(ids) and ids[starts] == self.bos:
            starts += 1
        return ids[starts - 1 :] if starts else ([self.bos] if self.adds_bos else []) + ids

    def _render(self, prompt: list[Message], responses: list[list[Message]]) -> tuple[str, list[str]]:
        """Template text of the prompt, and what the template adds to it for each response."""
        prompt, text = self._apply(prompt, add_generation_prompt=responses[0][0]["role"] == "assistant")
        return text, [self._response_text(prompt, text, response) for response in responses]

    def _response_text(self, prompt: list[Message], prompt_text: str, response: list[Message]) -> str:
        """The response as the template writes it, with its end-of-turn mark, without white space after that."""
        try:
            whole = self.tokenizer.apply_chat_template(prompt + response, tokenize=False)
        except Exception as error:
            raise InputError(f"the chat template refuses the response: {error}") from error
        if not whole.startswith(prompt_text):
            # Templates that rewrite earlier turns (reasoning models): the content alone, then the end token.
            return "\n".join(message["content"] for message in response)
        text = whole[len(prompt_text) :]
        content = response[-1]["content"]
        return text if content and text.endswith(content) else text.rstrip()

    def _apply(self, messages: list[Message], add_generation_prompt: bool) -> tuple[list[Message], str]:
        """Render messages; if the template refuses the system role, its text goes in front of the first message."""
        try:
            options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
            return messages, self.tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # templates raise Jinja errors of their own choosing
            if len(messages) > 1 and messages[0]["role"] == "system":
                merged = messages[0]["content"] + "\n\n" + messages[1]["content"]
                return self._apply([{**messages[1], "content": merged}, *messages[2:]], add_generation_prompt)
            raise InputError(f"the chat template refuses the prompt: {error}") from error

    def _truncate(self, prompt: list[int], responses: list[list[int]]) -> dict:
        """Cut the prompt's oldest tokens first, down to a quarter of the budget; then the responses' ends."""
        responses = [ids[:-1] if ids[-1:] == [self.eos] else ids for ids in responses]
        prompt_cut = response_cut = False
        if self.max_length is not None:
            longest = max(len(ids) for ids in responses)
            keep = max(self.max_length // 4, self.max_length - 1 - longest)
            if prompt_cut := len(prompt) > keep:
                head = prompt[:1] if prompt[:1] == [self.bos] else []
                prompt = head + prompt[len(prompt) - max(keep - len(head), 1) :]
            room = self.max_length - 1 - len(prompt)
            response_cut = longest > room
            responses = [ids[:room] for ids in responses]
        responses = [[*ids, self.eos] for ids in responses]
        return {"prompt_ids": prompt, "response_ids": responses, "prompt_cut": prompt_cut, "response_cut": response_cut}

    def _encode_released(self, prompt: list[Message], responses: list[list[Message]]) -> dict:
        """As the published checkpoints were trained; kept only so that they score as published."""
        options = {"verbose": False, "truncation": self.max_length is not None, "max_length": self.max_length}
        render = self.tokenizer.apply_chat_template
        gate = len(self.tokenizer(render(prompt[:1], tokenize=False), **options)["input_ids"])
        whole = [self.tokenizer(render(prompt + some, tokenize=False), **options)["input_ids"] for some in responses]
        cut = self.max_length is not None and any(len(ids) >= self.max_length for ids in whole)
        gate = min(gate, min(len(ids) for ids in whole) - 1)
        if any(ids[:gate] != whole[0][:gate] for ids in whole):
            raise InputError("input_format released needs a template that renders the first message the same each time")
        responses = [[*ids[gate:-1], self.eos] for ids in whole]
        return {"prompt_ids": whole[0][:gate], "response_ids": responses, "prompt_cut": False, "response_cut": cut}


def stable_hash(*parts: object) -> str:
    """A short fingerprint of JSON-serializable parts, the same in every process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
