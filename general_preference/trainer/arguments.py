"""The flags of a reward model's training: its head, data and losses. `parse_arguments` reads the command line.

The paper's flags keep their names and meaning; the rest stand beside them.
"""

import os
import re
from dataclasses import dataclass, replace

from general_preference.cli import check_at_least, flag
from general_preference.datasets.arguments import ReadingArguments
from general_preference.datasets.sources import parse_sources
from general_preference.errors import InputError
from general_preference.models.config import HEADS, INPUT_FORMATS, PreferenceConfig
from general_preference.models.heads import SavedHead
from general_preference.models.losses import LanguageModelLossKind, PreferenceLossKind
from general_preference.models.starting import head_to_train
from general_preference.trainer.run_arguments import BackboneArguments, RunArguments, parse_run

DEFAULT_MAX_LEN = 512


@dataclass
class ModelArguments(BackboneArguments):
    """What is trained: the backbone, its head, and adapters."""

    # fmt: off
    pretrain: str = flag("google/gemma-2b-it", "base language model, or an earlier preference model: folder or hub name")
    preference_head: str | None = flag(None, "bt (one number), gpm (planes) or hybrid (both); default what --pretrain has, gpm with --is_general_preference, else bt", choices=list(HEADS))
    is_general_preference: bool = flag(False, "train a General Preference Model; same as --preference_head gpm")
    value_head_dim: int | None = flag(None, "size D of an embedding: even for gpm (default 2), odd for hybrid (default 3), 1 for bt")
    add_prompt_head: bool = flag(False, "weigh the planes by a gate that reads the prompt's last token")
    gate: str | None = flag(None, "softmax (default): gate weights sum to 1; scaled_softmax: to the number of planes", choices=["softmax", "scaled_softmax"])
    normalize: bool | None = flag(None, "L2-normalize the planes of an embedding; default on for gpm and hybrid, never for bt")
    general_preference_tau: float | None = flag(None, "temperature tau of P = sigmoid(score / tau); default 0.1 for gpm and hybrid, 1 for bt", aliases=["--tau"])
    learnable_temperature: bool = flag(False, "optimize the temperature, starting at --general_preference_tau; saved with the model")
    new_head: bool = flag(False, "start with new heads where --pretrain has the same: only its backbone is kept")
    keep_reward: bool = flag(False, "a hybrid head on a Bradley-Terry --pretrain that starts as its reward")
    input_format: str | None = flag(None, "what is tokenized: chat, sequence_classification (as transformers' reward models), openrlhf, or released (published checkpoints); default what the model was saved with, else chat", choices=list(INPUT_FORMATS))
    disable_fast_tokenizer: bool = flag(False, "use the slow (Python) tokenizer where a model has both")
    input_template: str | None = flag(None, "replaces the chat template: '{}' is the user's text, \\n a new line, \\t a tab, \\\\ a backslash (a tokenizer without one gets 'Human:\\n{}\\nAssistant:\\n')")
    # fmt: on

    def preference(self, max_length: int | None, saved: SavedHead | None = None) -> PreferenceConfig:
        """The head to train: what the flags ask for, on a model with the head `saved` or with none.

        Raises:
            InputError: flags that contradict each other or the head that is continued.
        """
        if self.is_general_preference and self.preference_head == "bt":
            raise InputError("--is_general_preference asks for a GPM, --preference_head bt for Bradley-Terry: drop one")
        if self.new_head and self.keep_reward:
            raise InputError("--new_head forgets the reward that --keep_reward keeps: drop one")
        kind = self.preference_head or ("gpm" if self.is_general_preference else None)
        preference = head_to_train(
            self.pretrain, saved, kind, new=self.new_head, keep_reward=self.keep_reward, max_length=max_length,
            dim=self.value_head_dim, prompt_gate=self.add_prompt_head or None, gate=self.gate, normalize=self.normalize,
            temperature=self.general_preference_tau, learnable_temperature=self.learnable_temperature,
            input_format=self.input_format,
        )  # fmt: skip
        return replace(preference, max_length=preference.max_length or DEFAULT_MAX_LEN)


