"""Preference models to disk and hub: a folder that explains itself, and its upload.

The folder keeps the published tensor names (`model.*`, `lm_head.weight`, `value_head.weight`, `prompt_head.weight`), a
`preference` object in config.json, and a README.md that the hub can read.
"""

import dataclasses
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from transformers import GenerationConfig

from general_preference.models.model_card import model_card
from general_preference.models.model_files import HEAD_NAMES, HEADS_FILE
from general_preference.models.reward_model import RewardModel


def save_reward_model(
    model: RewardModel,
    path: str,
    state_dict: dict[str, torch.Tensor] | None = None,
    *,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
) -> None:
    """Write `model` to the folder `path`: config.json with the `preference` object, safetensors, the LoRA adapter, and
    a README.md made of `model.card`.

    Args:
        state_dict: the model's full tensors when they are not in the module itself (ZeRO-3); default its own.
        max_shard_size: size of a weight file, in bytes or as in "5GB".
        tags: more tags for the README.md's metadata.
    """
    state_dict = model.state_dict() if state_dict is None else state_dict
    prefix = "backbone."
    backbone = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    heads = {name: state_dict[name].contiguous() for name in HEAD_NAMES if name in state_dict}
    preference = model.preference
    if model.temperature is not None:
        learnt = state_dict["temperature.log_value"].float().exp().item()
        preference = dataclasses.replace(preference, temperature=learnt)

    language_model = model.language_model
    language_model.config.preference = preference.to_dict()
    # The base model's generation settings mean nothing here, and inconsistent ones would refuse to be saved.
    language_model.generation_config = GenerationConfig.from_model_config(language_model.config)
    if language_model is model.backbone:
        model.backbone.save_pretrained(path, state_dict={**backbone, **heads}, max_shard_size=max_shard_size)
    else:
        model.backbone.save_pretrained(path, state_dict=backbone)
        language_model.config.save_pretrained(path)
        save_file(heads, str(Path(path) / HEADS_FILE), metadata={"format": "pt"})
    for weights in Path(path).glob("*.safetensors"):
        shutil.copymode(Path(path) / "config.json", weights)  # safetensors makes files that only their owner can read
    model_card(preference, model.card, tags).save(Path(path) / "README.md")


def push_reward_model(
    model: RewardModel,
    repo_id: str,
    *,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
):
    """Upload what `save_reward_model` writes; the arguments are those of transformers' `push_to_hub`.

    The repository is made if there is none; a README.md that stands there already is kept. The tokenizer is uploaded
    on its own: `rm.tokenizer.push_to_hub(repo_id)`.

    Returns:
        huggingface_hub's CommitInfo.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    kept = api.file_exists(repo_id, "README.md", revision=revision)
    with tempfile.TemporaryDirectory() as folder:
        save_reward_model(model, folder, max_shard_size=max_shard_size, tags=tags)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=["README.md"] if kept else None,
        )
