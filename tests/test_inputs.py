"""What people hand to the pipeline: sequences of other libraries, names instead of objects, arguments as elsewhere."""

import inspect
import shutil
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer

from general_preference import GPMPipeline
from general_preference.errors import InputError
from general_preference.models.device import choose_device
from tests.test_pipeline import CHAT, CONVERSATIONS, PROMPT, RESPONSES, conversation


@pytest.fixture(scope="module")
def rm(saved):
    return GPMPipeline(saved(), device="cpu")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda rm: GPMPipeline(model="x"), "GPMPipeline has no argument 'model': did you mean model_name_or_path"),
        (lambda rm: GPMPipeline(rm.model), "found a RewardModel: from_model takes a loaded model"),
        (lambda rm: rm.compare(PROMPT, chosen="a", rejected="b"), "no argument 'chosen': did you mean first"),
        (lambda rm: rm.rank(PROMPT, ["a"], methods="nash"), "GPMPipeline.rank has no argument 'methods': did"),
        (lambda rm: rm([CHAT], return_prompts=True), "GPMPipeline has no argument 'return_prompts': did"),
        (lambda rm: rm.score([PROMPT], completions=[["a"]]), "score has no argument 'completions': did you mean resp"),
        (lambda rm: rm.to(devise="cpu"), "to has no argument 'devise': did you mean device"),
        (lambda rm: GPMPipeline.from_model(rm.model, None, max_len=9), "'max_len': did you mean max_len"),
    ],
)  # fmt: skip
def test_unknown_arguments_are_named_with_the_right_ones(rm, ask, message):
    with pytest.raises(InputError, match=message):
        ask(rm)
    for method in (GPMPipeline.__init__, GPMPipeline.rank, GPMPipeline.from_model):
        parameters = inspect.signature(method).parameters.values()
        assert all(p.kind != p.VAR_KEYWORD for p in parameters) and len(parameters) > 2 and method.__doc__


def as_generator(items):
    return (item for item in items)


def as_column(items):
    return datasets.Dataset.from_dict({"text": list(items)})["text"]


@pytest.mark.parametrize("kind", [tuple, np.array, pd.Series, as_column, as_generator, pd.Index])
def test_sequences_of_every_library_are_lists(rm, kind):
    texts = [text for text in RESPONSES if text]
    expected = rm.score_matrix(PROMPT, texts)
    assert torch.equal(rm.score_matrix(PROMPT, kind(texts)), expected)
    assert rm.rank(np.str_(PROMPT), kind(texts), method="copeland") == rm.rank(PROMPT, texts, method="copeland")
    torch.testing.assert_close(rm.preference_matrix(PROMPT, kind(texts)), torch.sigmoid(expected / rm.tau))
    groups = [texts, texts[:2]]
    wanted = rm.score([PROMPT, "Hi"], groups)
    for given in ([kind(some) for some in groups], as_generator(map(kind, groups))):
        found = rm.score(kind([PROMPT, "Hi"]), given)
        assert all(map(torch.equal, found, wanted))
    samples = [conversation(PROMPT, text) for text in texts]
    messages_of = kind if kind in (tuple, np.array, as_generator) else list
    outer = {np.array: as_generator, as_column: list, pd.Index: tuple}.get(kind, kind)
    assert torch.equal(rm(outer([messages_of(sample) for sample in samples])), rm(samples))
    assert rm.compare(messages_of(CHAT), np.str_("a"), kind(conversation("x", "b")[1:]) if kind is tuple else "b") == (
        rm.compare(CHAT, "a", "b")
    )


def test_conversations_as_pandas_reads_them_from_parquet(rm, tmp_path):
    samples = [[*CHAT, {"role": "assistant", "content": "b"}], CONVERSATIONS[0]]
    pd.DataFrame({"messages": samples}).to_parquet(tmp_path / "rows.parquet")
    column = pd.read_parquet(tmp_path / "rows.parquet")["messages"]
    assert isinstance(column[0], np.ndarray)
    assert torch.equal(rm(column), rm(samples))
    assert torch.equal(rm(datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"))["messages"]), rm(samples))


@pytest.mark.parametrize("name", ["bfloat16", "fp16", "auto", "torch.float32", torch.float64])
def test_dtypes_by_name(saved, name):
    expected = {"bfloat16": torch.bfloat16, "fp16": torch.float16, torch.float64: torch.float64}
    assert GPMPipeline(saved(), dtype=name, device="cpu").model.dtype == expected.get(name, torch.float32)


def test_devices_by_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [choose_device(wanted) for wanted in (0, "1", torch.device("cuda", 1), "cuda:0")] == [
        torch.device("cuda", index) for index in (0, 1, 1, 0)
    ]
    with pytest.raises(InputError, match=r"no device cuda:2 \(2 GPUs"):
        choose_device(2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device(0) == torch.device("mps", 0)


def test_a_pipeline_moves(saved, monkeypatch):
    rm = GPMPipeline(saved(), device="cpu")
    assert rm.to("cpu") is rm and rm.device == torch.device("cpu")
    with pytest.raises(InputError, match="'tpu9' is none"):
        rm.to("tpu9")
    chosen = []
    monkeypatch.setattr(rm.model, "layout_on", chosen.append)
    monkeypatch.setattr("general_preference.inference.pipeline.choose_device", lambda wanted: torch.device(wanted))
    assert rm.to("meta") is rm and rm.device.type == "meta" and chosen == [torch.device("meta")]
    assert {weight.device.type for weight in rm.model.parameters()} == {"meta"}


def test_tokenizers_and_folders_by_name(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(saved(), tmp_path / "model")
    other = AutoTokenizer.from_pretrained(saved())
    other.chat_template = other.chat_template.replace("message['content']", "message['content'] + '!'")
    other.save_pretrained(tmp_path / "other")
    expected = GPMPipeline(saved()).compare(PROMPT, "a", "bb")
    assert GPMPipeline("~/model").compare(PROMPT, "a", "bb") == expected
    assert GPMPipeline(Path("~/model"), tokenizer=saved()).compare(PROMPT, "a", "bb") == expected
    changed = [GPMPipeline(saved(), tokenizer=some).compare(PROMPT, "a", "bb") for some in ("~/other", other)]
    assert changed[0] == changed[1] != expected
    with pytest.raises(InputError, match="cannot load the tokenizer of owner/unknown"):
        GPMPipeline(saved(), tokenizer="owner/unknown")


def test_tokens_that_the_model_does_not_know_are_named(saved, tmp_path):
    shutil.copytree(saved(), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(saved())
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "model")
    rm = GPMPipeline(tmp_path / "model")
    assert rm.compare(PROMPT, "a", "b") == GPMPipeline(saved()).compare(PROMPT, "a", "b")
    size = len(tokenizer)
    for ask in (
        lambda: rm.compare(PROMPT, "a", "a <new> one"),
        lambda: rm.rank("<new>?", ["a"]),
        lambda: rm([conversation(PROMPT, "<new>")]),
    ):
        with pytest.raises(InputError, match=rf"0 has the token '<new>' with id {size - 1}, .* ids below {size - 1}"):
            ask()
    for given in (tokenizer, tmp_path / "model"):
        with pytest.raises(InputError, match=f"the tokenizer has {size} tokens and is not this model's"):
            GPMPipeline(saved(), tokenizer=given)
