"""The preference model: a causal LM over packed rows, an embedding head on responses, and a gate on prompts.

`get_reward_model` makes one to train, `load_reward_model` loads a trained one.
"""

import logging
import os

import torch
from torch import nn

from general_preference.errors import InputError
from general_preference.models.backbone import PackedBackbone
from general_preference.models.config import (
    BASE_DIGEST,
    PreferenceConfig,
    adapter_base,
    resolve,
    weights_digest,
)
from general_preference.models.heads import HEAD_NAMES, read_heads, saved_head, trained_preference
from general_preference.models.loading import add_lora, load_backbone, partitioned_loading
from general_preference.models.preference_heads import HeadsMixin
from general_preference.models.saving import CardFacts, push_reward_model, read_card_facts, save_reward_model
from general_preference.models.starting import check_reward, head_to_train

logger = logging.getLogger(__name__)


class RewardModel(HeadsMixin, PackedBackbone):
    """Causal LM `backbone` + embedding head + prompt gate, both in fp32 whatever the backbone's dtype.

    `preference` is saved with the weights; `card` is what the saved README.md says besides.
    """

    def __init__(self, backbone: nn.Module, preference: PreferenceConfig, attention: str = "auto"):
        super().__init__(backbone, attention)
        self.card = CardFacts()
        self.add_heads(preference, self.config.hidden_size)

    @classmethod
    def from_pretrained(cls, path: str, **options) -> "RewardModel":
        """A trained preference model from a folder or hub name; see `load_reward_model`."""
        return load_reward_model(path, **options)

    save_pretrained, push_to_hub = save_reward_model, push_reward_model

    def outputs(self, hidden, response_ends, prompt_ends, targets) -> dict[str, torch.Tensor]:
        """Every response of a `packing.Batch` embedded, and every prompt gated.

        Returns:
            What `read_states` makes of the last tokens' hidden states, and
            log_probs, counts: (N + G,) summed log-prob in nats and tokens per sequence, only with `targets`.
        """
        output = self.read_states(hidden[response_ends], hidden[prompt_ends])
        if targets is not None:
            sums = self.sequence_log_probs(hidden, targets, len(response_ends) + len(prompt_ends))
            output["log_probs"], output["counts"] = sums
        return output


def get_reward_model(
    model_name_or_path: str,
    *,
    bf16: bool = True,
    load_in_4bit: bool = False,
    lora_rank: int = 0,
    lora_alpha: int = 16,
    target_modules: str | list[str] | None = None,
    lora_dropout: float = 0.0,
    use_flash_attention_2: bool = False,
    ds_config: dict | None = None,
    init_value_head: bool = False,
    init_prompt_head: bool = False,
    keep_reward: bool = False,
    add_prompt_head: bool = False,
    is_general_preference: bool = False,
    value_head_dim: int | None = None,
    preference: PreferenceConfig | None = None,
    attn_implementation: str = "auto",
    trust_remote_code: bool = False,
    seed: int = 42,
) -> RewardModel:
    """A preference model to train, from a language model or an earlier preference model (the paper's arguments).

    A plain language model gets new heads (N(0, 1/hidden), by `seed`). A preference or reward model keeps its own,
    unless another head is asked for, or new ones by `init_value_head` / `init_prompt_head`; its backbone stays.

    Args:
        keep_reward: a hybrid head on a Bradley-Terry model, whose scores are those of that model until it is trained.
        bf16: the backbone in bfloat16, else fp32. load_in_4bit: in 4 bits (bitsandbytes), frozen under adapters.
        is_general_preference, value_head_dim (default 2), add_prompt_head: the head if `preference` is not given;
            where none of them is, the model's own, else Bradley-Terry.
        ds_config: a DeepSpeed configuration; with ZeRO stage 3 no process holds the whole backbone (except in 4 bits).
        attn_implementation: one of `kernels.CHOICES`; the kernel is chosen where the model runs.

    Raises:
        InputError: no such model, a folder that is none, or a reward to keep where there is none.
    """
    path = os.path.expanduser(model_name_or_path)
    head = saved_head(path, trust_remote_code)
    saved = None if head is None else head.preference
    if saved is None and adapter_base(path) is not None:
        raise InputError(f"{path} is an adapter without preference heads: merge it first (scripts/merge_lora.py)")
    if preference is None:
        asked = {"dim": value_head_dim, "prompt_gate": add_prompt_head or None}
        kind, new = "gpm" if is_general_preference else None, init_value_head
        preference = head_to_train(path, head, kind, new=new, keep_reward=keep_reward, **asked)
    elif keep_reward:
        check_reward(path, saved, preference.head)
    attention = "flash_attention_2" if use_flash_attention_2 else attn_implementation
    partitioned = partitioned_loading(ds_config, path, trust_remote_code)
    dtype = torch.bfloat16 if bf16 else torch.float32
    backbone = load_backbone(path, dtype, attention, trust_remote_code, load_in_4bit)
    made_up = (backbone.get_base_model() if hasattr(backbone, "peft_config") else backbone).made_up
    if made_up and saved is None:
        raise InputError(f"{path} lacks {made_up}weight, its language-model head: use a folder with all its weights")
    if lora_rank > 0:
        if hasattr(backbone, "peft_config"):
            raise InputError(f"{path} already is a LoRA adapter: drop lora_rank to continue training it")
        backbone = add_lora(backbone, lora_rank, lora_alpha, target_modules or "all-linear", lora_dropout, seed)
        backbone.config.update({BASE_DIGEST: weights_digest(path)})
    model = RewardModel(backbone, preference, attention)
    model.card.base_model = path
    model.initialize_heads(seed)
    if saved is not None:
        _start_heads(model, path, saved, (init_value_head, init_prompt_head), keep_reward, trust_remote_code)
    model.check_sharing(can_run=partitioned is None)
    return model


