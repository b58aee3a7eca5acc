"""Which tokens see which, when several responses stand behind one copy of their prompt.

A row of a batch is described by two integers per token: its `position` in its own sequence and its `segment`
(-1 padding, 0 prompt, 1.. one number per response). A token sees the prompt and its own response up to itself; that
equals running every response as a sequence of its own. A row with a single response is an ordinary causal sequence.

Architectures differ in what a layer may see, so the model's configuration is asked first (`shares_prompts`): plain
full attention and sliding windows get an exact mask, everything else (recurrent layers, ALiBi, chunked attention,
flash-attention kernels) is served with separate sequences and an ordinary padding mask.

A mask over a whole row also pays for what it hides: one response's tokens against another's. Where rows are long, the
kernel `BLOCKWISE` computes only the blocks that are seen (`RowBlocks`), which is what the CPU runs.
"""

from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PADDING, PROMPT = -1, 0
BLOCKWISE = "sdpa_blockwise"  # the name under which transformers knows the kernel of this file
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# What one more kernel call, with the copies it needs, costs in units of hidden size * (query, key) pairs. Where a call
# saved 47 to 69 million of them, a 135M Llama on two cores was as fast either way, forward alone or with backward.
_CALL_COST = 60_000_000
# Architectures whose shared-prompt scores are compared with separate sequences in tests/test_packing.py; others are
# checked once at run time by `RewardModel.verify_shared_prompts`.
VERIFIED = {
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "phi3",
    "olmo2",
    "mixtral",
    "opt",
    "mistral",
}


def shares_prompts(config) -> bool:
    """Whether a mask can make shared prompts exact for this model configuration (with the sdpa or eager kernels)."""
    if config._attn_implementation not in ("sdpa", "eager", BLOCKWISE):
        return False
    if config.model_type in ("bloom", "mpt", "falcon") and getattr(config, "alibi", True):
        return False
    return _layer_types(config) <= _KNOWN_LAYERS


def attention_mask(config, segments: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype, shared: bool):
    """What to pass to the backbone as `attention_mask`.

    Args:
        segments, positions: (R, L) integers as described above.
        dtype: the backbone's; eager kernels add the mask to their logits.
        shared: rows hold several responses. If not, rows are plain right-padded sequences.

    Returns:
        (R, L) 0/1 padding mask for plain rows; else a (R, 1, L, L) mask, boolean for sdpa and additive for eager, or a
        dict of two for models that mix full and sliding-window layers.
    """
    if not shared:
        return (segments != PADDING).long()
    keys, queries = segments[:, None, :], segments[:, :, None]
    index = torch.arange(segments.shape[1], device=segments.device)
    visible = (index[None, :] <= index[:, None]) & ((keys == PROMPT) | (keys == queries)) & (keys != PADDING)
    visible |= torch.eye(segments.shape[1], dtype=torch.bool, device=segments.device)  # padding must not see nothing
    layers = _layer_types(config)
    if layers == {"full_attention"}:
        return _as_kernel_expects(config, visible, dtype)
    # The window counts positions in the response's own sequence: in the row, other responses may stand in between.
    near = positions[:, :, None] - positions[:, None, :] < config.sliding_window
    windowed = _as_kernel_expects(config, visible & near, dtype)
    if layers == {"sliding_attention"}:
        return windowed
    return {"full_attention": _as_kernel_expects(config, visible, dtype), "sliding_attention": windowed}


@dataclass
class RowBlocks:
    """The seen blocks of R shared rows: per row the prompt's length, and every response's length r and mask.

    A mask is (1, 1, r, p + r): a response's tokens against the prompt's and its own.

    `calls` counts the layers that used them, so that an architecture that drops them cannot go unnoticed.
    """

    rows: list[tuple[int, list[tuple[int, torch.Tensor]]]]
    length: int
    calls: int = 0


def compute_blockwise(config) -> None:
    """Let a compared architecture with plain full attention use the kernel of this file in place of sdpa."""
    if (
        config._attn_implementation == "sdpa"
        and config.model_type in VERIFIED
        and _layer_types(config) == {"full_attention"}
    ):
        config._attn_implementation = BLOCKWISE


def row_blocks(config, segments: torch.Tensor, dtype: torch.dtype, shared: bool) -> RowBlocks | None:
    """The blocks of shared rows (R, L), where computing them alone is possible and cheaper than a dense mask.

    On CPUs only: elsewhere many small kernels cost more than they save.
    """
    if not shared or config._attn_implementation != BLOCKWISE or segments.device.type != "cpu":
        return None
    rows, seen, calls = [], 0, 0
    for row in segments.tolist():
        lengths = [row.count(PROMPT)] + [row.count(number) for number in range(1, max(row) + 1)]
        prompt, responses = lengths[0], lengths[1:]
        seen += prompt**2 // 2 + sum(length * (prompt + length) for length in responses)
        calls += len(lengths)
        rows.append((prompt, responses))
    saved = segments.numel() * segments.shape[1] - seen
    if saved * config.hidden_size < calls * _CALL_COST:
        return None
    sizes = {(prompt, length) for prompt, responses in rows for length in responses}
    # Additive, as the kernel wants them: a boolean mask would be converted anew in every layer.
    masks = {(p, r): torch.full((1, 1, r, p + r), -torch.inf, dtype=dtype).triu(p + 1) for p, r in sizes}
    blocks = [(prompt, [(length, masks[prompt, length]) for length in responses]) for prompt, responses in rows]
    return RowBlocks(blocks, segments.shape[1])


def blockwise_attention(module, query, key, value, attention_mask, *, row_blocks: RowBlocks | None = None, **options):
    """transformers' sdpa attention, block by block where `row_blocks` describe the rows.

    Args:
        query, key, value: (R, heads, L, head size). attention_mask: used only without blocks.

    Returns:
        ((R, L, heads, head size), None); the outputs of padding are zeros.
    """
    if row_blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    row_blocks.calls += 1
    rows = []
    for row, (prompt, responses) in enumerate(row_blocks.rows):
        q, k, v = query[row : row + 1], key[row : row + 1], value[row : row + 1]
        parts = [sdpa_attention_forward(module, *(x[:, :, :prompt] for x in (q, k, v)), None, **options)[0]]
        start = prompt
        for length, mask in responses:
            own = slice(start, start + length)
            seen_k, seen_v = (torch.cat([x[:, :, :prompt], x[:, :, own]], dim=2) for x in (k, v))
            parts.append(sdpa_attention_forward(module, q[:, :, own], seen_k, seen_v, mask, **options)[0])
            start += length
        parts.append(parts[0].new_zeros(1, row_blocks.length - start, *parts[0].shape[2:]))
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows), None


AttentionInterface.register(BLOCKWISE, blockwise_attention)
AttentionMaskInterface.register(BLOCKWISE, sdpa_mask)


def _layer_types(config) -> set[str]:
    """The kinds of attention layer of a model: its own list, or what its window setting says."""
    layers = getattr(config, "layer_types", None)
    if layers is not None:
        return set(layers)
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return {"sliding_attention"}
    if getattr(config, "attention_chunk_size", None) or getattr(config, "layers_block_type", None):
        return {"other"}
    return {"full_attention"}


def _as_kernel_expects(config, visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    visible = visible[:, None]
    if config._attn_implementation == "eager":
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
            ~visible, torch.finfo(dtype).min
        )
    return visible
