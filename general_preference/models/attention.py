"""Which tokens see which, when several responses stand behind one copy of their prompt.

A row of a batch is described by two integers per token: its `position` in its own sequence and its `segment`
(-1 padding, 0 prompt, 1.. one number per response). A token sees the prompt and its own response up to itself; that
equals running every response as a sequence of its own. A row with a single response is an ordinary causal sequence.

Architectures differ in what a layer may see, so the model's configuration is asked first (`shares_prompts`): plain
full attention and sliding windows get an exact mask, everything else (recurrent layers, ALiBi, chunked attention,
flash-attention kernels) is served with separate sequences and an ordinary padding mask.
"""

import torch

PADDING, PROMPT = -1, 0
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# Architectures whose shared-prompt scores were compared with separate sequences (tests/test_packing.py and the
# measurements in the README); others are checked once at run time by `RewardModel.verify_shared_prompts`.
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
    if config._attn_implementation not in ("sdpa", "eager"):
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
