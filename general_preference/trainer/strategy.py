"""The only file that knows DeepSpeed. The loop above it reads like the algorithm.

nccl between GPUs, gloo between CPUs; ranks and launchers are the business of processes.py.
"""

import contextlib
import copy
import io
import logging
import os
from datetime import timedelta
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

from general_preference.errors import InputError
from general_preference.models.acceleration import checkpoint_activations, compile_layers, use_liger_kernels
from general_preference.models.device import has_fast_bf16
from general_preference.models.reward_model import RewardModel
from general_preference.processes import Processes, single_process_defaults
from general_preference.trainer.arguments import EngineArguments, OptimizerArguments
from general_preference.trainer.engine_config import engine_config, offloads_optimizer, read_overrides

logger = logging.getLogger(__name__)


class Strategy(Processes):
    """Processes, device and the DeepSpeed engine of one run."""

    def __init__(self, engine: EngineArguments, optimizer: OptimizerArguments):
        """Join the other processes, choose the device, seed the generators.

        Raises:
            InputError: the device cannot do what the flags ask for, or --deepspeed_config cannot be used.
        """
        self.engine_arguments, self.optimizer_arguments = engine, optimizer
        deepspeed.utils.logger.setLevel(logging.WARNING)
        single_process_defaults()
        accelerator = get_accelerator()
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
        self.device = torch.device(accelerator.current_device_name())
        if engine.bf16 and not has_fast_bf16(self.device):
            raise InputError(f"--bf16: this {self.device.type} device has no bfloat16 arithmetic: drop the flag (fp32)")
        # On CPUs DeepSpeed would compile shared-memory collectives that only its inference layers use: a minute, a C++
        # compiler, and a build lock that blocks every later run if the compilation is killed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its progress
            deepspeed.init_distributed(
                dist_backend=accelerator.communication_backend_name(),
                timeout=timedelta(seconds=engine.dist_timeout),
                verbose=False,
            )
        super().__init__()
        self._config = self._read_config()
        set_seed(optimizer.seed)
        self.engine: Any = None

    @property
    def global_batch_size(self) -> int:
        """Comparisons per optimizer step, over all processes."""
        arguments = self.optimizer_arguments
        return arguments.micro_train_batch_size * arguments.accumulated_gradient * self.world_size

    def config(self) -> dict:
        """The DeepSpeed configuration: what the flags describe, and the user's own file over it."""
        return copy.deepcopy(self._config)

    def _read_config(self) -> dict:
        arguments, options = self.engine_arguments, {"on_gpu": self.device.type != "cpu"}
        path = arguments.deepspeed_config
        if path is None:
            return engine_config(arguments, self.optimizer_arguments, **options)
        overrides = self.main_first(lambda: read_overrides(path))
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
        learnt = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        temperature = [parameter for name, parameter in learnt if name.startswith("temperature.")]
        parameters = [{"params": [parameter for name, parameter in learnt if not name.startswith("temperature.")]}]
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
        self.engine.step()

    def gradient_norm(self) -> float:
        """Global norm of the last step's gradient before clipping; NaN if the engine does not know it."""
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

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

    def save_engine(self, folder: Path, client_state: dict) -> None:
        """Write weights, optimizer, schedule and the main process's random state under `folder`. Collective."""
        client_state = client_state | {"rng": torch.get_rng_state()}
        self.engine.save_checkpoint(str(folder), tag="engine", client_state=client_state, save_latest=False)

    def load_engine(self, folder: Path) -> dict:
        """Read back what `save_engine` wrote and return its client_state. Collective."""
        path, client_state = self.engine.load_checkpoint(str(folder), tag="engine")
        if path is None:
            raise InputError(f"checkpoint {folder} cannot be loaded: remove it, or drop --load_checkpoint")
        torch.set_rng_state(client_state.pop("rng"))
        return client_state
