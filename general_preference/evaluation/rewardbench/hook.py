"""The hook of the official RewardBench scripts: their pairwise interface for custom models, unedited.

import runpy, rewardbench
from general_preference.evaluation import rewardbench_config
rewardbench.REWARD_MODEL_CONFIG["path/or/name"] = rewardbench_config()
runpy.run_path("scripts/run_rm.py", run_name="__main__")          # whose model is path/or/name
"""

import torch
from transformers import PreTrainedTokenizerBase

from general_preference.datasets.messages import parse_conversation
from general_preference.datasets.tokenization import prepare_tokenizer
from general_preference.errors import InputError
from general_preference.inference.cuts import Cuts
from general_preference.inference.pipeline import GPMPipeline
from general_preference.models.device import choose_device, inference_dtype
from general_preference.models.reward_model import RewardModel, load_reward_model


class RewardBenchPipeline:
    """`pipe(chosen, rejected)` -> which chosen conversations win, for any head; `task` is not read."""

    def __init__(self, task: str, model: RewardModel, tokenizer: PreTrainedTokenizerBase):
        self.task, self.model = task, model
        self.tokenizer = prepare_tokenizer(tokenizer, "the model")
        self.cut = Cuts()  # of all calls, so that a cut is said once

    def __call__(
        self,
        chosen,
        rejected=None,
        *,
        max_length: int | None = None,
        truncation=True,
        padding=True,
        **_pipeline_options,
    ) -> torch.Tensor:
        """Compare B pairs of conversations.

        Args:
            chosen, rejected: B lists of messages with the same messages before the assistant's last turn. Without
                `rejected` a Bradley-Terry model returns rewards, as the official best-of-n script asks for.
            max_length: tokens of one conversation, at most the model's positions; default what it was trained with.
            _pipeline_options: what transformers' classification pipelines read (batch_size, function_to_apply, ...).

        Returns:
            (B,) bool on the CPU, True where the chosen one is strictly preferred; or rewards (B,) in fp32.

        Raises:
            InputError (a ValueError): a pair that does not share its prompt, or nothing to compare with.
        """
        model = getattr(self.model, "module", self.model)  # wrapped by accelerate where there are several processes
        if max_length is not None and model.learned_positions is not None:
            max_length = min(max_length, model.learned_positions)
        options = {"truncation": truncation, "max_length": max_length, "padding": padding}
        rm = GPMPipeline.from_model(model, self.tokenizer, **options)
        rm.cut = self.cut
        if rejected is None:
            if rm.value_head_dim != 1:
                raise InputError("only a Bradley-Terry model gives single conversations a reward: pass pairs")
            return rm(chosen).cpu()
        if len(chosen) != len(rejected):
            raise InputError(f"{len(chosen)} chosen conversations, but {len(rejected)} rejected ones")
        prompts, responses = [], []
        for index, (first, second) in enumerate(zip(chosen, rejected, strict=True)):
            prompt, better = parse_conversation(first, f"chosen conversation {index}")
            other, worse = parse_conversation(second, f"rejected conversation {index}")
            if prompt != other:
                raise InputError(f"pair {index}: the conversations differ before the assistant's last turn")
            prompts.append(prompt)
            responses.append([better, worse])
        return torch.tensor([bool(found.scores()[0, 1] > 0) for found in rm.embed(prompts, responses)])


def load_for_rewardbench(
    path: str, *, device_map=None, torch_dtype=None, attn_implementation: str | None = None, trust_remote_code=False
) -> RewardModel:
    """Load a preference model as the official scripts ask for it.

    Args:
        device_map: "cpu" is obeyed; else the model goes to this process's device.
        torch_dtype: the backbone's; None for bfloat16 on GPUs that compute it fast, else fp32.
    """
    device = choose_device("cpu" if device_map == "cpu" else "auto")
    options = {"attn_implementation": attn_implementation or "auto", "trust_remote_code": trust_remote_code}
    return load_reward_model(path, dtype=torch_dtype or inference_dtype(device, None), device=device, **options)


def rewardbench_config(torch_dtype: torch.dtype | None = None) -> dict:
    """The entry of the official `REWARD_MODEL_CONFIG` for our models; `torch_dtype` as for `load_for_rewardbench`."""
    return {
        "model_builder": load_for_rewardbench,
        "pipeline_builder": RewardBenchPipeline,
        "quantized": False,
        "custom_dialogue": True,
        "model_type": "Custom Classifier",
        "torch_dtype": torch_dtype or inference_dtype(choose_device(), None),
    }
