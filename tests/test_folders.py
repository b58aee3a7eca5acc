"""Nothing that is read, and nothing that no run wrote, is written over; "~" is the home folder wherever a path is."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from general_preference import GPMPipeline, RewardModel, get_reward_model
from general_preference.datasets.sources import parse_sources
from general_preference.datasets.tokenization import load_tokenizer
from general_preference.distributed import DistributedContext
from general_preference.errors import InputError, RunError
from general_preference.files import check_new_folder, new_folder
from general_preference.inference.batch import ResultStore
from general_preference.models.config import weights_digest
from general_preference.models.heads import saved_preference
from general_preference.trainer.arguments import parse_arguments
from general_preference.trainer.checkpoint import BestModels, CheckpointStore, RunState, save_model
from general_preference.trainer.folders import check_folders


@pytest.fixture
def place(tmp_path, model_folder, monkeypatch):
    """A working folder with a model, an adapter on it, an adapter without config.json on that one, and data."""
    shutil.copytree(model_folder("llama"), tmp_path / "tiny")
    for name, base in (("adapter", "tiny"), ("second", "adapter")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (tmp_path / "links").mkdir()
    for file in (tmp_path / "tiny").iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    (tmp_path / "link").symlink_to("tiny", target_is_directory=True)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "best").symlink_to(tmp_path / "tiny", target_is_directory=True)
    (tmp_path / "data" / "more").mkdir(parents=True)
    (tmp_path / "data" / "train.jsonl").write_text("{}")
    (tmp_path / "zero.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def check(*flags):
    check_folders(parse_arguments(["--pretrain", "tiny", "--dataset", "data/train.jsonl", *flags]))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--save_path", "tiny"], "save_path tiny is tiny"),
        (["--save_path", "data/more/../../tiny/"], "is tiny, which is read"),
        (["--save_path", "link"], "save_path link is tiny"),
        (["--save_path=~/tiny"], "is tiny"),
        (["--save_path", "tiny", "--pretrain", "link"], "is link"),
        (["--save_path", "tiny", "--pretrain", "links"], "contains links"),
        (["--save_path", "tiny", "--pretrain", "second"], "is tiny"),
        (["--save_path", "adapter", "--pretrain", "second"], "is adapter"),
        (["--save_path", "owner/name", "--pretrain", "owner/name"], "is owner/name"),
        (["--save_path", "."], "contains tiny"),
        (["--save_path", "out", "--ckpt_path", "tiny"], "ckpt_path tiny is tiny"),
        (["--save_path", "linked"], "save_path linked/best is tiny"),
        (["--save_path", "data"], "contains data/train.jsonl"),
        (["--save_path", "data", "--dataset", "data"], "is data"),
        (["--save_path", "data/more/out", "--dataset", "data"], "would be written into data"),
        (["--save_path", "data/out", "--dataset", "x=data"], "would be written into data"),
        (["--save_path", "data/out", "--dataset", "data@test"], "would be written into data@test"),
        (["--save_path", "data/out", "--dataset", "./data:en@test"], r"would be written into \./data:en@test"),
        (["--save_path", "data/out", "--dataset", "data/*"], r"would be written into data/\*"),
        (["--save_path", "out", "--ckpt_path", "data/ckpt", "--eval_dataset", "data"], "ckpt_path data/ckpt would be"),
        (["--save_path", "data/more", "--eval_dataset", "a=tiny,b=~/data"], "would be written into ~/data"),
        (["--save_path", "zero.json", "--deepspeed_config", "zero.json"], "is zero.json"),
    ],
)
def test_a_run_does_not_write_into_what_it_reads(place, flags, said):
    before = {path: path.stat() for path in place.rglob("*")}
    with pytest.raises(InputError, match=said):
        check(*flags)
    assert before == {path: path.stat() for path in place.rglob("*")}


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "other.safetensors",
        "README.md",
        "metrics.jsonl",
        "tokenizer.model",
        "arguments.json",
        "best/step_1/x",
    ],
)
def test_a_folder_that_is_no_runs_keeps_its_files(place, name):
    file = place / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text('{"of": "somebody else"}')
    with pytest.raises(InputError, match=f"save_path out holds {name.split('/')[0]}, which no training run wrote"):
        check("--save_path", "out")
    parse_arguments(["--dataset", "x"]).save(place / "out")  # now it is a run's
    check("--save_path", "out")
    check("--save_path", "out/again", "--pretrain", "out/best/step_1" if "best" in name else "out")


def test_folders_without_any_of_these_files_are_used(place):
    for name in (
        "notes.txt",
        "slurm.log",
        ".lock",
        "checkpoint/latest",
        "checkpoint/step_3/process_00000.safetensors",
        "checkpoint/step_3/.nfs01",
    ):
        (place / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "out" / name).write_text("step_3\n" if name.endswith("latest") else "x")
    check("--save_path", "out")
    for name, content in (("step_4/weights.bin", "x"), ("step_5", "x"), ("latest", "global_step10\n")):
        (place / "other" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "other" / name).write_text(content)
        with pytest.raises(InputError, match="ckpt_path other holds"):
            check("--save_path", "out", "--ckpt_path", "other")
        shutil.rmtree(place / "other")


@pytest.fixture
def engine(own_environment, make_model):
    model = make_model()
    return SimpleNamespace(context=DistributedContext.join(), model=model, full_state_dict=model.state_dict)


def test_a_new_model_replaces_a_saved_one_alone(engine, tokenizer, tmp_path):
    names = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"]
    names += ["preference_heads.safetensors", "adapter_config.json"]
    others = ["mine.safetensors", "model_old.safetensors", "adapter_model.safetensors.bak", "x.safetensors.index.json"]
    for name in names + others:
        (tmp_path / name).write_text("x")
    save_model(engine, tokenizer, tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert not set(names) & left and set(others) < left and "model.safetensors" in left


def test_only_models_that_a_run_listed_are_removed(engine, tokenizer, tmp_path):
    for name, config in (("step_1", "{}"), ("step_2", '{"preference": {}}'), ("step_7", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    (tmp_path / "best.json").write_text('[{"loss": 1.0, "model": "step_2"}]')
    best, state = BestModels(tmp_path, engine, tokenizer, 1), RunState(step=3)
    best.consider(state, 0.5, [])
    assert {path.name for path in tmp_path.glob("step_*")} == {"step_1", "step_3", "step_7"}
    state.step = 7
    with pytest.raises(RunError, match="step_7 is there already, and no run saved it"):
        best.consider(state, 0.4, [])
    state.step = 8
    best.consider(state, 0.3, [])
    assert {path.name for path in tmp_path.glob("step_*")} == {"step_1", "step_7", "step_8"}
    (tmp_path / "step_8" / "config.json").unlink()  # as a kill leaves it
    (tmp_path / "step_8" / ".writing_model").mkdir()
    BestModels(tmp_path / "step_8" / "..", engine, tokenizer, 1).consider(RunState(step=8), 0.3, [])
    assert RewardModel.from_pretrained(str(tmp_path / "step_8")).preference.dim == 4


def test_only_folders_of_checkpoints_are_removed(engine, tmp_path):
    engine.save = lambda folder: {}
    store = CheckpointStore(tmp_path, engine, 1, 1000)
    for name in ("step_1/manifest.json", "step_1/mine.txt", "step_2/mine.txt", "step_4/manifest.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    store.save(RunState(step=5))
    assert {path.name for path in tmp_path.glob("step_*")} == {"step_1", "step_2", "step_5"}
    with pytest.raises(RunError, match=r"step_2 holds mine\.txt, which is of no checkpoint"):
        store.save(RunState(step=2))
    assert (tmp_path / "step_2" / "mine.txt").read_text() == "x"


@pytest.mark.parametrize(
    ("output", "read", "said"),
    [
        ("tiny/config.json", "links", "is links"),
        ("link", "tiny", "is tiny"),
        ("zero.json", "zero.json", "is zero.json"),
        ("data/more/r.jsonl", None, "would be written into data"),
        ("x.jsonl", "x.jsonl.parts/model", "contains"),
    ],
)
def test_results_do_not_go_into_what_is_read(place, output, read, said):
    (place / "x.jsonl.parts" / "model").mkdir(parents=True)
    with pytest.raises(InputError, match=said):
        ResultStore(place / output).refuse_inputs(parse_sources("data"), read)
    ResultStore(place / "tiny" / "results.jsonl").refuse_inputs(parse_sources("data/train.jsonl"), "second", None)


def test_home_folders_in_flags_and_loaders(place, saved):
    arguments = parse_arguments(["--dataset=~/data", "--save_path=~/out", "--ckpt_path=~/c", "--pretrain=~/tiny"])
    output = arguments.output
    assert [output.save_path, output.ckpt_path] == [f"{place}/out", f"{place}/c"]
    assert arguments.model.pretrain == f"{place}/tiny" and arguments.data.dataset == f"{place}/data"
    arguments.save(place / "out")
    assert parse_arguments(["--config=~/out/arguments.json"]) == arguments
    shutil.copytree(saved(), place / "m")
    assert GPMPipeline("~/m", device="cpu").compare("q", "a", "b") == GPMPipeline(saved(), device="cpu").compare(
        "q", "a", "b"
    )
    assert RewardModel.from_pretrained("~/m").preference == saved_preference("~/m")
    assert get_reward_model("~/tiny").card.base_model == f"{place}/tiny" and load_tokenizer("~/m").eos_token
    assert weights_digest("~/m") == weights_digest(saved()) and not Path("~").exists()


@pytest.mark.parametrize(
    ("flag", "template"),
    [
        (r"Human:\n{}\nAssistant:\n", "Human:\n{}\nAssistant:\n"),
        (r"a\t{}\\n\x", "a\t{}\\n\\x"),
        ("Human:\n{}", "Human:\n{}"),
    ],
)
def test_backslashes_in_an_input_template(tmp_path, flag, template):
    arguments = parse_arguments(["--dataset", "x", "--input_template", flag])
    assert arguments.model.input_template == template
    arguments.save(tmp_path)
    assert parse_arguments(["--config", str(tmp_path / "arguments.json")]) == arguments


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path):
    output = tmp_path / "new"
    with pytest.raises(KeyboardInterrupt), new_folder(output) as folder:
        (folder / "part").write_text("half")
        assert not output.exists()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    (tmp_path / ".writing_new").mkdir()  # of a process that was killed
    (tmp_path / ".writing_new" / "part").write_text("half")
    output.mkdir()
    (tmp_path / ".writing_new" / "inner").mkdir()
    with new_folder(output) as folder:
        (folder / "whole").write_text("all")
        with pytest.raises(InputError, match="is being written by another run"), new_folder(output):
            pass
    assert [file.name for file in output.iterdir()] == ["whole"] and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(InputError, match="exists and is not empty"):
        check_new_folder(output, [])
