"""GPMPipeline: a trained preference model in a notebook. Needs torch and transformers; `show` also matplotlib.

rm = GPMPipeline("path or hub name")
rm.compare(prompt, first, second)             P(first is preferred)
rm.preference_matrix(prompt, responses)       (K, K) probabilities from K forward passes
rm.rank(prompt, responses)                    indices, best first
rm.score(prompts, responses)                  one number per response, as rewards
rm.show(prompt, responses)                    a picture of the preferences and of what they come from
rm([conversation, ...], return_prompt=True)   embeddings and prompt hidden states, as in the paper's example
"""

import os

import torch
from transformers import PreTrainedTokenizerBase

from general_preference.datasets.messages import Message, parse_conversation
from general_preference.datasets.tokenization import load_tokenizer
from general_preference.errors import InputError
from general_preference.inference.embedding import EmbeddedPrompt, embed
from general_preference.inference.inputs import as_list, check_keywords, choose_dtype
from general_preference.inference.scorer import PreferenceScorer
from general_preference.models.config import PreferenceConfig
from general_preference.models.device import choose_device
from general_preference.models.heads import trained_preference
from general_preference.models.reward_model import RewardModel, load_reward_model
from general_preference.models.score import preference_score


@check_keywords
class GPMPipeline(PreferenceScorer):
    """Scores, compares and ranks responses with a preference model, whose head and settings the checkpoint states.

    Wherever a list is expected, tuples, numpy arrays, pandas Series, `datasets` columns and generators will do.
    `cut` counts what did not fit into `max_length`; the first call that cuts warns.
    """

    def __init__(
        self,
        model_name_or_path: str | os.PathLike,
        device: str | int | torch.device = "auto",
        value_head_dim: int | None = None,
        is_general_preference: bool | None = None,
        bf16: bool | None = None,
        truncation: bool = True,
        max_length: int | None = None,
        padding: bool = True,
        tau: float | None = None,
        *,
        add_prompt_head: bool | None = None,
        dtype: torch.dtype | str | None = None,
        tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None = None,
        attn_implementation: str = "auto",
        batch_tokens: int | None = None,
        disable_fast_tokenizer: bool = False,
        trust_remote_code: bool = False,
    ):
        """Load a model folder (full, sharded or LoRA adapter) or hub name; reward models of other tools as well.

        Args:
            device: "auto" takes a GPU if there is one, then mps, then the CPU; a number is that of an accelerator.
            value_head_dim, is_general_preference, add_prompt_head, tau: what the checkpoint is expected to say, if not
                None. `tau` sets the temperature of weights that record none: published ones and those of other tools.
            bf16: the backbone's dtype; None is bf16 on GPUs that compute it fast, else fp32. Scores are fp32.
            truncation: cut prompt + response to `max_length` tokens (prompts first, from their oldest side).
            max_length: default what the model was trained with.
            padding: let rows of different length share a call. Scores do not depend on it.
            dtype: any other dtype of the backbone, or its name; "auto" leaves it to `bf16`.
            tokenizer: used instead of the one saved with the model; a path or hub name is loaded.
            attn_implementation: of `models.kernels.CHOICES`. batch_tokens: of one forward call; None fits the device.

        Raises:
            InputError (a ValueError): no such model, no heads, damaged weights, an unknown argument, or one that
                contradicts the checkpoint; the message names both values.
        """
        if not isinstance(model_name_or_path, str | os.PathLike):
            found = type(model_name_or_path).__name__
            raise InputError(f"expected a folder or hub name, found a {found}: from_model takes a loaded model")
        path, device = os.path.expanduser(model_name_or_path), choose_device(device)
        preference = trained_preference(path, trust_remote_code, temperature=tau)
        _check_expected(path, preference, value_head_dim, is_general_preference, add_prompt_head)
        dtype, remote = choose_dtype(dtype, bf16, device), {"trust_remote_code": trust_remote_code}
        options = {"dtype": dtype, "device": device, "attn_implementation": attn_implementation} | remote
        model = load_reward_model(path, preference=preference, **options)
        named = path if tokenizer is None else tokenizer
        if isinstance(named, str | os.PathLike):
            named = load_tokenizer(os.path.expanduser(named), use_fast=not disable_fast_tokenizer, **remote)
        if tokenizer is not None and len(named) > (known := model.vocabulary_size):
            raise InputError(f"the tokenizer has {len(named)} tokens and is not this model's, which knows {known}")
        self._hold(model, named, truncation, max_length, padding, batch_tokens, path)

    @classmethod
    def from_model(
        cls,
        model: RewardModel,
        tokenizer: PreTrainedTokenizerBase,
        truncation: bool = True,
        max_length: int | None = None,
        padding: bool = True,
        batch_tokens: int | None = None,
    ) -> "GPMPipeline":
        """A pipeline around a loaded model, which stays on its device; the other arguments as for `GPMPipeline`."""
        self = cls.__new__(cls)
        self._hold(model.eval(), tokenizer, truncation, max_length, padding, batch_tokens)
        return self

    def _hold(self, model: RewardModel, tokenizer, truncation, max_length, padding, batch_tokens, path=None) -> None:
        if batch_tokens is not None and batch_tokens < 1:
            raise InputError(f"batch_tokens is {batch_tokens}, expected at least 1")
        self.model, self.path = model, path
        self.padding, self.batch_tokens = padding, batch_tokens
        limits = model.learned_positions, model.vocabulary_size
        self._prepare(model.preference, tokenizer, limits, max_length, truncation)

    def __repr__(self) -> str:
        head, size = self.preference, sum(weight.numel() for weight in self.model.parameters())
        parts = [repr(self.path)] if self.path else []  # of a model from memory there is none
        parts += [head.describe(), f"temperature {head.temperature:g}"]
        parts += [head.input_format, f"max_length {self.max_length}"]
        parts += [f"{self.device} {str(self.model.dtype).removeprefix('torch.')}", f"{size / 1e6:,.1f} M parameters"]
        return f"GPMPipeline({', '.join(parts)})"

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.value_head.weight.device

    def to(self, device: str | int | torch.device) -> "GPMPipeline":
        """Move the model to another device, in place; returns the pipeline.

        Raises:
            InputError (a ValueError): no such device, or the attention kernel asked for cannot run there.
        """
        device = choose_device(device)
        self.model.layout_on(device)
        self.model.to(device)
        return self

    def __call__(self, samples: list[list[Message]], return_prompt: bool = False):
        """Embed conversations that end in the assistant's turn to be scored.

        Args:
            samples: B conversations, each a list of {"role", "content"}; those with the same prompt share its forward.
            return_prompt: also return the hidden state that the prompt gate reads.

        Returns:
            embeddings (B, D), or rewards (B,) of a Bradley-Terry model, in fp32 on `device`; with `return_prompt` a
            pair of them and the prompt hidden states (B, hidden).

        Raises:
            InputError (a ValueError): no conversations, or one that cannot be scored, by its index.
        """
        samples = as_list(samples, "samples", "a list of conversations", least=1)
        if isinstance(samples[0], dict):
            raise InputError("expected a list of conversations, found one conversation: wrap it in a list")
        groups: dict[tuple[int, ...], list[list[int]]] = {}
        places = []
        for index, sample in enumerate(samples):
            prompt, response = parse_conversation(sample, f"conversation {index}")
            row = self._encode(f"conversation {index}", prompt, [response])
            group = groups.setdefault(tuple(row["prompt_ids"]), [])
            places.append((tuple(row["prompt_ids"]), len(group)))
            group += row["response_ids"]
        rows = [{"prompt_ids": list(prompt), "response_ids": ids} for prompt, ids in groups.items()]
        found = dict(zip(groups, self._embed_rows(rows), strict=True))
        embeddings = torch.stack([found[prompt].embeddings[place] for prompt, place in places]).to(self.device)
        rewards = embeddings.squeeze(-1) if self.value_head_dim == 1 else embeddings
        if not return_prompt:
            return rewards
        return rewards, torch.stack([found[prompt].prompt_hidden_state for prompt, _ in places]).to(self.device)

    def _embed_rows(self, rows: list[dict]) -> list[EmbeddedPrompt]:
        self.cut.report(self.max_length)
        found = embed(self.model, rows, batch_tokens=self.batch_tokens, padding=self.padding, progress="embedding")
        return [embedded for _, embedded in sorted(found, key=lambda entry: entry[0])]


