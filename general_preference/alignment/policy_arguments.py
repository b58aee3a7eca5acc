"""The flags of a policy's training, and the published recipes that set them."""

from dataclasses import dataclass, field

from general_preference.alignment.targets import TargetKind
from general_preference.cli import check_at_least, flag
from general_preference.errors import InputError
from general_preference.models.losses import PolicyLossKind
from general_preference.trainer.run_arguments import BackboneArguments, OutputArguments, RunArguments, parse_run

_PAPER = {"adam_betas": [0.0, 0.99], "lr_schedule": "linear", "warmup_ratio": 0.1, "learning_rate": 5e-7}
_PAPER |= {"max_epochs": 1, "select": "pair", "beta": 0.001}
# What was published, no more: the betas (0, 0.99) are RMSprop's up to the correction of its bias.
RECIPES = {
    "gpo": _PAPER | {"loss": "regression", "target": "score"},
    "ln_gpo": _PAPER | {"loss": "regression", "target": "score", "length_normalization": 1.0},
    "sppo": _PAPER | {"loss": "regression", "target": "probability"},
    "dsppo": _PAPER | {"loss": "regression", "target": "dynamic", "dynamic_lambda": 1.0},
    "inpo": {
        "loss": "centered", "target": "hard", "select": "pair", "beta": 0.015, "anchors": "ref=0.3333,t=0.6667",
        "learning_rate": 1e-6, "lr_schedule": "cosine", "warmup_ratio": 0.1,
    },
    "dpo": {"loss": "logistic", "target": "hard", "select": "pair", "beta": 0.1, "anchors": "ref=1"},
    "best_of_n": {"loss": "likelihood", "select": "best"},
}  # fmt: skip
GAPS = {
    "gpo": "the published code reads no limit of the target (its CLAMP_THRES), so none is set",
    "dsppo": "the limit of its rewards (delta) is in no text that was found, so none is set",
}


@dataclass
class PolicyArguments(BackboneArguments):
    """What is trained, from which model."""

    # fmt: off
    pretrain: str | None = flag(None, "policy that wrote the samples: folder, LoRA adapter or hub name", aliases=["--policy"])
    reference: str | None = flag(None, "reference policy of an anchor 'ref'; default --start, in the first iteration --policy")
    start: str | None = flag(None, "policy that the iterations started from, which the loop names")
    # fmt: on

    @property
    def anchor_paths(self) -> dict[str, str]:
        """Paths of what log-ratios can be taken against."""
        return {"t": self.pretrain, "ref": self.reference or self.start or self.pretrain}

    @property
    def paths(self) -> list[str | None]:
        """Models that are read."""
        return [self.pretrain, self.reference, self.start]


@dataclass
class SampleArguments:
    """Samples of the policy and their scores."""

    # fmt: off
    samples: list[str] = field(default_factory=list, metadata={"help": "files of samples, as generate_responses.py writes them"})
    scores: list[str] = field(default_factory=list, metadata={"help": "their scores, as score_responses.py writes them, in the same order"})
    eval_samples: str | None = flag(None, "samples of held-out prompts to evaluate the loss on")
    eval_scores: str | None = flag(None, "their scores")
    any_policy: bool = flag(False, "train on samples that another policy wrote")
    # fmt: on

    evaluated_by = "add --eval_samples and --eval_scores"
    group_size, return_prompt_length = 1, False

    def check(self) -> None:
        """InputError for files that do not go together."""
        if not self.samples:
            raise InputError("--samples names no file: give one or more, as generate_responses.py writes them")
        if self.scores and len(self.samples) != len(self.scores):
            found = f"--samples has {len(self.samples)} files, --scores {len(self.scores)}"
            raise InputError(f"{found}: give one of each, in the same order")
        if self.eval_scores is not None and self.eval_samples is None:
            raise InputError("--eval_samples and --eval_scores go together: give both")

    @property
    def evaluates(self) -> bool:
        """Whether there is a set to evaluate on."""
        return self.eval_samples is not None

    @property
    def sources(self) -> list[str]:
        """Paths that are read."""
        return [*self.samples, *self.scores, *filter(None, (self.eval_samples, self.eval_scores))]


