"""Texts in, comparisons, rankings and rewards out: what a pipeline does besides running a model.

`GPMPipeline` (pipeline.py) embeds with a model that it holds, `RemotePreference` (remote.py) with one on a server.
"""

import dataclasses
import functools

import torch
from transformers import PreTrainedTokenizerBase

from general_preference.datasets.messages import Message, begun_prompt, parse_prompt
from general_preference.datasets.records import parse_answer
from general_preference.datasets.tokenization import ComparisonTokenizer
from general_preference.errors import InputError
from general_preference.inference import ranking
from general_preference.inference.cuts import Cuts
from general_preference.inference.embedding import EmbeddedPrompt
from general_preference.inference.figures import default_labels, draw_preferences, save_figure
from general_preference.inference.inputs import as_list
from general_preference.models.config import MIN_LENGTH, PreferenceConfig
from general_preference.models.score import preference_probability

RELEASED_MAX_LENGTH = 4096  # tokens; what the published checkpoints are run with, they record none

Prompt = str | list[Message]
Response = str | list[Message]


class PreferenceScorer:
    """Compares, ranks and scores responses, given what embeds their tokens: `_embed_rows` of a subclass.

    A subclass calls `_prepare` before anything else. `cut` counts what did not fit into `max_length`.
    """

    def _prepare(
        self,
        preference: PreferenceConfig,
        tokenizer: PreTrainedTokenizerBase,
        limits: tuple[int | None, int],
        max_length: int | None = None,
        truncation: bool = True,
    ) -> None:
        """limits: tokens that fit the model's learned positions (None: any number), and token ids that it knows."""
        if max_length is not None and max_length < MIN_LENGTH:
            raise InputError(f"max_length is {max_length}, expected at least {MIN_LENGTH}")
        self.preference, self.tokenizer = preference, tokenizer
        self.value_head_dim, self.add_prompt_head = preference.dim, preference.prompt_gate
        positions, _ = self._positions, self._vocabulary = limits
        if truncation and max_length is not None and positions is not None and max_length > positions:
            raise InputError(f"max_length {max_length} exceeds the model's {positions} positions")
        released = RELEASED_MAX_LENGTH if preference.input_format == "released" else None
        limit = max_length or preference.max_length or released
        limit = limit if positions is None else min(limit or positions, positions)
        self.max_length = limit if truncation else None
        self.encoder = ComparisonTokenizer(tokenizer, self.max_length, preference.input_format, preference.pad_token_id)
        self.cut = Cuts()

    @property
    def tau(self) -> float:
        """The temperature of P(first preferred) = sigmoid(score / tau)."""
        return self.preference.temperature

    def compare(self, prompt: Prompt, first: Response, second: Response) -> float:
        """P(first is preferred to second) in [0, 1].

        Args:
            prompt: text of a user, or messages (a system message and several turns are fine).
            first, second: text of an assistant, or messages that follow the prompt.
        """
        return self.preference_matrix(prompt, [first, second])[0, 1].item()

    def score_matrix(self, prompt: Prompt, responses: list[Response]) -> torch.Tensor:
        """(K, K) scores, row over column, in fp32 on the CPU: exactly antisymmetric, logits times `tau`.

        All responses share one prompt, cut so that with the longest of them it fits into `max_length`.
        """
        return self.embed([prompt], [responses])[0].scores()

    def preference_matrix(self, prompt: Prompt, responses: list[Response]) -> torch.Tensor:
        """(K, K) probabilities that the row's response is preferred to the column's, for the cost of K responses."""
        return preference_probability(self.score_matrix(prompt, responses), self.tau)

    def rank(self, prompt: Prompt, responses: list[Response], method: str = "borda") -> list[int]:
        """Indices of the responses, best first; ties keep the order given. `method` is one of `ranking.METHODS`."""
        return ranking.rank(self.preference_matrix(prompt, responses), method)

    def score(self, prompts: list[Prompt], responses: list[list[Response]], method="borda") -> list[torch.Tensor]:
        """One number per response, for reinforcement learning and best-of-n sampling; K forwards per prompt.

        Args:
            prompts, responses: as for `embed`. method: as for `ranking.response_scores`.

        Returns:
            B tensors (K,) in fp32 on the CPU; responses that tie have equal numbers.
        """
        numbers = (ranking.response_scores(one.scores(), method, self.tau) for one in self.embed(prompts, responses))
        return [torch.tensor(list(map(float, some))) for some in numbers]

    def show(self, prompt: Prompt, responses: list[Response], labels: list[str] | None = None, path=None):
        """The preferences among K >= 2 responses as a matplotlib Figure, which a notebook displays.

        Left `preference_matrix`; right the embeddings on their planes (of many, those with the largest gate weights),
        and the rewards or, of a hybrid head, the numbers beside the planes.

        Args:
            labels: K names of the responses; default their indices and beginnings. Long ones are cut.
            path: also write the picture there; the ending chooses the format (.png, .pdf, ...).

        Raises:
            InputError (a ValueError): fewer than two responses, another number of labels, an unknown format, no
                matplotlib, or something that cannot be scored.
        """
        responses = as_list(responses, "responses", "a list of at least two", least=1)
        labels = labels if labels is None else as_list(labels, "labels", "a list with one for each response")
        if len(responses) < 2:
            raise InputError("there is one response, expected at least two to compare")
        if labels is not None and len(labels) != len(responses):
            raise InputError(f"there are {len(labels)} labels, but {len(responses)} responses: give one for each")
        (embedded,) = self.embed([prompt], [responses])
        figure = draw_preferences(embedded, self.tau, default_labels(responses) if labels is None else labels)
        if path is not None:
            save_figure(figure, path)
        return figure

    def embed(self, prompts: list[Prompt], responses: list[list[Response]]) -> list[EmbeddedPrompt]:
        """Embed B prompts, each with K >= 1 responses (K may differ), into B EmbeddedPrompts with `scores()` (K, K).

        Raises:
            InputError (a ValueError): something that cannot be scored; the message names it.
        """
        read = enumerate(read_groups(prompts, responses))
        return self._embed_rows([self._encode(f"prompt {n}", begun_prompt(prompt), some) for n, (prompt, some) in read])

    def _embed_rows(self, rows: list[dict]) -> list[EmbeddedPrompt]:
        """Embed what `_encode` made, in its order."""
        raise NotImplementedError

    def _encode(self, name: str, prompt: list[Message], responses: list[list[Message]]) -> dict:
        """Token ids of one prompt and its responses; errors start with `name`."""
        try:
            row = self.encoder.encode([prompt], [responses])[0]
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        longest, limit = len(row["prompt_ids"]) + max(map(len, row["response_ids"])), self._positions
        if limit is not None and longest > limit:
            raise InputError(f"{name} with its response has {longest} tokens, the model {limit} positions")
        highest, known = max(map(max, (row["prompt_ids"], *row["response_ids"]))), self._vocabulary
        if highest >= known:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise InputError(f"{name} has the token {token!r} with id {highest}, but the model knows ids below {known}")
        if row["prompt_cut"] or row["response_cut"]:
            self.cut.add(row, self._whole_encoder.encode([prompt], [responses])[0])
        return row

    @functools.cached_property
    def _whole_encoder(self) -> ComparisonTokenizer:
        return dataclasses.replace(self.encoder, max_length=None)


def read_groups(prompts: list[Prompt], responses: list[list[Response]]) -> list[tuple[list, list]]:
    """(messages of the prompt, messages of each response) of B prompts with K >= 1 responses each.

    Raises:
        InputError: something that cannot be scored; the message names it.
    """
    prompts = as_list(prompts, "prompts", "a list of them")
    responses = as_list(responses, "responses", "a list with one entry for each prompt")
    if len(prompts) != len(responses):
        raise InputError(f"{len(prompts)} prompts, but {len(responses)} lists of responses: give one for each")
    read = []
    for index, (prompt, some) in enumerate(zip(prompts, responses, strict=True)):
        some = as_list(some, f"responses to prompt {index}", "a list of at least one", least=1)
        messages = parse_prompt(prompt, f"prompt {index}")
        begun = begun_prompt(messages)
        parsed = [parse_answer(one, f"response {n} to prompt {index}", begun) for n, one in enumerate(some)]
        read.append((messages, parsed))
    return read
