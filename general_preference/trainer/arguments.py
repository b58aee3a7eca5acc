"""Every training flag, by role, with the checks that refuse contradictions before anything is loaded.

The paper's flags keep their names and meaning; the rest stand beside them. `parse_arguments` is the only place that
reads the command line.
"""

import json
import os
import re
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path

from general_preference.cli import check_at_least, flag, parse_flags
from general_preference.datasets.arguments import ReadingArguments
from general_preference.errors import InputError
from general_preference.files import replace_text
from general_preference.models.config import HEADS, INPUT_FORMATS, PreferenceConfig
from general_preference.models.heads import SavedHead
from general_preference.models.kernels import CHOICES
from general_preference.models.losses import LanguageModelLossKind, PreferenceLossKind
from general_preference.models.starting import head_to_train

DEFAULT_MAX_LEN = 512


@dataclass
class ModelArguments:
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
    attn_implementation: str = flag("auto", "attention kernel; auto takes the fastest that is exact for the model on this device", choices=CHOICES)
    flash_attn: bool = flag(False, "same as --attn_implementation flash_attention_2 (needs flash-attn and a GPU)")
    disable_fast_tokenizer: bool = flag(False, "use the slow (Python) tokenizer where a model has both")
    input_template: str | None = flag(None, "replaces the chat template: '{}' is the user's text, \\n a new line, \\t a tab, \\\\ a backslash (a tokenizer without one gets 'Human:\\n{}\\nAssistant:\\n')")
    trust_remote_code: bool = flag(False, "run code that comes with the model")
    load_in_4bit: bool = flag(False, "4-bit backbone under LoRA (bitsandbytes, GPU)")
    lora_rank: int = flag(0, "rank of LoRA adapters on the backbone; 0 trains the whole backbone")
    lora_alpha: int = flag(16, "LoRA scale numerator")
    lora_dropout: float = flag(0.0, "LoRA dropout")
    target_modules: list[str] | None = field(default_factory=lambda: ["all-linear"], metadata={"help": "modules that get adapters: names, or all-linear"})
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
class OptimizerArguments:
    """How weights move, and in what portions comparisons reach them."""

    # fmt: off
    learning_rate: float = flag(1e-5, "peak learning rate of AdamW")
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.95], metadata={"help": "AdamW's two betas, as in --adam_betas 0.9 0.95"})
    l2: float = flag(0.0, "weight decay")
    max_norm: float = flag(1.0, "clip the global gradient norm here; 0 does not clip")
    max_epochs: int = flag(1, "passes over the training set")
    lr_schedule: str = flag("cosine", "learning rate after the warm-up: falls to zero on a cosine or a line, or stays", choices=["cosine", "linear", "constant"])
    warmup_ratio: float = flag(0.03, "share of the steps in which the learning rate rises")
    micro_train_batch_size: int = flag(8, "comparisons per process and forward pass")
    accumulated_gradient: int = flag(1, "micro-batches per step; global batch = micro-batch * accumulation * processes")
    seed: int = flag(42, "seed of heads, shuffles and dropout")
    # fmt: on

    def check(self) -> None:
        """InputError for values out of range."""
        check_at_least(self, 1, "max_epochs", "micro_train_batch_size", "accumulated_gradient")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed {self.seed} must be from 0 to 4294967295")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise InputError(f"--adam_betas {self.adam_betas} must be two numbers from 0 to below 1")
        check_at_least(self, 0, "learning_rate", "l2", "max_norm", "warmup_ratio")


