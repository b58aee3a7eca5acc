"""The only file that imports DeepSpeed: ZeRO 0 to 3 under the training loop, on GPUs over nccl or CPUs over gloo."""

import contextlib
import copy
import io
import logging
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the import: keeps DeepSpeed from probing for other devices

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from pydantic import ValidationError
from transformers import set_seed

from general_preference.distributed import DistributedContext
from general_preference.errors import InputError
from general_preference.models.acceleration import checkpoint_activations, compile_layers, use_liger_kernels
from general_preference.models.device import has_fast_bf16
from general_preference.models.reward_model import RewardModel
from general_preference.trainer.deepspeed_config import engine_config, offloads_optimizer, read_overrides
from general_preference.trainer.engine import build_schedule, parameter_groups
from general_preference.trainer.run_arguments import EngineArguments, OptimizerArguments
from general_preference.trainer.shards import check_complete, describe_file, read_extra, read_shard, write_shard
from general_preference.trainer.zero_layout import filling, forget_empty_step, own_shard

RANDOM_STATES = ("random/cpu", "random/device")  # of torch, which alone draws while training (dropout)
START_TIMEOUT = 6 * 3600  # seconds until the first step is done: one process downloads and tokenizes meanwhile


def model_state_memory(
    stage: int, total: int, trained: int, largest: int, gpus: int, per_node: int, offload: bool
) -> tuple[int, int]:
    """Bytes of (a GPU, a node's main memory) for weights, gradients and Adam states in bf16 mixed precision.

    ZeRO 2 and 3 by DeepSpeed's estimators; without ZeRO each GPU holds 20 bytes per trained parameter (2 weights, 2
    gradients, 4 fp32 gradients, 4 fp32 weights, 8 Adam), under ZeRO 1 the last 16 are divided. A frozen one takes 2.

    Args:
        total, trained, largest: parameters of the model, those trained, those of the largest layer.
        offload: Adam's states and the fp32 weights in main memory.
    """
    places = {"num_gpus_per_node": min(gpus, per_node), "num_nodes": -(-gpus // per_node), "cpu_offload": offload}
    frozen, loading = 2 * (total - trained), 4 * total * min(gpus, per_node)
    if stage == 0:
        return 20 * trained + frozen, loading
    if stage == 1:
        return 4 * trained + 16 * trained // gpus + frozen, loading
    if stage == 2:
        node, gpu = estimate_zero2_model_states_mem_needs(trained, **places)
        return gpu + frozen, node
    node, gpu, _ = estimate_zero3_model_states_mem_needs(trained, largest, cpu_offload_params=False, **places)
    return gpu + frozen // gpus, node


class DeepSpeedEngine:
    """See `engine.Engine`. Holds the processes, this one's device and, after `prepare`, DeepSpeed's engine."""

    def __init__(self, engine: EngineArguments, optimizer: OptimizerArguments):
        """Join the other processes, choose the device, seed the generators.

        Raises:
            InputError: the device cannot do what is asked for, or deepspeed_config cannot be used.
        """
        self.engine_arguments, self.optimizer_arguments = engine, optimizer
        deepspeed.utils.logger.setLevel(logging.WARNING)
        accelerator = get_accelerator()
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        self.device = torch.device(accelerator.current_device_name())
        if engine.bf16 and not has_fast_bf16(self.device):
            raise InputError(f"bf16: this {self.device.type} device has no bfloat16 arithmetic: use fp32")
        # On CPUs DeepSpeed would compile shared-memory collectives that only its inference layers use: a minute, a C++
        # compiler, and a build lock that blocks every later run if the compilation is killed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = accelerator.communication_backend_name()
        self.context = DistributedContext.join(backend, timeout=max(START_TIMEOUT, engine.dist_timeout))
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its progress
            deepspeed.init_distributed(dist_backend=backend, verbose=False)  # takes over the group just made
        if self.context.world_size % engine.zpg:
            count = self.context.world_size
            raise InputError(f"zpg {engine.zpg} does not divide the {count} processes: use the number per node")
        self._config = self._read_config()
        set_seed(optimizer.seed)
        self.engine: Any = None
        self._norm_without_zero = torch.tensor(float("nan"))  # which the engine does not keep there

    @property
    def global_batch_size(self) -> int:
        """Comparisons per optimizer step, over all processes."""
        return self.optimizer_arguments.micro_train_batch_size * self.micro_batches

    @property
    def micro_batches(self) -> int:
        """Micro-batches per optimizer step, over all processes."""
        return self.optimizer_arguments.accumulated_gradient * self.context.world_size

    @property
    def model(self) -> RewardModel:
        """As DeepSpeed's engine holds it."""
        return self.engine.module

    def config(self) -> dict:
        """The DeepSpeed configuration: what the flags describe, and the user's own file over it."""
        return copy.deepcopy(self._config)

    def _read_config(self) -> dict:
        arguments, path = self.engine_arguments, self.engine_arguments.deepspeed_config
        overrides = None if path is None else self.context.main_process_first(lambda: read_overrides(path))
        options = {"on_gpu": self.device.type != "cpu", "world_size": self.context.world_size, "overrides": overrides}
        config = engine_config(arguments, self.optimizer_arguments, **options)
        if path is not None:
            with self._explained():
                DeepSpeedConfig(copy.deepcopy(config))
        return config

    @contextlib.contextmanager
    def _explained(self):
        """What DeepSpeed does not accept in a user's own configuration is one line; without one it is a fault here."""
        try:
            yield
        except Exception as error:  # DeepSpeed raises whatever its parts raise, assertions among them
            path = self.engine_arguments.deepspeed_config
            if path is None or isinstance(error, torch.OutOfMemoryError):
                raise
            if isinstance(error, ValidationError):
                found = error.errors()[0]
                reason = f"{'.'.join(map(str, found['loc']))}: {found['msg']}"
            else:
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(f"deepspeed_config {path} is refused by DeepSpeed ({reason}): correct it") from error

    def prepare(self, model: RewardModel, steps: int) -> None:
        """Wrap `model` in DeepSpeed's engine, with AdamW and the schedule."""
        arguments, engine = self.optimizer_arguments, self.engine_arguments
        if engine.use_liger_kernel:
            use_liger_kernels(model.language_model, self.device)
        if engine.gradient_checkpointing:
            reentrant, selective = engine.gradient_checkpointing_use_reentrant, engine.selective_checkpointing
            checkpoint_activations(model.language_model, reentrant=reentrant, selective=selective)
        if engine.torch_compile:
            compile_layers(model.language_model)
        self._match_partitioned(model)
        config = self.config()
        betas = tuple(arguments.adam_betas)
        options = {"lr": arguments.learning_rate, "betas": betas, "weight_decay": arguments.l2}
        if offloads_optimizer(config):
            from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles an operator when first used

            optimizer = DeepSpeedCPUAdam(parameter_groups(model), **options)
        else:
            fused = self.device.type != "cpu" or None
            optimizer = torch.optim.AdamW(parameter_groups(model), fused=fused, **options)
        schedule = build_schedule(optimizer, arguments, steps)
        with self._explained():
            parts = {"model": model, "optimizer": optimizer, "lr_scheduler": schedule}
            self.engine, *_ = deepspeed.initialize(config=config, dist_init_required=False, **parts)
        if engine.zero_stage == 0 and engine.bf16:
            forget_empty_step(self.engine)
        set_seed((arguments.seed + self.context.rank) % 2**32)  # adapters were made alike everywhere; dropout is not

    def _match_partitioned(self, model: RewardModel) -> None:
        """Where ZeRO 3 loaded the backbone in parts, give heads and adapters its dtype and device.

        DeepSpeed takes a model with partitioned tensors to be ready as it is, and refuses two dtypes among them.
        """
        weights = list(model.parameters())
        if any(hasattr(weight, "ds_id") for weight in weights):
            dtype = torch.bfloat16 if self.engine_arguments.bf16 else torch.float32
            for weight in weights:
                if not hasattr(weight, "ds_id") and weight.is_floating_point():
                    weight.data = weight.data.to(self.device, dtype)

    def train_mode(self, training: bool) -> None:
        """Switch dropout on (training) or off (evaluation)."""
        self.engine.train(training)

    def forward(self, **inputs) -> dict[str, torch.Tensor]:
        """`PackedBackbone.forward` through the engine."""
        return self.engine(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Backpropagate one micro-batch."""
        self.engine.backward(loss)

    def step(self) -> None:
        """Count one micro-batch; on the last of a step, clip, update and move the schedule."""
        if self.engine_arguments.zero_stage == 0 and self.engine.is_gradient_accumulation_boundary():
            gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
            self._norm_without_zero = torch.nn.utils.get_total_norm(gradients)
        self.engine.step()

    def gradient_norm(self) -> torch.Tensor:
        """Scalar float64."""
        norm = self.engine.get_global_grad_norm()
        norm = self._norm_without_zero if norm is None else norm
        return torch.as_tensor(norm, dtype=torch.float64, device=self.device).reshape(())

    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self.engine.get_lr()[0])

    def started(self) -> None:
        """The first step is done: from now on no process waits for another for more than dist_timeout seconds."""
        self.context.set_timeout(self.engine_arguments.dist_timeout)

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Of a model with adapters what was trained; the frozen base is neither gathered nor copied."""
        state, adapted = {}, hasattr(self.model.backbone, "peft_config")
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if adapted and not tensor.requires_grad:
                continue
            with GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                if self.context.is_main:
                    state[name] = tensor.detach().cpu().clone()
        return state

    def save(self, folder: Path) -> dict[str, dict]:
        """One file per process.

        Raises:
            RunError: on every process; the folder cannot be written.
            RuntimeError: a parameter would not be saved whole.
        """
        shard = own_shard(self.engine, self.context.rank)
        check_complete(self.context.gather_objects(shard.counts()), shard.sizes)
        file = folder / f"process_{self.context.rank:05d}.safetensors"

        def work() -> dict:
            folder.mkdir(parents=True, exist_ok=True)
            write_shard(file, shard, self._random_states())
            return describe_file(file)

        return dict(self.context.gather_objects((file.name, self.context.write(folder.parent, work))))

    def load(self, folder: Path, step: int) -> None:
        """On any number of processes and ZeRO stage.

        Raises:
            InputError: on every process; the files are of another model.
        """
        files = sorted(folder.glob("process_*.safetensors"))
        with filling(self.engine, self.context.rank, step) as shard:
            self.context.together(lambda: read_shard(files, shard))
        schedule = self.engine.lr_scheduler
        schedule.load_state_dict(schedule.state_dict() | {"last_epoch": step - 1, "_step_count": step + 1})
        schedule.step()  # sets the learning rate of `step`
        self.engine.global_steps = step
        mine = folder / f"process_{self.context.rank:05d}.safetensors"
        if mine.is_file():
            states = read_extra(mine, RANDOM_STATES)
            torch.set_rng_state(states[RANDOM_STATES[0]])
            if self.device.type != "cpu" and RANDOM_STATES[1] in states:
                get_accelerator().set_rng_state(states[RANDOM_STATES[1]])
        else:  # there were fewer processes
            set_seed((self.optimizer_arguments.seed + self.context.rank + 7919 * step) % 2**32)

    def _random_states(self) -> dict[str, torch.Tensor]:
        on_device = {} if self.device.type == "cpu" else {RANDOM_STATES[1]: get_accelerator().get_rng_state()}
        return {RANDOM_STATES[0]: torch.get_rng_state()} | on_device

    def peak_memory(self) -> int:
        """On the GPU, or of main memory where there is none."""
        if self.device.type == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return get_accelerator().max_memory_allocated()
