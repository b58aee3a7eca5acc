"""Which comparison is seen when: nothing lost, nothing twice, the same steps on any number of processes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from general_preference.datasets.sampler import StepSampler, evaluation_batches
from general_preference.errors import InputError


def lengths_of(count, seed=0):
    return torch.randint(5, 500, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def steps(count, micro, accumulation, world, epochs=1, start=0, group_size=1, packed=True):
    """Per step, the items of all processes; and the number of micro-batches of each."""
    per_rank = []
    for rank in range(world):
        sampler = StepSampler(
            lengths_of(count), micro_batch_size=micro, accumulation=accumulation, world_size=world, rank=rank,
            seed=5, group_size=group_size, packed=packed,
        )  # fmt: skip
        batches = list(sampler.micro_batches(epochs, start))
        assert all(len(batch) == micro for batch in batches)
        per_rank.append([batches[i : i + accumulation] for i in range(0, len(batches), accumulation)])
    assert len({len(batches) for batches in per_rank}) == 1
    return [[item for part in parts for batch in part for item in batch] for parts in zip(*per_rank, strict=True)]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_an_epoch_sees_everything_once_and_weights_average_to_one(count, micro, accumulation, world, packed):
    seen = []
    for items in steps(count, micro, accumulation, world, packed=packed):
        real = [index for index, weight in items if weight > 0]
        seen += real
        assert sum(weight for _, weight in items) == pytest.approx(world * accumulation)
        assert len({weight for _, weight in items if weight > 0}) == 1
    assert sorted(seen) == list(range(count))


def test_a_step_does_not_depend_on_how_it_is_divided():
    def contents(*division, packed=True):
        found = steps(50, *division, epochs=2, packed=packed)
        return [sorted(index for index, weight in items if weight) for items in found]

    assert contents(8, 1, 1) == contents(1, 8, 1) == contents(2, 2, 2) == contents(4, 1, 2)
    assert contents(8, 1, 1) == contents(2, 2, 2, packed=False)


def test_continuing_equals_never_having_stopped():
    whole = steps(37, 2, 2, 2, epochs=3)
    for start in (0, 1, 5, 9, len(whole) - 1):
        assert steps(37, 2, 2, 2, epochs=3, start=start) == whole[start:]


def test_epochs_differ_and_seeds_repeat():
    sampler = StepSampler(lengths_of(40), micro_batch_size=4, seed=1)
    assert sampler.order(0) != sampler.order(1)
    assert sampler.order(1) == StepSampler(lengths_of(40), micro_batch_size=4, seed=1).order(1)


def test_neighbors_stay_in_one_step():
    for items in steps(48, 4, 1, 2, group_size=4):
        indices = sorted(index for index, _ in items)
        assert all(indices[i + 1] == indices[i] + 1 for i in range(len(indices)) if i % 4 != 3)


def test_groups_survive_a_shuffled_table():
    groups = [7, 7, 3, 3, 9, 1, 1, 4, 4, 5, 5]  # rows of a split; group 9 lost its partner
    for seed in range(5):
        sampler = StepSampler([10] * 11, micro_batch_size=2, accumulation=2, seed=seed, group_size=2, groups=groups)
        order = sampler.order(0)
        steps = [order[start : start + 4] for start in range(0, 11, 4)]
        for step in steps:
            for index in step:
                assert all(mate in step for mate in range(11) if groups[mate] == groups[index])
    with pytest.raises(InputError, match="make micro-batch"):
        StepSampler([10] * 8, micro_batch_size=3, group_size=2)


def test_micro_batches_hold_similar_lengths():
    lengths = lengths_of(512)
    sampler = StepSampler(lengths, micro_batch_size=8, accumulation=8, seed=0)
    padded = sum(8 * max(lengths[i] for i, _ in batch) for batch in sampler.micro_batches(1))
    assert padded < 1.15 * sum(lengths)


@pytest.mark.parametrize("packed", [True, False])
def test_processes_that_wait_for_each_other_carry_the_same(packed):
    lengths = [
        int(length) for length in torch.empty(4096).log_normal_(5, 0.6, generator=torch.Generator().manual_seed(0))
    ]
    samplers = [
        StepSampler(lengths, micro_batch_size=4, accumulation=4, world_size=4, rank=rank, seed=0, packed=packed)
        for rank in range(4)
    ]
    cost = (lambda batch: sum(batch)) if packed else (lambda batch: max(batch) * len(batch))
    excess = []
    for batches in zip(*(sampler.micro_batches(1) for sampler in samplers), strict=True):
        costs = [cost([lengths[index] for index, _ in batch]) for batch in batches]
        excess.append(max(costs) / (sum(costs) / 4) - 1)
    assert samplers[0].imbalance() == pytest.approx(sum(excess) / len(excess))
    assert samplers[0].imbalance() < (0.04 if packed else 0.15)
    drawn = torch.randperm(4096, generator=torch.Generator().manual_seed(0)).view(-1, 4, 4).tolist()
    naive = [[cost([lengths[index] for index in batch]) for batch in batches] for batches in drawn]
    assert sum(max(costs) * 4 / sum(costs) - 1 for costs in naive) / len(naive) > 0.2, "what chance would give"


def test_packed_micro_batches_of_a_step_carry_equally_many_tokens():
    lengths = lengths_of(512)
    batches = StepSampler(lengths, micro_batch_size=8, accumulation=8, seed=0, packed=True).micro_batches(1)
    tokens = [sum(lengths[index] for index, _ in batch) for batch in batches]
    for start in range(0, 64, 8):
        assert max(tokens[start : start + 8]) < 1.06 * min(tokens[start : start + 8])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 50), st.integers(1, 7), st.integers(1, 4))
def test_evaluation_covers_everything_once(count, micro, world):
    ranks = [evaluation_batches(lengths_of(count), micro, world, rank) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [index for batches in ranks for batch in batches for index, weight in batch if weight > 0]
    assert sorted(seen) == list(range(count))
