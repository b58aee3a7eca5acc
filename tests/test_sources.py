"""What is read of files, folders and hub names, and what is said of what is not: formats, splits, bad records."""

import gzip
import json
import logging
import os

import datasets
import pyarrow
import pytest
from pyarrow import ipc

from general_preference.datasets.locations import find_files, locate
from general_preference.datasets.preparation import load_tokenized
from general_preference.datasets.sources import Source, load_source, parse_sources
from general_preference.datasets.tokenization import ComparisonTokenizer
from general_preference.errors import InputError

RECORDS = [{"prompt": f"question {i // 2}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]
ROWS = "prompt,chosen,rejected\n" + "".join(f"q{i},a,b\n" for i in range(3))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def write(path, records=RECORDS[:1]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def contents(table):
    return [(row["prompt"][0]["content"], [r[0]["content"] for r in row["responses"]]) for row in table]


def compress(data: bytes, ending: str) -> bytes:
    return gzip.compress(data, mtime=0) if ending == ".gz" else pyarrow.Codec("zstd").compress(data, asbytes=True)


def files_of(path) -> list[str]:
    """Names of the files that are read, below the folder."""
    location = locate(str(path))
    return [str(file.relative_to(location.place)) for file in find_files(location)[0]]


def test_every_format_reads_alike(tmp_path):
    expected, summary = load_source(Source("a", write(tmp_path / "a.jsonl", RECORDS)))
    assert summary.left_out == 0 and len(expected) == 20
    table = datasets.Dataset.from_list(RECORDS)
    write(tmp_path / "lines.ndjson", RECORDS)
    write(tmp_path / "UPPER.JSONL", RECORDS)
    (tmp_path / "array.json").write_text(json.dumps(RECORDS))
    table.to_csv(str(tmp_path / "t.csv"))
    table.to_csv(str(tmp_path / "t.tsv"), sep="\t")
    table.to_parquet(str(tmp_path / "t.parquet"))
    with ipc.new_stream(str(tmp_path / "stream.arrow"), table.data.schema) as stream:
        stream.write_table(table.data.table)
    with ipc.new_file(str(tmp_path / "file.arrow"), table.data.schema) as file:
        file.write_table(table.data.table, max_chunksize=7)
    names = [path.name for path in tmp_path.iterdir() if path.is_file()]
    for name in names:
        for ending in (".gz", ".zst"):
            (tmp_path / f"{name}{ending}").write_bytes(compress((tmp_path / name).read_bytes(), ending))
    table.with_format("numpy", columns=["prompt"]).save_to_disk(str(tmp_path / "saved"))
    write(tmp_path / "folder" / "part1.jsonl", RECORDS[:7])
    (tmp_path / "folder" / "part2.jsonl.gz").write_bytes(
        b"".join(compress(json.dumps(record).encode() + b"\n", ".gz") for record in RECORDS[7:])  # many members
    )
    for name in [*names, *(f"{name}{end}" for name in names for end in (".gz", ".zst")), "saved", "folder"]:
        found, _ = load_source(Source("a", str(tmp_path / name)))
        assert contents(found) == contents(expected), name
        ids = found["id"][:]
        assert len(set(ids)) == 20 and str(tmp_path / name) in ids[0]


def test_rows_without_an_id_lead_back_to_file_and_row(tmp_path):
    table = datasets.Dataset.from_list(RECORDS)
    for part in range(2):
        table.shard(2, part, contiguous=True).to_parquet(
            str(tmp_path / "d" / f"data/train-0000{part}-of-00002.parquet")
        )
    found, _ = load_source(Source("a", str(tmp_path / "d")))
    folder = tmp_path / "d" / "data"
    assert found["id"][:] == [
        f"{folder}/train-0000{part}-of-00002.parquet, row {row}" for part in range(2) for row in range(1, 11)
    ]
    table.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    saved, _ = load_source(Source("a", str(tmp_path / "saved")))
    assert saved["id"][:] == [f"{tmp_path}/saved, row {row}" for row in range(1, 21)]


def test_a_hub_name_has_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((*arguments, options["split"]))
        return datasets.Dataset.from_list(RECORDS[:2])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for path, expected in [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name@test", ("owner/name", None, "test")),
        ("owner/name:all@train[:10%]", ("owner/name", "all", "train[:10%]")),
        ("owner/name:all", ("owner/name", "all", "train")),
    ]:
        found, _ = load_source(Source("a", path))
        assert set(asked) == {expected}
        assert found["id"][1] == f"{path}{'' if '@' in path else '@train'}, row 2"
        asked.clear()


def test_a_saved_dataset_is_read_without_the_caches_beside_it(tmp_path):
    saved = tmp_path / "sets" / "saved"
    datasets.Dataset.from_list(RECORDS[:3]).save_to_disk(str(saved))
    datasets.load_from_disk(str(saved)).map(lambda row: {"prompt": row["prompt"] + "?"})
    assert len(list(saved.glob("*.arrow"))) == 2, "datasets writes the mapped table into the same folder"
    for path in (saved, saved.parent, f"{saved}/*.arrow"):
        table, _ = load_source(Source("saved", str(path)))
        assert [prompt for prompt, _ in contents(table)] == [record["prompt"] for record in RECORDS[:3]]
    (saved / "data-00000-of-00001.arrow").write_bytes(b"no table")
    with pytest.raises(InputError, match=f"cannot read {saved} as a saved dataset"):
        load_source(Source("saved", str(saved)))


def test_of_saved_splits_train_is_read(tmp_path):
    train, test = datasets.Dataset.from_list(RECORDS[:3]), datasets.Dataset.from_list(RECORDS[3:5])
    datasets.DatasetDict(train=train, test_prefs=test).save_to_disk(str(tmp_path / "splits"))
    paths = [f"{tmp_path}/splits{part}" for part in ("", "@train", "/test_prefs", "@test_prefs")]
    assert [len(load_source(Source("a", path))[0]) for path in paths] == [3, 3, 2, 2]
    datasets.DatasetDict(test=test).save_to_disk(str(tmp_path / "no_train"))
    with pytest.raises(
        InputError, match=r"no_train has no split 'train'; it has test: name one, as in .*/no_train@test"
    ):
        load_source(Source("a", str(tmp_path / "no_train")))


@pytest.mark.parametrize(
    "names",
    [
        ["train/a.jsonl", "train/b.jsonl", "test/a.jsonl"],
        ["deep/er/train/a.jsonl", "deep/dev/a.jsonl", "other/a.jsonl"],
        ["train.jsonl", "test.jsonl", "validation.jsonl"],
        ["my_train_1.jsonl", "my-train-2.jsonl", "eval 1.jsonl", "pretrain.jsonl"],
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/raw_prefs-00000-of-00001.jsonl"],
        ["x/train-00000-of-00002.jsonl", "x/filtered-00000-of-00001.jsonl"],
        ["set_train/test.jsonl", "test/train.jsonl"],
        ["Train.jsonl", "training.jsonl", "evaluation.v2.jsonl", "valid.jsonl"],
        ["part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"],
        ["a.jsonl", "training/.hidden/b.jsonl", "training/__pycache__/b.jsonl", ".test.jsonl"],
    ],
)
def test_split_names_mean_what_they_mean_to_datasets(tmp_path, names):
    folder = tmp_path / "d"
    for name in names:
        write(folder / name)
    found = datasets.load_dataset_builder(str(folder)).config.data_files
    known = {str(split): files for split, files in found.items()}
    for split, files in known.items():
        assert files_of(f"{folder}@{split}") == sorted(os.path.relpath(file, folder) for file in files)
    missing = "validation" if "validation" not in known else "nothing"
    with pytest.raises(InputError, match=f"has no split '{missing}'; it has ") as caught:
        files_of(f"{folder}@{missing}")
    assert all(split in str(caught.value) for split in known)
    assert "train" not in known or files_of(folder) == files_of(f"{folder}@train")


def test_configurations_are_those_of_the_readme(tmp_path):
    folder = tmp_path / "helpful"
    for name in ("preference/train.jsonl", "preference/test.jsonl", "edit/train.jsonl"):
        write(folder / name)
    files = "\n".join(f"  - split: {split}\n    path: preference/{split}.jsonl" for split in ("train", "test"))
    configs = f"- config_name: preference\n  data_files:\n{files}\n- config_name: edit\n  data_files: edit/*.jsonl"
    (folder / "README.md").write_text(f"---\nlicense: mit\nconfigs:\n{configs}\n---\nText\n")
    assert files_of(f"{folder}:preference") == ["preference/train.jsonl"]
    assert files_of(f"{folder}:preference@test") == ["preference/test.jsonl"]
    assert files_of(f"{folder}:edit@train") == ["edit/train.jsonl"]
    for path, message in [
        (folder, r"Please pick one among the available configs: \['preference', 'edit'\]$"),
        (f"{folder}:other", "'other' not found"),
        (f"{folder}:edit@test", "has no split 'test'; it has train"),
        (f"{folder / 'edit'}:other", "has no configuration 'other'"),
    ]:
        with pytest.raises(InputError, match=message):
            files_of(path)


def test_what_is_read_of_a_folder_is_listed(tmp_path, caplog):
    folder = tmp_path / "run"
    for name in ("train/0.jsonl", "train/1.JSONL", "test/x.jsonl", "extra.csv", ".cache/train/y.jsonl", "notes.txt"):
        write(folder / name)
    for name in ("arguments.json", "train/results.summary.json", "dataset_info.json", "train/metrics.jsonl"):
        (folder / name).write_text("{}")
    with caplog.at_level(logging.INFO):
        assert len(load_source(Source("a", str(folder)))[0]) == 2
        load_source(Source("b", str(folder / "test")))
        load_source(Source("c", str(folder / "train" / "0.jsonl")))
    assert caplog.messages == [
        f"a: 2 files of {folder} (train/0.jsonl, train/1.JSONL); "
        "left out: extra.csv (in no split), test/x.jsonl (split test)",
        f"b: 1 file of {folder}/test (x.jsonl)",
    ]


def test_linked_folders_are_read_once(tmp_path):
    write(tmp_path / "large" / "x.jsonl")
    write(tmp_path / "d" / "sub" / "a.jsonl")
    (tmp_path / "d" / "linked").symlink_to("../large")
    (tmp_path / "d" / "sub" / "loop").symlink_to("..")
    assert files_of(tmp_path / "d") == ["linked/x.jsonl", "sub/a.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("part-*.jsonl", ["part-0.jsonl", "part-1.jsonl"]),
        ("**/*.jsonl", ["other.jsonl", "part-0.jsonl", "part-1.jsonl", "sub/part-2.jsonl"]),
        ("*", ["other.jsonl", "part-0.jsonl", "part-1.jsonl", "t.tsv"]),
        ("sub[1].jsonl", ["sub[1].jsonl"]),
    ],
)
def test_globs(tmp_path, pattern, expected):
    folder = tmp_path / "d"
    for name in ("part-1.jsonl", "part-0.jsonl", "sub/part-2.jsonl", "other.jsonl", ".hidden.jsonl", "config.json"):
        write(folder / name)
    (folder / "t.tsv").write_text(ROWS.replace(",", "\t"))
    if "[" in pattern:
        write(folder / pattern)
    found, _ = load_source(Source("a", f"{folder}/{pattern}"))
    assert list(dict.fromkeys(name.rpartition(",")[0] for name in found["id"])) == [f"{folder}/{x}" for x in expected]


def test_sources_and_names(tmp_path, monkeypatch):
    assert parse_sources("x/a.jsonl,b=y/c.csv,owner/name, x/d.JSONL.gz ,x/part-*.tsv,y/**/*.jsonl,owner/n:c@test") == [
        Source("a", "x/a.jsonl"), Source("b", "y/c.csv"), Source("name", "owner/name"), Source("d", "x/d.JSONL.gz"),
        Source("part", "x/part-*.tsv"), Source("y", "y/**/*.jsonl"), Source("n:c@test", "owner/n:c@test")]  # fmt: skip
    assert [s.name for s in parse_sources("x/train.jsonl,y/train.jsonl")] == ["x/train", "y/train"]
    for text, message in [("a=x,a=y", "two sets"), ("x,,y", "empty entry"), ("a=", "empty entry")]:
        with pytest.raises(InputError, match=message):
            parse_sources(text)
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jsonl", "rate=0.1.jsonl", "c, d/train.jsonl", "v@2/x.jsonl"):
        write(tmp_path / name)
    assert parse_sources(r"a,b.jsonl,rate=0.1.jsonl,n=c, d@train,v@2,new\,x.jsonl") == [
        Source("a,b", "a,b.jsonl"), Source("rate=0.1", "rate=0.1.jsonl"), Source("n", "c, d@train"),
        Source("v@2", "v@2"), Source("new,x", "new,x.jsonl")]  # fmt: skip
    assert [s.name for s in parse_sources("owner/name,x=c, d,a,b.jsonl,owner/y")] == ["name", "x", "a,b", "y"]
    assert files_of("c, d@train") == ["train.jsonl"] and files_of("v@2@train") == files_of("v@2") == ["x.jsonl"]


def test_a_file_that_is_read_twice_is_said_once(tmp_path, tokenizer, caplog):
    for name in ("d/a.jsonl", "d/b.jsonl", "d/c.jsonl"):
        write(tmp_path / name)
    sources = parse_sources(f"all={tmp_path}/d,some={tmp_path}/d/../d/[ab].jsonl,c=owner/name,d=owner/name@train")
    load_tokenized(sources[:2], ComparisonTokenizer(tokenizer))
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"'all' and 'some' both read {tmp_path}/d/a.jsonl and 1 more: these comparisons count twice"
    ]
    assert sources[2].files == sources[3].files


def test_an_edited_file_is_read_again_and_an_unchanged_one_is_not(tmp_path):
    path = write(tmp_path / "d" / "a.jsonl", RECORDS[:4])
    first, _ = load_source(Source("a", str(tmp_path / "d")))
    again, _ = load_source(Source("a", str(tmp_path / "d")))
    assert first.cache_files == again.cache_files
    write(tmp_path / "d" / "a.jsonl", RECORDS[:5])
    write(tmp_path / "d" / "test" / "a.jsonl", RECORDS[:3])
    assert len(load_source(Source("a", path))[0]) == 5
    assert len(load_source(Source("a", f"{tmp_path}/d@test"))[0]) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no records"),
        ("\n\n", "holds no records"),
        ('{"prompt": "q", "chosen": "a", "rejected": "b"}\n{"prompt": ', "line 2: not JSON"),
        ('{"prompt": "q", "chosen": "a"}\n', "line 1: no key 'rejected'"),
        ('{"prompt": "q", "chosen": 5, "rejected": "b"}\n', "line 1: 'chosen' is int 5"),
        ("\ufeffnot json\n", "line 1: not JSON"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load_source(Source("bad", str(path)))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "Name two fruits.,apples, pears,stones",
            r"line 3: 4 cells under 3 columns; a cell that holds ',' .* in quotes",
        ),
        ("q,a", "line 3: 2 cells under 3 columns"),
        ('q,"a"b,c', "line 3: .*expected after"),
        ('"two\nlines",a,b,c', "line 3: 4 cells"),
        ("q,caf\udce9,b", "line 3: .* not UTF-8"),
    ],
)
def test_a_bad_row_of_a_csv_file_costs_itself_alone(tmp_path, row, message):
    file, lines = tmp_path / "x.csv", ROWS.splitlines()
    lines.insert(2, row)
    file.write_text("\n".join(lines), errors="surrogateescape")
    with pytest.raises(InputError, match=f"x.csv, {message}"):
        load_source(Source("x", str(file)))
    table, summary = load_source(Source("x", str(file)), skip_bad=True)
    assert [prompt for prompt, _ in contents(table)] == ["q0", "q1", "q2"] and summary.left_out == 1
    assert table["id"][2].endswith(f"line {5 + row.count(chr(10))}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ROWS + 'q,"a,b\nq,a,b\n', "line 5: .*unexpected end of data"),
        (ROWS + 'q,a,"b', "line 5: .*unexpected end of data"),
        (ROWS + 'q,"a,b\nq,a,b\nq,"a",b\nq,a,b\n', "line 5: .*expected after"),
        (ROWS.replace("chosen", "prompt"), "line 1: two columns are called 'prompt'"),
        (ROWS.replace("prompt", " "), "line 1: column 1 of 3 has no name"),
        ("\n" + ROWS.replace("chosen", ""), "line 2: column 2 of 3 has no name"),
    ],
)
def test_a_csv_file_that_hides_rows_or_columns_is_refused(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    for skip_bad in (False, True):
        with pytest.raises(InputError, match=f"x.csv, {message}"):
            load_source(Source("x", str(tmp_path / "x.csv")), skip_bad=skip_bad)


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
def test_bytes_that_are_not_text_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b'[{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}]\ncaf\xe9\n')
    with pytest.raises(InputError, match="UTF-8") as caught:
        load_source(Source("x", str(tmp_path / name)))
    assert name in str(caught.value) and "\n" not in str(caught.value)


