"""The flags of the stages of policy alignment but the training's (policy_arguments.py)."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from general_preference.cli import check_at_least, check_seed, flag
from general_preference.datasets.arguments import ReadingArguments
from general_preference.errors import InputError

COMPARED = "name=FILE for each policy, samples of the same prompts: the start first, the current policy last"


@dataclass
class GenerationArguments(ReadingArguments):
    """A policy, prompts, and how it answers them. With temperature 1 and top_p 1 samples come from the policy itself."""

    policy: str | None = flag(None, "language model that answers: folder, LoRA adapter or hub name")
    prompts: str | None = flag(
        None, "records with prompts: files, folders, patterns or hub names, by commas; of comparisons their prompts"
    )
    output: str = flag("samples.jsonl", "file of the responses, one JSON object a line")
    samples: int = flag(8, "responses to each prompt (K)")
    temperature: float = flag(1.0, "of sampling")
    top_p: float = flag(1.0, "sample from the likeliest tokens of this probability")
    max_new_tokens: int = flag(256, "tokens of a response at most, the stop token included")
    max_prompt_tokens: int | None = flag(None, "leave out prompts of more tokens, and count them")
    max_prompts: int | None = flag(None, "answer at most so many prompts, drawn by --seed")
    seed: int = flag(42, "seed of the samples and of the draw of --max_prompts")
    engine: str = flag(
        "auto",
        "what generates; auto: vllm where GENERATE_PYTHON names its interpreter, else transformers",
        choices=["auto", "transformers", "continuous", "vllm"],
    )
    batch_tokens: int | None = flag(
        None, "tokens in one call of engine transformers, responses at their longest; default fits the device"
    )
    vllm_options: str = flag("{}", 'more arguments of vllm.LLM as JSON, such as {"gpu_memory_utilization": 0.8}')
    bf16: bool | None = flag(None, "bfloat16 policy; default on GPUs that compute it fast")
    device: str = flag("auto", "auto (one GPU per process, else mps or the CPU), cuda:N, mps or cpu")
    trust_remote_code: bool = flag(False, "run code that comes with the policy")
    overwrite: bool = flag(False, "replace samples of another policy, other prompts or other settings in --output")
    local_rank: int = flag(-1, "set by launchers")

    def check(self) -> None:
        """InputError for what cannot work, before anything is loaded."""
        _check_paths(self, "policy", "prompts")
        self.reading()
        check_at_least(self, 1, "samples", "max_new_tokens", "max_prompt_tokens", "max_prompts", "batch_tokens")
        check_seed(self.seed)
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"--temperature {self.temperature} must be above 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top_p {self.top_p} must be above 0 and at most 1")
        self.vllm()

    def vllm(self) -> dict:
        """`vllm_options` as an object; InputError if it is none."""
        try:
            options = json.loads(self.vllm_options)
        except ValueError as error:
            raise InputError(f"--vllm_options {self.vllm_options} is no JSON ({error})") from error
        if not isinstance(options, dict):
            raise InputError(f'--vllm_options {self.vllm_options} must be an object, as in {{"max_model_len": 4096}}')
        if "model" in options:
            raise InputError(f"--vllm_options {self.vllm_options} names a model, but --policy does: drop it")
        return options


@dataclass
class ScoringArguments:
    """A preference model, samples, and where the embeddings go."""

    model: str | None = flag(None, "trained preference model: folder or hub name")
    samples: str | None = flag(None, "file of samples, as generate_responses.py writes it")
    output: str = flag("scored.jsonl", "file of the embeddings, one JSON object a line")
    max_length: int | None = flag(None, "tokens of prompt and one response; default what the model was trained with")
    overwrite: bool = flag(False, "replace scores of another model, other samples or other settings in --output")

    def check(self) -> None:
        """InputError for what cannot work, before anything is loaded."""
        _check_paths(self, "model", "samples")
        check_at_least(self, 8, "max_length")


def _check_paths(arguments, *needed: str) -> None:
    if missing := [name for name in needed if not getattr(arguments, name)]:
        raise InputError(f"--{missing[0]} is missing")
    if Path(arguments.output).is_dir() or not arguments.output.endswith(".jsonl"):
        raise InputError(f"--output {arguments.output} must be the name of a file that ends in .jsonl")


@dataclass
class ComparisonReportArguments:
    """Which policies are compared, by which preference models, and where the report goes."""

    samples: list[str] = field(default_factory=list, metadata={"help": COMPARED})
    model: str | None = flag(None, "trained preference model: folder or hub name")
    judge: str | None = flag(None, "a second preference model, that no policy was trained with: the same columns by it")
    output: str = flag("report.json", "file of all numbers; the picture gets its name with .png")
    train_report: str | None = flag(
        None, "JSON file of the training with the KL divergence of the current policy from the previous one"
    )
    max_length: int | None = flag(None, "tokens of prompt and one response; default what the model was trained with")
    judge_tau: float | None = flag(None, "--tau of the judge")
    skip_finished: bool = flag(False, "do nothing where --output is the report of the same samples, models and flags")

    def check(self) -> None:
        """InputError for what cannot work, before anything is loaded."""
        if self.model is None:
            raise InputError("--model names no preference model: give a folder or hub name")
        if self.judge is None and self.judge_tau is not None:
            raise InputError(f"--judge_tau {self.judge_tau} is of a --judge, which is not given")
        if not self.output.endswith(".json"):
            raise InputError(f"--output {self.output!r} must end in .json")
        check_at_least(self, 8, "max_length")
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
