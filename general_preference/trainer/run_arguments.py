"""Flags that every training run has: the backbone, optimizer, engine and output, and the checks among them."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any, get_type_hints

from general_preference.cli import check_at_least, check_seed, flag, parse_flags
from general_preference.errors import InputError
from general_preference.files import replace_text
from general_preference.models.kernels import CHOICES


@dataclass
class BackboneArguments:
    """How a language model is run, and which adapters are trained on it."""

    # fmt: off
    attn_implementation: str = flag("auto", "attention kernel; auto takes the fastest that is exact for the model on this device", choices=CHOICES)
    flash_attn: bool = flag(False, "same as --attn_implementation flash_attention_2 (needs flash-attn and a GPU)")
    trust_remote_code: bool = flag(False, "run code that comes with the model")
    load_in_4bit: bool = flag(False, "4-bit backbone under LoRA (bitsandbytes, GPU)")
    lora_rank: int = flag(0, "rank of LoRA adapters on the backbone; 0 trains the whole backbone")
    lora_alpha: int = flag(16, "LoRA scale numerator")
    lora_dropout: float = flag(0.0, "LoRA dropout")
    target_modules: list[str] | None = field(default_factory=lambda: ["all-linear"], metadata={"help": "modules that get adapters: names, or all-linear"})
    # fmt: on

    @property
    def paths(self) -> list[str | None]:
        """Models that are read."""
        return [self.pretrain]

    def check(self, engine: "EngineArguments") -> None:
        """InputError for values that cannot be used together."""
        if self.flash_attn and self.attn_implementation not in ("auto", "flash_attention_2"):
            raise InputError(f"--flash_attn and --attn_implementation {self.attn_implementation} disagree: drop one")
        check_at_least(self, 0, "lora_rank")
        check_at_least(self, 1, "lora_alpha")
        if self.load_in_4bit and self.lora_rank < 1:
            raise InputError("--load_in_4bit freezes the backbone: add --lora_rank to train adapters")
        if self.load_in_4bit and not engine.bf16:
            raise InputError("--load_in_4bit computes in bfloat16: add --bf16")
        kernel = "flash_attention_2" if self.flash_attn else self.attn_implementation
        if kernel in ("varlen", "flash_attention_2") and not engine.bf16:
            raise InputError(f"--attn_implementation {kernel} computes in half precision: add --bf16, or use auto")


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
        check_seed(self.seed)
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

    def check(self) -> None:
        """InputError for values that cannot be used together."""
        check_at_least(self, 1, "zpg", "dist_timeout")
        if self.selective_checkpointing and not self.gradient_checkpointing:
            raise InputError("--selective_checkpointing is a kind of checkpointing: add --gradient_checkpointing")
        if self.selective_checkpointing and self.gradient_checkpointing_use_reentrant:
            raise InputError("--selective_checkpointing and --gradient_checkpointing_use_reentrant exclude each other")
        if self.gradient_checkpointing_use_reentrant and not self.gradient_checkpointing:
            raise InputError("--gradient_checkpointing_use_reentrant is a kind of --gradient_checkpointing: add that")
        for name in ("torch_compile", "use_liger_kernel"):  # they write into tensors that it believes to be unchanged
            if self.selective_checkpointing and getattr(self, name):
                raise InputError(f"--selective_checkpointing and --{name} exclude each other: drop one")
        if self.torch_compile and self.zero_stage == 3:
            raise InputError("--torch_compile works with weights that are whole: use --zero_stage 2, not 3, or drop it")
        if self.adam_offload and self.zero_stage == 0:
            raise InputError("--adam_offload moves what ZeRO partitions: use --zero_stage 1 to 3, not 0, or drop it")
        own = "bf16" if self.bf16 else "fp32"
        if self.zero_stage == 0 and self.grad_accum_dtype not in (None, own):
            found = f"--grad_accum_dtype {self.grad_accum_dtype} with --zero_stage 0 must be {own}"
            raise InputError(f"{found}, in which it trains: use --zero_stage 1 to 3, or drop it")
        if self.zpg > 1 and self.zero_stage != 3:
            raise InputError(f"--zpg {self.zpg} needs --zero_stage 3, not {self.zero_stage}")


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
class RunArguments:
    """All flags of a training run, by role. model: BackboneArguments with `pretrain`; data, loss: of what is trained.

    data has evaluates (whether anything is evaluated on), sources (paths that are read), group_size and
    return_prompt_length; loss has aux_loss_coef.
    """

    model: BackboneArguments
    data: Any
    loss: Any
    optimizer: OptimizerArguments
    engine: EngineArguments
    output: OutputArguments

    def check(self) -> None:
        """Refuse what cannot work, before anything is loaded. Raises InputError with both values and the cure."""
        for group in (self.data, self.loss, self.optimizer, self.output, self.engine):
            group.check()
        self.model.check(self.engine)
        self.check_routing(self.loss.aux_loss_coef)
        if self.output.save_best_model and not self.data.evaluates:
            raise InputError(f"--save_best_model needs an evaluation: {self.data.evaluated_by}")

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
        return flat

    def save(self, folder: Path, **resolved) -> None:
        """Write arguments.json, `resolved` being what the run found out (world size, steps, versions)."""
        text = json.dumps(self.to_dict() | {"resolved": resolved}, indent=2, sort_keys=True)
        replace_text(folder / "arguments.json", text)


def parse_run(argv: list[str] | None, kind: type[RunArguments], description: str, **options) -> RunArguments:
    """The command line as `kind`, whose fields are groups of flags. options: of `cli.parse_flags`, which see."""
    groups = tuple(get_type_hints(kind)[one.name] for one in fields(kind))
    arguments = kind(*parse_flags(groups, argv, description, **options))
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        arguments.output.load_checkpoint = True
    targets = arguments.model.target_modules
    arguments.model.target_modules = targets[0] if targets == ["all-linear"] else targets
    return arguments
