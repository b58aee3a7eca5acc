"""Preference models to disk and hub: the published tensor names, `preference` in config.json, and a model card."""

import dataclasses
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from safetensors.torch import save_file
from transformers import GenerationConfig
from yaml import YAMLError

from general_preference.models.config import BASE_DIGEST, HEADS_FILE, PreferenceConfig
from general_preference.models.heads import DIGEST, HEAD_NAMES, SCORE, score_digest


def save_reward_model(model, path: str, state_dict: dict | None = None, *, max_shard_size="50GB", tags=None) -> None:
    """Write `model` to the folder `path`: config.json, safetensors or the LoRA adapter with heads, and `model.card`.

    state_dict: the full tensors where the module does not hold them (ZeRO-3). max_shard_size: bytes, or as in "5GB".
    tags: more tags for the card.
    """
    state_dict = model.state_dict() if state_dict is None else state_dict
    parts = (name.partition(".") for name in state_dict)
    backbone = {rest: state_dict[f"backbone.{rest}"] for part, _, rest in parts if part == "backbone"}
    if made_up := getattr(model.language_model, "made_up", None):  # it is in no checkpoint, and not trained
        backbone = {name: tensor for name, tensor in backbone.items() if not name.startswith(made_up)}
    heads = {name: state_dict[name].contiguous() for name in HEAD_NAMES if name in state_dict}
    preference = model.preference
    if model.temperature is not None:
        learned = state_dict["temperature.log_value"].float().exp().item()
        preference = dataclasses.replace(preference, temperature=learned)

    language_model = model.language_model
    describe_head(language_model.config, preference)
    # Generation settings are unused, and inconsistent ones would refuse to be saved.
    language_model.generation_config = GenerationConfig.from_model_config(language_model.config)
    if language_model is model.backbone:
        vars(language_model.config).pop(BASE_DIGEST, None)  # of an adapter that was merged
        if preference.head == "bt":  # the name by which transformers, TRL and OpenRLHF read it
            heads[SCORE] = heads[HEAD_NAMES[0]].clone()
            language_model.config.update({DIGEST: score_digest(heads[SCORE])})
        model.backbone.save_pretrained(path, state_dict={**backbone, **heads}, max_shard_size=max_shard_size)
    else:
        model.backbone.save_pretrained(path, state_dict=backbone)
        language_model.config.save_pretrained(path)
        save_file(heads, str(Path(path) / HEADS_FILE), metadata={"format": "pt"})
    for weights in Path(path).glob("*.safetensors"):
        shutil.copymode(Path(path) / "config.json", weights)  # safetensors writes them with mode 600
    model_card(preference, model.card, tags).save(Path(path) / "README.md")


def describe_head(config, preference: PreferenceConfig) -> None:
    """Write into a configuration what this package, and what others read of a reward model."""
    for key in ("mean", "std", "normalize_reward", "value_head_prefix", DIGEST):  # of the model that it started from
        vars(config).pop(key, None)
    config.preference = dataclasses.asdict(preference)
    if preference.head == "bt":
        config.num_labels, config.value_head_prefix = 1, SCORE.split(".")[0]


def push_reward_model(model, repo_id: str, *, private=None, token=None, revision=None, tags=None, **options):
    """Upload what `save_reward_model` writes and return huggingface_hub's CommitInfo.

    Takes the arguments of transformers' `push_to_hub`, whose mixin would replace the card. A missing repository is
    created; an existing README.md is kept.
    """
    api, max_shard_size = HfApi(token=token), options.pop("max_shard_size", "50GB")
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    kept = ["README.md"] if api.file_exists(repo_id, "README.md", revision=revision) else None
    options = {"commit_message": "Upload model", "ignore_patterns": kept, "revision": revision} | options
    with tempfile.TemporaryDirectory() as folder:
        save_reward_model(model, folder, max_shard_size=max_shard_size, tags=tags)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)


