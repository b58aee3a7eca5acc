"""From sources to tables: tokenized, cached, blended, split by prompt, summarized."""

import copy
import json

import datasets
import pytest
import torch

from general_preference.datasets.preparation import (
    blend,
    load_tokenized,
    parse_probabilities,
    split_and_blend,
    split_by_prompt,
    summarize_table,
    tokenize,
)
from general_preference.datasets.sources import Source, load_source
from general_preference.datasets.tokenization import ComparisonTokenizer
from general_preference.errors import InputError

RECORDS = [{"prompt": f"question {i // 2}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(20)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_bad_records_can_be_skipped_and_counted(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [*RECORDS[:3], {"prompt": "q"}, *RECORDS[3:6], [1, 2]])
    with pytest.raises(InputError, match=r"line 4: .* \(2 such records in all\)"):
        load_source(Source("a", path))
    tables, (summary,) = load_tokenized([Source("a", path)], ComparisonTokenizer(tokenizer), skip_bad=True)
    assert len(tables[0]) == 6 and summary.left_out == 2
    only_bad = write(tmp_path / "b.jsonl", [{}])
    with pytest.raises(InputError, match="no usable record"):
        load_source(Source("b", only_bad), skip_bad=True)


def test_tokenizing_is_cached_by_tokenizer_and_length(tmp_path, tokenizer):
    table, _ = load_source(Source("a", write(tmp_path / "a.jsonl", RECORDS)))
    first = tokenize(table, ComparisonTokenizer(tokenizer, 64))[0]
    assert tokenize(table, ComparisonTokenizer(tokenizer, 64))[0].cache_files == first.cache_files
    shorter = tokenize(table, ComparisonTokenizer(tokenizer, 12))[0]
    assert shorter.cache_files != first.cache_files and max(shorter["length"]) < max(first["length"])


def test_several_workers_give_the_same_table(tmp_path, tokenizer):
    records = [{"prompt": f"question {i}", "chosen": "a", "rejected": "b"} for i in range(4100)]
    table, _ = load_source(Source("a", write(tmp_path / "a.jsonl", records)))
    one = tokenize(table, ComparisonTokenizer(tokenizer, 64), workers=1)[0]
    two = tokenize(table, ComparisonTokenizer(tokenizer, 63), workers=2)[0]
    assert one["prompt_ids"][:] == two["prompt_ids"][:] and one["id"][:] == two["id"][:]


def test_probabilities():
    assert parse_probabilities(None, 3) is None
    assert parse_probabilities("3,1", 2) == [0.75, 0.25]
    for text, count, message in [
        ("1", 2, "1 numbers, but dataset has 2"),
        ("a,b", 2, "not a list"),
        ("1,0", 2, "positive"),
    ]:
        with pytest.raises(InputError, match=message):
            parse_probabilities(text, count)


def tokenized(prompts, name=""):
    return datasets.Dataset.from_dict(
        {"prompt_key": prompts, "id": [f"{name}{i}" for i in range(len(prompts))], "value": list(range(len(prompts)))}
    )


def test_blends_follow_the_probabilities():
    few, many = tokenized(["a"] * 50, "few"), tokenized(["b"] * 200, "many")
    mixed = blend([few, many], [0.5, 0.5], seed=0)
    assert {row["id"] for row in mixed} == {row["id"] for row in few} | {row["id"] for row in many}
    share = sum(row["id"].startswith("few") for row in mixed) / len(mixed)
    assert 0.4 < share < 0.6, "the small set is repeated to keep its share"
    end_to_end, held_out = split_and_blend([few, many], None, 1.0, seed=0)
    assert len(end_to_end) == 250 and len(set(end_to_end["id"])) == 250 and len(held_out) == 0


def test_a_blend_repeats_nothing_that_is_held_out():
    few, many = tokenized([f"a{i}" for i in range(20)], "few"), tokenized([f"b{i}" for i in range(200)], "many")
    train, held_out = split_and_blend([few, many], [0.5, 0.5], 0.8, seed=0)
    assert len(held_out) == 44 and len(set(held_out["id"])) == 44
    assert not set(train["prompt_key"]) & set(held_out["prompt_key"])
    assert len(train) > len(set(train["id"])), "the small set is repeated where it is trained on"


@pytest.mark.parametrize("group_size", [1, 3])
def test_no_prompt_is_on_both_sides(group_size):
    generator = torch.Generator().manual_seed(0)
    keys = [f"p{i}" for i in torch.randint(0, 80, (300,), generator=generator).tolist()] if group_size == 1 else [
        f"p{i // 6}" for i in range(300)
    ]  # fmt: skip
    table = tokenized(keys)

    def split(seed):
        train, held_out = split_and_blend([table], None, 0.8, seed=seed, group_size=group_size)
        return train, held_out

    train, held_out = split(1)
    assert len(train) + len(held_out) == 300 and abs(len(train) - 240) <= 6
    assert not set(train["prompt_key"]) & set(held_out["prompt_key"])
    assert train["value"][:20] != list(range(20)), "shuffled"
    assert split(1)[0]["value"][:] == train["value"][:]
    assert split(2)[0]["value"][:] != train["value"][:]


def test_neighbors_stay_together_through_the_split():
    tables = [tokenized([f"{name}{i}" for i in range(30)], name) for name in "ab"]
    train, held_out = split_and_blend(tables, None, 0.7, seed=0, group_size=4)
    assert {len(train), len(held_out)} == {42, 18} or abs(len(train) - 42) <= 4
    names = dict(zip(train["id"], train["group"], strict=True)) | dict(
        zip(held_out["id"], held_out["group"], strict=True)
    )
    for name in "ab":
        for i in range(29):
            assert (names[f"{name}{i}"] == names[f"{name}{i + 1}"]) == (i // 4 == (i + 1) // 4)
    assert not set(train["group"]) & set(held_out["group"])


def test_max_samples_and_the_whole_set():
    table = tokenized([f"p{i}" for i in range(100)])
    train, held_out = split_by_prompt(table, 0.9, seed=0, max_samples=30)
    assert (len(train), len(held_out)) == (27, 3) and not set(train) & set(held_out)
    train, held_out = split_by_prompt(table, 1.0, seed=0)
    assert (len(train), len(held_out)) == (100, 0)


def test_what_cannot_be_split_is_said():
    one, ten = tokenized(["p"] * 6), tokenized([f"p{i}" for i in range(10)])
    with pytest.raises(InputError, match="all 6 comparisons have the same prompt, so none can be held out"):
        split_by_prompt(one, 0.9, seed=0)
    with pytest.raises(InputError, match="all 10 comparisons belong together"):
        split_by_prompt(ten, 0.9, seed=0, groups=[0] * 10)
    with pytest.raises(InputError, match="max_samples 5: the 6 comparisons of a prompt stay together"):
        split_by_prompt(one, 1.0, seed=0, max_samples=5)
    with pytest.raises(InputError, match=r"train_split_ratio 0.01 of 10 comparisons leaves none"):
        split_by_prompt(ten, 0.01, seed=0)
    assert len(split_by_prompt(one, 1.0, seed=0)[0]) == 6


def test_what_a_template_refuses_is_a_bad_record(tmp_path, tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% for message in messages %}{% if message['role'] not in ['user', 'assistant'] %}"
        "{{ raise_exception('no such role') }}{% endif %}"
        "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    conversation = [{"role": "user", "content": "q"}, {"role": "tool", "content": "42"}]
    bad = {side: [*conversation, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    sources = [Source("a", write(tmp_path / "a.jsonl", [*RECORDS[:3], bad, {}, *RECORDS[3:6]]))]
    with pytest.raises(InputError, match=r"line 4: the chat template .*no such role"):
        load_tokenized([Source("b", write(tmp_path / "b.jsonl", [*RECORDS[:3], bad]))], ComparisonTokenizer(strict))
    (table,), (summary,) = load_tokenized(sources, ComparisonTokenizer(strict), skip_bad=True)
    assert len(table) == summary.records == 6 and summary.left_out == 2
    assert "line 5" in summary.reasons[0] and "line 4: the chat template" in summary.reasons[1]
    (alone,), _ = load_tokenized([Source("c", write(tmp_path / "c.jsonl", RECORDS[3:6]))], ComparisonTokenizer(strict))
    assert table["response_ids"][3:] == alone["response_ids"][:]


def test_tool_calls_and_template_variables_reach_the_template(tmp_path, tokenizer):
    """Two answers that differ in their tool calls alone are told apart, and tools are part of the prompt."""
    tools = copy.deepcopy(tokenizer)
    tools.chat_template = (
        "{% if tools %}{{ '<|system|>' + (tools | tojson) + '<|end|>' }}{% endif %}"
        "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
        "{% for call in message['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}{{ '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )

    def answer(city):
        call = {"type": "function", "function": {"name": "weather", "arguments": json.dumps({"city": city})}}
        return [{"role": "assistant", "content": None, "tool_calls": [call]}]

    record = {"prompt": "Rain?", "chosen": answer("Oslo"), "rejected": answer("Rome")}
    tool = {"type": "function", "function": {"name": "weather", "description": "the weather of a city"}}
    path = write(tmp_path / "a.jsonl", [record | {"tools": [tool]}, record])
    (table,), _ = load_tokenized([Source("a", path)], ComparisonTokenizer(tools))
    with_tools, without = table
    assert "the weather of a city" in tools.decode(with_tools["prompt_ids"])
    assert with_tools["prompt_key"] != without["prompt_key"]
    for row in table:
        chosen, rejected = map(tools.decode, row["response_ids"])
        assert '"Oslo"' in chosen and '"Rome"' in rejected
    assert not table["empty"][0] and not table["identical"][0]
    with pytest.raises(InputError, match="line 1: the chat template leaves out"):
        load_tokenized([Source("a", path)], ComparisonTokenizer(tokenizer))


def test_summary_counts_what_is_unusual(tmp_path, tokenizer):
    records = [
        {"prompt": "q", "chosen": "", "rejected": "b"},
        {"prompt": "q", "chosen": "same", "rejected": "same"},
        {"prompt": "rock " * 100, "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "paper " * 100 + "x", "rejected": "paper " * 100 + "y"},
        {"prompt": "q", "responses": ["a", "b", "c"], "preferences": [[0, 1], [1, 2]]},
    ]
    encoder = ComparisonTokenizer(tokenizer, 40)
    path = write(tmp_path / "a.jsonl", [*records, {}, []])
    (table,), sources = load_tokenized([Source("a", path)], encoder, skip_bad=True)
    summary = summarize_table("a", table, sources, {table["prompt_key"][2]})
    assert (summary.comparisons, summary.preferences, summary.left_out) == (5, 6, 2)
    assert (summary.empty, summary.identical, summary.prompt_cut) == (1, 1, 1)
    assert (summary.response_cut, summary.identical_after_cut, summary.seen_prompts) == (1, 1, 1)
    assert summary.tokens == sum(table["length"]) and "1 identical after cut" in str(summary)


def test_a_record_without_prompt_tokens_is_refused(tmp_path, tokenizer):
    from scripts.make_tiny_model import train_tokenizer

    bare = train_tokenizer(["a"], 270)
    bare.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    path = write(tmp_path / "a.jsonl", [{"prompt": "", "chosen": "a", "rejected": "b"}])
    with pytest.raises(InputError, match="line 1: the prompt has no tokens"):
        load_tokenized([Source("a", path)], ComparisonTokenizer(bare))
