"""Which tokens see which when several responses are behind one copy of their prompt: masks, packed rows, kernels.

A row has two integers per token: its `position` in its sequence and its `segment` (-1 padding, 0 prompt, 1.. one per
response). A token sees the prompt and its own response up to itself, as if every response were run separately.

Plain full attention and sliding windows get an exact mask; everything else (recurrent layers, ALiBi, chunked attention)
runs separate sequences with a padding mask (`shares_prompts`). Architectures with plain full attention only run
comparisons end to end in one row without padding (`RowLayout.packed`), by the kernels below or FlexAttention.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PADDING, PROMPT = -1, 0
FLEX = "flex_attention"
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# Compared with separate sequences in tests/test_packing.py; others are checked by `PackedBackbone.check_sharing`.
VERIFIED = {"llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi3", "olmo2", "mixtral"}
VERIFIED |= {"opt", "mistral"}
# Those that take FlexAttention's masks (GPT-2 and OPT look into theirs).
FLEX_VERIFIED = {"llama", "qwen2", "qwen3", "gemma", "gpt_neox", "phi3", "olmo2", "mixtral"}


@dataclass(frozen=True)
class RowLayout:
    """How responses lie in the rows of a batch.

    shared:  behind one copy of their prompt; else one response per row.
    packed:  all comparisons in one row, end to end; else one comparison per row, padded to the longest.
    rounded: a packed row is padded at its end, so that compiled kernels meet few lengths.
    """

    shared: bool = True
    packed: bool = False
    rounded: bool = False

    def row_length(self, tokens: int) -> int:
        """Length of a row for so many tokens: if rounded, a multiple of 128 and at most 1/8 longer above 1,024."""
        if not self.rounded:
            return tokens
        grain = max(128, 2 ** (tokens - 1).bit_length() // 16)
        return -(-tokens // grain) * grain


def shares_prompts(config) -> bool:
    """Whether a mask or kernel can make shared prompts exact for this model configuration."""
    if config._attn_implementation == "flash_attention_2":  # transformers' own knows sequences alone
        return packs_rows(config)
    if config._attn_implementation not in ("sdpa", "eager", FLEX, *KERNELS):
        return False
    if config.model_type in ("bloom", "mpt", "falcon") and getattr(config, "alibi", True):
        return False
    return _layer_types(config) <= _KNOWN_LAYERS


def packs_rows(config) -> bool:
    """Whether rows may be packed: plain full attention in every layer, and a verified architecture."""
    plain = _layer_types(config) == {"full_attention"} and not getattr(config, "attn_logit_softcapping", None)
    return plain and config.model_type in VERIFIED


def row_layout(config, shared: bool) -> RowLayout:
    """How rows must lie for the kernel that `config` names. shared: `RewardModel.shares_prompts`."""
    kernel = config._attn_implementation
    packed = shared and (kernel == FLEX or kernel in KERNELS)
    return RowLayout(shared, packed, packed and kernel == FLEX)


def attention_mask(config, segments: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype, shared: bool):
    """What to pass to a backbone of this `dtype` as `attention_mask`, for (R, L) `segments` and `positions`.

    Returns (R, L) 0/1 for plain right-padded rows (not `shared`); else a (R, 1, L, L) mask, boolean for sdpa and
    additive for eager, or a dict of two for models that mix full and sliding-window layers.
    """
    if not shared:
        return (segments != PADDING).long()
    keys, queries = segments[:, None, :], segments[:, :, None]
    ones = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device)
    visible = ones.tril() & ((keys == PROMPT) | (keys == queries)) & (keys != PADDING)
    visible |= torch.eye(len(ones), dtype=torch.bool, device=segments.device)  # padding must not see nothing

    def for_kernel(visible: torch.Tensor) -> torch.Tensor:
        eager = config._attn_implementation == "eager"
        return (visible.logical_not().to(dtype) * torch.finfo(dtype).min if eager else visible)[:, None]

    if (layers := _layer_types(config)) == {"full_attention"}:
        return for_kernel(visible)
    # The window counts logical positions: in the row, other responses may lie in between.
    windowed = for_kernel(visible & (positions[:, :, None] - positions[:, None, :] < config.sliding_window))
    if layers == {"sliding_attention"}:
        return windowed
    return {"full_attention": for_kernel(visible), "sliding_attention": windowed}


def block_mask(segments: torch.Tensor, positions: torch.Tensor) -> BlockMask:
    """FlexAttention's mask of packed rows (R, L), in which padding at the end sees padding alone."""
    # Positions restart at 0 with every prompt only, so counting zeros numbers the comparisons.
    comparisons = ((positions == 0) & (segments == PROMPT)).cumsum(dim=1)
    comparisons = comparisons.masked_fill(segments == PADDING, 0)

    def visible(row, _head, query, key):
        own = segments[row, query] == segments[row, key]
        same = comparisons[row, query] == comparisons[row, key]
        return (key <= query) & same & (own | (segments[row, key] == PROMPT))

    rows, length = segments.shape
    compiled = segments.device.type == "cuda"  # else the whole (L, L) mask is materialized
    return create_block_mask(visible, rows, None, length, length, device=segments.device, _compile=compiled)


def _layer_types(config) -> set[str]:
    """The kinds of attention layer of a model: its own list, or what its window setting says."""
    if getattr(config, "layer_types", None) is not None:
        return set(config.layer_types)
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return {"sliding_attention"}
    if getattr(config, "attention_chunk_size", None) or getattr(config, "layers_block_type", None):
        return {"other"}
    return {"full_attention"}


