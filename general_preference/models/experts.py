"""Mixture-of-experts backbones: the loss that keeps their experts evenly used.

A router gives every token to a few experts. Left to the preference loss alone it may forget most of them, so such
models are trained with a load-balancing loss beside (Switch Transformer, arXiv 2101.03961, equations 4 to 6). The
forward of transformers' causal LMs adds it; here only the layers below the LM head are run, so it is made here.
"""

import torch

from general_preference.errors import InputError


def load_balancing_loss(router_logits: tuple[torch.Tensor, ...], top_k: int, counted: torch.Tensor) -> torch.Tensor:
    """E * sum over experts e of (choices of e per token) * (mean probability of e), over tokens and layers together.

    Equals transformers' `load_balancing_loss_func` on the same tokens. It is not a mean over tokens: the choices, which
    carry no gradient, are those of the tokens at hand, so the loss of a batch is not the mean of its parts' losses.

    Args:
        router_logits: per layer (T, E) logits of E experts for the T tokens of the flattened rows.
        top_k: experts that a token is given to.
        counted: T booleans, of any shape, which tokens count; the others are padding.

    Returns:
        scalar in fp32 or better, no unit: `top_k` where all experts are used and likely alike, at most E * top_k.
        0 if no token counts.
    """
    counted = counted.reshape(-1, 1)
    chosen, probability = 0.0, 0.0
    for logits in router_logits:
        logits = logits.reshape(len(counted), -1)
        shares = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        best = torch.zeros_like(shares).scatter_(1, shares.detach().topk(top_k, dim=-1).indices, 1.0)
        chosen = chosen + (best * counted).sum(dim=0)
        probability = probability + (shares * counted).sum(dim=0)
    tokens = (counted.sum() * len(router_logits)).clamp(min=1)
    return chosen.shape[0] * (chosen / tokens * (probability / tokens)).sum()


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
            f"--aux_loss_coef {asked} balances experts, and {config.model_type} records no choice of experts: drop it"
        )
    return asked
