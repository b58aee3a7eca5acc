"""The prompts that a policy answers: read from data of any known shape, each one once, as the policy's tokens.

{"prompt": str | [messages]}       optional as in comparisons: "id", "system", "tools", "chat_template_kwargs"
{"messages": [messages]}           what is before the assistant's last turn
any comparison of docs/data.md     its prompt
"""

import dataclasses
import json
import logging
from dataclasses import dataclass

import torch
import xxhash

from general_preference.datasets.messages import PREFIX, Message, parse_messages
from general_preference.datasets.reading import Reading
from general_preference.datasets.records import Comparison, parse_record
from general_preference.datasets.sources import REMEDY, SHOWN, Source, place_below, source_records
from general_preference.datasets.tokenization import ComparisonTokenizer, stable_hash
from general_preference.errors import InputError

logger = logging.getLogger(__name__)

_ANSWERED = {"chosen", "rejected", "responses"}


@dataclass
class Prompt:
    """What one set of responses answers; `options` are variables of the chat template, `ids` the policy's tokens."""

    id: str
    messages: list[Message]
    options: dict
    ids: list[int]

    def columns(self) -> dict:
        """The prompt's part of a row of samples; text alone for a user's only message."""
        messages = [{key: value for key, value in message.items() if key != PREFIX} for message in self.messages]
        text = len(messages) == 1 and messages[0].keys() == {"role", "content"} and messages[0]["role"] == "user"
        prompt = {"id": self.id, "prompt": messages[0]["content"] if text else messages, "prompt_ids": self.ids}
        return prompt | ({"options": self.options} if self.options else {})


@dataclass
class PromptCounts:
    """Records that were read, and those that gave no prompt of their own: unfit, repeated, longer than asked for."""

    records: int = 0
    left_out: int = 0
    repeated: int = 0
    too_long: int = 0


def parse_prompt_record(record: object, reading: Reading) -> Comparison:
    """A record with a prompt, with or without responses to it, which do not matter.

    Raises:
        InputError: what was found and what was expected; the caller adds file and line.
    """
    try:
        return parse_record(record, reading)
    except InputError:
        held = {key for key, value in record.items() if value is not None} if isinstance(record, dict) else set()
        if _ANSWERED & held or not {"prompt", "messages", reading.prompt_key} & held:
            raise
    record = {key: record[key] for key in held}
    if "messages" in record and not {"prompt", reading.prompt_key} & held:
        messages = parse_messages(record.pop("messages"), "messages", reading)
        answers = len(messages) > 1 and messages[-1]["role"] == "assistant"
        record["prompt"] = messages[:-1] if answers else messages
    reading = dataclasses.replace(reading, custom=False, chosen_key=None, rejected_key=None, criterion=None)
    return parse_record(record | {"chosen": "a", "rejected": "b"}, reading)  # which its checks expect


def read_prompts(
    sources: list[Source],
    encoder: ComparisonTokenizer,
    reading: Reading,
    *,
    skip_bad: bool = False,
    longest: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[list[Prompt], PromptCounts]:
    """The prompts of all sources in their order, each once.

    Args:
        longest: leave out prompts of more tokens. limit: keep at most so many, drawn by `seed`.
        skip_bad: leave out, and count, records that do not fit.

    Raises:
        InputError: a record that does not fit, two prompts with one id, or no prompt at all.
    """
    counts, found, ids = PromptCounts(), {}, {}
    for source, (place, entry) in ((one, record) for one in sources for record in source_records(one)):
        counts.records += 1
        try:
            prompt = _read_prompt(place, entry, reading, encoder)
        except InputError as error:
            if not skip_bad:
                raise InputError(f"{error}; {REMEDY}") from error
            counts.left_out += 1
            if counts.left_out <= SHOWN:
                logger.warning("left out: %s", error)
            continue
        prompt.id = prompt.id or place_below(source, place)
        key = stable_hash(prompt.messages, prompt.options)
        if key in found:
            counts.repeated += 1
            continue
        if len(sources) > 1:
            prompt.id = f"{source.name}/{prompt.id}"
        if prompt.id in ids:
            cure = "make ids unique, or name the column in ignore_columns"
            raise InputError(f"two prompts have the id {prompt.id!r}, at {ids[prompt.id]} and {place}: {cure}")
        found[key], ids[prompt.id] = prompt, place
    prompts = [prompt for prompt in found.values() if longest is None or len(prompt.ids) <= longest]
    counts.too_long = len(found) - len(prompts)
    if not prompts:
        raise InputError(f"{', '.join(source.path for source in sources)}: no prompt to answer ({counts})")
    if limit is not None and limit < len(prompts):
        drawn = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))[:limit]
        prompts = [prompts[index] for index in drawn.sort().values.tolist()]
    return prompts, counts


def _read_prompt(place: str, record: object, reading: Reading, encoder: ComparisonTokenizer) -> Prompt:
    if isinstance(record, InputError):
        raise record
    try:
        read = parse_prompt_record(record, reading)
        json.dumps([read.id, read.prompt, read.options], ensure_ascii=False).encode()
        return Prompt(read.id, read.prompt, read.options, encoder.encode_prompt(read.prompt, read.options))
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: not valid Unicode (half of a surrogate pair)") from error


def prompts_checksum(prompts: list[Prompt]) -> str:
    """XXH3 of ids, texts and tokens in their order: the tokenizer and its chat template count."""
    digest = xxhash.xxh3_128()
    for prompt in prompts:
        digest.update(stable_hash(prompt.id, prompt.messages, prompt.options, prompt.ids).encode())
    return digest.hexdigest()