@dataclass
class PolicyLossArguments:
    """What the policy's log-ratios are pulled to, and how."""

    # fmt: off
    recipe: str | None = flag(None, "published settings of a method, which are printed; flags beside it win", choices=list(RECIPES))
    loss: PolicyLossKind = flag("centered", "centered: the exact step, whatever Z is; regression: log Z = 0; logistic: DPO; surrogate: clipped policy gradient; likelihood: fine-tuning")
    target: TargetKind = flag("score", "score: GPO; probability: SPPO; dynamic: DSPPO; hard: order alone; win_rate: soft labels of --loss logistic; planes: GPRL's advantage, for --loss surrogate")
    beta: float = flag(10.0, "strength of the regularization: targets are divided by it; without effect where it is so small that the loss never comes near its minimum")
    select: str = flag("all", "responses of a prompt that are trained on: all, the best and the worst by mean score, or the best", choices=["all", "pair", "best"])
    count_self: bool = flag(True, "average scores over all K responses, as published; false: over the K - 1 others, which is unbiased")
    clamp_target: float | None = flag(None, "limit of a target's absolute value")
    length_normalization: float = flag(0.0, "gamma of log-ratio / length^gamma; 1 is LN-GPO")
    anchors: str = flag("t=1", "what log-ratios are taken against: weights of the sampling policy (t) and of the reference (ref), such as ref=0.33,t=0.67")
    iteration: int = flag(1, "number of this iteration, from 1, for --target dynamic")
    dynamic_lambda: float = flag(1.0, "lambda of --target dynamic")
    clip: float | None = flag(0.2, "clip of --loss surrogate")
    aux_loss_coef: float | None = flag(None, "weight of the load-balancing loss of experts; default the model's router_aux_loss_coef if it sets output_router_logits, else 0")
    # fmt: on

    def check(self) -> None:
        """InputError for values that cannot be used together."""
        check_at_least(self, 1e-30, "beta", "clamp_target", "clip")
        check_at_least(self, 0, "length_normalization", "dynamic_lambda", "aux_loss_coef")
        check_at_least(self, 1, "iteration")
        for loss, targets in (
            ("logistic", ("hard", "win_rate")),
            ("surrogate", ("planes", "score", "probability", "hard")),
        ):
            if self.loss == loss and self.target not in targets:
                raise InputError(f"--loss {loss} takes --target {' or '.join(targets)}, not {self.target}")
        if self.target == "win_rate" and self.loss != "logistic":
            raise InputError(f"--target win_rate labels pairs for --loss logistic, not {self.loss}")
        if self.target == "planes" and self.loss != "surrogate":
            raise InputError(f"--target planes is an advantage for --loss surrogate, not {self.loss}")
        if self.target == "win_rate" and self.clamp_target is not None:
            raise InputError("--clamp_target would distort the probabilities of --target win_rate: drop it")
        if self.loss == "logistic" and self.select != "pair":
            raise InputError(f"--loss logistic compares pairs: use --select pair, not {self.select}")
        if self.select == "best" and self.loss != "likelihood":
            raise InputError(f"--select best leaves nothing to compare with: use --loss likelihood, not {self.loss}")
        if self.length_normalization and self.loss in ("surrogate", "likelihood"):
            found = f"--length_normalization {self.length_normalization} is not read by --loss {self.loss}"
            raise InputError(f"{found}, which divides by the length anyway: drop it")
        if self.loss == "surrogate" and self.weights() != {"t": 1}:
            raise InputError(f"--loss surrogate takes ratios to the sampling policy, --anchors t=1, not {self.anchors}")
        self.weights()

    def unread(self) -> list[str]:
        """Flags that differ from their default, but that this loss and target do not read."""
        targets = self.loss != "likelihood"
        averages = targets and self.target in ("score", "probability", "dynamic")
        read = {
            "target": targets,
            "beta": self.loss == "logistic" or (targets and self.target != "planes"),
            "count_self": averages,
            "clamp_target": targets and not (self.loss == "logistic" and self.target == "hard"),
            "anchors": targets,
            "dynamic_lambda": targets and self.target == "dynamic",
            "clip": self.loss == "surrogate",
        }
        default = PolicyLossArguments()
        names = [name for name in read if not read[name] and getattr(self, name) != getattr(default, name)]
        return [f"--{name} {getattr(self, name)}" for name in names]

    def __str__(self) -> str:
        if self.loss == "likelihood":
            return "likelihood loss"
        return f"{self.loss} loss, {self.target} targets, beta {self.beta:g}"

    @property
    def fine_tunes(self) -> bool:
        """Whether all responses are imitated as they are."""
        return self.loss == "likelihood" and self.select == "all"

    def weights(self) -> dict[str, float]:
        """{"t" or "ref": weight} of the anchors, none for the likelihood; rounded ones made to sum to 1, since
        log-probabilities are in the hundreds. InputError for what is not read so."""
        if self.loss == "likelihood":
            return {}
        found = {}
        for part in self.anchors.split(","):
            name, _, number = part.partition("=")
            if name in found:
                raise InputError(f"--anchors {self.anchors}: {name} is given twice")
            try:
                found[name] = float(number)
            except ValueError as error:
                raise InputError(f"--anchors {self.anchors}: expected t=1, ref=1 or both with weights") from error
        total = sum(found.values())
        if not found.keys() <= {"t", "ref"} or not abs(total - 1) <= 1e-3 or min(found.values()) < 0:
            raise InputError(f"--anchors {self.anchors}: the weights of t and ref must be positive and sum to 1")
        return {name: weight / total for name, weight in found.items() if weight}