LIBRARY = "general-preference"
_HEADS = {"bt": "Bradley-Terry reward model", "gpm": "General Preference Model", "hybrid": "Hybrid preference model"}
_PLANES = """Embeds each response in planes ({0.planes})%s and compares two embeddings with a
skew-symmetric operator, so its preferences may be cyclic.
P(first is preferred) = sigmoid(score / {0.temperature:.4g})."""
_DESCRIPTIONS = {
    "bt": "Gives each response one number; P(first is preferred) = sigmoid((first - second) / temperature).",
    "gpm": _PLANES % "",
    "hybrid": _PLANES % " and a scalar reward",
}
_USE = """```python
from general_preference import GPMPipeline

rm = GPMPipeline("path or hub name of this model")
rm.compare(prompt, first, second)       # P(first is preferred)
rm.rank(prompt, responses)              # indices, best first
```

"""
_FORMATS = {
    "bt": """transformers' AutoModelForSequenceClassification, TRL and OpenRLHF read this folder as it is (an adapter:
after `scripts/merge_lora.py`). For vLLM and SGLang, `scripts/export_model.py` makes a folder of it.""",
    "gpm": "For vLLM, SGLang, transformers or sentence-transformers, `scripts/export_model.py` makes a folder of it.",
}
_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ description }}

## Use

{{ use }}

## Training

Base model: {{ base }}. Comparisons: {{ data }}.

{{ evaluation }}

## Source

Zhang et al., *Beyond Bradley-Terry Models: A General Preference Model for Language Model Alignment*, ICML 2025,
[arXiv 2410.02197](https://arxiv.org/abs/2410.02197).
"""


@dataclass
class CardFacts:
    """results: {set: {metric: value}} as `preference_statistics` names them; the others are hub names or paths."""

    base_model: str | None = None
    datasets: list[str] = field(default_factory=list)
    results: dict[str, dict[str, float]] = field(default_factory=dict)


def model_card(
    preference: PreferenceConfig, facts: CardFacts, tags: list[str] | None = None, use: str | None = None
) -> ModelCard:
    """The card of a model with this head; `tags` are added to its own. use: how it is used, if not by GPMPipeline."""
    gate = ", prompt gate" if preference.prompt_gate else ""
    title = _HEADS[preference.head] + (f" (D = {preference.dim}{gate})" if preference.planes else "")
    results = [
        EvalResult("text-classification", name, name, metric, row[metric], task_name="Preference prediction")
        for name, row in facts.results.items()
        for metric in ("accuracy", "loss", "n")
        if metric in row
    ]
    data = ModelCardData(
        base_model=hub_name(facts.base_model),
        datasets=[name for name in map(hub_name, facts.datasets) if name] or None,
        eval_results=results or None,
        model_name=title,
        library_name=LIBRARY,
        pipeline_tag="text-classification",
        tags=["reward-model", "preference-model", preference.head, "arxiv:2410.02197", *(tags or [])],
    )
    table = ["| held-out comparisons | accuracy | loss | n |", "|---|---:|---:|---:|"]
    for name, row in facts.results.items():
        table.append(f"| {name} | {row.get('accuracy', 0):.4f} | {row.get('loss', 0):.4f} | {row.get('n', 0)} |")
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=title,
        description=_DESCRIPTIONS[preference.head].format(preference),
        use=use or _USE + _FORMATS["bt" if preference.head == "bt" else "gpm"],
        base=_shown(facts.base_model),
        data=", ".join(map(_shown, facts.datasets)) or "not recorded",
        evaluation="\n".join(table) if facts.results else "No evaluation was recorded.",
    )


def read_card_facts(readme: str | Path | None) -> CardFacts:
    """What a card written by `model_card` says in its metadata; nothing if there is no such card."""
    try:
        data = ModelCard.load(readme, ignore_metadata_errors=True).data if readme else None
    except (OSError, ValueError, TypeError, AttributeError, KeyError, YAMLError, HFValidationError):
        data = None  # someone else's README.md
    if data is None or data.library_name != LIBRARY:
        return CardFacts()
    datasets = [data.datasets] if isinstance(data.datasets, str) else data.datasets or []
    facts = CardFacts(data.base_model, datasets)
    for result in data.eval_results or []:
        facts.results.setdefault(result.dataset_name, {})[result.metric_type] = result.metric_value
    return facts


def hub_name(name: str | None) -> str | None:
    """`owner/name:configuration@split` -> `owner/name` if that can be a hub name and is no local path."""
    name = re.split("[:@]", name or "")[0]
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).exists() else None


def _shown(name: str | None) -> str:
    path = Path(name or "")
    parts = path.parts[-2:] if path.suffix else path.parts[-1:]  # of a file also its folder: data/train.jsonl
    return f"`{hub_name(name) or '/'.join(parts)}`" if name else "not recorded"
