"""Load balancing of mixture-of-experts backbones (Switch Transformer, arXiv 2101.03961, equations 4 to 6).

transformers' causal LMs add this loss in their forward, of which only the layers below the LM head are run here.
"""

import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from general_preference.errors import InputError


def load_balancing_loss(router_logits: tuple[torch.Tensor, ...], top_k: int, counted: torch.Tensor) -> torch.Tensor:
    """transformers' `load_balancing_loss_func` over the tokens that count, in fp32; 0 if none counts.

    Args:
        router_logits: per layer (T, E) logits of E experts for the T tokens of the flattened rows.
        top_k: experts per token. counted: T booleans of any shape, false for padding.

    Returns:
        scalar without unit, from `top_k` (balanced) to E * top_k; not the mean of the losses of a batch's parts.
    """
    some = counted.any()  # multiplied, not asked with `if`: that would wait for the accelerator
    logits = tuple(layer.float() for layer in router_logits)
    return some * load_balancing_loss_func(logits, logits[0].shape[-1], top_k, counted | ~some)


def records_routing(language_model) -> bool:
    """Whether a causal LM has experts and transformers can return their router's logits."""
    recorded = getattr(language_model.base_model, "_can_record_outputs", None) or {}
    return "router_logits" in recorded and hasattr(language_model.config.get_text_config(), "num_experts_per_tok")


def balance_coefficient(language_model, asked: float | None) -> float:
    """Weight of the load-balancing loss: as asked, or (None) as transformers' own forward would weigh it.

    Raises:
        InputError: a weight above 0 for a model without experts, or with experts whose choices are not recorded.
    """
    config = language_model.config.get_text_config()
    if asked is None:  # released models mostly leave output_router_logits off
        wanted = records_routing(language_model) and getattr(config, "output_router_logits", False)
        return float(getattr(config, "router_aux_loss_coef", 0.0)) if wanted else 0.0
    if asked > 0 and not records_routing(language_model):
        raise InputError(
            f"aux_loss_coef {asked} balances experts, and {config.model_type} records no choice of experts: use 0"
        )
    return asked
