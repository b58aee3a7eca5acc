"""The checksum of what training learns from: any change of it counts, and where or how it is stored does not."""

from types import SimpleNamespace

import datasets
import pytest

from general_preference.datasets.checksum import table_checksum
from general_preference.datasets.preparation import COUNTS, TOKENIZED, blend
from general_preference.errors import InputError
from general_preference.trainer.trainer import Trainer
from tests.conftest import random_comparisons

ROWS = [
    {"subset": "", "prompt_key": f"p{index}", "length": 0} | dict.fromkeys(COUNTS, 0) | comparison
    for index, comparison in enumerate(random_comparisons(30, 290, seed=6))
]


def table(rows: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows, features=TOKENIZED)


def edit(rows: list[dict], place: int, **columns) -> list[dict]:
    return [row | columns if index == place else row for index, row in enumerate(rows)]


GROUP = next(index for index, row in enumerate(ROWS) if len(row["first"]) > 1)
LAST = ROWS[-1]
FIRST, SECOND, *OTHERS = LAST["response_ids"]
CHANGES = {
    "swapped": [row | {"first": row["second"], "second": row["first"]} for row in ROWS],
    "one swapped": edit(ROWS, 7, first=ROWS[7]["second"], second=ROWS[7]["first"]),
    "margin": edit(ROWS, 3, margin=0.25),
    "soft label": edit(ROWS, 3, label=[0.7]),
    "a token": edit(ROWS, 29, response_ids=[*LAST["response_ids"][:-1], [*LAST["response_ids"][-1][:-2], 17, 5]]),
    "a prompt's token": edit(ROWS, 0, prompt_ids=[1, 17, *ROWS[0]["prompt_ids"][2:]]),
    "where a response ends": edit(ROWS, 29, response_ids=[FIRST[:-1], [FIRST[-1], *SECOND], *OTHERS]),
    "order of preferences": edit(ROWS, GROUP, **{name: ROWS[GROUP][name][::-1] for name in ("first", "second")}),
    "order of rows": ROWS[::-1],
    "fewer": ROWS[:-1],
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_learned_from_counts(change):
    assert table_checksum(table(CHANGES[change])) != table_checksum(table(ROWS))


def test_how_a_table_is_stored_does_not_count(tmp_path):
    fresh = table(ROWS)
    expected = table_checksum(fresh)
    fresh.save_to_disk(tmp_path / "saved", num_shards=4)
    order = [*range(1, 30), 0]
    stored = {
        "saved in shards": datasets.load_from_disk(str(tmp_path / "saved")),
        "chunks": datasets.concatenate_datasets([table(ROWS[:11]), table(ROWS[11:])]),
        "wide numbers": datasets.Dataset.from_list(ROWS),
        "a selection of a selection": table([ROWS[index] for index in order]).select([29, *range(29)]),
        "names of records": table([row | {"id": "x", "subset": "y"} for row in ROWS]),
        "another format": fresh.with_format("numpy"),
    }
    assert {name: table_checksum(one) for name, one in stored.items()} == dict.fromkeys(stored, expected)
    grouped = fresh.add_column("group", [index // 2 for index in range(30)])
    regrouped = fresh.add_column("group", [index // 3 for index in range(30)])
    assert len({expected, table_checksum(grouped), table_checksum(regrouped)}) == 3
    assert table_checksum(blend([fresh, grouped.remove_columns("group")], [0.5, 0.5], seed=1)) != expected


def test_processes_that_read_different_data_are_refused():
    processes = SimpleNamespace(gather_objects=lambda mine: [mine, "another"])
    trainer = SimpleNamespace(arguments=SimpleNamespace(model=None, optimizer=None), context=processes)
    with pytest.raises(InputError, match="processes read different training data"):
        Trainer._identity(trainer, table(ROWS))
