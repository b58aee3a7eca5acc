"""The only file that knows DeepSpeed. The loop above it reads like the algorithm.

nccl between GPUs, gloo between CPUs; ranks and launchers are the business of processes.py.
"""

import contextlib
import io
import logging
import os
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the import: keeps DeepSpeed from probing for other devices

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from transformers import get_cosine_schedule_with_warmup, set_seed

from general_preference import rendezvous
from general_preference.errors import InputError
from general_preference.heartbeat import Heartbeat
from general_preference.models.acceleration import checkpoint_activations, compile_layers, use_liger_kernels
from general_preference.models.device import has_fast_bf16
from general_preference.models.reward_model import RewardModel
from general_preference.processes import Processes
from general_preference.trainer.arguments import EngineArguments, OptimizerArguments

logger = logging.getLogger(__name__)


class Strategy(Processes):
    """Processes, device and the DeepSpeed engine of one run."""

    def __init__(self, engine: EngineArguments, optimizer: OptimizerArguments):
        """Join the other processes, choose the device, seed the generators.

        Raises:
            InputError: the device cannot do what the flags ask for, or the processes do not find each other.
        """
        self.engine_arguments, self.optimizer_arguments = engine, optimizer
        deepspeed.utils.logger.setLevel(logging.WARNING)
        rendezvous.find_place()
        accelerator = get_accelerator()
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
        self.device = torch.device(accelerator.current_device_name())
        if engine.bf16 and not has_fast_bf16(self.device):
            raise InputError(f"--bf16: this {self.device.type} device has no bfloat16 arithmetic: drop the flag (fp32)")
        # On CPUs DeepSpeed would compile shared-memory collectives that only its inference layers use: a minute, a C++
        # compiler, and a build lock that blocks every later run if the compilation is killed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = accelerator.communication_backend_name()
        rendezvous.join(backend, timeout=engine.dist_timeout, join_timeout=engine.dist_timeout)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its progress
            deepspeed.init_distributed(dist_backend=backend, verbose=False)  # takes over the group just made
        super().__init__()
        if rendezvous.spans_nodes():
            self.heartbeat = Heartbeat(self)
        set_seed(optimizer.seed)
        self.engine: Any = None

    @property
    def global_batch_size(self) -> int:
        """Comparisons per optimizer step, over all processes."""
        arguments = self.optimizer_arguments
        return arguments.micro_train_batch_size * arguments.accumulated_gradient * self.world_size

    def config(self) -> dict:
        """The DeepSpeed configuration that the flags describe."""
        engine, optimizer = self.engine_arguments, self.optimizer_arguments
        on_gpu = self.device.type != "cpu"
        zero = {
            "stage": engine.zero_stage,
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
            "stage3_gather_16bit_weights_on_model_save": True,
            "zero_hpz_partition_size": engine.zpg,
        }
        if engine.adam_offload and on_gpu:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if engine.disable_trace_cache:
            zero |= {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
        return {
            "train_micro_batch_size_per_gpu": optimizer.micro_train_batch_size,
            "gradient_accumulation_steps": optimizer.accumulated_gradient,
            "gradient_clipping": optimizer.max_norm,
            "zero_optimization": zero,
            "bf16": {"enabled": engine.bf16},
            "data_types": {"grad_accum_dtype": engine.grad_accum_dtype},
            "steps_per_print": 10**12,
            "wall_clock_breakdown": False,
        }

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
        if engine.adam_offload and self.device.type != "cpu":
            from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles an operator when first used

            optimizer = DeepSpeedCPUAdam(parameters, **options)
        else:
            optimizer = torch.optim.AdamW(parameters, fused=self.device.type != "cpu" or None, **options)
        warmup = int(-(-steps * arguments.warmup_ratio // 1))
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, lr_scheduler=schedule, config=self.config(), dist_init_required=False
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
        """All tensors of the model, whole, on the CPU of the main process; an empty dict on the others. Collective."""
        state = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
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
