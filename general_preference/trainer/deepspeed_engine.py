"""The only file that knows DeepSpeed. The loop above it reads like the algorithm.

nccl between GPUs, gloo between CPUs; ranks and launchers are the business of distributed.py.
"""

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
from pydantic import ValidationError
from transformers import get_cosine_schedule_with_warmup, set_seed

from general_preference.distributed import DistributedContext
from general_preference.errors import InputError
from general_preference.models.acceleration import checkpoint_activations, compile_layers, use_liger_kernels
from general_preference.models.device import has_fast_bf16
from general_preference.models.reward_model import RewardModel
from general_preference.trainer.arguments import EngineArguments, OptimizerArguments
from general_preference.trainer.deepspeed_config import engine_config, offloads_optimizer, read_overrides
from general_preference.trainer.shards import describe_file, read_extra, read_share, write_share
from general_preference.trainer.zero_layout import filling, forget_empty_step, own_share

logger = logging.getLogger(__name__)

RANDOM_STATES = ("random/cpu", "random/device")  # of torch, which alone draws while training (dropout)


class DeepSpeedEngine(DistributedContext):
    """DistributedContext, device and the DeepSpeed engine of one run."""

    def __init__(self, engine: EngineArguments, optimizer: OptimizerArguments):
        """Join the other processes, choose the device, seed the generators.

        Raises:
            InputError: the device cannot do what the flags ask for, --deepspeed_config cannot be used, or the processes
                do not find each other.
        """
        self.engine_arguments, self.optimizer_arguments = engine, optimizer
        deepspeed.utils.logger.setLevel(logging.WARNING)
        accelerator = get_accelerator()
        accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        self.device = torch.device(accelerator.current_device_name())
        if engine.bf16 and not has_fast_bf16(self.device):
            raise InputError(f"--bf16: this {self.device.type} device has no bfloat16 arithmetic: drop the flag (fp32)")
        # On CPUs DeepSpeed would compile shared-memory collectives that only its inference layers use: a minute, a C++
        # compiler, and a build lock that blocks every later run if the compilation is killed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = accelerator.communication_backend_name()
        DistributedContext.join(backend, timeout=engine.dist_timeout)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its progress
            deepspeed.init_distributed(dist_backend=backend, verbose=False)  # takes over the group just made
        super().__init__()
        if self.world_size % engine.zpg:
            raise InputError(
                f"--zpg {engine.zpg} does not divide the {self.world_size} processes: use the number per node"
            )
        self._config = self._read_config()
        set_seed(optimizer.seed)
        self.engine: Any = None
        self._whole_norm = float("nan")  # without ZeRO the engine does not keep it

    @property
    def global_batch_size(self) -> int:
        """Comparisons per optimizer step, over all processes."""
        arguments = self.optimizer_arguments
        return arguments.micro_train_batch_size * arguments.accumulated_gradient * self.world_size

    @property
    def micro_batches(self) -> int:
        """Micro-batches per optimizer step, over all processes."""
        return self.optimizer_arguments.accumulated_gradient * self.world_size

    def config(self) -> dict:
        """The DeepSpeed configuration: what the flags describe, and the user's own file over it."""
        return copy.deepcopy(self._config)

    def _read_config(self) -> dict:
        arguments, options = self.engine_arguments, {"on_gpu": self.device.type != "cpu"}
        path = arguments.deepspeed_config
        if path is None:
            return engine_config(arguments, self.optimizer_arguments, **options)
        overrides = self.main_process_first(lambda: read_overrides(path))
        config = engine_config(
            arguments, self.optimizer_arguments, world_size=self.world_size, overrides=overrides, **options
        )
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
            raise InputError(f"--deepspeed_config {path} is refused by DeepSpeed ({reason}): correct it") from error

    def prepare(self, model: RewardModel, steps: int) -> None:
        """Wrap `model` in the engine: AdamW, cosine schedule to zero over `steps` optimizer steps with a warm-up."""
        arguments = self.optimizer_arguments
        engine = self.engine_arguments
        if engine.use_liger_kernel:
            use_liger_kernels(model.language_model, self.device)
        if engine.gradient_checkpointing:
            checkpoint_activations(
                model.language_model,
                reentrant=engine.gradient_checkpointing_use_reentrant,
                selective=engine.selective_checkpointing,
            )
        if engine.torch_compile:
            compile_layers(model.language_model)
        self._match_partitioned(model)
        learned = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        temperature = [parameter for name, parameter in learned if name.startswith("temperature.")]
        parameters = [{"params": [parameter for name, parameter in learned if not name.startswith("temperature.")]}]
        if temperature:  # decaying its logarithm would pull it towards 1
            parameters.append({"params": temperature, "weight_decay": 0.0})
        options = {"lr": arguments.learning_rate, "betas": (0.9, 0.95), "weight_decay": arguments.l2}
        config = self.config()
        if offloads_optimizer(config):
            from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles an operator when first used

            optimizer = DeepSpeedCPUAdam(parameters, **options)
        else:
            optimizer = torch.optim.AdamW(parameters, fused=self.device.type != "cpu" or None, **options)
        warmup = int(-(-steps * arguments.warmup_ratio // 1))
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
        with self._explained():
            self.engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, lr_scheduler=schedule, config=config, dist_init_required=False
            )
        if engine.zero_stage == 0 and engine.bf16:
            forget_empty_step(self.engine)
        self._seed(self.rank)  # adapters were made alike everywhere; dropout is not

    def _seed(self, offset: int) -> None:
        """Seed all generators, differently for every offset."""
        set_seed((self.optimizer_arguments.seed + offset) % 2**32)

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

    @property
    def model(self) -> RewardModel:
        """The model inside the engine."""
        return self.engine.module

    def train_mode(self, training: bool) -> None:
        """Switch dropout on (training) or off (evaluation)."""
        self.engine.train(training)

    def forward(self, **inputs) -> dict[str, torch.Tensor]:
        """`RewardModel.forward` through the engine."""
        return self.engine(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        """Backpropagate one micro-batch; gradients are averaged over accumulation and processes."""
        self.engine.backward(loss)

    def step(self) -> None:
        """Count one micro-batch; on the last of a step, clip, update and move the schedule."""
        if self.engine_arguments.zero_stage == 0 and self.engine.is_gradient_accumulation_boundary():
            gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
            self._whole_norm = float(torch.nn.utils.get_total_norm(gradients))
        self.engine.step()

    def gradient_norm(self) -> float:
        """Global norm of the last step's gradient before clipping."""
        norm = self.engine.get_global_grad_norm()
        return self._whole_norm if norm is None else float(norm)

    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self.engine.get_lr()[0])

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """What a saved model needs, whole, on the CPU of the main process; an empty dict on the others. Collective.

        Of a model with adapters that is what was trained; the frozen base is neither gathered nor copied.
        """
        state, adapted = {}, hasattr(self.model.backbone, "peft_config")
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if adapted and not tensor.requires_grad:
                continue
            partitioned = hasattr(tensor, "ds_id")
            with GatheredParameters([tensor], enabled=partitioned):
                if self.is_main:
                    state[name] = tensor.detach().cpu().clone()
        return state

    def save_share(self, folder: Path) -> dict[str, dict]:
        """Write every process's weights, optimizer and random states under `folder`. Collective.

        Returns:
            {file name: its entry in the manifest} of all processes.

        Raises:
            RunError: on every process; the folder cannot be written.
        """
        share = own_share(self.engine, self.rank)
        file = folder / f"process_{self.rank:05d}.safetensors"

        def work() -> dict:
            folder.mkdir(parents=True, exist_ok=True)
            write_share(file, share, self._random_states())
            return describe_file(file)

        return dict(self.gather_objects((file.name, self.write(folder.parent, work))))

    def load_share(self, folder: Path, step: int) -> None:
        """Continue from `step`, as `save_share` wrote it, on any number of processes and ZeRO stage. Collective.

        Raises:
            InputError: on every process; the files are of another model.
        """
        files = sorted(folder.glob("process_*.safetensors"))
        with filling(self.engine, self.rank, step) as share:
            self.together(lambda: read_share(files, share))
        schedule = self.engine.lr_scheduler
        schedule.load_state_dict(schedule.state_dict() | {"last_epoch": step - 1, "_step_count": step + 1})
        schedule.step()  # sets the learning rate of `step`
        self.engine.global_steps = step
        mine = folder / f"process_{self.rank:05d}.safetensors"
        if mine.is_file():
            self._set_random_states(read_extra(mine, RANDOM_STATES))
        else:  # there were fewer processes
            self._seed(self.rank + 7919 * step)

    def _random_states(self) -> dict[str, torch.Tensor]:
        states = {RANDOM_STATES[0]: torch.get_rng_state()}
        if self.device.type != "cpu":
            states[RANDOM_STATES[1]] = get_accelerator().get_rng_state()
        return states

    def _set_random_states(self, states: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(states[RANDOM_STATES[0]])
        if self.device.type != "cpu" and RANDOM_STATES[1] in states:
            get_accelerator().set_rng_state(states[RANDOM_STATES[1]])

    def all_reduce_max(self, values: list[float]) -> list[float]:
        """The largest of each value over all processes. Collective."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return tensor.tolist()

    def peak_memory(self) -> int:
        """Bytes that this process held at most: on the GPU, or of main memory where there is none."""
        if self.device.type == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return get_accelerator().max_memory_allocated()