@dataclass
class PackedSequences:
    """The S sequences of a row of T tokens.

    queries, keys:         S lengths each; the queries, in order, are the row's first sum(queries) tokens
    key_index:             (sum of keys,) where in the row each key is
    query_ends, key_ends:  (S + 1,) int32 cumulative lengths from 0, as variable-length kernels take them
    calls:                 layers that used this, so that an architecture that drops it is noticed
    """

    queries: list[int]
    keys: list[int]
    key_index: torch.Tensor
    query_ends: torch.Tensor
    key_ends: torch.Tensor
    calls: int = 0
    _masks: list[torch.Tensor | None] | None = None

    def map(self, move) -> "PackedSequences":
        """A fresh copy with `move` applied to its tensors."""
        tensors = {name: move(getattr(self, name)) for name in ("key_index", "query_ends", "key_ends")}
        return replace(self, **tensors, calls=0, _masks=None)

    def masks(self, dtype: torch.dtype) -> list[torch.Tensor | None]:
        """Per sequence the (queries, keys) mask, additive, or None where plain causal attention is meant."""
        if self._masks is None:
            self._masks = [
                None if count == seen else torch.full((count, seen), -torch.inf, dtype=dtype).triu(seen - count + 1)
                for count, seen in zip(self.queries, self.keys, strict=True)
            ]
        return self._masks


def pack_sequences(lengths: list[tuple[int, list[int]]]) -> PackedSequences:
    """The sequences of a row that holds, one after another, comparisons of (prompt tokens, tokens of each response)."""
    queries, keys, index, start = [], [], [], 0
    for prompt, responses in lengths:
        end = start + prompt
        for number, response in enumerate(responses or [0]):
            index += [torch.arange(start, start + prompt), torch.arange(end, end + response)]
            queries.append(response if number else prompt + response)
            keys.append(prompt + response)
            end += response
        start = end
    ends = [torch.tensor([0, *counts]).cumsum(0).to(torch.int32) for counts in (queries, keys)]
    return PackedSequences(queries, keys, torch.cat(index), *ends)


@torch.compiler.disable  # one Python call per sequence: a compiled layer breaks its graph here
def packed_attention(module, query, key, value, attention_mask, *, sequences: PackedSequences | None = None, **options):
    """Attention of a row that `sequences` describe; of anything else, transformers' sdpa attention.

    query: (1, heads, T, head size). key, value: (1, key-value heads, T, head size). options: `scaling`, `dropout`.
    Returns ((1, T, heads, head size), None).
    """
    if sequences is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    sequences.calls += 1
    queries = query[0].transpose(0, 1)
    seen_keys, seen_values = (tensor[0].transpose(0, 1).index_select(0, sequences.key_index) for tensor in (key, value))
    kernel = KERNELS[module.config._attn_implementation]
    scale, dropout = options.get("scaling"), options.get("dropout") or 0.0
    return kernel(queries, seen_keys, seen_values, sequences, scale, dropout)[None], None


def by_sdpa(query, key, value, sequences: PackedSequences, scale: float | None, dropout: float) -> torch.Tensor:
    """One call per sequence: (T, heads, head size) queries, (K, key-value heads, head size) keys -> queries' shape."""
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    # Slicing instead would make a gradient of the whole row's size for each sequence.
    counts = (sequences.queries, sequences.keys, sequences.keys)
    parts = [t.transpose(0, 1)[None].split(c, dim=2) for t, c in zip((query, key, value), counts, strict=True)]
    options = {"dropout_p": dropout, "scale": scale}
    found = [
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **options)
        for q, k, v, mask in zip(*parts, sequences.masks(query.dtype), strict=True)
    ]
    return torch.cat([part[0].transpose(0, 1) for part in found])


def by_varlen(query, key, value, sequences: PackedSequences, scale: float | None, dropout: float) -> torch.Tensor:
    """All sequences in one call of torch's variable-length attention; shapes as in `by_sdpa`."""
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ValueError("torch's variable-length attention has no dropout: use attn_implementation sdpa")
    shared = query.shape[1] != key.shape[1]
    return _in_half(varlen_attn, query, key, value, sequences, scale=scale, window_size=(-1, 0), enable_gqa=shared)


def by_flash(query, key, value, sequences: PackedSequences, scale: float | None, dropout: float) -> torch.Tensor:
    """All sequences in one call of flash-attn; same shapes as `by_sdpa`."""
    from flash_attn import flash_attn_varlen_func

    options = {"dropout_p": dropout, "softmax_scale": scale, "causal": True}
    return _in_half(flash_attn_varlen_func, query, key, value, sequences, **options)


def _in_half(kernel, query, key, value, sequences: PackedSequences, **options) -> torch.Tensor:
    """Call a half-precision kernel; inputs may be fp32 where a model upcasts its norms."""
    half = (t.contiguous() if t.dtype in HALF else t.to(torch.bfloat16).contiguous() for t in (query, key, value))
    longest = max(sequences.queries), max(sequences.keys)
    return kernel(*half, sequences.query_ends, sequences.key_ends, *longest, **options).to(query.dtype)


HALF = (torch.bfloat16, torch.float16)
KERNELS = {"packed_sdpa": by_sdpa, "packed_varlen": by_varlen, "packed_flash": by_flash}

for _name in KERNELS:
    AttentionInterface.register(_name, packed_attention)
    AttentionMaskInterface.register(_name, sdpa_mask)