@dataclass
class EngineArguments:
    """DeepSpeed, precision and memory."""

    # fmt: off
    zero_stage: int = flag(2, "ZeRO stage: what is partitioned over processes (1 optimizer, 2 gradients, 3 weights)", choices=[0, 1, 2, 3])
    bf16: bool = flag(False, "train the backbone in bfloat16; default fp32")
    gradient_checkpointing: bool = flag(False, "recompute activations in backward: less memory, about a third more time")
    gradient_checkpointing_use_reentrant: bool = flag(False, "the older, re-entrant kind of checkpointing")
    selective_checkpointing: bool = flag(False, "with --gradient_checkpointing: keep matrix products and attention, recompute the cheap rest")
    torch_compile: bool = flag(False, "compile the layers with torch.compile (ZeRO 0 to 2; a minute at the start)")
    use_liger_kernel: bool = flag(False, "fused kernels of the package liger-kernel (GPU)")
    adam_offload: bool = flag(False, "keep optimizer states in main memory")
    zpg: int = flag(1, "ZeRO++ secondary partition size (processes per node), ZeRO 3")
    grad_accum_dtype: str | None = flag(None, "dtype in which gradients accumulate", choices=["fp32", "bf16", "fp16"])
    disable_trace_cache: bool = flag(False, "ZeRO 3: do not rely on modules running in the same order every step")
    deepspeed_config: str | None = flag(None, "a DeepSpeed configuration (JSON) merged over what the flags describe; what flags decide it cannot change")
    local_rank: int = flag(-1, "set by launchers")
    dist_timeout: int = flag(1800, "seconds a process waits for the others before the run ends with an error")
    # fmt: on


@dataclass
class OutputArguments:
    """What is written, when, and where."""

    # fmt: off
    save_path: str = flag("./checkpoint/rm", "folder of the run: model, metrics, pictures, arguments")
    save_steps: int = flag(-1, "write a resumable checkpoint every so many steps; -1 only when a signal ends the run")
    save_minutes: float | None = flag(None, "also write a resumable checkpoint every so many minutes, for queues that take machines away")
    ckpt_path: str | None = flag(None, "folder of resumable checkpoints; default SAVE_PATH/checkpoint")
    max_ckpt_num: int = flag(3, "resumable checkpoints to keep, newest first")
    max_ckpt_mem: float = flag(1000, "GB that resumable checkpoints may take together; the newest always stays")
    load_checkpoint: bool = flag(False, "continue from the newest whole checkpoint in --ckpt_path; implied when torchrun starts the processes again")
    plan: int | None = flag(None, "print memory, steps and hours of this run on so many GPUs, and exit")
    logging_steps: int = flag(1, "log every so many steps")
    eval_steps: int = flag(-1, "evaluate every so many steps; -1 after each epoch")
    save_best_model: int | None = flag(None, "keep the N models with the lowest evaluation loss under SAVE_PATH/best")
    use_wandb: str | None = flag(None, "log to wandb as well: an API key, online (already logged in) or offline")
    wandb_org: str | None = flag(None, "wandb entity")
    wandb_group: str | None = flag(None, "wandb group")
    wandb_project: str = flag("train_rm_general_preference", "wandb project")
    wandb_run_name: str = field(default_factory=lambda: datetime.now().strftime("rm_%m%dT%H:%M"), metadata={"help": "wandb run; default rm_DATE"})
    # fmt: on

    @property
    def checkpoint_folder(self) -> Path:
        """Where resumable checkpoints go."""
        return Path(self.ckpt_path) if self.ckpt_path else Path(self.save_path) / "checkpoint"

    def check(self) -> None:
        """InputError for values out of range."""
        check_at_least(self, 1, "logging_steps", "save_best_model", "max_ckpt_num", "plan")
        check_at_least(self, 1e-9, "save_minutes", "max_ckpt_mem")
        for name in ("save_steps", "eval_steps"):
            if getattr(self, name) < 1 and getattr(self, name) != -1:
                raise InputError(f"--{name} {getattr(self, name)} must be at least 1, or -1")


