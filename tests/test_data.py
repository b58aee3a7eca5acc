"""The bundled comparisons: reproducible, small, split without leaks, complete cycles."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.make_data import scalar_ceiling
from general_preference.datasets.records import parse_record
from general_preference.plots import find_cycle

DATA = Path(__file__).resolve().parents[1] / "data"
SETS = ("cyclic", "transitive", "mixed")


def read(kind, split):
    return [json.loads(line) for line in (DATA / kind / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_script_writes_the_same_bytes(tmp_path):
    subprocess.run([sys.executable, DATA / "make_data.py", "--output_dir", tmp_path], check=True, capture_output=True)
    written = sorted(tmp_path.rglob("*.jsonl"))
    assert len(written) == 6
    for path in written:
        assert path.read_bytes() == (DATA / path.relative_to(tmp_path)).read_bytes(), path
    assert sum(path.stat().st_size for path in written) < 1_000_000


@pytest.mark.parametrize("kind", SETS)
def test_no_sentence_of_the_test_set_is_trained_on(kind):
    def texts(records):
        return {text for record in records for text in [record["prompt"], *record.get("responses", [])]} | {
            record[side] for record in records for side in ("chosen", "rejected") if side in record
        }

    assert not texts(read(kind, "train")) & texts(read(kind, "test"))


def test_test_cycles_are_complete_and_what_a_scalar_reaches_is_known():
    lengths = set()
    for record in read("cyclic", "test"):
        cycle = find_cycle([tuple(edge) for edge in record["preferences"]])
        assert len(cycle) == len(record["responses"]) == len(record["preferences"])
        lengths.add(len(cycle))
        assert scalar_ceiling([record]) == pytest.approx((len(cycle) - 1) / len(cycle))
    assert lengths == {3, 4, 5}
    assert scalar_ceiling(read("transitive", "test")) == 1.0
    assert all(
        find_cycle([tuple(edge) for edge in record["preferences"]]) is None for record in read("transitive", "test")
    )
    for record in read("mixed", "test"):
        assert len(find_cycle([tuple(edge) for edge in record["preferences"]])) == 3
        assert scalar_ceiling([record]) == pytest.approx(5 / 6)


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_record_fits(kind, split):
    for record in read(kind, split):
        found = parse_record(record)
        assert len({response[0]["content"] for response in found.responses}) == len(found.responses)
