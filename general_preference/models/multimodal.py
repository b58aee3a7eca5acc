"""Models that read images as well, trained and run on text.

Their text layers, embeddings and LM head are used as a causal LM; everything else is loaded, frozen and saved again.
"""

import re

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from general_preference.errors import InputError

BOTH_WAYS = {"paligemma"}  # a prompt's tokens see those after them, which behind a shared prompt is not done here


def auto_class(config, path: str):
    """The transformers class that loads a model of this configuration; InputError for one that is no language model."""
    if config.model_type in BOTH_WAYS:
        raise InputError(f"{path} is a {config.model_type} model, whose prompts attend both ways: use another")
    multimodal = config.get_text_config() is not config
    if multimodal and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not config.is_encoder_decoder:
        return AutoModelForImageTextToText
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "auto_map", None):
        return AutoModelForCausalLM
    raise InputError(f"{path} is a {config.model_type} model, which is no decoder-only language model: use another")


def text_layers(language_model: nn.Module) -> nn.Module:
    """What maps token ids to last hidden states, without the LM head.

    Raises:
        InputError: a multimodal architecture whose text part cannot be told from the others.
    """
    if language_model.config.get_text_config() is language_model.config:
        return language_model.base_model
    layers = language_model.get_decoder()
    layers = layers.model if layers.get_output_embeddings() is not None else layers  # Llama 4's has the LM head with it
    if layers.get_input_embeddings() is not language_model.get_input_embeddings():
        kind = language_model.config.model_type
        raise InputError(f"the text part of {kind} models is not known here: use a model that reads text alone")
    return layers


def text_modules(language_model: nn.Module, excluded: bool = False) -> str | None:
    """A pattern that fits the names of the modules in the text layers and the LM head (`excluded`: all others).

    None for a model that has no other modules.
    """
    if language_model.config.get_text_config() is language_model.config:
        return None
    names = {module: name for name, module in language_model.named_modules()}
    parts = text_layers(language_model), language_model.get_output_embeddings()
    text = "|".join(re.escape(names[part]) for part in parts)
    return rf"(?!({text})(\.|$)).*" if excluded else rf"({text})(\..*)?"


def freeze_other_parts(language_model: nn.Module) -> None:
    """Freeze what is neither in the text layers nor the LM head: it is never run."""
    pattern = text_modules(language_model)
    for name, parameter in language_model.named_parameters() if pattern else ():
        if not re.fullmatch(pattern, name):
            parameter.requires_grad_(False)
