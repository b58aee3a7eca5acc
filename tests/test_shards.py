"""Checkpoint files: written by any division of the parameters, read by any other; damage is found before it is read."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from general_preference.errors import InputError
from general_preference.trainer.checkpoint import FORMAT, MANIFEST, _digest, _read_manifest
from general_preference.trainer.shards import (
    FIELDS,
    Fragment,
    Shard,
    check_complete,
    describe_file,
    read_shard,
    verify_file,
    write_shard,
)
from general_preference.trainer.zero_layout import own_shard

SHAPES = {"embedding": (7, 3), "head": (4, 5), "scale": (1,), "norm": (13,)}
SIZES = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}


def whole(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {field: torch.randn(shape, generator=generator) for field in FIELDS} for name, shape in SHAPES.items()
    }


def cut_end_to_end(processes: int) -> list[list[Fragment]]:
    """All parameters in a row, one stretch per process, as ZeRO 1 and 2 cut them."""
    size = -(-sum(torch.Size(shape).numel() for shape in SHAPES.values()) // processes)
    fragments: list[list[Fragment]] = [[] for _ in range(processes)]
    position = 0
    for name, shape in SHAPES.items():
        start, count = 0, torch.Size(shape).numel()
        while start < count:
            process, offset = divmod(position, size)
            part = min(count - start, size - offset)
            fragments[process].append(Fragment(name, shape, start, part, 0, offset))
            start, position = start + part, position + part
    return fragments


def cut_each(processes: int) -> list[list[Fragment]]:
    """Every parameter in equal parts, the last one padded, as ZeRO 3 cuts them."""
    fragments: list[list[Fragment]] = [[] for _ in range(processes)]
    for number, (name, shape) in enumerate(SHAPES.items()):
        count = torch.Size(shape).numel()
        size = -(-count // processes)
        for process in range(processes):
            part = min(size, count - process * size)
            if part > 0:
                fragments[process].append(Fragment(name, shape, process * size, part, number, 0))
    return fragments


def empty_shard(fragments: list[Fragment], trained: dict[str, int] | None = None) -> Shard:
    flats = max((fragment.flat for fragment in fragments), default=-1) + 1
    lengths = [max((f.offset + f.count for f in fragments if f.flat == flat), default=0) + 2 for flat in range(flats)]
    flat_tensors = [{field: torch.full((length,), -7.0) for field in FIELDS} for length in lengths]
    return Shard(flat_tensors, fragments, SIZES if trained is None else trained)


def fill(shard: Shard, values: dict) -> Shard:
    for fragment in shard.fragments:
        for field in FIELDS:
            part = values[fragment.name][field].flatten()[fragment.start : fragment.start + fragment.count]
            shard.flats[fragment.flat][field][fragment.offset : fragment.offset + fragment.count] = part
    return shard


CUTS = {"end to end": cut_end_to_end, "each": cut_each}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(CUTS)), st.integers(1, 9), st.sampled_from(sorted(CUTS)), st.integers(1, 9))
def test_any_division_reads_what_any_other_wrote(tmp_path_factory, wrote, writers, reads, readers):
    folder, values = tmp_path_factory.mktemp("shards"), whole(writers)
    files = [folder / f"process_{number:05d}.safetensors" for number in range(writers)]
    for file, fragments in zip(files, CUTS[wrote](writers), strict=True):
        write_shard(file, fill(empty_shard(fragments), values), {"random/cpu": torch.zeros(3, dtype=torch.uint8)})
    for fragments in CUTS[reads](readers):
        shard, expected = empty_shard(fragments), fill(empty_shard(fragments), values)
        read_shard(files, shard)
        for found, wanted in zip(shard.flats, expected.flats, strict=True):
            for field in FIELDS:
                assert torch.equal(found[field], wanted[field]), "what no fragment covers stays as it was"


def test_another_model_is_refused(tmp_path):
    (fragments,) = cut_each(1)
    file = tmp_path / "process_00000.safetensors"
    write_shard(file, fill(empty_shard(fragments[1:]), whole(0)), {})
    with pytest.raises(InputError, match="has no embedding"):
        read_shard([file], empty_shard(fragments))
    with pytest.raises(InputError, match="which this one does not"):
        read_shard([file], empty_shard(fragments[1:], {"head": 20, "norm": 13}))
    other = [Fragment("head", (5, 4), 0, 20, 0, 0)]
    with pytest.raises(InputError, match=r"head is \(4, 5\), this one's is \(5, 4\)"):
        read_shard([file], empty_shard(other, {"head": 20, "norm": 13, "scale": 1}))


def test_a_missing_part_is_noticed(tmp_path):
    files = []
    for number, fragments in enumerate(cut_each(2)):
        files.append(tmp_path / f"{number}.safetensors")
        write_shard(files[-1], fill(empty_shard(fragments), whole(0)), {})
    with pytest.raises(InputError, match="lacks a part of"):
        read_shard(files[:1], empty_shard(cut_each(1)[0]))


def test_every_kind_of_damage_is_found(tmp_path):
    file = tmp_path / "process_00000.safetensors"
    write_shard(file, fill(empty_shard(cut_each(1)[0]), whole(0)), {})
    entry, good = describe_file(file), file.read_bytes()
    assert verify_file(file, entry) is None
    for position in (0, 9, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        assert "is damaged" in verify_file(file, entry)
    file.write_bytes(good[:-1])
    assert f"has {len(good) - 1} bytes instead of {len(good)}" in verify_file(file, entry)
    file.unlink()
    assert "cannot be read" in verify_file(file, entry)


def test_no_flipped_bit_of_a_manifest_goes_unnoticed(tmp_path):
    content = {
        "format": FORMAT,
        "state": {"step": 4, "best": [[0.1234567890123, "step_2"]]},
        "files": {"a": {"bytes": 5}},
    }
    text = json.dumps(content | {"xxh3_128": _digest(content)}, indent=1).encode()
    file = tmp_path / MANIFEST
    file.write_bytes(text)
    assert _read_manifest(tmp_path) == (content, None)
    for position in range(len(text)):
        for bit in (1, 32):
            file.write_bytes(text[:position] + bytes([text[position] ^ bit]) + text[position + 1 :])
            found, problem = _read_manifest(tmp_path)
            assert found == content or problem, f"byte {position}"


def test_every_element_is_saved_exactly_once():
    """Counts of all processes are compared with the parameters' sizes before a manifest is written."""
    for cut in CUTS.values():
        counts = [empty_shard(fragments).counts() for fragments in cut(3)]
        check_complete(counts, SIZES)
        with pytest.raises(RuntimeError, match="elements of"):
            check_complete(counts[:-1], SIZES)
        with pytest.raises(RuntimeError, match="elements of"):
            check_complete([*counts, counts[0]], SIZES)