GOOD = "".join(json.dumps(record) + "\n" for record in RECORDS * 100).encode()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.parquet", b"nothing of the kind", "as Parquet: "),
        ("x.arrow", b"nothing of the kind", "as Arrow: "),
        ("x.json", json.dumps(RECORDS)[:-40].encode(), "as JSON in UTF-8: "),
        ("x.jsonl.gz", b"", "has 0 bytes"),
        ("x.jsonl.zst", b"", "has 0 bytes"),
        ("x.jsonl.gz", GOOD, "Not a gzipped file"),
        ("x.jsonl.zst", GOOD, "decompress failed"),
        ("x.jsonl.gz", compress(GOOD, ".gz")[:-9], "ended before the end-of-stream"),
        ("x.jsonl.zst", compress(GOOD, ".zst")[:-9], "Truncated"),
        ("x.csv.gz", compress(ROWS.encode(), ".gz")[:-1], "ended before"),
    ],
)
def test_a_damaged_file_is_refused_whole(tmp_path, name, data, message):
    write(tmp_path / "d" / "a.jsonl", RECORDS)
    (tmp_path / "d" / name).write_bytes(data)
    for skip_bad in (False, True):
        with pytest.raises(InputError, match=message) as caught:
            load_source(Source("x", str(tmp_path / "d")), skip_bad=skip_bad)
        assert f"d/{name}" in str(caught.value) and "\n" not in str(caught.value)


