"""Where DeepSpeed keeps a process's weights and Adam states: the one place that looks inside its engine.

Three layouts: without ZeRO every process has every parameter (and in bf16 an fp32 copy of it); under ZeRO 1 and 2 (and
the bf16 optimizer) all parameters of a group lie end to end and are cut into one stretch per process; under ZeRO 3
every parameter is cut by itself. For deepspeed_engine.py alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from general_preference.trainer.shards import FIELDS, Piece, Share


def own_share(engine, rank: int, step: int | None = None) -> Share:
    """The part of weights and Adam states that process `rank` owns and writes, in the engine's own memory.

    Args:
        step: the share will be filled as of this step: Adam's step count is set, and without ZeRO every process
            takes everything, of which the first one alone writes.
    """
    zero = engine.optimizer
    base = getattr(zero, "optimizer", zero)
    learned = {name: weight for name, weight in engine.module.named_parameters() if weight.requires_grad}
    if _by_parameter(engine):
        flats = list(zero.fp32_partitioned_groups_flat)
        places = {name: zero.grad_position[zero.get_param_id(weight)] for name, weight in learned.items()}
        pieces = [_part(name, weight, rank, *places[name]) for name, weight in learned.items()]
    elif any(hasattr(weight, "_hp_mapping") for weight in learned.values()):
        flats = [group["params"][0] for group in base.param_groups]
        pieces = [_fragment(name, weight) for name, weight in learned.items() if weight._hp_mapping is not None]
    elif rank == 0 or step is not None:
        copies = _fp32_copies(zero)
        flats = [copies.get(weight, weight) for weight in learned.values()]
        pieces = [
            Piece(name, tuple(weight.shape), 0, weight.numel(), number, 0)
            for number, (name, weight) in enumerate(learned.items())
        ]
    else:
        flats, pieces = [], []
    tensors = [_tensors(base, flat, step) for flat in flats]
    return Share(tensors, [piece for piece in pieces if piece.count > 0], set(learned))


@contextmanager
def filling(engine, rank: int, step: int) -> Iterator[Share]:
    """The share to fill as of `step`; afterwards the engine computes with what was filled in. Collective."""
    zero = engine.optimizer
    if _by_parameter(engine):
        zero.checkpoint_event_prologue()
    yield own_share(engine, rank, step)
    if _by_parameter(engine):
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)  # as at the end of a step
        zero.checkpoint_event_epilogue()
    elif hasattr(zero, "update_lp_params"):
        zero.update_lp_params()
    for weight, copy in _fp32_copies(zero).items():
        weight.data.copy_(copy.data)


def forget_empty_step(engine) -> None:
    """Undo the step of zero gradients that DeepSpeed takes in bf16 without ZeRO: Adam counts it, and weights decay."""
    for weight, copy in _fp32_copies(engine.optimizer).items():
        copy.data.copy_(weight.data)
    engine.optimizer.optimizer.state.clear()


def _by_parameter(engine) -> bool:
    return hasattr(engine.optimizer, "fp32_partitioned_groups_flat")


def _fp32_copies(zero) -> dict[torch.Tensor, torch.Tensor]:
    """{parameter: its fp32 copy} of the optimizer that trains in bf16 without ZeRO; empty for any other."""
    groups = zip(getattr(zero, "fp16_groups", []), getattr(zero, "fp32_groups", []), strict=False)
    return {weight: copy for weights, copies in groups for weight, copy in zip(weights, copies, strict=True)}


def _part(name: str, weight, rank: int, flat: int, offset: int, size: int) -> Piece:
    """ZeRO 3: equal parts of `size` elements, the last one padded."""
    count = min(size, weight.ds_numel - rank * size)
    return Piece(name, tuple(weight.ds_shape), rank * size, count, flat, offset)


def _fragment(name: str, weight) -> Piece:
    """ZeRO 1 and 2: what of the parameter lies in this process's stretch."""
    here, there = weight._hp_mapping.lp_fragment_address, weight._hp_mapping.hp_fragment_address
    group = weight._hp_mapping.param_group_index
    return Piece(name, tuple(weight.shape), here.start, here.numel, group, there.start)


def _tensors(base: torch.optim.Optimizer, flat: torch.Tensor, step: int | None) -> dict[str, torch.Tensor]:
    """{field: (n,)} of one flat tensor; Adam's state is made as Adam does it where no step was taken yet."""
    state = base.state[flat]
    if "exp_avg" not in state:
        state |= {"step": 0, "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
        step = step or 0
    if step is not None:
        state["step"] = step  # DeepSpeed's Adam on the CPU counts with a number, torch's with a tensor
        if isinstance(base, torch.optim.AdamW):
            device = flat.device if base.defaults["fused"] else "cpu"
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=device)
    weight, *moments = (tensor.detach().view(-1) for tensor in (flat, *(state[name] for name in FIELDS[1:])))
    return dict(zip(FIELDS, (weight, *moments), strict=True))
