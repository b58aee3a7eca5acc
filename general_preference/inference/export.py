"""Preference models as folders that inference servers read: transformers' classifiers, or sentence-transformers.

sequence_classification  the base model's class for classification, such as LlamaForSequenceClassification: the value
                         head's D rows and the gate's P rows are `score.weight`, so that its labels are those numbers
sentence_transformers    the layers, the last token's hidden state, and those rows as a Dense layer

Both give raw numbers; `RemotePreference` (remote.py), or whoever follows the folder's README.md, compares them.
"""

import contextlib
import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_MAPPING
from transformers.utils import is_accelerate_available

from general_preference.datasets.tokenization import fix_date, load_tokenizer
from general_preference.errors import InputError
from general_preference.files import check_new_folder, new_folder, replace_text
from general_preference.inference.export_card import FORMATS, serving
from general_preference.models.config import (
    PreferenceConfig,
    adapter_base,
    base_chain,
    load_config,
    read_tensors,
    resolve,
    tensor_files,
)
from general_preference.models.heads import (
    DIGEST,
    HEAD_NAMES,
    SCORE,
    head_tensors,
    read_heads,
    score_digest,
    trained_preference,
)
from general_preference.models.loading import OLD_MASKS, load_backbone, without_report
from general_preference.models.merging import merge_into_folder
from general_preference.models.saving import describe_head, model_card, read_card_facts
from general_preference.models.starting import settle_padding

# Modules of sentence-transformers by the names that its versions and the servers know.
_MODULES = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}


def export_model(
    path: str, output: Path, format: str, max_shard_size: int | str = "5GB"
) -> tuple[PreferenceConfig, str]:
    """Write the preference model at `path` (full, sharded or an adapter, which is merged) to `output` for servers.

    The backbone's tensors keep the dtype that they are stored in, the head is in fp32, and the LM head is left out.

    Args:
        output: a folder that does not exist or is empty. format: one of `FORMATS`.
        max_shard_size: of a file of weights, in bytes or as here.

    Returns:
        The head, and the name of the class that reads the backbone.

    Raises:
        InputError: no trained model, an architecture without such a class, or an output that is not empty or is read.
        RunError: it cannot be written.
    """
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}: choose one of {', '.join(FORMATS)}")
    preference = trained_preference(path)
    check_new_folder(output, base_chain(path))
    tokenizer = _tokenizer(path)
    with new_folder(output) as folder:
        with _merged(path, folder) as source:
            heads = read_heads(source)
            weight = torch.cat([heads[name].float() for name in HEAD_NAMES if name in heads] or [torch.empty(0, 0)])
            _check_shape(path, weight, preference)
            config, left_out = _configuration(source, preference, format, len(weight))
            settle_padding(config, tokenizer, preference)
            tensors = read_tensors(source, set(tensor_files(source)) - left_out)
            for name, tensor in (*tensors.items(), ("the head", weight)):
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise InputError(f"{path}: {name} holds numbers that are not finite")
            if format == "sequence_classification":
                tensors[SCORE] = weight
                vars(config)[DIGEST] = score_digest(weight)
            else:
                _sentence_transformers(folder, weight)
            config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            _write_shards(tensors, folder, max_shard_size)
            facts = read_card_facts(resolve(source, "README.md"))
            use = serving(preference, format, config.architectures[0], tokenizer, weight.shape[1])
            model_card(preference, facts, use=use).save(folder / "README.md")
        for file in folder.rglob("*.safetensors"):
            shutil.copymode(folder / "config.json", file)  # safetensors writes them with mode 600
    return preference, config.architectures[0]


def _check_shape(path: str, weight: torch.Tensor, preference: PreferenceConfig) -> None:
    """InputError unless these are the rows of both heads."""
    rows, hidden = len(labels(preference)), load_config(path).get_text_config().hidden_size
    if tuple(weight.shape) != (rows, hidden):
        found = f"holds heads of shape {tuple(weight.shape)}" if weight.numel() else "lacks its heads"
        raise InputError(f"{path} {found}, but {preference.describe()} has ({rows}, {hidden})")