@dataclass
class PolicyOutputArguments(OutputArguments):
    """What is written, when, and where."""

    # fmt: off
    save_path: str = flag("./checkpoint/policy", "folder of the run: model, metrics, pictures, arguments")
    wandb_project: str = flag("train_policy_general_preference", "wandb project")
    skip_finished: bool = flag(False, "do nothing where --save_path holds the finished run; one with other flags is refused")
    # fmt: on

    def check(self) -> None:
        """As `OutputArguments.check`."""
        super().check()
        if self.plan is not None:
            raise InputError("--plan is of the training of reward models: drop it")


@dataclass
class PolicyRunArguments(RunArguments):
    """All flags of a policy's training, by role."""

    model: PolicyArguments
    data: SampleArguments
    loss: PolicyLossArguments
    output: PolicyOutputArguments

    def check(self) -> None:
        """As `RunArguments.check`."""
        if self.model.pretrain is None:
            raise InputError("--policy names no model: give the policy that wrote the samples")
        if self.model.reference is not None and "ref" not in self.loss.weights():
            raise InputError("--reference is read where --anchors has ref: add it, or drop the reference")
        known = self.model.reference or self.model.start or self.loss.iteration == 1
        if not known and "ref" in self.loss.weights():
            found = (
                f"--anchors {self.loss.anchors} at --iteration {self.loss.iteration}: the policy is no reference then"
            )
            raise InputError(f"{found}: name by --reference the one that the alignment started from")
        super().check()
        if not self.loss.fine_tunes and not self.data.scores:
            raise InputError("--scores is missing: only --loss likelihood with --select all does without")
        if not self.loss.fine_tunes and self.data.evaluates and self.data.eval_scores is None:
            raise InputError("--eval_samples and --eval_scores go together: give both")


def parse_policy_arguments(argv: list[str] | None = None) -> PolicyRunArguments:
    """Read the command line; a recipe's values where no flag is given. One named there wins over a --config file."""
    text = "Train a policy on scored samples. Every flag: --help."

    def preset(flags) -> dict:
        return RECIPES.get(flags.recipe, {})

    return parse_run(argv, PolicyRunArguments, text, presets=preset, replaced=preset)