class StubEngine:
    """What `zero_layout` asks of DeepSpeed's engine, with a stage of its choice and attributes that may be missing."""

    def __init__(self, stage: int, optimizer):
        self.module, self.optimizer, self.stage = torch.nn.Linear(4, 8, bias=False), optimizer, stage

    def zero_optimization_stage(self) -> int:
        return self.stage


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_renamed_attribute_of_the_engine_is_no_empty_checkpoint(stage):
    """DeepSpeed's internals are private: if one goes, saving raises instead of writing nothing, or zeros."""
    weight = torch.zeros(32, requires_grad=True)
    base = torch.optim.AdamW([weight])
    with pytest.raises(RuntimeError, match=f"keeps the states of ZeRO {stage} in another place"):
        own_shard(StubEngine(stage, SimpleNamespace(optimizer=base)), rank=0)


def test_states_without_moments_are_not_saved_as_zeros():
    weight = torch.zeros(32, requires_grad=True)
    engine = StubEngine(2, SimpleNamespace(optimizer=torch.optim.AdamW([weight])))
    here, there = SimpleNamespace(start=0, numel=32), SimpleNamespace(start=0)
    engine.module.weight._hp_mapping = SimpleNamespace(
        lp_fragment_address=here, hp_fragment_address=there, param_group_index=0
    )
    with pytest.raises(RuntimeError, match="exp_avg"):
        own_shard(engine, rank=0)
    assert own_shard(engine, rank=0, step=4).counts() == {"weight": 32}, "they are made where a checkpoint is read"


def test_an_unknown_zero_stage_is_refused():
    with pytest.raises(RuntimeError, match="do not know ZeRO stage 4"):
        own_shard(StubEngine(4, torch.optim.AdamW([torch.zeros(1, requires_grad=True)])), rank=0)


def test_without_zero_the_first_process_writes_everything():
    engine = StubEngine(0, None)
    engine.optimizer = torch.optim.AdamW(engine.module.parameters())
    assert own_shard(engine, rank=0).counts() == {"weight": 32} and own_shard(engine, rank=1).counts() == {}
