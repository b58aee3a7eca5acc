"""The flags of scripts/compare_heads.py."""

from dataclasses import dataclass
from pathlib import Path

from general_preference.cli import check_at_least, check_seed, flag
from general_preference.datasets.arguments import ReadingArguments
from general_preference.errors import InputError
from general_preference.inference.arguments import DeviceArguments

HEADS = (
    "bt,bt_gate8,gpm2,gpm2_raw,gpm4,gpm4_raw,gpm4_gate,gpm4_gate_raw,gpm6,gpm6_raw,gpm6_gate,gpm6_gate_raw,"
    "gpm8,gpm8_raw,gpm8_gate,gpm8_gate_raw,hybrid3,hybrid7_gate"
)


@dataclass
class ProbingArguments(ReadingArguments, DeviceArguments):
    """Backbone, comparisons, heads, and how they are trained."""

    # fmt: off
    pretrain: str | None = flag(None, "the frozen backbone: a language or preference model, folder or hub name")
    dataset: str | None = flag(None, "comparisons to train on: files, folders or hub names, by commas; see docs/data.md")
    eval_dataset: str | None = flag(None, "sets to compare heads on: path,path or name=path,name=path; default held-out prompts of --dataset")
    output: str = flag("./results/heads", "folder of the results")
    features: str | None = flag(None, "folder of the hidden states, which runs on the same data share; default OUTPUT/features")
    heads: str = flag(HEADS, "what is compared, the others with the first: bt, gpmD, hybridD, of these two also _gate and _raw (planes not normalized); bt_gateD is a Bradley-Terry reward that reads the prompt, of the size of gpmD_gate. (gpm2_gate is gpm2: its one plane has weight 1)")
    seeds: int = flag(5, "trainings of each head, with other weights and another order")
    learning_rates: str = flag("1e-4,3e-4,1e-3,3e-3,1e-2", "tried for each head; the one with the lowest loss on the validation prompts is taken")
    epochs: int = flag(10, "passes over the training comparisons, for all heads")
    batch_size: int = flag(32, "comparisons per step")
    l2: float = flag(0.0, "weight decay")
    learnable_temperature: bool = flag(False, "train the temperature, too (not of bt_gateD)")
    train_split_ratio: float | None = flag(None, "share of --dataset to train on; the rest, with other prompts, is the set 'held_out'; default 0.8, with --eval_dataset 1")
    validation_ratio: float = flag(0.15, "share of the training comparisons, by prompt, that choose learning rates; then all are trained on")
    max_samples: int = flag(1000000, "use at most so many comparisons of --dataset")
    max_len: int | None = flag(None, "tokens of a prompt and a response; default what --pretrain was saved with, else 512")
    seed: int = flag(42, "of the splits; heads have this seed and the following ones")
    save: str | None = flag(None, "save a head with its backbone as a model: its name, or best (lowest validation loss)")
    save_path: str | None = flag(None, "folder of the model of --save; default OUTPUT/model")
    # fmt: on

    def check(self) -> None:
        """InputError for what cannot work, before anything is loaded."""
        if missing := [name for name in ("pretrain", "dataset", "output") if not getattr(self, name)]:
            raise InputError(f"--{missing[0]} is missing")
        self.reading()
        check_at_least(self, 1, "seeds", "epochs", "batch_size", "max_samples", "batch_tokens", "preprocessing_workers")
        check_at_least(self, 0, "l2")
        check_seed(self.seed)
        check_at_least(self, 8, "max_len")
        if not 0 < self.validation_ratio < 1:
            raise InputError(f"--validation_ratio {self.validation_ratio} must lie between 0 and 1")
        if self.train_split_ratio is not None and not 0 < self.train_split_ratio <= 1:
            raise InputError(f"--train_split_ratio {self.train_split_ratio} must lie above 0 and not exceed 1")
        if self.train_split_ratio == 1 and not self.eval_dataset:
            raise InputError("--train_split_ratio 1 holds nothing out: lower it, or add --eval_dataset")
        if self.save_path and not self.save:
            raise InputError(f"--save_path {self.save_path} has no model to hold: add --save best, or a head's name")
        if self.save not in (None, "best") and self.save not in self.head_names():
            raise InputError(f"--save {self.save} is none of --heads, nor best")
        if self.save == "best" and not self.savable():
            raise InputError("--save best: none of --heads is of a preference model")
        if self.save in self.head_names() and self.save not in self.savable():
            raise InputError(f"--save {self.save} is a rival for comparison, no head of a preference model")
        self.rates()

    def head_names(self) -> list[str]:
        """The names in --heads."""
        return [name.strip() for name in self.heads.split(",")]

    def savable(self) -> list[str]:
        """Those of them that a model folder holds."""
        return [name for name in self.head_names() if not name.startswith("bt_gate")]

    def rates(self) -> list[float]:
        """The learning rates, as numbers."""
        try:
            rates = [float(rate) for rate in self.learning_rates.split(",")]
        except ValueError as error:
            raise InputError(f"--learning_rates {self.learning_rates} is no list such as 1e-4,1e-3") from error
        if not all(0 < rate < float("inf") for rate in rates):
            raise InputError(f"--learning_rates {self.learning_rates}: every rate must be positive")
        return sorted(rates)

    @property
    def train_ratio(self) -> float:
        """The share of --dataset to train on."""
        return self.train_split_ratio or (1.0 if self.eval_dataset else 0.8)

    @property
    def features_folder(self) -> Path:
        """Where the hidden states are."""
        return Path(self.features or Path(self.output) / "features")

    @property
    def model_folder(self) -> Path:
        """Where the saved model goes."""
        return Path(self.save_path or Path(self.output) / "model")
