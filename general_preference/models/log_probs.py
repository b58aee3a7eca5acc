"""Log-probabilities of tokens from hidden states, chunk by chunk: a (tokens, vocabulary) tensor never exists whole.

Logits are recomputed in backward, where the output matrix's gradient is summed in place. torch's `linear_cross_entropy`
(2.13) is as fast on a CPU with chunks of this size, but rounds bf16 log-probs to bf16: an error four times ours.
"""

import torch
from torch import nn
from torch.autograd.function import once_differentiable

# Elements of one chunk's logits; on CPUs 128 MiB in fp32: half was a tenth slower, twice no faster.
CPU_ELEMENTS, GPU_ELEMENTS = 2**25, 2**27
CPU_ROWS = 64


def linear_log_probs(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability in nats of each token under softmax(hidden @ weight.T).

    hidden: (T, hidden). weight: (vocabulary, hidden). tokens: (T,) ids. Returns (T,) in fp32 or better; the matrix
    products run in the inputs' dtype.
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
