"""The losses: of preferences, of policies, the language-model regularizers with their token log-probs, of experts.

A reward model minimizes (1 - c) * preference + c * regularizer, and adds the weighted load-balancing loss.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from general_preference.errors import InputError

PreferenceLossKind = Literal["logistic", "regression"]
LanguageModelLossKind = Literal["vanilla", "mean", "sum", "reference_free"]
PolicyLossKind = Literal["centered", "regression", "logistic", "surrogate", "likelihood"]
# Elements of one chunk's logits; on CPUs 128 MiB in fp32: half was a tenth slower, twice no faster.
CPU_ELEMENTS, GPU_ELEMENTS = 2**25, 2**27
CPU_ROWS = 64


def preference_loss(
    score: torch.Tensor,
    *,
    kind: PreferenceLossKind = "logistic",
    temperature: float | torch.Tensor = 1.0,
    margin: float | torch.Tensor = 0.0,
    target: float = 10.0,
    label: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """Loss of each comparison, given the score of its first response against its second.

    logistic:   cross-entropy between q and sigmoid(z), z = (score - margin) / temperature; q = 1: softplus(-z)
    regression: q * 0.5 * (score / temperature - target)^2 + (1 - q) * 0.5 * (-score / temperature - target)^2

    Args:
        score: (...,) score of first against second. temperature: tau > 0 of P = sigmoid(score / tau).
        margin: >= 0, in units of the score: how much `first` should win by. Logistic only.
        target: wanted score / temperature of a certain preference. Regression only.
        label: q in [0, 1], the probability that `first` is preferred; 0.5 is a tie.

    Returns (...,) losses in nats (logistic) or squared logits (regression), fp32 or better.

    Raises:
        ValueError: unknown `kind`, or a margin with the regression loss (it has a target instead).

    Source: arXiv 2410.02197 (both losses); the margin is that of Llama 2, arXiv 2307.09288.
    """
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    label = torch.as_tensor(label, dtype=score.dtype, device=score.device).expand_as(score)
    if kind == "logistic":
        return F.binary_cross_entropy_with_logits((score - margin) / temperature, label, reduction="none")
    if kind == "regression":
        if isinstance(margin, torch.Tensor) or margin != 0:
            raise ValueError("the regression loss has a target, not a margin: leave margin at 0 or use kind='logistic'")
        logit = score / temperature
        return 0.5 * (label * (logit - target) ** 2 + (1 - label) * (logit + target) ** 2)
    raise ValueError(f"unknown preference loss {kind!r}: expected 'logistic' or 'regression'")


def policy_loss(
    log_ratio: torch.Tensor,
    target: torch.Tensor,
    group: torch.Tensor,
    *,
    kind: PolicyLossKind = "centered",
    length: torch.Tensor | None = None,
    gamma: float = 0.0,
    clip: float | None = None,
    beta: float = 1.0,
) -> torch.Tensor:
    """Loss of each response that a policy is trained on, given how far it has moved: rho = log_ratio, T = target.

    centered:   (d - mean of d over the group)^2, d = rho / length^gamma - T. Its minimum over all policies is
                pi_t(y) exp(T(y)) / Z without knowing Z. With two responses ((d_1 - d_2) / 2)^2: IPO, INPO and REBEL.
    regression: d^2, which takes log Z for 0      GPO as published (arXiv 2410.02197), SPPO (arXiv 2405.00675)
    logistic:   preference_loss(z_1 - z_2, temperature=1 / beta, label=T) of a pair, z = rho / length^gamma
                DPO (arXiv 2305.18290)
    surrogate:  -min(r T, clip(r, 1 - clip, 1 + clip) T), r = exp(rho / length)      GSPO (arXiv 2507.18071)
    likelihood: -rho / length, rho being a log-probability      supervised fine-tuning on the responses given

    Args:
        log_ratio: (N,) log-probability of each whole response in nats, less that of its anchors.
        target: (N,) in the unit of rho / length^gamma; logistic: the probability that it is the better one of its pair;
            surrogate: its advantage; likelihood: unused.
        group: (N,) integers from 0 to below N, equal for responses to one prompt. length: (N,) tokens of each.
        gamma: of length^gamma, 0 for none; surrogate and likelihood divide by the length whatever it is.
        clip: of the surrogate; None does not clip. beta: of the logistic loss.

    Returns (N,) in fp32 or better; both responses of a logistic pair have the pair's loss.

    Raises:
        ValueError: an unknown kind, no length where one is needed, or a logistic group that is no pair.
    """
    log_ratio = log_ratio.to(torch.promote_types(log_ratio.dtype, torch.float32))
    needed = gamma != 0 or kind in ("surrogate", "likelihood")
    if needed and length is None:
        raise ValueError(f"the {kind} loss needs the lengths of the responses")
    count = torch.ones_like(log_ratio) if length is None else length.clamp(min=1).to(log_ratio.dtype)
    if kind == "likelihood":
        return -log_ratio / count
    if kind == "surrogate":
        ratio = (log_ratio / count).exp()
        bounded = ratio if clip is None else ratio.clamp(1 - clip, 1 + clip)
        return -torch.minimum(ratio * target, bounded * target)
    moved = log_ratio / count**gamma
    if kind == "logistic":
        return preference_loss(moved - moved[_partners(group)], temperature=1 / beta, label=target)
    if kind not in ("centered", "regression"):
        raise ValueError(f"unknown policy loss {kind!r}: expected one of {', '.join(PolicyLossKind.__args__)}")
    residual = moved - target
    if kind == "centered":
        sums, sizes = (
            torch.zeros_like(residual).index_add(0, group, one) for one in (residual, torch.ones_like(residual))
        )
        residual = residual - sums[group] / sizes[group]
    return residual**2


def _partners(group: torch.Tensor) -> torch.Tensor:
    """(N,) the index of the other response of each group of two."""
    sizes = group.bincount()
    if (wrong := sizes[(sizes != 2) & (sizes != 0)]).numel():
        raise ValueError(f"the logistic loss compares pairs, but a group has {wrong[0].item()} responses")
    order = group.argsort(stable=True).view(-1, 2)
    other = torch.empty_like(group)
    other[order[:, 0]], other[order[:, 1]] = order[:, 1], order[:, 0]
    return other


def language_model_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    *,
    kind: LanguageModelLossKind = "vanilla",
    beta: float = 1.0,
    margin: float = 0.0,
    rejected: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Mean `regularizer` (which see) of a batch of chosen sequences, a scalar in nats, from logits.

    Args:
        logits: (B, L, V), logits[:, t] predicts token t + 1 (as a causal LM returns them).
        labels: (B, L) the token ids themselves; the shift by one happens here, as in transformers.
        mask: (B, L), 1 for the tokens of `labels` that count; the first token never counts.
        rejected: (logits, labels, mask), for `reference_free` alone.
    """

    def sequence_log_probs(logits, labels, mask):
        log_probs = token_log_probs(logits[:, :-1], labels[:, 1:].clamp(min=0))
        counted = mask[:, 1:].to(log_probs.dtype)
        return (log_probs * counted).sum(dim=1), counted.sum(dim=1)

    chosen = sequence_log_probs(logits, labels, mask)
    others = None if rejected is None else sequence_log_probs(*rejected)
    return regularizer(chosen, others, kind=kind, beta=beta, margin=margin).mean()