@dataclass
class DataArguments(ReadingArguments):
    """What it is trained and evaluated on."""

    evaluated_by = "add --eval_dataset or --train_split_ratio below 1"

    # fmt: off
    dataset: str | None = flag(None, "comparisons to train on: files (jsonl, json, csv, tsv, parquet, arrow), folders, patterns or hub names (owner/name:config@split), separated by commas")
    dataset_probs: str | None = flag(None, "probability of each set, as in 0.4,0.6: sets are drawn until each was seen whole; default end to end")
    eval_dataset: str | None = flag(None, "sets to evaluate on: path,path or name=path,name=path")
    train_split_ratio: float = flag(1.0, "share of --dataset to train on; the rest, with other prompts, is the set 'held_out'")
    max_samples: int = flag(1000000, "use at most so many comparisons of --dataset, drawn after the shuffle")
    max_len: int | None = flag(None, "tokens of a prompt and a response; prompts are cut first, at their oldest end; default what --pretrain was saved with, else 512")
    group_size: int = flag(1, "neighboring records that stay in one step")
    preprocessing_workers: int = flag(min(8, os.cpu_count() or 1), "processes that tokenize")
    return_prompt_length: bool = flag(False, "log the mean prompt length of each step (train/prompt_length, tokens)")
    # fmt: on

    def check(self) -> None:
        """InputError for values that cannot be used together."""
        if not self.dataset:
            raise InputError("--dataset is missing: name a file, folder or hub dataset of comparisons")
        self.reading()
        if not 0 < self.train_split_ratio <= 1:
            raise InputError(f"--train_split_ratio {self.train_split_ratio} must lie above 0 and not exceed 1")
        check_at_least(self, 1, "max_samples", "group_size", "preprocessing_workers")
        check_at_least(self, 8, "max_len")  # room for a prompt and a response
        if self.group_size > 1 and self.dataset_probs and self.dataset_probs.count(","):
            raise InputError("--group_size keeps neighbors together, --dataset_probs draws one by one: drop one")

    @property
    def evaluates(self) -> bool:
        """Whether there is a set to evaluate on."""
        return bool(self.eval_dataset) or self.train_split_ratio < 1

    @property
    def sources(self) -> list[str]:
        """Paths and hub names that are read."""
        return [source.path for text in (self.dataset, self.eval_dataset) if text for source in parse_sources(text)]


@dataclass
class LossArguments:
    """What is minimized: (1 - c) * preference + c * regularizer + a * load balance of experts."""

    # fmt: off
    loss: PreferenceLossKind = flag("logistic", "logistic: cross-entropy with sigmoid(score / tau); regression: squared distance to a target")
    margin_loss: bool = flag(False, "use the records' margin: the preferred side should win by so much (logistic)")
    regression_target_margin: float = flag(10.0, "target of score / tau under --loss regression")
    add_pretrain_loss: bool = flag(False, "add a language-model regularizer on chosen responses")
    ptx_loss_coef: float = flag(0.1, "its share c in [0, 1]")
    ptx_loss: LanguageModelLossKind = flag("vanilla", "which regularizer")
    ptx_response_only: bool = flag(False, "regularize the response's tokens alone; default the whole chosen sequence")
    reward_scaler_beta: float = flag(2.0, "beta of the regularizers mean, sum and reference_free")
    reward_margin: float = flag(1.0, "margin of the reference_free regularizer")
    aux_loss_coef: float | None = flag(None, "weight a of the load-balancing loss of experts; default the model's router_aux_loss_coef if it sets output_router_logits, else 0")
    compute_fp32_loss: bool = flag(False, "compute heads, scores and losses in fp32: always so here, whatever the backbone's dtype")
    # fmt: on

    def check(self) -> None:
        """InputError for values that cannot be used together."""
        if self.loss == "regression" and self.margin_loss:
            raise InputError("--margin_loss belongs to --loss logistic; regression has --regression_target_margin")
        if not 0 <= self.ptx_loss_coef <= 1:
            raise InputError(f"--ptx_loss_coef {self.ptx_loss_coef} must lie between 0 and 1")
        check_at_least(self, 0, "aux_loss_coef")
        if self.ptx_loss_coef == 1 and self.add_pretrain_loss:
            raise InputError("--ptx_loss_coef 1 leaves no preference loss: use a smaller share")


@dataclass
class Arguments(RunArguments):
    """All flags of a reward model's training, by role."""

    model: ModelArguments
    data: DataArguments
    loss: LossArguments

    def to_dict(self) -> dict:
        """As `RunArguments.to_dict`; a template as the flag is written."""
        flat = super().to_dict()
        if flat["input_template"] is not None:
            flat["input_template"] = flat["input_template"].replace("\\", "\\\\")
        return flat


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """Read the command line; see `parse_run`."""
    arguments = parse_run(argv, Arguments, "Train a preference model. Every flag: --help.", replaced=_replaced)
    if arguments.model.input_template is not None:
        arguments.model.input_template = _unescape(arguments.model.input_template)
    return arguments


def _unescape(text: str) -> str:
    """The text that is meant by one with \\n, \\t and \\\\; any other backslash stays."""
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t", "\\": "\\"}[found[1]], text)


def _replaced(flags) -> tuple[str, ...]:
    """Keys of a --config file that a head on the command line replaces: it is chosen as a whole."""
    if flags.preference_head is None and not flags.keep_reward:
        return ()
    head = ("is_general_preference", "value_head_dim", "add_prompt_head")
    return (*head, "general_preference_tau") if flags.keep_reward or flags.preference_head == "bt" else head
