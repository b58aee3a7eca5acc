"""What the training loop asks of the engine that holds a model's weights, gradients and optimizer states.

The one there is: `DeepSpeedEngine`. Parameter groups and the learning-rate schedule are the same for any engine.
"""

from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from transformers import get_scheduler

from general_preference.distributed import DistributedContext
from general_preference.trainer.run_arguments import OptimizerArguments


class Engine(Protocol):
    """What holds a model. Methods are collective: every process calls them in the same order.

    context: the processes. device: where this one computes. model: as the engine holds it.
    global_batch_size: comparisons per optimizer step; micro_batches: forward passes per step; over all processes.
    prepare: take over `model`, to be trained for `steps` optimizer steps.
    train_mode: switch dropout on (training) or off (evaluation).
    backward: backpropagate one micro-batch; gradients are averaged over accumulation and processes.
    step: count one micro-batch; on the last of a step, clip, update and move the schedule.
    gradient_norm: scalar, the global norm of the last step's gradient before clipping; not waited for.
    started: the first step is done; what made processes wait for each other for long is over.
    learning_rate: of the next step.
    full_state_dict: what a saved model needs, whole, on the CPU of the main process; empty on the others.
    save: write weights, optimizer and random states; returns {file name: its entry in the manifest}.
    load: continue from `step` as `save` wrote it, on any number of processes.
    peak_memory: bytes that this process held at most.
    """

    context: DistributedContext
    device: torch.device
    model: nn.Module
    global_batch_size: int
    micro_batches: int

    def prepare(self, model: nn.Module, steps: int) -> None: ...
    def train_mode(self, training: bool) -> None: ...
    def forward(self, **inputs) -> dict[str, torch.Tensor]: ...
    def backward(self, loss: torch.Tensor) -> None: ...
    def step(self) -> None: ...
    def gradient_norm(self) -> torch.Tensor: ...
    def started(self) -> None: ...
    def learning_rate(self) -> float: ...
    def full_state_dict(self) -> dict[str, torch.Tensor]: ...
    def save(self, folder: Path) -> dict[str, dict]: ...
    def load(self, folder: Path, step: int) -> None: ...
    def peak_memory(self) -> int: ...


def parameter_groups(model: nn.Module) -> list[dict]:
    """Trainable parameters for an optimizer; a learnable temperature is not decayed.

    Decaying its logarithm would pull it towards 1.
    """
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    groups = [{"params": [weight for name, weight in trained if not name.startswith("temperature.")]}]
    temperature = [weight for name, weight in trained if name.startswith("temperature.")]
    return groups + ([{"params": temperature, "weight_decay": 0.0}] if temperature else [])


def build_schedule(optimizer: torch.optim.Optimizer, arguments: OptimizerArguments, steps: int):
    """A warm-up, then a cosine or a line to zero over `steps` optimizer steps, or a constant rate."""
    warmup = int(-(-steps * arguments.warmup_ratio // 1))
    name = "constant_with_warmup" if arguments.lr_schedule == "constant" else arguments.lr_schedule
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
