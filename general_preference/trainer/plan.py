"""What a run would need: parameters, memory of the model states by ZeRO stage, steps, tokens and hours. Trains nothing.

What the training script prints when asked to plan; the model is built from its configuration alone, without weights.
"""

import math

import pandas
import torch

from general_preference.models.config import PreferenceConfig, load_config
from general_preference.models.loading import add_lora
from general_preference.models.multimodal import auto_class, freeze_other_parts
from general_preference.models.reward_model import RewardModel
from general_preference.trainer.arguments import Arguments
from general_preference.trainer.deepspeed_engine import model_state_memory

GPUS_PER_NODE = 8
UTILIZATION, PEAK = 0.4, 989e12  # share of an H100's dense bf16 FLOP/s


def count_parameters(arguments: Arguments, preference: PreferenceConfig) -> tuple[int, int, int]:
    """(all parameters, those that are trained, those of the largest layer) of the run's model."""
    options = arguments.model
    config = load_config(options.pretrain, options.trust_remote_code)
    with torch.device("meta"):
        backbone = auto_class(config, options.pretrain).from_config(config, trust_remote_code=options.trust_remote_code)
        freeze_other_parts(backbone)
        if options.lora_rank > 0:
            targets = options.target_modules or "all-linear"
            backbone = add_lora(backbone, options.lora_rank, options.lora_alpha, targets, options.lora_dropout, 0)
        model = RewardModel(backbone, preference)
    model.freeze_unused(language_model_head=arguments.loss.add_pretrain_loss)
    weights = list(model.parameters())
    largest = max(sum(weight.numel() for weight in m.parameters(recurse=False)) for m in model.modules())
    return sum(w.numel() for w in weights), sum(w.numel() for w in weights if w.requires_grad), largest


def memory_table(total: int, trained: int, largest: int, gpus: int) -> str:
    """GB per GPU, and of main memory per node, for every ZeRO stage in bf16, with and without offloaded Adam states."""
    rows = []
    for stage in range(4):
        for offload in (False, True) if stage > 1 else (False,):
            gpu, node = model_state_memory(stage, total, trained, largest, gpus, GPUS_PER_NODE, offload)
            rows.append([stage, "yes" if offload else "no", f"{gpu / 1e9:.2f}", f"{node / 1e9:.2f}"])
    titles = ["ZeRO", "Adam offloaded", "GB per GPU", "GB main memory per node"]
    return pandas.DataFrame(rows, columns=titles).to_string(index=False)


def plan(arguments: Arguments, preference: PreferenceConfig, gpus: int, world_size: int, lengths: list[int]) -> str:
    """The whole text.

    Args:
        lengths: tokens of each training comparison, its prompt once. world_size: processes that the flags' batch is of.
    """
    total, trained, largest = count_parameters(arguments, preference)
    optimizer, checkpointing = arguments.optimizer, arguments.engine.gradient_checkpointing
    batch = optimizer.micro_train_batch_size * optimizer.accumulated_gradient * world_size
    steps, tokens = math.ceil(len(lengths) / batch) * optimizer.max_epochs, sum(lengths) * optimizer.max_epochs
    # Forward 2, gradients of activations 2, of weights 2, recomputation 2 per parameter and token; attention left out.
    per_token = 4 * total + 2 * trained + (2 * total if checkpointing else 0)
    hours = per_token * tokens / (gpus * PEAK * UTILIZATION) / 3600
    return "\n".join([
        f"Parameters: {total / 1e6:,.1f} M, trained: {trained / 1e6:,.1f} M, largest layer: {largest / 1e6:,.1f} M",
        "",
        f"Model states on {gpus} GPU(s), {min(gpus, GPUS_PER_NODE)} per node, in bf16 (an estimate; activations, which",
        "grow with the micro-batch and the length, come on top):",
        memory_table(total, trained, largest, gpus),
        "",
        f"Comparisons: {len(lengths)}, tokens per epoch: {sum(lengths)} (longest comparison {max(lengths)})",
        f"Steps: {steps} of {batch} comparisons, about {tokens / max(steps, 1):.0f} tokens each",
        f"Hours: {hours:.2g} at {UTILIZATION:.0%} of {PEAK / 1e12:.0f} TFLOP/s per GPU (H100, bf16), "
        f"{per_token / 1e9:.3g} GFLOP per token",
    ])  # fmt: skip