def test_paths_that_are_no_data(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "transitive.jsonl")
    for path, message in [
        ("notes.txt", "ends in '.txt': expected .jsonl, "),
        ("empty", "holds no data file"),
        ("gone.jsonl", r"does not exist \(there is .*/transitive.jsonl\)"),
        ("transitiv.json", r"does not exist \(there is .*/transitive.jsonl\)"),
        ("transitive.jsonl@test", "has no split 'test'; it has train"),
        ("*.txt", "matches no data file"),
        ("*.csv", "does not exist"),
    ]:
        with pytest.raises(InputError, match=message):
            load_source(Source("x", str(tmp_path / path)))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_source(Source("x", "nobody/nothing-of-the-kind"))


def test_names_of_files_that_are_not_utf8(tmp_path):
    folder = os.fsencode(tmp_path / "d")
    os.mkdir(folder)
    for name in (b"caf\xe9.jsonl", b"th\xe9.jsonl"):
        with open(os.path.join(folder, name), "w") as file:
            file.write(json.dumps(RECORDS[0]) + "\n" + json.dumps(RECORDS[1]) + "\n")
    found, _ = load_source(Source("a", str(tmp_path / "d")))
    assert found["id"][1] == rf"{tmp_path}/d/caf\udce9.jsonl, line 2" and len(set(found["id"])) == 4
    table = datasets.Dataset.from_list(RECORDS[:2])
    table.to_parquet(str(tmp_path / "plain.parquet"))
    strange = os.fsdecode(folder + b"/caf\xe9.parquet")
    os.rename(tmp_path / "plain.parquet", strange)
    assert len(load_source(Source("a", strange))[0]) == 2
    with pytest.raises(InputError, match=r"caf\\udce9.parquet: the name is not UTF-8") as caught:
        parse_sources(strange)
    str(caught.value).encode()


def test_one_bad_byte_costs_one_record(tmp_path):
    good = [json.dumps({"prompt": f"{i} é", "chosen": "a", "rejected": "b"}, ensure_ascii=False) for i in range(300)]
    lines = [line.encode() for line in good]
    lines.insert(200, b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}')
    lines.append(b"[" * 100_000)
    file = tmp_path / "bytes.jsonl"
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError, match="line 201: not JSON in UTF-8"):
        load_source(Source("bytes", str(file)))
    table, summary = load_source(Source("bytes", str(file)), skip_bad=True)
    assert (len(table), summary.left_out) == (300, 2)


def test_half_a_surrogate_pair_costs_one_record(tmp_path):
    path = write(tmp_path / "a.jsonl", [*RECORDS[:2], RECORDS[2] | {"chosen": "half an emoji: \ud83d"}])
    with pytest.raises(InputError, match="line 3: not valid Unicode"):
        load_source(Source("a", path))
    table, summary = load_source(Source("a", path), skip_bad=True)
    assert (len(table), summary.left_out) == (2, 1)
