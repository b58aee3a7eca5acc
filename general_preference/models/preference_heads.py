"""What is learned on hidden states: an embedding of each response, a gate on each prompt, a temperature.

`RewardModel` has these heads on its backbone; `PreferenceHeads` are the same heads alone, for states that were kept.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from general_preference.models.config import PreferenceConfig
from general_preference.models.score import gate_weights, head_embedding


class Fp32Linear(nn.Linear):
    """A bias-free linear layer that computes in fp32 (or better) whatever dtype its weight is stored in."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in_features) of any float dtype -> (..., out_features) in fp32 or better."""
        dtype = torch.promote_types(input.dtype, torch.float32)
        return F.linear(input.to(dtype), self.weight.to(dtype))


class ValueHead(Fp32Linear):
    """Embeds in D numbers. The scalar of an odd D is computed by itself: to the bit as a Bradley-Terry head does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in_features) of any float dtype -> (..., D) in fp32 or better."""
        dtype, scalar = torch.promote_types(input.dtype, torch.float32), self.out_features % 2
        parts = self.weight.to(dtype).split([size for size in (self.out_features - scalar, scalar) if size])
        return torch.cat([F.linear(input.to(dtype), part) for part in parts], dim=-1)


class Temperature(nn.Module):
    """A learnable tau > 0, stored as its logarithm."""

    def __init__(self, value: float):
        super().__init__()
        self.log_value = nn.Parameter(torch.tensor([math.log(value)], dtype=torch.float32))

    def forward(self) -> torch.Tensor:
        """(1,) the temperature."""
        return self.log_value.float().exp()


class HeadsMixin:
    """The heads of a module that calls `add_heads`; their names are those of the saved tensors."""

    def add_heads(self, preference: PreferenceConfig, hidden_size: int) -> None:
        """Make the heads that `preference` describes, all computing in fp32."""
        self.preference = preference
        self.value_head = ValueHead(hidden_size, preference.dim, bias=False)
        self.prompt_head = Fp32Linear(hidden_size, preference.planes, bias=False) if preference.prompt_gate else None
        self.temperature = Temperature(preference.temperature) if preference.learnable_temperature else None

    def initialize_heads(self, seed: int) -> None:
        """Fill the heads with N(0, 1 / hidden), the same values for the same seed on every process and ZeRO stage."""
        generator, std = torch.Generator().manual_seed(seed), 1 / math.sqrt(self.value_head.in_features)
        for head in filter(None, (self.value_head, self.prompt_head)):
            head.weight.data.copy_(torch.empty(head.weight.shape).normal_(0.0, std, generator=generator))

    def read_states(self, response_states: torch.Tensor, prompt_states: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the heads make of the hidden states (N, hidden) of responses' and (G, hidden) of prompts' last tokens.

        Returns:
            embeddings: (N, D). temperature: (1,), learned or fixed. prompt_hidden_states: (G, hidden).
            gates: (G, P), only if there is a gate.
        """
        finish = self.preference.normalize, self.preference.reward_offset
        embeddings = head_embedding(self.value_head(response_states), *finish)
        output = {"embeddings": embeddings, "prompt_hidden_states": prompt_states}
        fixed = torch.full((1,), self.preference.temperature, device=response_states.device)
        output["temperature"] = fixed if self.temperature is None else self.temperature()
        if self.prompt_head is not None:
            output["gates"] = self.gate(prompt_states)
        return output

    def gate(self, prompt_hidden_state: torch.Tensor) -> torch.Tensor:
        """Weights of the planes (..., P), >= 0, from the hidden state (..., hidden) of the prompt's last token."""
        logits = self.prompt_head(prompt_hidden_state)
        return gate_weights(logits, self.preference.gate, prompt_hidden_state.shape[-1])


class PreferenceHeads(HeadsMixin, nn.Module):
    """The heads of a preference model without its backbone."""

    def __init__(self, preference: PreferenceConfig, hidden_size: int):
        super().__init__()
        self.add_heads(preference, hidden_size)

    forward = HeadsMixin.read_states
