"""Checkpoint files: written by any division of the parameters, read by any other; damage is found before it is read."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from general_preference.errors import InputError
from general_preference.trainer.checkpoint import MANIFEST, _digest, _read_manifest
from general_preference.trainer.shards import FIELDS, Piece, Share, describe_file, read_share, verify_file, write_share

SHAPES = {"embedding": (7, 3), "head": (4, 5), "scale": (1,), "norm": (13,)}


def whole(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {field: torch.randn(shape, generator=generator) for field in FIELDS} for name, shape in SHAPES.items()
    }


def cut_end_to_end(processes: int) -> list[list[Piece]]:
    """All parameters in a row, one stretch per process, as ZeRO 1 and 2 cut them."""
    size = -(-sum(torch.Size(shape).numel() for shape in SHAPES.values()) // processes)
    pieces: list[list[Piece]] = [[] for _ in range(processes)]
    position = 0
    for name, shape in SHAPES.items():
        start, count = 0, torch.Size(shape).numel()
        while start < count:
            process, offset = divmod(position, size)
            part = min(count - start, size - offset)
            pieces[process].append(Piece(name, shape, start, part, 0, offset))
            start, position = start + part, position + part
    return pieces


def cut_each(processes: int) -> list[list[Piece]]:
    """Every parameter in equal parts, the last one padded, as ZeRO 3 cuts them."""
    pieces: list[list[Piece]] = [[] for _ in range(processes)]
    for number, (name, shape) in enumerate(SHAPES.items()):
        count = torch.Size(shape).numel()
        size = -(-count // processes)
        for process in range(processes):
            part = min(size, count - process * size)
            if part > 0:
                pieces[process].append(Piece(name, shape, process * size, part, number, 0))
    return pieces


def empty_share(pieces: list[Piece], names: set[str] | None = None) -> Share:
    flats = max((piece.flat for piece in pieces), default=-1) + 1
    sizes = [max((p.offset + p.count for p in pieces if p.flat == flat), default=0) + 2 for flat in range(flats)]
    flat_tensors = [{field: torch.full((size,), -7.0) for field in FIELDS} for size in sizes]
    return Share(flat_tensors, pieces, set(SHAPES) if names is None else names)


def fill(share: Share, values: dict) -> Share:
    for piece in share.pieces:
        for field in FIELDS:
            part = values[piece.name][field].flatten()[piece.start : piece.start + piece.count]
            share.flats[piece.flat][field][piece.offset : piece.offset + piece.count] = part
    return share


CUTS = {"end to end": cut_end_to_end, "each": cut_each}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(CUTS)), st.integers(1, 9), st.sampled_from(sorted(CUTS)), st.integers(1, 9))
def test_any_division_reads_what_any_other_wrote(tmp_path_factory, wrote, writers, reads, readers):
    folder, values = tmp_path_factory.mktemp("shares"), whole(writers)
    files = [folder / f"process_{number:05d}.safetensors" for number in range(writers)]
    for file, pieces in zip(files, CUTS[wrote](writers), strict=True):
        write_share(file, fill(empty_share(pieces), values), {"random/cpu": torch.zeros(3, dtype=torch.uint8)})
    for pieces in CUTS[reads](readers):
        share, expected = empty_share(pieces), fill(empty_share(pieces), values)
        read_share(files, share)
        for found, wanted in zip(share.flats, expected.flats, strict=True):
            for field in FIELDS:
                assert torch.equal(found[field], wanted[field]), "what no piece covers stays as it was"


def test_another_model_is_refused(tmp_path):
    (pieces,) = cut_each(1)
    file = tmp_path / "process_00000.safetensors"
    write_share(file, fill(empty_share(pieces[1:]), whole(0)), {})
    with pytest.raises(InputError, match="has no embedding"):
        read_share([file], empty_share(pieces))
    with pytest.raises(InputError, match="which this one does not"):
        read_share([file], empty_share(pieces[1:], {"head", "norm"}))
    other = [Piece("head", (5, 4), 0, 20, 0, 0)]
    with pytest.raises(InputError, match=r"head is \(4, 5\), this one's is \(5, 4\)"):
        read_share([file], empty_share(other, {"head", "norm", "scale"}))


def test_a_missing_part_is_noticed(tmp_path):
    files = []
    for number, pieces in enumerate(cut_each(2)):
        files.append(tmp_path / f"{number}.safetensors")
        write_share(files[-1], fill(empty_share(pieces), whole(0)), {})
    with pytest.raises(InputError, match="lacks a part of"):
        read_share(files[:1], empty_share(cut_each(1)[0]))


def test_every_kind_of_damage_is_found(tmp_path):
    file = tmp_path / "process_00000.safetensors"
    write_share(file, fill(empty_share(cut_each(1)[0]), whole(0)), {})
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
    content = {"format": 1, "state": {"step": 4, "best": [[0.1234567890123, "step_2"]]}, "files": {"a": {"bytes": 5}}}
    text = json.dumps(content | {"xxh3_128": _digest(content)}, indent=1).encode()
    file = tmp_path / MANIFEST
    file.write_bytes(text)
    assert _read_manifest(tmp_path) == (content, None)
    for position in range(len(text)):
        for bit in (1, 32):
            file.write_bytes(text[:position] + bytes([text[position] ^ bit]) + text[position + 1 :])
            found, problem = _read_manifest(tmp_path)
            assert found == content or problem, f"byte {position}"