def regularizer(
    chosen: tuple[torch.Tensor, torch.Tensor],
    rejected: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    kind: LanguageModelLossKind = "vanilla",
    beta: float = 1.0,
    margin: float = 0.0,
) -> torch.Tensor:
    """The four language-model regularizers per comparison, from (summed log-prob, token count), each (B,).

    vanilla:        -mean log-prob                                          (plain supervised fine-tuning)
    mean:           -logsigmoid(beta * mean log-prob)
    sum:            -logsigmoid(beta * summed log-prob)
    reference_free: -logsigmoid(beta * (mean chosen - mean rejected) - margin)    (SimPO, arXiv 2405.14734)

    Returns (B,) in nats; a sequence without counted tokens has mean log-prob 0. Source: arXiv 2406.10216.

    Raises:
        ValueError: unknown `kind`, or `reference_free` without `rejected`.
    """
    mean = chosen[0] / chosen[1].clamp(min=1)
    if kind == "vanilla":
        return -mean
    if kind == "mean":
        return -F.logsigmoid(beta * mean)
    if kind == "sum":
        return -F.logsigmoid(beta * chosen[0])
    if kind == "reference_free":
        if rejected is None:
            raise ValueError("the reference_free regularizer compares with the rejected response: pass `rejected`")
        return -F.logsigmoid(beta * (mean - rejected[0] / rejected[1].clamp(min=1)) - margin)
    raise ValueError(f"unknown regularizer {kind!r}: expected 'vanilla', 'mean', 'sum' or 'reference_free'")


