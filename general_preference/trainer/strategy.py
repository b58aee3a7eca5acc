"""The only file that knows DeepSpeed, ranks and devices. The loop above it reads like the algorithm.

Runs under any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (deepspeed, torchrun,
Slurm), and without one as a single process. nccl on GPUs, gloo on CPUs.
"""

import contextlib
import io
import logging
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the import: keeps DeepSpeed from probing for other devices

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from transformers import get_cosine_schedule_with_warmup, set_seed

from general_preference.errors import InputError
from general_preference.models.reward_model import RewardModel
from general_preference.trainer.arguments import EngineArguments, OptimizerArguments

logger = logging.getLogger(__name__)


class Strategy:
    """Processes, device and the DeepSpeed engine of one run."""

    def __init__(self, engine: EngineArguments, optimizer: OptimizerArguments):
        """Join the other processes, choose the device, seed the generators.

        Raises:
            InputError: the device cannot do what the flags ask for.
        """
        self.engine_arguments, self.optimizer_arguments = engine, optimizer
        deepspeed.utils.logger.setLevel(logging.WARNING)
        _single_process_defaults()
        accelerator = get_accelerator()
        if engine.bf16 and not _fast_bf16():
            raise InputError(
                f"--bf16: this {accelerator.device_name()} device has no bfloat16 arithmetic: drop the flag (fp32)"
            )
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
        self.device = torch.device(accelerator.current_device_name())
        # On CPUs DeepSpeed would compile shared-memory collectives that only its inference layers use: a minute, a C++
        # compiler, and a build lock that blocks every later run if the compilation is killed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its progress
            deepspeed.init_distributed(
                dist_backend=accelerator.communication_backend_name(),
                timeout=timedelta(seconds=engine.dist_timeout),
                verbose=False,
            )
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        set_seed(optimizer.seed)
        self.is_main = self.rank == 0
        self.engine: Any = None

    @property
    def global_batch_size(self) -> int:
        """Comparisons per optimizer step, over all processes."""
        arguments = self.optimizer_arguments
        return arguments.micro_train_batch_size * arguments.accumulated_gradient * self.world_size

    def main_first(self, work: Callable[[], Any], main_only: bool = False) -> Any:
        """Run `work` on the first process of each node, then (from its caches) on the others.

        An InputError on any of them is raised on all, so that every process leaves with the same message.

        Args:
            main_only: only the very first process runs `work`; the others get None.
        """
        goes_first = self.is_main if main_only else os.environ["LOCAL_RANK"] == "0"
        result, problem = None, None
        if goes_first:
            try:
                result = work()
            except InputError as error:
                problem = str(error)
        problems = [None] * self.world_size
        dist.all_gather_object(problems, problem)
        for found in problems:
            if found is not None:
                raise InputError(found)
        return result if goes_first or main_only else work()

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
        if self.engine_arguments.gradient_checkpointing:
            reentrant = self.engine_arguments.gradient_checkpointing_use_reentrant
            model.language_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.language_model.enable_input_require_grads()
        learnt = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        temperature = [parameter for name, parameter in learnt if name.startswith("temperature.")]
        parameters = [{"params": [parameter for name, parameter in learnt if not name.startswith("temperature.")]}]
        if temperature:  # decaying its logarithm would pull it towards 1
            parameters.append({"params": temperature, "weight_decay": 0.0})
        options = {"lr": arguments.learning_rate, "betas": (0.9, 0.95), "weight_decay": arguments.l2}
        if self.engine_arguments.adam_offload and self.device.type != "cpu":
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

    def all_reduce(self, sums: torch.Tensor) -> torch.Tensor:
        """Add up a tensor over all processes, in place; the same result on each."""
        dist.all_reduce(sums)
        return sums

    def gather_objects(self, value: Any) -> list:
        """One picklable value of each process, on all of them."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """The main process's value, on all processes: for decisions that every process must take alike."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        dist.barrier()

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

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def is_main_process() -> bool:
    """Whether the environment makes this the first process; usable before any `Strategy` exists."""
    return os.environ.get("RANK", "0") == "0"


def _single_process_defaults() -> None:
    """Without a launcher, be a world of one on a free port, so that two runs on a machine do not meet."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        os.environ.setdefault("LOCAL_RANK", "0")
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _fast_bf16() -> bool:
    """Whether bfloat16 is arithmetic of the device and not an emulation many times slower than fp32."""
    if get_accelerator().device_name() == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if get_accelerator().device_name() == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return get_accelerator().is_bf16_supported()
