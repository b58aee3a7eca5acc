"""The DeepSpeed configuration of a run: what the arguments describe, with a user's own file merged over it.

Pure functions of arguments and a JSON object; called by deepspeed_engine.py. What the arguments decide and what is made
elsewhere (batch sizes, clipping, precision, optimizer, schedule) cannot be changed by the file.
"""

import json
from pathlib import Path
from typing import Any

from general_preference.errors import InputError
from general_preference.trainer.run_arguments import EngineArguments, OptimizerArguments

# What checkpoints do not reach or what is made elsewhere: {name: its only accepted value}.
_FIXED = {
    "optimizer": None,  # AdamW from learning_rate, adam_betas, l2
    "scheduler": None,  # from learning_rate, lr_schedule, warmup_ratio
    "fp16.enabled": False,
    "amp.enabled": False,
    "torch_autocast.enabled": False,
    "zero_optimization.offload_optimizer.ratio": 1,
    "zero_optimization.offload_optimizer.super_offload": False,
    "zero_optimization.zenflow": None,
    "zero_optimization.mics_shard_size": -1,
}


def read_overrides(path: str) -> dict:
    """The JSON object in the file at `path`, without values that are "auto" (transformers' word for "not given").

    Raises:
        InputError: no such file, not JSON, or not an object.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise _refused(path, f"cannot be read ({error.strerror}): check the path") from error
    except ValueError as error:
        raise _refused(path, f"is not JSON ({error}): correct it") from error
    if not isinstance(found, dict):
        raise _refused(path, f"holds {type(found).__name__}, not an object: see DeepSpeed's configuration page")
    return _without_auto(found)


def engine_config(
    engine: EngineArguments, optimizer: OptimizerArguments, *, on_gpu: bool, world_size: int = 1, overrides=None
) -> dict:
    """The configuration that the arguments describe, with `overrides` merged over it (objects deeply).

    On a CPU an optimizer that is offloaded to main memory is there anyway, so nothing is offloaded.

    Raises:
        InputError: `overrides` contradict the arguments, or describe what is made elsewhere.
    """
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "overlap_comm": on_gpu,
        "contiguous_gradients": True,
        "stage3_gather_16bit_weights_on_model_save": True,
        "zero_hpz_partition_size": engine.zpg,
    }
    if engine.adam_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if engine.disable_trace_cache:  # nothing is fetched ahead or kept for later, so no recorded order is relied on
        zero |= {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    config = {
        "train_micro_batch_size_per_gpu": optimizer.micro_train_batch_size,
        "gradient_accumulation_steps": optimizer.accumulated_gradient,
        "gradient_clipping": optimizer.max_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": engine.bf16},
        "data_types": {"grad_accum_dtype": engine.grad_accum_dtype},
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }
    if overrides:
        _check(engine, optimizer, world_size, overrides)
        config = _merged(config, overrides)
    zero = config["zero_optimization"]
    if not on_gpu and (zero.get("offload_optimizer") or {}).get("device") == "cpu":
        del zero["offload_optimizer"]
    return config


def without_keys(config: Any) -> Any:
    """The configuration as it may be saved with a run: an `api_key` (DeepSpeed's Comet monitor takes one) left out."""
    if isinstance(config, dict):
        return {name: without_keys(value) for name, value in config.items() if name != "api_key"}
    return config


def offloads_optimizer(config: dict) -> bool:
    """Whether the optimizer's states of this configuration live outside of the device that computes."""
    return (config["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none"


def _check(engine: EngineArguments, optimizer: OptimizerArguments, world_size: int, overrides: dict) -> None:
    """Refuse overrides that disagree with the arguments: the gradient of a step, and what is logged, follow those."""
    path, micro, steps = engine.deepspeed_config, optimizer.micro_train_batch_size, optimizer.accumulated_gradient
    arguments = {
        "train_micro_batch_size_per_gpu": ("micro_train_batch_size", micro),
        "gradient_accumulation_steps": ("accumulated_gradient", steps),
        "train_batch_size": ("micro_train_batch_size * accumulated_gradient * processes", micro * steps * world_size),
        "gradient_clipping": ("max_norm", optimizer.max_norm),
        "zero_optimization.stage": ("zero_stage", engine.zero_stage),
        "bf16.enabled": ("bf16", engine.bf16),
        "zero_optimization.zero_hpz_partition_size": ("zpg", engine.zpg if engine.zpg > 1 else None),
        "data_types.grad_accum_dtype": ("grad_accum_dtype", engine.grad_accum_dtype),
    }  # fmt: skip
    for name, (argument, value) in arguments.items():
        found = _at(path, overrides, name)
        if found is not None and value is not None and found != value:
            there = f"says {name} = {json.dumps(found)}"
            raise _refused(path, f"{there}, but {argument} is {json.dumps(value)}: change one")
    for name, usual in _FIXED.items():
        found = _at(path, overrides, name)
        if found is not None and found != usual and found != {}:
            raise _refused(path, f"says {name} = {json.dumps(found)}, which training here does not support: remove it")
    for name in ("offload_optimizer", "offload_param"):
        if _at(path, overrides, f"zero_optimization.{name}.device") == "nvme":
            raise _refused(path, f"says {name}.device = nvme, which checkpoints do not reach: use cpu")


def _at(path: str | None, config: dict, name: str) -> Any:
    """The value at a dotted name, None where there is none."""
    *sections, last = name.split(".")
    for section in sections:
        config = config.get(section) or {}
        if not isinstance(config, dict):
            raise _refused(path, f"says {section} = {json.dumps(config)}, which must be an object")
    return config.get(last)


def _merged(base: dict, over: dict) -> dict:
    """A new object: `over` wins, and where both hold objects they are merged."""
    both = base.keys() & over.keys()
    deep = {key: _merged(base[key], over[key]) for key in both if isinstance(base[key], dict) and over[key] is not None}
    return base | over | deep


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_auto(entry) for key, entry in value.items() if entry != "auto"}
    return value


def _refused(path: str | None, reason: str) -> InputError:
    return InputError(f"deepspeed_config {path} {reason}")