@contextlib.contextmanager
def _merged(path: str, folder: Path):
    """A folder with the whole model at `path`: itself, or for an adapter a merged one in `folder` for the while."""
    if adapter_base(path) is None:
        yield path
        return
    merged = folder / "merged"
    merge_into_folder(path, merged)
    yield str(merged)
    shutil.rmtree(merged)


def _tokenizer(path: str):
    tokenizer = load_tokenizer(path)
    fix_date(tokenizer)
    return tokenizer


def _configuration(path: str, preference: PreferenceConfig, format: str, numbers: int):
    """The exported model's configuration, and the names of the tensors at `path` that it leaves out.

    Raises:
        InputError: transformers has no class for it, or one with other tensors.
    """
    config, classifies = load_config(path), format == "sequence_classification"
    mapping = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if classifies else MODEL_MAPPING
    if type(config) not in mapping:
        what = f"transformers has no class for sequence classification with {config.model_type} models"
        raise InputError(f"{path}: {what}: use format sentence_transformers, or run it with GPMPipeline")
    if not classifies and config.get_text_config() is not config:
        raise InputError(f"{path} reads images too, which sentence-transformers would ask for: use another format")
    describe_head(config, preference)
    config.architectures = [mapping[type(config)].__name__]
    if classifies:
        config.id2label = dict(enumerate(labels(preference)))
        config.label2id = {label: index for index, label in config.id2label.items()}
        config.problem_type = "regression"  # else servers may take a softmax over the labels
    language_model = load_backbone(path, torch.float32, device="meta")  # names and shapes alone
    names = {module: name for name, module in language_model.named_modules()}
    lm_head = names[language_model.get_output_embeddings()] + "."
    options = {"device_map": "meta"} if is_accelerate_available() else {}
    with without_report():
        twin, info = mapping[type(config)].from_pretrained(path, config=config, output_loading_info=True, **options)
    prefix = "" if classifies else f"{language_model.base_model_prefix}."
    expected = {prefix + name: tensor.shape for name, tensor in twin.state_dict().items()}
    found = {name: tensor.shape for name, tensor in language_model.state_dict().items() if not name.startswith(lm_head)}
    found |= {SCORE: (numbers, config.get_text_config().hidden_size)} if classifies else {}
    if differing := sorted(name for name, _ in found.items() ^ expected.items()):
        raise InputError(f"{path}: {config.architectures[0]} has other tensors than this model, as {differing[0]}")
    unused = {name for name in tensor_files(path) if f".{lm_head}" in f".{name}" or OLD_MASKS.search(name)}
    return config, unused | set(info["unexpected_keys"]) | head_tensors(path)  # of some, the LM head has another name


def labels(preference: PreferenceConfig) -> list[str]:
    """What the D numbers of a head and the P logits of its gate are called, in their order."""
    planes, gates = 2 * preference.planes, preference.planes * preference.prompt_gate
    names = [f"embedding_{index}" for index in range(planes)] + ["reward"] * (preference.dim % 2)
    return names + [f"gate_{index}" for index in range(gates)]


def _write_shards(tensors: dict[str, torch.Tensor], folder: Path, max_shard_size: int | str) -> None:
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for name, held in shards.filename_to_tensors.items():
        save_file({tensor: tensors[tensor] for tensor in held}, folder / name, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        replace_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2))


def _sentence_transformers(folder: Path, weight: torch.Tensor) -> None:
    """The modules around the layers: pooling and, as a Dense layer, the heads' `weight`; nothing is normalized."""
    numbers, hidden = weight.shape
    modules = [
        {"idx": index, "name": str(index), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for index, (place, kind) in enumerate(_MODULES.items())
    ]
    pooling = {"word_embedding_dimension": hidden, "include_prompt": True}
    pooling |= dict.fromkeys(("pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_max_tokens"), False)
    pooling["pooling_mode_lasttoken"] = True
    dense = {"in_features": hidden, "out_features": numbers, "bias": False}
    dense["activation_function"] = "torch.nn.modules.linear.Identity"
    replace_text(folder / "modules.json", json.dumps(modules, indent=2))
    replace_text(folder / "1_Pooling" / "config.json", json.dumps(pooling, indent=2))
    replace_text(folder / "2_Dense" / "config.json", json.dumps(dense, indent=2))
    save_file({"linear.weight": weight}, folder / "2_Dense" / "model.safetensors", metadata={"format": "pt"})
