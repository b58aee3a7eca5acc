"""A policy: a causal language model that gives log-probabilities of whole responses, packed behind their prompts."""

import logging
import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData

from general_preference.errors import InputError
from general_preference.models.backbone import PackedBackbone
from general_preference.models.config import BASE_DIGEST, weights_digest
from general_preference.models.heads import saved_head
from general_preference.models.loading import add_lora, load_backbone, partitioned_loading
from general_preference.models.saving import LIBRARY, CardFacts, hub_name

logger = logging.getLogger(__name__)

_ALIGNED = """# Aligned policy

A policy aligned with a preference model by General Preference Optimization or a relative of it. A plain causal language
model: transformers and vLLM load it.

Starts from: {base}. Preference model: {judge}. Trained with: {method}.

Source: Zhang et al., [arXiv 2410.02197](https://arxiv.org/abs/2410.02197).
"""
_FINE_TUNED = """# Fine-tuned policy

A plain causal language model, fine-tuned on given responses: transformers and vLLM load it.

Starts from: {base}. Trained with: {method}.
"""


class PolicyModel(PackedBackbone):
    """A causal LM over packed rows. Saved as a plain one; `facts` is what its README.md says of its training."""

    def __init__(self, backbone: torch.nn.Module, attention: str = "auto"):
        super().__init__(backbone, attention)
        self.card = CardFacts()  # base_model
        self.facts: dict[str, str | None] = {"method": "unknown", "judge": None}  # judge: None if no one judged

    def outputs(self, hidden, response_ends, prompt_ends, targets) -> dict[str, torch.Tensor]:
        """log_probs, counts: (N,) summed log-prob in nats and tokens of every response of a `packing.SampleBatch`."""
        log_probs, counts = self.sequence_log_probs(hidden, targets, len(response_ends))
        return {"log_probs": log_probs, "counts": counts}

    def save_pretrained(self, path: str, state_dict: dict | None = None) -> None:
        """Write a plain causal LM, or its LoRA adapter. state_dict: the full tensors where the module lacks them."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        backbone = {name.removeprefix("backbone."): tensor for name, tensor in state_dict.items()}
        self.backbone.save_pretrained(path, state_dict=backbone)
        if self.backbone is not self.language_model:
            self.language_model.config.save_pretrained(path)
        for weights in Path(path).glob("*.safetensors"):
            shutil.copymode(Path(path) / "config.json", weights)  # safetensors writes them with mode 600
        base = self.card.base_model or "unknown"
        tags = ["preference-alignment", "arxiv:2410.02197"] if self.facts["judge"] else []
        data = ModelCardData(base_model=hub_name(base), library_name="transformers", tags=[*tags, LIBRARY])
        text = (_ALIGNED if self.facts["judge"] else _FINE_TUNED).format(base=Path(base).name, **self.facts)
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(Path(path) / "README.md")


def get_policy(
    path: str,
    *,
    bf16: bool = True,
    load_in_4bit: bool = False,
    lora_rank: int = 0,
    lora_alpha: int = 16,
    target_modules: str | list[str] | None = None,
    lora_dropout: float = 0.0,
    attn_implementation: str = "auto",
    trust_remote_code: bool = False,
    ds_config: dict | None = None,
    seed: int = 42,
) -> PolicyModel:
    """The policy at `path`, to train, without dropout. A LoRA adapter is continued if `lora_rank` is its own.

    Raises:
        InputError: no such model, one without a language-model head, a preference model, or an adapter of another rank.
    """
    path = os.path.expanduser(path)
    check_policy(path, trust_remote_code)
    partitioned = partitioned_loading(ds_config, path, trust_remote_code)
    dtype = torch.bfloat16 if bf16 else torch.float32
    backbone = load_backbone(path, dtype, attn_implementation, trust_remote_code, load_in_4bit)
    _drop_nothing(backbone)
    if hasattr(backbone, "peft_config"):
        rank = backbone.peft_config["default"].r
        if lora_rank not in (0, rank):
            found = f"{path} is a LoRA adapter of rank {rank}, but lora_rank is {lora_rank}"
            raise InputError(f"{found}: use the same, or none")
    elif lora_rank > 0:
        backbone = add_lora(backbone, lora_rank, lora_alpha, target_modules or "all-linear", lora_dropout, seed)
        backbone.config.update({BASE_DIGEST: weights_digest(path)})
    model = PolicyModel(backbone, attn_implementation)
    model.freeze_unused(language_model_head=True)
    model.card.base_model = path
    model.check_sharing(can_run=partitioned is None)
    return model


def _drop_nothing(model: torch.nn.Module) -> None:
    """Switch off the dropout that the model was pretrained with, in modules and in numbers that attention reads.

    It would be noise in log-ratios, which are of the same model without it. That of adapters is somebody's wish.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0
        for attribute in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)


def check_policy(path: str, trust_remote_code: bool = False) -> None:
    """InputError if the model at `path` is a preference model, whose heads its use as a policy would lose."""
    head = saved_head(path, trust_remote_code)
    if head is not None:
        raise InputError(f"{path} is a {head.preference.describe()} model, not a policy: give a causal language model")
