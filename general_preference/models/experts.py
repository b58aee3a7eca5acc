"""Mixture-of-experts backbones: the loss that keeps their experts evenly used.

A router gives every token to a few experts. Left to the preference loss alone it may forget most of them, so such
models are also trained with a load-balancing loss (Switch Transformer, arXiv 2101.03961, equations 4 to 6). The
forward of transformers' causal LMs adds it; here only the layers below the LM head are run, so it is computed here.
"""

import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from general_preference.errors import InputError


def load_balancing_loss(router_logits: tuple[torch.Tensor, ...], top_k: int, counted: torch.Tensor) -> torch.Tensor:
    """transformers' `load_balancing_loss_func` over the tokens that count, in fp32; 0 if none counts.

    It is not a mean over tokens: the loss of a batch is not the mean of its parts' losses.

    Args:
        router_logits: per layer (T, E) logits of E experts for the T tokens of the flattened rows.
        top_k: experts that a token is given to.
        counted: T booleans, of any shape, which tokens count; the others are padding.

    Returns:
        scalar, no unit: `top_k` where all experts are used and likely alike, at most E * top_k.
    """
    some = counted.any()  # multiplied, not asked with `if`: that would wait for the accelerator
    logits = tuple(layer.float() for layer in router_logits)
    return some * load_balancing_loss_func(logits, logits[0].shape[-1], top_k, counted | ~some)


def records_routing(language_model) -> bool:
    """Whether a causal LM has experts, and its layers tell which they chose."""
    recorded = getattr(language_model.base_model, "_can_record_outputs", None) or {}
    return "router_logits" in recorded and hasattr(language_model.config.get_text_config(), "num_experts_per_tok")


def balance_coefficient(language_model, asked: float | None) -> float:
    """Weight of the load-balancing loss in training.

    Args:
        asked: the weight that a user asks for; None for what transformers' own forward would do: the model's
            `router_aux_loss_coef` if its configuration sets `output_router_logits` (released models mostly do not),
            else 0.

    Raises:
        InputError: a weight above 0 for a model without experts, or with experts whose choices are not recorded.
    """
    config = language_model.config.get_text_config()
    if asked is None:
        wanted = records_routing(language_model) and getattr(config, "output_router_logits", False)
        return float(getattr(config, "router_aux_loss_coef", 0.0)) if wanted else 0.0
    if asked > 0 and not records_routing(language_model):
        raise InputError(
            f"aux_loss_coef {asked} balances experts, and {config.model_type} records no choice of experts: use 0"
        )
    return asked
