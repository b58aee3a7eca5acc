"""Attention over one row that holds whole comparisons end to end, without padding and without a mask over the row.

Such a row is cut into sequences (`PackedSequences`): a prompt with its first response, then every further response by
itself. The queries of a sequence are its own tokens, which stand together; its keys are, for a further response, the
prompt's tokens and its own. In each, a query sees every key that is not behind it, counted from the end: ordinary
causal attention where queries and keys are the same tokens. That is what variable-length kernels compute, so one
gather of keys and values serves three of them:

    packed_sdpa      torch's scaled_dot_product_attention, one call per sequence: CPUs
    packed_varlen    torch.nn.attention.varlen, one call for all: GPUs, half precision, torch >= 2.12
    packed_flash     flash-attn's variable-length kernel: GPUs, half precision, where the package is installed

A prompt's hidden states are computed once; only its keys and values are copied, once per further response.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


@dataclass
class PackedSequences:
    """The S sequences of a row of T tokens: who is asked, and what is seen.

    queries, keys:           S lengths each; the queries, in order, are the row's first sum(queries) tokens
    key_index:               (sum of keys,) where in the row each key stands
    query_ends, key_ends:    (S + 1,) int32 cumulative lengths from 0, as variable-length kernels take them
    calls:                   layers that used this, so that an architecture that drops it cannot go unnoticed
    """

    queries: list[int]
    keys: list[int]
    key_index: torch.Tensor
    query_ends: torch.Tensor
    key_ends: torch.Tensor
    calls: int = 0
    _masks: list[torch.Tensor | None] | None = None

    def map(self, move) -> "PackedSequences":
        """A copy whose tensors went through `move`, and that nobody has used yet."""
        values = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("calls", "_masks")
        }
        return PackedSequences(**{k: move(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()})

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


@torch.compiler.disable  # one Python call per sequence: a compiled layer stops before it and goes on behind it
def packed_attention(module, query, key, value, attention_mask, *, sequences: PackedSequences | None = None, **options):
    """Attention of a row that `sequences` describe; of anything else, transformers' sdpa attention.

    Args:
        query: (1, heads, T, head size). key, value: (1, key-value heads, T, head size).
        attention_mask: used only without `sequences`.
        options: `scaling` and `dropout` as attention layers pass them; what belongs to other kernels is None there.

    Returns:
        ((1, T, heads, head size), None).
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
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    # Splitting, unlike slicing, makes one tensor in backward and not one of the whole row's size for each sequence.
    parts = zip(
        query.transpose(0, 1).split(sequences.queries, dim=1),
        key.transpose(0, 1).split(sequences.keys, dim=1),
        value.transpose(0, 1).split(sequences.keys, dim=1),
        sequences.masks(query.dtype),
        strict=True,
    )
    found = [
        F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scale
        )[0].transpose(0, 1)
        for q, k, v, mask in parts
    ]
    return torch.cat(found)


def by_varlen(query, key, value, sequences: PackedSequences, scale: float | None, dropout: float) -> torch.Tensor:
    """All sequences in one call of torch's variable-length attention; same shapes as `by_sdpa`."""
    from torch.nn.attention.varlen import varlen_attn

    if dropout:
        raise ValueError("torch's variable-length attention has no dropout: use --attn_implementation sdpa")
    dtype, (query, key, value) = query.dtype, _in_half_precision(query, key, value)
    return varlen_attn(
        query,
        key,
        value,
        sequences.query_ends,
        sequences.key_ends,
        max(sequences.queries),
        max(sequences.keys),
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    ).to(dtype)


def by_flash(query, key, value, sequences: PackedSequences, scale: float | None, dropout: float) -> torch.Tensor:
    """All sequences in one call of flash-attn; same shapes as `by_sdpa`."""
    from flash_attn import flash_attn_varlen_func

    dtype, (query, key, value) = query.dtype, _in_half_precision(query, key, value)
    return flash_attn_varlen_func(
        query,
        key,
        value,
        sequences.query_ends,
        sequences.key_ends,
        max(sequences.queries),
        max(sequences.keys),
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
    ).to(dtype)


def _in_half_precision(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Contiguous, and in what these kernels take: a half-precision model may upcast its norms (4-bit training does)."""
    return [t.contiguous() if t.dtype in HALF else t.to(torch.bfloat16).contiguous() for t in tensors]


HALF = (torch.bfloat16, torch.float16)
KERNELS = {"packed_sdpa": by_sdpa, "packed_varlen": by_varlen, "packed_flash": by_flash}

for _name in KERNELS:
    AttentionInterface.register(_name, packed_attention)
    AttentionMaskInterface.register(_name, sdpa_mask)
