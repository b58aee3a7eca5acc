"""Which process sees which comparison at which step: shuffled, balanced by length, resumable at any step.

A global batch depends on (seed, epoch, step) alone. Inside a step comparisons are assigned by length: to micro-batches
of similar length if rows are padded, of equally many tokens if packed, so that processes have about equal cost.
"""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from general_preference.errors import InputError

Item = tuple[int, float]  # index of a comparison, its weight in the step's loss


@dataclass
class StepSampler:
    """Yields the micro-batches of one process, in order, for the rest of a run.

    A comparison's weight is (world_size * accumulation) / (comparisons in the step): averaged over accumulation and
    processes this is the mean over the global batch; an epoch's last step is filled up with repeats of weight 0.

    lengths: tokens of each comparison. groups: which neighbors are shuffled as one and share a step, one id each;
    default `group_size` in a row. packed: rows have no padding, so a micro-batch costs its tokens.

    Raises:
        InputError: a step does not hold a whole number of groups.
    """

    lengths: list[int]
    micro_batch_size: int
    accumulation: int = 1
    world_size: int = 1
    rank: int = 0
    seed: int = 0
    group_size: int = 1
    groups: list[int] | None = None
    packed: bool = False

    def __post_init__(self):
        if self.groups is None:
            self.groups = [index // self.group_size for index in range(len(self.lengths))]
        self.global_batch_size = self.micro_batch_size * self.accumulation * self.world_size
        if self.global_batch_size % self.group_size:
            found = f"group_size {self.group_size} does not divide the {self.global_batch_size} comparisons of a step"
            raise InputError(f"{found}: make micro-batch * accumulation * processes a multiple")
        self.steps_per_epoch = math.ceil(len(self.lengths) / self.global_batch_size)

    def micro_batches(self, epochs: int, start_step: int = 0) -> Iterator[list[Item]]:
        """Micro-batches from the global step `start_step` to the end of `epochs` epochs, `accumulation` per step."""
        for epoch in range(start_step // self.steps_per_epoch, epochs):
            order = self.order(epoch)
            first = max(0, start_step - epoch * self.steps_per_epoch)
            for step in range(first, self.steps_per_epoch):
                yield from self._micro_batches(order, step)[self.rank :: self.world_size]

    def order(self, epoch: int) -> list[int]:
        """The permutation of an epoch: groups in random order, the incomplete ones last so that none is cut."""
        blocks: dict[int, list[int]] = {}
        for index, group in enumerate(self.groups):
            blocks.setdefault(group, []).append(index)
        members = list(blocks.values())
        generator = torch.Generator().manual_seed(self.seed + epoch)
        shuffled = [members[i] for i in torch.randperm(len(members), generator=generator)]
        return [index for block in sorted(shuffled, key=len, reverse=True) for index in block]

    def imbalance(self, steps: int = 1000) -> float:
        """Mean over the first steps' micro-batches of (most tokens on a process, with padding) / (mean) - 1."""
        order, excess = self.order(0), []
        for step in range(min(steps, self.steps_per_epoch)):
            batches = self._micro_batches(order, step)
            for start in range(0, len(batches), self.world_size):
                costs = [self._cost(batch) for batch in batches[start : start + self.world_size]]
                excess.append(max(costs) * len(costs) / sum(costs) - 1)
        return sum(excess) / len(excess)

    def _cost(self, batch: list[Item]) -> int:
        lengths = [self.lengths[index] for index, _ in batch]
        return sum(lengths) if self.packed else max(lengths) * len(lengths)

    def _micro_batches(self, order: list[int], step: int) -> list[list[Item]]:
        """A step's micro-batches of all processes; every `world_size` in a row run at the same time."""
        batch = order[step * self.global_batch_size : (step + 1) * self.global_batch_size]
        weight = self.world_size * self.accumulation / len(batch)
        by_length = sorted(batch, key=lambda index: (-self.lengths[index], index))
        items = [(index, weight) for index in by_length]
        # The shortest comparison fills the empty places of a last step: it counts nothing and costs least.
        items += [(by_length[-1], 0.0)] * (self.global_batch_size - len(batch))
        return self._evenly(items) if self.packed else _side_by_side(items, self.micro_batch_size, self.world_size)

    def _evenly(self, items: list[Item]) -> list[list[Item]]:
        """Longest first, each to the micro-batch with the fewest tokens that has room; fullest micro-batches first."""
        batches: list[list[Item]] = [[] for _ in range(self.accumulation * self.world_size)]
        open_batches = [(0, number) for number in range(len(batches))]
        for item in items:
            tokens, number = heapq.heappop(open_batches)
            batches[number].append(item)
            if len(batches[number]) < self.micro_batch_size:
                heapq.heappush(open_batches, (tokens + self.lengths[item[0]], number))
        batches.sort(key=self._cost, reverse=True)
        sides = [batches[start : start + self.world_size] for start in range(0, len(batches), self.world_size)]
        # Every second one reversed, so that no process always gets the fuller one.
        return [batch for number, side in enumerate(sides) for batch in (side[::-1] if number % 2 else side)]


def evaluation_batches(lengths: list[int], micro_batch_size: int, world_size: int, rank: int) -> list[list[Item]]:
    """The micro-batches of one process, equally many on each, that cover every comparison once; repeats weigh 0."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    items = [(index, 1.0) for index in order]
    items += [(order[-1], 0.0)] * (-len(items) % (world_size * micro_batch_size))
    return _side_by_side(items, micro_batch_size, world_size)[rank::world_size]


def _side_by_side(items: list[Item], micro: int, world_size: int) -> list[list[Item]]:
    """Micro-batches of similar length, from items in order of length; those that run at the same time take turns."""
    stride = world_size * micro
    steps = (items[start : start + stride] for start in range(0, len(items), stride))
    return [step[rank::world_size] for step in steps for rank in range(world_size)]