@dataclass
class Arguments:
    """All flags of a training run, by role."""

    model: ModelArguments
    data: DataArguments
    loss: LossArguments
    optimizer: OptimizerArguments
    engine: EngineArguments
    output: OutputArguments

    def check(self) -> None:
        """Refuse what cannot work, before anything is loaded. Raises InputError with both values and the cure."""
        for group in (self.data, self.loss, self.optimizer, self.output):
            group.check()
        model, engine, output = self.model, self.engine, self.output
        if model.flash_attn and model.attn_implementation not in ("auto", "flash_attention_2"):
            raise InputError(f"--flash_attn and --attn_implementation {model.attn_implementation} disagree: drop one")
        check_at_least(model, 0, "lora_rank")
        check_at_least(model, 1, "lora_alpha")
        check_at_least(engine, 1, "zpg", "dist_timeout")
        if model.load_in_4bit and model.lora_rank < 1:
            raise InputError("--load_in_4bit freezes the backbone: add --lora_rank to train adapters")
        if model.load_in_4bit and not engine.bf16:
            raise InputError("--load_in_4bit computes in bfloat16: add --bf16")
        if engine.selective_checkpointing and not engine.gradient_checkpointing:
            raise InputError("--selective_checkpointing is a kind of checkpointing: add --gradient_checkpointing")
        if engine.selective_checkpointing and engine.gradient_checkpointing_use_reentrant:
            raise InputError("--selective_checkpointing and --gradient_checkpointing_use_reentrant exclude each other")
        if engine.gradient_checkpointing_use_reentrant and not engine.gradient_checkpointing:
            raise InputError("--gradient_checkpointing_use_reentrant is a kind of --gradient_checkpointing: add that")
        for name in ("torch_compile", "use_liger_kernel"):  # they write into tensors that it believes to be unchanged
            if engine.selective_checkpointing and getattr(engine, name):
                raise InputError(f"--selective_checkpointing and --{name} exclude each other: drop one")
        kernel = "flash_attention_2" if model.flash_attn else model.attn_implementation
        if kernel in ("varlen", "flash_attention_2") and not engine.bf16:
            raise InputError(f"--attn_implementation {kernel} computes in half precision: add --bf16, or use auto")
        if engine.torch_compile and engine.zero_stage == 3:
            raise InputError("--torch_compile works with weights that are whole: use --zero_stage 2, not 3, or drop it")
        if engine.adam_offload and engine.zero_stage == 0:
            raise InputError("--adam_offload moves what ZeRO partitions: use --zero_stage 1 to 3, not 0, or drop it")
        own = "bf16" if engine.bf16 else "fp32"
        if engine.zero_stage == 0 and engine.grad_accum_dtype not in (None, own):
            found = f"--grad_accum_dtype {engine.grad_accum_dtype} with --zero_stage 0 must be {own}"
            raise InputError(f"{found}, in which it trains: use --zero_stage 1 to 3, or drop it")
        if engine.zpg > 1 and engine.zero_stage != 3:
            raise InputError(f"--zpg {engine.zpg} needs --zero_stage 3, not {engine.zero_stage}")
        self.check_routing(self.loss.aux_loss_coef)
        if output.save_best_model and not self.data.eval_dataset and self.data.train_split_ratio == 1:
            raise InputError("--save_best_model needs an evaluation: add --eval_dataset or --train_split_ratio below 1")

    def check_routing(self, coefficient: float | None) -> None:
        """Refuse a load-balancing loss without gradient; called again when the model's own weight for it is known."""
        if coefficient and self.engine.gradient_checkpointing_use_reentrant:
            raise InputError(
                "--gradient_checkpointing_use_reentrant gives the load-balancing loss no gradient, and --aux_loss_coef "
                f"is {coefficient}: drop it, or set --aux_loss_coef 0"
            )

    def to_dict(self) -> dict:
        """All flags, flat, as saved in arguments.json; a wandb key is never among them."""
        flat = {name: value for group in vars(self).values() for name, value in asdict(group).items()}
        if flat["use_wandb"] not in (None, "online", "offline"):
            flat["use_wandb"] = "online"
        if flat["input_template"] is not None:  # as the flag is written
            flat["input_template"] = flat["input_template"].replace("\\", "\\\\")
        return flat

    def save(self, folder: Path, **resolved) -> None:
        """Write arguments.json, `resolved` being what the run found out (world size, steps, versions)."""
        text = json.dumps(self.to_dict() | {"resolved": resolved}, indent=2, sort_keys=True)
        replace_text(folder / "arguments.json", text)


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """Read the command line. Unknown flags and values of the wrong type end the program with code 2, as argparse does."""
    groups = (ModelArguments, DataArguments, LossArguments, OptimizerArguments, EngineArguments, OutputArguments)
    arguments = Arguments(*parse_flags(groups, argv, "Train a preference model. Every flag: --help.", _replaced))
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        arguments.output.load_checkpoint = True
    if arguments.model.input_template is not None:
        arguments.model.input_template = _unescape(arguments.model.input_template)
    targets = arguments.model.target_modules
    arguments.model.target_modules = targets[0] if targets == ["all-linear"] else targets
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