def load_reward_model(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "auto",
    trust_remote_code: bool = False,
    preference: PreferenceConfig | None = None,
    device: torch.device | str = "cpu",
) -> RewardModel:
    """Load a trained preference model (full, sharded or LoRA adapter) from a folder or hub name, in eval mode.

    preference: the head, if read already. device: where the weights go (directly if accelerate is installed).

    Raises:
        InputError: no such model, a plain language model without heads, or weights that cannot be read.
    """
    path, device = os.path.expanduser(path), torch.device(device)
    preference = preference or trained_preference(path, trust_remote_code)
    backbone = load_backbone(path, dtype, attn_implementation, trust_remote_code, device=device)
    model = RewardModel(backbone, preference, attn_implementation)
    _copy_heads(model, path, HEAD_NAMES, trust_remote_code)
    model.to(device)  # before the self-check, which is of the kernels there
    model.card = read_card_facts(resolve(path, "README.md"))
    model.check_sharing()
    model.eval().layout_on(device)  # a kernel that cannot run is refused now, not with the first batch
    return model


def _start_heads(model: RewardModel, path: str, saved: PreferenceConfig, new, keep_reward, trust_remote_code) -> None:
    """Keep the heads at `path` that fit and are not to be `new` (value, prompt head); one line says which are not."""
    same = saved.same_head(model.preference)
    if keep_reward:  # every plane's second coordinate is 0, so planes score 0
        reward = read_heads(path, trust_remote_code)[HEAD_NAMES[0]]
        model.value_head.weight.data[1:-1:2] = 0
        model.value_head.weight.data[-1:] = reward
    elif same:
        keep = [name for name, fresh in zip(HEAD_NAMES, new, strict=True) if not fresh]
        _copy_heads(model, path, keep, trust_remote_code)
    if not same or any(new):
        head = f"{model.preference.describe()} head{' whose scalar is its reward' * keep_reward}"
        logger.info("%s (%s) keeps its backbone and gets a new %s", path, saved.describe(), head)


def _copy_heads(model: RewardModel, path: str, names, trust_remote_code: bool) -> None:
    """Fill the model's heads `names` from the checkpoint at `path`; a head without weights is never left random."""
    tensors = read_heads(path, trust_remote_code)
    for name in names:
        head = getattr(model, name.split(".")[0])
        found = f"has {name} of shape {tuple(tensors[name].shape)}" if name in tensors else f"has no {name}"
        needed = f"has no {name}" if head is None else f"has {name} of shape {tuple(head.weight.shape)}"
        if found != needed:
            raise InputError(f"{path} {found}, but the model that its configuration describes {needed}")
        if head is not None:
            head.weight.data.copy_(tensors[name])
