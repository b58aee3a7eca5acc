"""The flags of policy alignment."""

from dataclasses import dataclass, field

from general_preference.cli import check_at_least, flag
from general_preference.errors import InputError
from general_preference.models.kernels import CHOICES

COMPARED = "name=FILE for each policy, samples of the same prompts: the start first, the current policy last"


@dataclass
class ComparisonReportArguments:
    """Which policies are compared, by which preference models, and where the report goes."""

    samples: list[str] = field(default_factory=list, metadata={"help": COMPARED})
    model: str | None = flag(None, "trained preference model: folder or hub name")
    judge: str | None = flag(None, "a second preference model, that no policy was trained with: the same columns by it")
    output: str = flag("report.json", "file of all numbers; the picture gets its name with .png")
    train_report: str | None = flag(None, "JSON file of the training with the KL divergence of the current policy")
    max_length: int | None = flag(None, "tokens of prompt and one response; default what the model was trained with")
    general_preference_tau: float | None = flag(None, "temperature of published weights (0.1)", aliases=["--tau"])
    judge_tau: float | None = flag(None, "the same of the judge")
    bf16: bool | None = flag(None, "bfloat16 backbone; default on GPUs that compute it fast")
    attn_implementation: str = flag("auto", "attention kernel; auto: the fastest that is exact here", choices=CHOICES)
    trust_remote_code: bool = flag(False, "run code that comes with the models")
    device: str = flag("auto", "auto (a GPU if there is one, else mps or the CPU), cuda:N, mps or cpu")
    batch_tokens: int | None = flag(None, "tokens in one call at most, padding included; default fits the device")

    def check(self) -> None:
        """InputError for what cannot work, before anything is loaded."""
        if self.model is None:
            raise InputError("--model names no preference model: give a folder or hub name")
        if self.judge is None and self.judge_tau is not None:
            raise InputError(f"--judge_tau {self.judge_tau} is of a --judge, which is not given")
        if not self.output.endswith(".json"):
            raise InputError(f"--output {self.output!r} must end in .json")
        check_at_least(self, 1, "batch_tokens")
        self.named_samples()

    def named_samples(self) -> dict[str, str]:
        """{name: path} of the policies in their order. InputError for fewer than two, or a name or file given twice."""
        found = {}
        for one in self.samples:
            name, _, path = one.partition("=")
            if not name or not path:
                raise InputError(f"--samples {one!r} names no policy: expected name=FILE")
            if name in found or path in found.values():
                raise InputError(f"--samples {one!r} is given twice: each policy has its own name and file")
            found[name] = path
        if len(found) < 2:
            raise InputError(f"--samples names {len(found)} policies: expected at least the start and the current one")
        return found
