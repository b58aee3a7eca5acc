"""Where DeepSpeed keeps a process's weights and Adam states: the one place that looks inside its engine.

Which layout holds is what the engine's public stage number says: without ZeRO every process has every parameter (and in
bf16 an fp32 copy of it); under ZeRO 1 and 2 all parameters of a group lie end to end and are cut into one stretch per
process; under ZeRO 3 every parameter is cut by itself. Called by deepspeed_engine.py alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from general_preference.trainer.shards import FIELDS, Fragment, Shard


def own_shard(engine, rank: int, step: int | None = None) -> Shard:
    """The part of weights and Adam states that process `rank` owns and writes, in the engine's own memory.

    Args:
        step: the shard will be filled as of this step: Adam's count is set, and without ZeRO every process takes all.

    Raises:
        RuntimeError: a ZeRO stage this file does not know, or states that are not where it expects them.
    """
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    base = getattr(zero, "optimizer", zero)
    trained = {name: weight for name, weight in engine.module.named_parameters() if weight.requires_grad}
    try:
        if stage == 3:
            flats = list(zero.fp32_partitioned_groups_flat)
            places = {name: zero.grad_position[zero.get_param_id(weight)] for name, weight in trained.items()}
            fragments = [_partition(name, weight, rank, *places[name]) for name, weight in trained.items()]
        elif stage in (1, 2):
            flats = [group["params"][0] for group in base.param_groups]
            fragments = [_stretch(name, weight) for name, weight in trained.items() if weight._hp_mapping is not None]
        elif stage == 0:
            copies = _fp32_copies(zero)
            flats = [copies.get(weight, weight) for weight in trained.values()]
            numbered = enumerate(trained.items())
            fragments = [Fragment(name, tuple(w.shape), 0, w.numel(), number, 0) for number, (name, w) in numbered]
            if rank != 0 and step is None:
                flats, fragments = [], []
        else:
            raise RuntimeError(f"checkpoints do not know ZeRO stage {stage}")
        tensors = [_tensors(base, flat, step, required=stage > 0 and step is None) for flat in flats]
    except (AttributeError, KeyError) as error:
        raise RuntimeError(f"this DeepSpeed keeps the states of ZeRO {stage} in another place ({error!r})") from error
    sizes = {name: getattr(weight, "ds_numel", weight.numel()) for name, weight in trained.items()}
    return Shard(tensors, [fragment for fragment in fragments if fragment.count > 0], sizes)


@contextmanager
def filling(engine, rank: int, step: int) -> Iterator[Shard]:
    """The shard to fill as of `step`; afterwards the engine computes with what was filled in. Collective."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        zero.checkpoint_event_prologue()
    yield own_shard(engine, rank, step)
    if stage == 3:
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)  # as at the end of a step
        zero.checkpoint_event_epilogue()
    elif stage in (1, 2):
        zero.update_lp_params()
    else:
        for weight, copy in _fp32_copies(zero).items():
            weight.data.copy_(copy.data)


def forget_empty_step(engine) -> None:
    """Undo the step of zero gradients that DeepSpeed takes in bf16 without ZeRO: Adam counts it, and weights decay."""
    for weight, copy in _fp32_copies(engine.optimizer).items():
        copy.data.copy_(weight.data)
    engine.optimizer.optimizer.state.clear()


def _fp32_copies(zero) -> dict[torch.Tensor, torch.Tensor]:
    """{parameter: its fp32 copy} of the optimizer that trains in bf16 without ZeRO; empty in fp32."""
    if isinstance(zero, torch.optim.Optimizer):
        return {}
    groups = zip(zero.fp16_groups, zero.fp32_groups, strict=True)
    return {weight: copy for weights, copies in groups for weight, copy in zip(weights, copies, strict=True)}


def _partition(name: str, weight, rank: int, flat: int, offset: int, size: int) -> Fragment:
    """ZeRO 3: equal parts of `size` elements, the last one padded."""
    count = min(size, weight.ds_numel - rank * size)
    return Fragment(name, tuple(weight.ds_shape), rank * size, count, flat, offset)


def _stretch(name: str, weight) -> Fragment:
    """ZeRO 1 and 2: what of the parameter lies in this process's stretch."""
    here, there = weight._hp_mapping.lp_fragment_address, weight._hp_mapping.hp_fragment_address
    group = weight._hp_mapping.param_group_index
    return Fragment(name, tuple(weight.shape), here.start, here.numel, group, there.start)


def _tensors(base, flat: torch.Tensor, step: int | None, required: bool) -> dict[str, torch.Tensor]:
    """{field: (n,)} of one flat tensor; Adam's state is made as Adam does it where no step was taken yet.

    required: the state must be there; without ZeRO it is missing for a parameter that never had a gradient.
    """
    state = base.state[flat]
    if "exp_avg" not in state:
        if required:
            raise KeyError("exp_avg")
        state |= {"step": 0, "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
        step = step or 0
    if step is not None:
        state["step"] = step  # DeepSpeed's Adam on the CPU counts with a number, torch's with a tensor
        if isinstance(base, torch.optim.AdamW):
            device = flat.device if base.defaults["fused"] else "cpu"
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
    weight, *moments = (tensor.detach().view(-1) for tensor in (flat, *(state[name] for name in FIELDS[1:])))
    return dict(zip(FIELDS, (weight, *moments), strict=True))