def token_log_probs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probability (...,) in nats of each target token under logits (..., V), computed in fp32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, targets[..., None]).squeeze(-1) - logits.logsumexp(dim=-1)


def linear_log_probs(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability in nats of each token under softmax(hidden @ weight.T), without a (T, vocabulary) tensor.

    hidden: (T, hidden). weight: (vocabulary, hidden). tokens: (T,) ids. Returns (T,) in fp32 or better; the matrix
    products run in the inputs' dtype, and logits are recomputed in backward. torch's `linear_cross_entropy` (2.13) is
    as fast on a CPU, but rounds bf16 log-probs to bf16: an error four times ours.
    """
    return _LinearLogProbs.apply(hidden, weight, tokens)


def can_fuse(head: nn.Module) -> bool:
    """Whether the output layer is one plain, whole, local matrix: no bias, adapter, quantization or partition."""
    plain = type(head) is nn.Linear and head.bias is None and type(head.weight.data) is torch.Tensor
    return plain and head.weight.numel() > 0


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, tokens):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        found, sums = (torch.empty(len(tokens), dtype=dtype, device=hidden.device) for _ in range(2))
        for part in _chunks(len(tokens), weight):
            logits = hidden[part] @ weight.T
            # The softmax's log-denominator, in groups of rows that stay in a CPU's cache.
            rows = CPU_ROWS if logits.device.type == "cpu" else len(logits)
            sums[part] = torch.cat([some.to(dtype).logsumexp(dim=1) for some in logits.split(rows)])
            found[part] = logits.gather(1, tokens[part, None]).squeeze(1).to(dtype) - sums[part]
        ctx.save_for_backward(hidden, weight, tokens, sums)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        hidden, weight, tokens, sums = ctx.saved_tensors
        for_hidden = torch.empty_like(hidden)
        # Summed over chunks in fp32: half precision would round every further chunk.
        for_weight = torch.zeros_like(weight, dtype=sums.dtype) if ctx.needs_input_grad[1] else None
        for part in _chunks(len(tokens), weight):
            above = gradient[part, None]
            if hidden.dtype == sums.dtype:  # one pass over the logits less
                slopes = torch.addmm(-sums[part, None], hidden[part], weight.T).exp_()
            else:
                slopes = ((hidden[part] @ weight.T).to(sums.dtype) - sums[part, None]).exp_()
            # The negative of d log p(token) / d logits = onehot(token) - softmax(logits); in fp32, since half precision
            # has no 1 - p of a token that is nearly certain.
            slopes = slopes.scatter_add_(1, tokens[part, None], -torch.ones_like(above)).to(hidden.dtype)
            for_hidden[part] = (-above * (slopes @ weight)).to(hidden.dtype)
            if for_weight is not None:
                scaled = (hidden[part] * above).to(hidden.dtype)
                if for_weight.dtype == hidden.dtype:
                    for_weight.addmm_(slopes.T, scaled, alpha=-1)
                else:
                    for_weight -= slopes.T @ scaled
        return for_hidden, None if for_weight is None else for_weight.to(weight.dtype), None


def _chunks(count: int, weight: torch.Tensor) -> list[slice]:
    elements = CPU_ELEMENTS if weight.device.type == "cpu" else GPU_ELEMENTS
    size = max(1, elements // len(weight))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def load_balancing_loss(router_logits: tuple[torch.Tensor, ...], top_k: int, counted: torch.Tensor) -> torch.Tensor:
    """transformers' `load_balancing_loss_func` over the tokens that count, in fp32; 0 if none counts.

    router_logits: per layer (T, E). top_k: experts per token. counted: T booleans of any shape, false for padding.

    Returns a scalar without unit, from `top_k` (balanced) to E * top_k; not the mean of the losses of a batch's parts.
    Source: Switch Transformer, arXiv 2101.03961, equations 4 to 6.
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
            f"aux_loss_coef {asked}: {config.model_type} records no choice of experts, which it balances: use 0"
        )
    return asked