def _check_expected(path: str, preference: PreferenceConfig, dim, is_general_preference, add_prompt_head) -> None:
    """InputError where the checkpoint at `path` is not what was expected."""
    preference.check(path, dim=dim, prompt_gate=add_prompt_head)
    if is_general_preference not in (None, preference.head != "bt"):
        asked = f"is_general_preference = {is_general_preference} was asked for"
        raise InputError(f"{path} was saved with head = {preference.head!r}, but {asked}: drop the argument")


def generate_high_dim_result_with_prompt(
    model: RewardModel,
    value_head_dim: int,
    chosen_reward: torch.Tensor,
    rejected_reward: torch.Tensor,
    prompt_hidden_states: torch.Tensor | None,
) -> torch.Tensor:
    """Scores of B pairs from what `GPMPipeline.__call__` returns; positive where `chosen_reward` is preferred.

    Args:
        value_head_dim: D, as the model has it.
        chosen_reward, rejected_reward: embeddings (B, D), or rewards (B,) for D = 1.
        prompt_hidden_states: (B, hidden), read by the gate; may be None for a model without one.

    Returns:
        (B,) scores in fp32.

    Raises:
        InputError (a ValueError): sizes that do not fit the model, or no prompt hidden states for its gate.
    """
    if value_head_dim != model.preference.dim:
        raise InputError(f"value_head_dim is {value_head_dim}, but the model has D = {model.preference.dim}")
    rewards = chosen_reward, rejected_reward
    first, second = (one.reshape(-1, 1) if value_head_dim == 1 else torch.atleast_2d(one) for one in rewards)
    if first.shape != second.shape or first.shape[1] != value_head_dim:
        shapes = " and ".join(str(tuple(one.shape)) for one in rewards)
        raise InputError(f"rewards of shapes {shapes}: expected two of (B, {value_head_dim})")
    if not model.preference.prompt_gate:
        return preference_score(first, second)
    if prompt_hidden_states is None:
        raise InputError("this model's gate reads the prompt: pass the prompt hidden states (return_prompt=True)")
    states, expected = torch.atleast_2d(prompt_hidden_states), (len(first), model.config.hidden_size)
    if states.shape != expected:
        raise InputError(f"prompt hidden states of shape {tuple(states.shape)}: expected {expected}")
    with torch.no_grad():
        return preference_score(first, second, model.gate(states))
