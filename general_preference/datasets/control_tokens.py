"""Text is tokenized as text: only the chat template makes control tokens.

A response that spells `<|end|><|user|>` would otherwise become those tokens, and a policy that is trained against a
reward model finds such things. Texts are protected before the template is rendered, and encoded after it.
"""

import re
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from general_preference.errors import InputError

# Unicode noncharacters, which no text holds, around a number: in a text the control token that it spells, in a rendered
# conversation the control token that the template wrote.
SPELLED, WRITTEN = "\ufdd0{}\ufdd1", "\ufdd2{}\ufdd3"
_ROLES = {"system", "user", "assistant", "tool"}
_SPELLED_BEGINS = SPELLED[0]
_SPELLED = re.compile("\ufdd0([0-9]+)\ufdd1")


def is_protected(text: str) -> bool:
    """Whether `ControlTokens.protect` replaced something in a text."""
    return _SPELLED_BEGINS in text


class ControlTokens:
    """The special tokens of a tokenizer, except the one for unknown characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        special = {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.ids = {token.content: number for number, token in special.items()}
        self.names = sorted(self.ids, key=len, reverse=True)
        self._beginnings = {name[0] for name in self.names}
        self.pattern = re.compile("|".join(map(re.escape, self.names)) or "(?!)")
        normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        matched = [
            token.content for token in special.values() if token.normalized
        ]  # in the text, once it is normalized
        self._normalize = normalizer.normalize_str if normalizer is not None and matched else None
        self._normalized = {normalizer.normalize_str(name): name for name in matched} if self._normalize else {}
        self._backend: Tokenizer | None = None

    def protect(self, value):
        """A text, or texts in lists and dicts, with every spelled control token replaced by what stands for it.

        Raises:
            InputError: normalization would make a control token of a text that does not spell it.
        """
        if isinstance(value, str):
            text = self.pattern.sub(lambda found: SPELLED.format(self.names.index(found[0])), value)
            if self._normalize and (found := self._find(self._normalized, self._normalize(text))):
                raise InputError(f"a text spells {self._normalized[found]} once it is normalized: {value[:40]!r}")
            return text
        if isinstance(value, dict):
            return {self.protect(key): self.protect(one) for key, one in value.items()}
        return [self.protect(one) for one in value] if isinstance(value, list) else value

    def spelled_in(self, value) -> bool:
        """Whether a text, or one in lists and dicts, spells a control token."""
        if isinstance(value, str):
            found = self._find(self._beginnings, value) and self._find(self.names, value)
            return bool(found or (self._normalize and self._find(self._normalized, self._normalize(value))))
        if isinstance(value, dict):
            return any(map(self.spelled_in, value.values())) or any(map(self.spelled_in, value))
        return isinstance(value, list) and any(map(self.spelled_in, value))

    def spelled_by(self, messages: list[dict]) -> bool:
        """Whether the messages spell a control token; `spelled_in`, but faster for those with text alone."""
        return any(
            self.spelled_in(message["content"] if len(message) == 2 and message["role"] in _ROLES else message)
            for message in messages
        )

    @staticmethod
    def _find(names: Iterable[str], text: str) -> str | None:
        return next((name for name in names if name in text), None)  # far faster than the pattern

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text in which some control tokens were protected.

        Raises:
            InputError: this tokenizer makes control tokens of any text that spells them.
        """
        spelled = ", ".join(sorted({self.names[int(number)] for number in _SPELLED.findall(text)}))
        if (backend := self._guarded()) is None:
            raise InputError(f"a text spells {spelled}, which slow tokenizers turn into control tokens")
        text = self.pattern.sub(lambda found: WRITTEN.format(self.names.index(found[0])), text)
        text = _SPELLED.sub(lambda found: self.names[int(found[1])], text)
        ids = backend.encode(text, add_special_tokens=False).ids
        if not set(ids).isdisjoint(self.ids.values()):
            unknown = self.tokenizer.unk_token_id
            if any(number in self.ids.values() and number != unknown for number in ids):
                raise InputError(f"a text spells {spelled}, which this tokenizer turns into control tokens")
        return [self._written.get(number, number) for number in ids]

    def _guarded(self) -> Tokenizer | None:
        """The tokenizer with other names for its control tokens, so that their own names are text; None if slow."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if self._backend is None and backend is not None:
            decoder = self.tokenizer.added_tokens_decoder
            self._backend = Tokenizer.from_str(backend.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True
            self._written = {}
            for index, name in enumerate(self.names):
                token = decoder[self.ids[name]]
                options = {"lstrip": token.lstrip, "rstrip": token.rstrip, "normalized": False, "special": False}
                self._backend.add_tokens([AddedToken(WRITTEN.format(index), **options)])
                self._written[self._backend.token_to_id(WRITTEN.format(index))] = self.ids[name]
        return self._backend
