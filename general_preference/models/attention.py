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
_MOST_KEYS = 16384  # keys of one call, the prompt's copies included: what they take in memory stays small
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
class ResponseBlock:
    """n responses of a row that attend in one kernel call, each to the prompt's p tokens and its own up to r.

    index: (n, r) where their tokens stand in the row (shorter ones repeat their last). kept: (n, r) which are real.
    mask: (1, 1, r, p + r), additive.
    """

    index: torch.Tensor
    kept: torch.Tensor
    mask: torch.Tensor


@dataclass
class RowBlocks:
    """The seen blocks of R shared rows: per row the prompt's length and the blocks of its responses, in order.

    `calls` counts the layers that used them, so that an architecture that drops them cannot go unnoticed.
    """

    rows: list[tuple[int, list[ResponseBlock]]]
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
        prompt, lengths = row.count(PROMPT), [row.count(number) for number in range(1, max(row) + 1)]
        seen += prompt**2 // 2 + sum(length * (prompt + length) for length in lengths)
        groups = _similar(lengths, prompt)
        calls += 1 + len(groups)
        rows.append((prompt, groups))
    saved = segments.numel() * segments.shape[1] - seen
    if saved * config.hidden_size < calls * _CALL_COST:
        return None
    return RowBlocks([(prompt, _response_blocks(prompt, groups, dtype)) for prompt, groups in rows], segments.shape[1])


def _similar(lengths: list[int], prompt: int) -> list[list[int]]:
    """Neighbours that may share a call: hardly any padding, and not too many copies of the prompt's keys."""
    groups: list[list[int]] = []
    for length in lengths:
        joined = [*groups[-1], length] if groups else [length]
        longest = max(joined)
        fits = longest * len(joined) <= 1.25 * sum(joined) and (prompt + longest) * len(joined) <= _MOST_KEYS
        if groups and fits:
            groups[-1] = joined
        else:
            groups.append([length])
    return groups


def _response_blocks(prompt: int, groups: list[list[int]], dtype: torch.dtype) -> list[ResponseBlock]:
    blocks, start = [], prompt
    for lengths in groups:
        longest = max(lengths)
        sizes, steps = torch.tensor(lengths)[:, None], torch.arange(longest)[None, :]
        starts = start + sizes.cumsum(dim=0) - sizes
        # Additive, as the kernel wants it: a boolean mask would be converted anew in every layer.
        mask = torch.full((1, 1, longest, prompt + longest), -torch.inf, dtype=dtype).triu(prompt + 1)
        blocks.append(ResponseBlock(starts + torch.minimum(steps, sizes - 1), steps < sizes, mask))
        start += sum(lengths)
    return blocks


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
    for row, (prompt, blocks) in enumerate(row_blocks.rows):
        shared = [tensor[row : row + 1, :, :prompt] for tensor in (query, key, value)]
        parts = [sdpa_attention_forward(module, *shared, None, **options)[0][0]]
        for block in blocks:
            own_q, own_k, own_v = (tensor[row][:, block.index].transpose(0, 1) for tensor in (query, key, value))
            count = len(block.index)
            seen_k = torch.cat([shared[1].expand(count, -1, -1, -1), own_k], dim=2)
            seen_v = torch.cat([shared[2].expand(count, -1, -1, -1), own_v], dim=2)
            found = sdpa_attention_forward(module, own_q, seen_k, seen_v, block.mask, **options)[0]
            parts.append(found[block.kept])
        parts.append(parts[0].new_zeros(row_blocks.length - sum(map(len, parts)), *parts[0].shape[1:]))
        rows.append(torch.cat(parts))
    return torch.stack(rows), None


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
