"""What a pipeline has cut to its limit of tokens: counted, and said in one line. Called by pipeline.py."""

import logging
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)


@dataclass
class Cuts:
    """Totals since the pipeline was made.

    prompts, responses: how many were cut. prompt_tokens, response_tokens: by how many tokens in all.
    alike: responses that are told apart from another one only beyond the limit: they tie.
    """

    prompts: int = 0
    prompt_tokens: int = 0
    responses: int = 0
    response_tokens: int = 0
    alike: int = 0
    _whole: dict[tuple, tuple] = field(default_factory=dict, repr=False)  # of this call: what is left -> what it was
    _said: int = field(default=0, repr=False)

    def add(self, row: dict, whole: dict) -> None:
        """Count what `row` lacks of `whole`, both as the tokenizer makes them."""
        prompt, full_prompt = tuple(row["prompt_ids"]), tuple(whole["prompt_ids"])
        self.prompts += len(prompt) < len(full_prompt)
        self.prompt_tokens += len(full_prompt) - len(prompt)
        for left, full in zip(row["response_ids"], whole["response_ids"], strict=True):
            self.responses += len(left) < len(full)
            self.response_tokens += len(full) - len(left)
            before = full_prompt, tuple(full)
            self.alike += self._whole.setdefault((prompt, tuple(left)), before) != before

    def report(self, limit: int) -> None:
        """End a call: warn about the first that cuts, and about the first in which responses tie by it."""
        self._whole.clear()
        kind = 2 if self.alike else int(self.prompts + self.responses > 0)
        if kind > self._said:
            self._said = kind
            parts = [("prompt", self.prompts, self.prompt_tokens), ("response", self.responses, self.response_tokens)]
            shown = [f"{count} {name}{'s' * (count > 1)} by {tokens} tokens" for name, count, tokens in parts if count]
            alike = f"; told apart from another only beyond the limit, so that they tie: {self.alike}"
            advice = "raise max_length to keep more; further cuts are only counted, in `cut`"
            text = ", ".join(shown) + alike * (self.alike > 0)
            logger.warning("cut to %d tokens: %s (%s)", limit, text, advice)
