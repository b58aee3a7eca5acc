"""GPMPipeline: published weights score as published, every way of asking gives one score, bad input is named."""

import json
import math
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from general_preference import GPMPipeline, generate_high_dim_result_with_prompt
from general_preference.datasets.packing import Collator
from general_preference.datasets.sources import Source
from general_preference.errors import InputError, NonFiniteError
from general_preference.inference.cuts import Cuts
from general_preference.inference.embedding import embed
from general_preference.models.config import PreferenceConfig
from general_preference.models.score import preference_score
from tests.conftest import MAIN_FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Which throw wins?"
RESPONSES = ["The rock.", "Paper, of course; name the paper and win.", "", "scissors äöü 你好 " * 4, "rock"]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello, friend!"},
    {"role": "user", "content": PROMPT},
]


def conversation(prompt: str, response: str) -> list[dict]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def messages(prompt: str, response: str) -> tuple[list, list]:
    return conversation(prompt, response)[:1], [conversation(prompt, response)[1:]]


CONVERSATIONS = [
    conversation("Hi", "Hello there, friend!"),
    conversation(PROMPT, "rock"),
    conversation(PROMPT, "Scissors cut the paper, and the paper wraps the rock. " * 3),
    [*CHAT[1:], {"role": "assistant", "content": "  The paper.  "}],
    conversation("Écris « bonjour » 🙂", "```python\nprint('こんにちは')\n```"),
]


def add_bos(folder: Path) -> None:
    """Make the folder's tokenizer put BOS in front itself, as Llama's does: with the template's, it is two."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def published(model_folder, tmp_path_factory):
    """A function: (family, dim, gate) -> folder as the published weights are: head tensors, no `preference` object."""

    def make(family: str, dim: int, gate: bool) -> Path:
        folder = tmp_path_factory.mktemp(f"published-{family}-{dim}") / "model"
        shutil.copytree(model_folder(family), folder)
        tensors = load_file(folder / "model.safetensors")
        generator = torch.Generator().manual_seed(dim)
        hidden = AutoModelForCausalLM.from_pretrained(folder).config.hidden_size
        tensors["value_head.weight"] = torch.randn(dim, hidden, generator=generator)
        if gate:
            tensors["prompt_head.weight"] = torch.randn(dim // 2, hidden, generator=generator)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["CustomRewardModel"]}))
        add_bos(folder)
        return folder

    return make


@torch.no_grad()
def as_published(folder: Path, conversations: list, max_length: int = 4096):
    """(ids, embeddings or rewards, prompt hidden states): left padding, text tokenized with special tokens again, end
    token over the last one, gate at the end of the first message."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", truncation_side="right")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tensors = load_file(folder / "model.safetensors")
    texts = [tokenizer.apply_chat_template(one, tokenize=False) for one in conversations]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    ids[:, -1], mask[:, -1] = tokenizer.eos_token_id, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    hidden = model.base_model(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    rewards = hidden[:, -1] @ tensors["value_head.weight"].T
    rewards = rewards.squeeze(-1) if rewards.shape[1] == 1 else torch.nn.functional.normalize(rewards, dim=-1)
    states = []
    for one, text, row in zip(conversations, texts, hidden, strict=True):
        first = len(tokenizer(tokenizer.apply_chat_template(one[:1], tokenize=False))["input_ids"])
        whole = len(tokenizer(text, truncation=True, max_length=max_length)["input_ids"])
        states.append(row[len(row) - (whole - first) - 1])
    return ids, rewards, torch.stack(states), tensors.get("prompt_head.weight")


@pytest.mark.parametrize("family", MAIN_FAMILIES)
@pytest.mark.parametrize(("dim", "gate"), [(1, False), (2, False), (6, True), (8, True)])
def test_published_weights_score_as_published(published, family, dim, gate):
    folder = published(family, dim, gate)
    ids, expected, states, prompt_head = as_published(folder, CONVERSATIONS)
    rm = GPMPipeline(folder, value_head_dim=dim, is_general_preference=dim > 1)
    assert (rm.value_head_dim, rm.add_prompt_head, rm.tau) == (dim, gate, 1.0 if dim == 1 else 0.1)
    assert rm.max_length == (512 if family == "gpt2" else 4096), "as published, but within learned positions"
    for one, row in zip(CONVERSATIONS, ids.tolist(), strict=True):
        encoded = rm.encoder.encode([one[:-1]], [[one[-1:]]])[0]
        mine = encoded["prompt_ids"] + encoded["response_ids"][0]
        assert [rm.tokenizer.pad_token_id] * (len(row) - len(mine)) + mine == row
        assert mine[:2] == [1, 1] and mine[-1] == 5
    embeddings, found_states = rm(CONVERSATIONS, return_prompt=True)
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_states, states, atol=1e-5, rtol=1e-5)
    score = generate_high_dim_result_with_prompt(rm.model, dim, embeddings[:-1], embeddings[1:], found_states[:-1])
    if dim == 1:
        torch.testing.assert_close(score, expected[:-1] - expected[1:], atol=1e-5, rtol=1e-5)
    else:
        weights = torch.softmax(states[:-1] @ prompt_head.T, dim=-1) if gate else torch.ones(4, dim // 2)
        first, second = expected[:-1].view(4, -1, 2), expected[1:].view(4, -1, 2)
        areas = first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]
        torch.testing.assert_close(score, (weights * areas).sum(-1), atol=1e-5, rtol=1e-5)


def test_published_weights_are_cut_as_published(published):
    folder = published("llama", 6, True)
    ids, expected, states, _ = as_published(folder, CONVERSATIONS, max_length=40)
    assert ids.shape[1] == 40
    embeddings, found = GPMPipeline(folder, max_length=40)(CONVERSATIONS, return_prompt=True)
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, states, atol=1e-5, rtol=1e-5)


def test_the_papers_example_as_printed(published):
    folder = str(published("llama", 6, True))
    context1, context2 = CONVERSATIONS[1:3]
    rm = GPMPipeline(folder, value_head_dim=6)
    reward1, prompt_hidden_state = rm([context1], return_prompt=True)
    reward2 = rm([context2])
    result = generate_high_dim_result_with_prompt(rm.model, rm.value_head_dim, reward1, reward2, prompt_hidden_state)
    result_batch = result.float().cpu().detach().numpy().tolist()
    assert len(result_batch) == 1 and result_batch[0] != 0
    responses = [context1[-1]["content"], context2[-1]["content"]]
    assert result_batch[0] == pytest.approx(rm.score_matrix(PROMPT, responses)[0, 1].item(), abs=1e-5)


@pytest.fixture(scope="module")
def rm(saved):
    return GPMPipeline(saved(), device="cpu")


@pytest.mark.parametrize("published_format", [False, True])
def test_batch_mates_do_not_change_what_is_cut(saved, published, published_format):
    rm = GPMPipeline(published("llama", 4, True) if published_format else saved(), max_length=64)
    prompt = "paper " * 30
    samples = [conversation(prompt, "rock"), conversation(prompt, "scissors " * 60), conversation(prompt, "a " * 12)]
    together, states = rm(samples, return_prompt=True)
    for index, sample in enumerate(samples):
        alone, state = rm([sample], return_prompt=True)
        torch.testing.assert_close(together[[index]], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(states[[index]], state, atol=1e-5, rtol=1e-5)


def random_conversations(count: int) -> list:
    generator = torch.Generator().manual_seed(0)
    words = ["rock", "paper", "scissors", "wins", "the", "a", "system", "prompt", "你好"]

    def text(most: int) -> str:
        picks = torch.randint(
            len(words), (int(torch.randint(1, most, (1,), generator=generator)),), generator=generator
        )
        return " ".join(words[i] for i in picks)

    prompts = [text(30) for _ in range(count // 2)]
    return [conversation(prompts[i % len(prompts)], text(40)) for i in range(count)]


@pytest.mark.parametrize("kind", [("llama", "gpm", 4, True), ("gemma2", "hybrid", 3, True), ("gpt2", "bt", 1, False)])
def test_batches_order_and_mates_do_not_matter(saved, kind):
    rm = GPMPipeline(saved(*kind))
    samples = random_conversations(64)
    together, states = rm(samples, return_prompt=True)
    assert together.shape == ((64,) if kind[2] == 1 else (64, kind[2])) and states.shape == (64, 32)
    alone = torch.cat([rm([sample]) for sample in samples])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    shuffled, shuffled_states = rm([samples[i] for i in order], return_prompt=True)
    torch.testing.assert_close(shuffled, together[order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shuffled_states, states[order], atol=1e-5, rtol=1e-5)
    for options in ({"batch_tokens": 1}, {"batch_tokens": 300}, {"padding": False}):
        divided = GPMPipeline(saved(*kind), **options)
        torch.testing.assert_close(divided(samples), together, atol=1e-5, rtol=1e-5)
        divided.model.shares_prompts = False
        torch.testing.assert_close(divided(samples), together, atol=1e-5, rtol=1e-5)


def test_calls_are_bounded_and_unpadded_where_asked(rm, monkeypatch):
    sizes = []
    forward = rm.model.forward

    def spy(**inputs):
        sizes.append((inputs["input_ids"].numel(), bool((inputs["segments"] < 0).any())))
        return forward(**inputs)

    monkeypatch.setattr(rm.model, "forward", spy)
    rows = [rm._encode("", one[:-1], [one[-1:]]) for one in random_conversations(40)]
    longest = max(len(row["prompt_ids"]) + len(row["response_ids"][0]) for row in rows)
    list(embed(rm.model, rows, batch_tokens=3 * longest))
    assert max(size for size, _ in sizes) <= 3 * longest and len(sizes) < 40
    assert sizes[0][0] > 2 * longest, "filled, the longest first"
    sizes.clear()
    list(embed(rm.model, rows, padding=False))
    assert not any(padded for _, padded in sizes)
    sizes.clear()
    list(embed(rm.model, rows, batch_size=7))
    assert len(sizes) == math.ceil(40 / 7)
    sizes.clear()
    many = {"prompt_ids": [1, 7], "response_ids": [[8 + i, 9, 5] for i in range(30)]}
    ((_, whole),) = embed(rm.model, [many], batch_tokens=20)
    assert [size for size, _ in sizes] == [20] * 5 and whole.embeddings.shape == (30, 4)


@pytest.mark.parametrize("head", [("gpm", 4, True), ("gpm", 2, False), ("bt", 1, False), ("hybrid", 5, True)])
def test_the_matrix_is_antisymmetric_and_agrees_with_every_other_way(saved, head):
    rm = GPMPipeline(saved("llama", *head))
    scores, matrix = rm.score_matrix(PROMPT, RESPONSES), rm.preference_matrix(PROMPT, RESPONSES)
    assert torch.equal(scores, -scores.T)
    torch.testing.assert_close(matrix, torch.sigmoid(scores / rm.tau))
    assert torch.equal(matrix.diagonal(), torch.full((5,), 0.5))
    assert rm.compare(PROMPT, RESPONSES[0], RESPONSES[1]) == pytest.approx(matrix[0, 1].item(), abs=1e-5)
    reverse = rm.compare(PROMPT, RESPONSES[1], RESPONSES[0])
    assert reverse + rm.compare(PROMPT, RESPONSES[0], RESPONSES[1]) == pytest.approx(1, abs=1e-6)
    asked = [{"role": "user", "content": PROMPT}]
    embeddings, states = rm([conversation(PROMPT, text) for text in RESPONSES], return_prompt=True)
    columns = [
        generate_high_dim_result_with_prompt(
            rm.model, rm.value_head_dim, embeddings, embeddings[[j]].expand_as(embeddings), states
        )
        for j in range(5)
    ]
    torch.testing.assert_close(torch.stack(columns, dim=1), scores, atol=1e-5, rtol=1e-5)
    as_messages = [[{"role": "assistant", "content": text}] for text in RESPONSES]
    assert torch.equal(rm.score_matrix(asked, as_messages), scores)
    whole = [conversation(PROMPT, text) for text in RESPONSES]
    assert torch.equal(rm.score_matrix(asked, whole), scores), "a response may repeat the prompt"
    rewards = scores[:, 0] if head[0] == "bt" else matrix.sum(dim=1)
    assert rm.rank(PROMPT, RESPONSES) == rewards.argsort(descending=True, stable=True).tolist()


@pytest.mark.parametrize("head", [("gpm", 4, True), ("bt", 1, False)])
def test_one_number_per_response(saved, head, monkeypatch):
    rm = GPMPipeline(saved("llama", *head))
    prompts, responses = [PROMPT, CHAT], [RESPONSES, [RESPONSES[0], "b", RESPONSES[0]]]
    scores = [rm.score_matrix(*each) for each in zip(prompts, responses, strict=True)]
    forward, forwards = rm.model.forward, []
    monkeypatch.setattr(rm.model, "forward", lambda **inputs: forwards.append(inputs) or forward(**inputs))
    found = rm.score(prompts, responses)
    ends = sum(len(inputs["response_ends"]) for inputs in forwards)
    assert ends == 5 + 2, "each different response once"
    assert [one.shape for one in found] == [(5,), (3,)] and {one.dtype for one in found} == {torch.float32}
    for one, matrix in zip(found, scores, strict=True):
        torch.testing.assert_close(one, matrix.mean(dim=1), atol=1e-5, rtol=1e-5)
    assert found[1][0] == found[1][2] != found[1][1]
    if head[0] == "bt":
        rewards = rm([conversation(PROMPT, text) for text in RESPONSES])
        torch.testing.assert_close(found[0], rewards - rewards.mean(), atol=1e-5, rtol=1e-5)
    lowest = rm.score(prompts, responses, method="min")[0]
    assert lowest[0] == pytest.approx(scores[0][0, 1:].min().item(), abs=1e-5)
    shares = rm.score(prompts, responses, method="copeland")[0]
    wins = ((scores[0] > 0).float() + 0.5 * (scores[0] == 0)).fill_diagonal_(0).sum(dim=1) / 4
    torch.testing.assert_close(shares, wins)
    assert rm.score(prompts, responses, method="nash")[0].sum().item() == pytest.approx(1, abs=1e-4)
    with pytest.raises(InputError, match=r"'elo'"):
        rm.score(prompts, responses, method="elo")
    with pytest.raises(InputError, match="2 prompts, but 1 lists"):
        rm.score(prompts, responses[:1])


@pytest.mark.parametrize("batch_tokens", [None, 1])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equal_responses_tie_exactly(saved, attention, batch_tokens):
    rm = GPMPipeline(saved(), attn_implementation=attention, batch_tokens=batch_tokens)
    texts = ["paper", "rock, of course", "paper", "a longer answer than the others", "paper"]
    scores = rm.score_matrix("Which throw wins, and why would anybody choose it?", texts)
    assert scores[0, 2] == scores[0, 4] == scores[2, 4] == 0 and scores[0, 1] != 0
    torch.testing.assert_close(scores[[0, 0]], scores[[2, 4]], rtol=0, atol=0)
    alone = rm.score_matrix("Which throw wins, and why would anybody choose it?", texts[:2])
    assert scores[0, 1].item() == pytest.approx(alone[0, 1].item(), abs=1e-5)


@pytest.mark.parametrize(("family", "shared"), [("llama", True), ("llama", False), ("gemma2", True)])
def test_identical_responses_tie_in_training_evaluation_inference_and_benchmarks(saved, tmp_path, family, shared):
    from general_preference.datasets.packing import Comparisons
    from general_preference.datasets.preparation import load_tokenized
    from general_preference.evaluation.rewardbench import RewardBenchPipeline, report, scoring
    from general_preference.inference.batch import result_row, summarize_rows
    from general_preference.trainer.arguments import LossArguments
    from general_preference.trainer.objectives import PreferenceObjective

    rm = GPMPipeline(saved(family))
    rm.model.shares_prompts = shared
    texts = [f"{'rock ' * (i % 7)}paper {i}" for i in range(20)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": PROMPT, "chosen": text, "rejected": text}) for text in texts))
    (table,), _ = load_tokenized([Source("pairs", str(file))], rm.encoder)
    objective = PreferenceObjective(LossArguments(), rm.model, rm.tokenizer, torch.device("cpu"))
    for collate, training in ((objective.collate_evaluation, False), (objective.collate, True)):
        rm.model.train(training)
        batch = collate([Comparisons(table)[index, 1.0] for index in range(20)])
        with torch.no_grad():
            sums = objective.evaluation_sums("pairs", rm.model(**batch.model_inputs()), batch)
        found = objective.statistics(sums)
        assert (found["ties"], found["accuracy"], found["n"]) == (20, 0.5, 20)
    rm.model.eval()
    rows = [result_row(table[index], embedded, rm.tau) for index, embedded in embed(rm.model, table)]
    assert summarize_rows(rows, rm.tau)[0]["all"]["ties"] == 20
    assert {row["score"] for row in rows} == {0} and {row["probability"] for row in rows} == {0.5}
    four = [
        row | {"response_ids": row["response_ids"] * 2, "first": [0], "second": [3], "label": [1.0]} for row in table
    ]
    for index, embedded in embed(rm.model, four):
        row = report.best_of_n_row(four[index], embedded, rm.tau)
        assert {*row["score"]} == {0} and {*row["probability"]} == {0.5} and row["cyclic_share"] == 0
        assert scoring.best_of_n_credit(row["score"]) == 0.25
    pairs = [conversation(PROMPT, text) for text in texts]
    assert not RewardBenchPipeline("", rm.model, rm.tokenizer)(pairs, pairs).any()
    assert {rm.compare(PROMPT, text, text) for text in texts} == {0.5}


def test_one_response_and_two_equal_ones(rm):
    assert rm.rank(PROMPT, ["only"]) == [0] and rm.preference_matrix(PROMPT, ["only"]).tolist() == [[0.5]]
    assert rm.compare(PROMPT, "same", "same") == 0.5
    assert rm.rank(PROMPT, ["same", "same"], method="nash") == [0, 1]


def test_system_messages_and_turns_count(rm):
    short, chat = rm.score_matrix(PROMPT, RESPONSES[:2]), rm.score_matrix(CHAT, RESPONSES[:2])
    assert (short - chat).abs().max() > 1e-4
    assert (chat - rm.score_matrix(CHAT[1:], RESPONSES[:2])).abs().max() > 1e-4
    turns = [*RESPONSES[0:1], [{"role": "assistant", "content": "Paper"}, {"role": "user", "content": "Sure?"},
                               {"role": "assistant", "content": "Yes."}]]  # fmt: skip
    assert rm.score_matrix(CHAT, turns).shape == (2, 2)


def test_a_pair_has_the_score_of_the_trainers_evaluation(saved, tmp_path):
    from general_preference.datasets.packing import Comparisons
    from general_preference.datasets.preparation import load_tokenized
    from general_preference.trainer.arguments import LossArguments
    from general_preference.trainer.objectives import batch_loss

    rm = GPMPipeline(saved())
    records = [{"prompt": PROMPT, "chosen": a, "rejected": b} for a, b in pairwise(RESPONSES)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    (table,), _ = load_tokenized([Source("pairs", str(file))], rm.encoder)
    comparisons = Comparisons(table)
    batch = Collator(0, rm.model.layout_on())([comparisons[index, 1.0] for index in range(len(table))])
    with torch.no_grad():
        trained = batch_loss(rm.model(**batch.model_inputs()), batch, LossArguments()).score
    mine = [rm.score_matrix(PROMPT, [r["chosen"], r["rejected"]])[0, 1] for r in records]
    torch.testing.assert_close(torch.stack(mine), trained, atol=1e-6, rtol=0)


def test_length_limits(saved, make_model, tmp_path):
    long = "rock paper scissors " * 400
    rm = GPMPipeline(saved(), max_length=64)
    row = rm._encode("", *messages(long, RESPONSES[1]))
    assert len(row["prompt_ids"]) + len(row["response_ids"][0]) == 64 and row["prompt_cut"]
    assert rm.max_length == 64 and GPMPipeline(saved()).max_length is None
    whole = GPMPipeline(saved(), max_length=64, truncation=False)
    assert len(whole._encode("", *messages(long, "a"))["prompt_ids"]) > 1000
    gpt2 = GPMPipeline(saved("gpt2", "bt", 1, False), truncation=False)
    with pytest.raises(InputError, match=r"prompt 1 .* the model 512 positions"):
        gpt2.embed([PROMPT, long], [["a"], ["b"]])
    assert GPMPipeline(saved("gpt2", "bt", 1, False)).max_length == 512
    with pytest.raises(InputError, match="513 exceeds the model's 512 positions"):
        GPMPipeline(saved("gpt2", "bt", 1, False), max_length=513)
    with pytest.raises(InputError, match="at least 8"):
        GPMPipeline(saved(), max_length=3)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"value_head_dim": 6}, "dim = 4, but 6"),
        ({"is_general_preference": False}, "head = 'gpm', but is_general_preference = False"),
        ({"add_prompt_head": False}, "prompt_gate = True, but False"),
        ({"tau": 0.2}, "temperature = 0.1, but 0.2"),
        ({"device": "tpu9"}, "'tpu9' is none"),
        ({"device": "cuda:7"}, "GPU"),
        ({"batch_tokens": 0}, "at least 1"),
        ({"device": 96}, r"no device cuda:96 \("),
        ({"device": "97"}, r"no device cuda:97 \("),
        ({"dtype": "bfloat17"}, "dtype 'bfloat17' is none of auto, float32, bfloat16, float16, float64"),
        ({"dtype": torch.int8}, "dtype torch.int8 is none of auto, float32"),
        ({"dtype": "fp32", "bf16": True}, "bf16 = True and dtype = float32 disagree"),
        ({"torch_dtype": "auto"}, "GPMPipeline has no argument 'torch_dtype': did you mean dtype"),
        ({"max_len": 64}, "'max_len': did you mean max_length"),
        ({"max_lenght": 64}, "'max_lenght': did you mean max_length"),
        ({"device_map": "auto"}, "'device_map': did you mean device"),
        ({"temperature": 1.0}, "'temperature': did you mean tau"),
        ({"batch_size": 8}, "'batch_size': did you mean batch_tokens"),
        ({"zzz": 8}, "'zzz': it takes model_name_or_path, device, value_head_dim"),
    ],
)
def test_arguments_that_contradict_the_checkpoint_or_the_machine(saved, argument, message):
    if argument.get("device") == "cuda:7" and torch.cuda.device_count() > 7:
        pytest.skip("this machine has that many")
    with pytest.raises(InputError, match=message):
        GPMPipeline(saved(), **argument)


def test_a_cut_is_said_once_and_counted(saved, caplog):
    rm = GPMPipeline(saved(), max_length=64)
    rm.compare(PROMPT, "a", "b")
    assert not caplog.text and rm.cut == Cuts()
    whole = GPMPipeline(saved())._encode("", *messages("paper " * 90, "rock " * 40))
    lost = len(whole["prompt_ids"]) + len(whole["response_ids"][0]) - 64
    rm([CONVERSATIONS[0], conversation("paper " * 90, "rock " * 40)])
    assert (rm.cut.prompts, rm.cut.responses, rm.cut.alike) == (1, 1, 0)
    assert rm.cut.prompt_tokens + rm.cut.response_tokens == lost
    said = f"cut to 64 tokens: 1 prompt by {rm.cut.prompt_tokens} tokens, 1 response by {rm.cut.response_tokens} tokens"
    assert [record.getMessage().startswith(said) for record in caplog.records] == [True]
    for _ in range(3):
        rm.rank("paper " * 90, ["a", "b"])
    assert len(caplog.records) == 1 and rm.cut.prompts == 4 and rm.cut.responses == 1
    GPMPipeline(saved(), truncation=False).compare("paper " * 90, "a", "b")
    assert len(caplog.records) == 1


@pytest.mark.parametrize("published_format", [False, True])
@pytest.mark.parametrize("ask", ["matrix", "conversations", "prompts"])
def test_answers_that_differ_only_behind_the_cut(saved, published, caplog, ask, published_format):
    rm = GPMPipeline(published("llama", 4, True) if published_format else saved(), max_length=64)
    first, second = "rock " * 60 + "yes", "rock " * 60 + "no, never"
    if ask == "matrix":
        assert rm.compare(PROMPT, first, second) == 0.5
        assert rm.compare(PROMPT, first, first) == 0.5
    elif ask == "conversations":
        found = rm([conversation(PROMPT, text) for text in (first, second, "rock")])
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    elif not published_format:  # prompts are told apart by their oldest side, which is cut
        rm(2 * [conversation(f"{text} {'paper ' * 60}", "rock") for text in ("One", "Two")])
    else:
        return
    assert rm.cut.alike == (2 if ask == "prompts" else 1)
    assert f"told apart from another only beyond the limit, so that they tie: {rm.cut.alike}" in caplog.text
    before = len(caplog.records)
    rm.compare(PROMPT, first, second)
    assert len(caplog.records) == before


def test_a_tie_behind_the_cut_is_said_although_a_cut_was(saved, caplog):
    rm = GPMPipeline(saved(), max_length=64)
    rm.compare("paper " * 90, "a", "b")
    rm.compare(PROMPT, "rock " * 60 + "yes", "rock " * 60 + "no")
    assert ["they tie" in record.getMessage() for record in caplog.records] == [False, True]


@pytest.mark.parametrize(
    "extra", [["c"], ["a long answer, " * 9], ["", "b"], [RESPONSES[3]] * 3, ["<think>hm</think>good"]]
)
def test_a_prompts_tokens_do_not_depend_on_the_responses_beside_them(rm, extra):
    rows = [rm._encode("", CHAT, [[{"role": "assistant", "content": text}] for text in ("a", *some)])
            for some in ([], extra)]  # fmt: skip
    assert rows[0]["prompt_ids"] == rows[1]["prompt_ids"] and rows[0]["response_ids"] == rows[1]["response_ids"][:1]


def test_responses_go_on_in_a_turn_that_the_prompt_begins(rm, monkeypatch):
    rows = []
    encode = rm.encoder.encode
    monkeypatch.setattr(rm.encoder, "encode", lambda *some: rows.extend(found := encode(*some)) or found)
    begun = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "The "}]
    assert rm.compare(begun, "rock.", "paper.") != 0.5
    texts = [rm.tokenizer.decode(rows[0]["prompt_ids"] + ids) for ids in rows[0]["response_ids"]]
    whole = [[begun[0], {"role": "assistant", "content": text}] for text in ("The rock.", "The paper.")]
    assert texts == [rm.tokenizer.apply_chat_template(one, tokenize=False) for one in whole]
    assert rm.tokenizer.decode(rows[0]["prompt_ids"]).endswith("The ")


def test_the_temperature_of_published_weights_may_be_chosen(published):
    folder = published("llama", 2, False)
    assert GPMPipeline(folder, tau=0.3).tau == 0.3
    with pytest.raises(InputError, match="must be positive"):
        GPMPipeline(folder, tau=0.0)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda rm: rm([]), "samples are an empty list, expected a list of conversations"),
        (lambda rm: rm("text"), "samples are 'text', expected a list"),
        (lambda rm: rm(CONVERSATIONS[0]), "wrap it in a list"),
        (lambda rm: rm([CONVERSATIONS[0], CHAT[:2]]), "conversation 1 has no assistant turn"),
        (lambda rm: rm([CHAT]), "conversation 0 ends with a user turn"),
        (lambda rm: rm([[{"role": "assistant", "content": "a"}]]), "conversation 0 has no turn before"),
        (lambda rm: rm([[{"role": "user"}]]), "conversation 0.* expected a message"),
        (lambda rm: rm([None]), "conversation 0"),
        (lambda rm: rm.rank(PROMPT, []), "responses to prompt 0 are an empty list"),
        (lambda rm: rm.rank(PROMPT, "abc"), "responses to prompt 0 are 'abc'"),
        (lambda rm: rm.rank(PROMPT, ["a", None]), "response 1 to prompt 0.* nothing None"),
        (lambda rm: rm.compare(PROMPT, "a", None), "response 1 to prompt 0"),
        (lambda rm: rm.compare(None, "a", "b"), "prompt 0"),
        (
            lambda rm: rm.compare(PROMPT, [{"role": "user", "content": "a"}], "b"),
            "response 0 to prompt 0' begins with a user turn",
        ),
        (
            lambda rm: rm.compare(PROMPT, "a", conversation("Another?", "b")),
            "response 1 to prompt 0' begins with a user turn",
        ),
        (lambda rm: rm.embed("text", [["a"]] * 4), "prompts are 'text'"),
        (lambda rm: rm.compare([], "a", "b"), "prompt 0"),
        (lambda rm: rm.rank(PROMPT, {"b", "a"}), "responses to prompt 0 are a set"),
        (lambda rm: rm.rank(PROMPT, np.array("a")), "responses to prompt 0 are a ndarray"),
        (lambda rm: rm.rank(PROMPT, pd.DataFrame({"response": ["a", "b"]})), "are a DataFrame, expected a list of at"),
        (lambda rm: rm.score(datasets.Dataset.from_dict({"prompt": [PROMPT]}), [["a"]]), "prompts are a Dataset"),
        (lambda rm: rm.rank(PROMPT, pd.Series(["a", float("nan")])), "response 1 to prompt 0"),
        (lambda rm: rm.score(np.array([PROMPT]), ["a"]), "responses to prompt 0 are 'a'"),
        (lambda rm: rm({"role": "user", "content": "a"}), "samples are {'role'"),
        (lambda rm: rm(text for text in ()), "an empty list"),
        (lambda rm: rm.rank(PROMPT, ["a"], method="elo"), "unknown ranking method 'elo'"),
        (lambda rm: rm.embed([PROMPT], []), "1 prompts, but 0 lists"),
        (
            lambda rm: generate_high_dim_result_with_prompt(rm.model, 6, torch.ones(1, 6), torch.ones(1, 6), None),
            "D = 4",
        ),
        (
            lambda rm: generate_high_dim_result_with_prompt(rm.model, 4, torch.ones(1, 4), torch.ones(1, 4), None),
            "gate",
        ),
    ],
)
def test_bad_input_is_one_value_error_that_names_the_item(rm, ask, message):
    with pytest.raises(ValueError, match=message) as caught:
        ask(rm)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 8), (1, 8), (1, 32)), r"expected two of \(B, 4\)"),
        (((2, 4), (1, 4), (1, 32)), r"expected two of \(B, 4\)"),
        (((2, 4), (2, 4), (1, 32)), r"expected \(2, 32\)"),
    ],
)
def test_rewards_and_states_that_do_not_fit_the_model(rm, shapes, message):
    with pytest.raises(InputError, match=message):
        generate_high_dim_result_with_prompt(rm.model, 4, *map(torch.ones, shapes))


@pytest.mark.parametrize("gone", ["value_head.weight", "prompt_head.weight"])
def test_heads_that_are_missing_are_not_made_up(saved, tmp_path, gone):
    shutil.copytree(saved(), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors[gone]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"has no {gone}"):
        GPMPipeline(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 1}, "weights that its configuration has no place for"),
        ({"num_attention_heads": 0}, "cannot"),
        ({"hidden_size": None}, "cannot"),
        ({"preference": []}, "expected an object"),
        ({"preference": {"head": "gpm", "dim": "4"}}, "dim is '4'"),
        ({"preference": {"head": "gpm", "dim": 4, "max_length": 3}}, "max_length is 3"),
        ({"preference": {"head": "gpm", "dim": 4, "normalize": "no"}}, "normalize is 'no'"),
        ({"preference": {"head": "gpm", "dim": 4, "temperature": math.inf}}, "temperature"),
    ],
)
def test_configurations_that_make_no_sense(saved, tmp_path, change, message):
    shutil.copytree(saved(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=message):
        GPMPipeline(tmp_path / "model")


def test_folders_that_cannot_be_used(saved, model_folder, make_model, tmp_path):
    with pytest.raises(InputError, match="plain language model"):
        GPMPipeline(model_folder("llama"))
    with pytest.raises(InputError, match="does not exist"):
        GPMPipeline(tmp_path / "gone")
    with pytest.raises(InputError, match=r"owner/unknown"):
        GPMPipeline("owner/unknown")
    pickled = tmp_path / "pickled"
    shutil.copytree(model_folder("llama"), pickled)
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04never loaded")
    with pytest.raises(InputError, match=r"pickle \(pytorch_model.bin\)"):
        GPMPipeline(pickled)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_shard_is_named(saved, make_model, tmp_path, damage):
    make_model().save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    AutoTokenizer.from_pretrained(saved()).save_pretrained(tmp_path)
    whole = GPMPipeline(tmp_path)
    torch.testing.assert_close(whole(CONVERSATIONS), GPMPipeline(saved())(CONVERSATIONS))
    for shard in shards:
        content = shard.read_bytes()
        shard.unlink()
        if damage == "cut":
            shard.write_bytes(content[: len(content) - 100])
        with pytest.raises((ValueError, OSError), match=shard.name):
            GPMPipeline(tmp_path)
        shard.write_bytes(content)


def test_an_adapter_loads_with_its_heads(saved, make_model, tmp_path):
    pytest.importorskip("peft")
    model = make_model("llama", lora_rank=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "head.weight" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(saved()).save_pretrained(tmp_path)
    rm = GPMPipeline(tmp_path)
    one = rm._encode("", *messages(PROMPT, "rock"))
    ((_, found),) = embed(model, [one])
    torch.testing.assert_close(rm([conversation(PROMPT, "rock")]), found.embeddings)
    assert (
        rm([conversation(PROMPT, "rock")]) - GPMPipeline(saved())([conversation(PROMPT, "rock")])
    ).abs().max() > 1e-3


def test_hub_names_load_from_the_hubs_cache(saved, make_model, tmp_path):
    """Hub names, with files where a download would have put them (the hub itself is out of reach)."""
    pytest.importorskip("peft")
    kinds = {"full": ({}, {}), "sharded": ({}, {"max_shard_size": "40KB"}), "adapter": ({"lora_rank": 2}, {})}
    expected = {}
    for kind, (made, written) in kinds.items():
        repository = tmp_path / f"models--owner--{kind}"
        snapshot = repository / "snapshots" / ("0" * 40)
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        make_model("llama", **made).save_pretrained(str(snapshot), **written)
        AutoTokenizer.from_pretrained(saved()).save_pretrained(snapshot)
        expected[kind] = GPMPipeline(snapshot).compare(PROMPT, "a", "b")
    code = (
        "import json\nfrom general_preference import GPMPipeline\n"
        f"rms = {{kind: GPMPipeline('owner/' + kind, value_head_dim=4) for kind in {list(kinds)!r}}}\n"
        f"print(json.dumps({{kind: rm.compare({PROMPT!r}, 'a', 'b') for kind, rm in rms.items()}}))"
    )
    done = run_python(code, HF_HUB_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == pytest.approx(expected, abs=1e-6)


def test_torch_and_transformers_are_enough(saved, tmp_path):
    """In an environment from which everything else that this project can use is missing."""
    missing = ("deepspeed", "peft", "wandb", "flash_attn", "datasets", "matplotlib", "scipy", "accelerate", "pandas")
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not entry.name.lower().startswith(missing):
            (tmp_path / entry.name).symlink_to(entry)
    code = f"""
from importlib.util import find_spec
assert not any(map(find_spec, {missing!r}))
from general_preference import GPMPipeline, RewardModel, get_reward_model
rm = GPMPipeline({saved()!r})
print(rm.rank({PROMPT!r}, ["a", "b", "c"]), rm([{CONVERSATIONS[0]!r}]).shape)
"""
    done = run_python(code, "-S", PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert done.returncode == 0, done.stderr[-2000:]


def run_python(code: str, *options: str, **extra) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | extra
    return subprocess.run(
        [sys.executable, *options, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_model_without_a_gate_needs_no_prompt(saved):
    rm = GPMPipeline(saved("llama", "gpm", 2, False))
    first, second = rm(CONVERSATIONS[:2]), rm(CONVERSATIONS[2:4])
    score = generate_high_dim_result_with_prompt(rm.model, 2, first, second, None)
    torch.testing.assert_close(score, preference_score(first, second))
    assert score.shape == (2,) and PreferenceConfig("gpm", 2).planes == 1


@pytest.mark.parametrize("head", ["value_head", "prompt_head"])
def test_weights_that_are_not_finite_are_noticed(saved, make_model, tmp_path, head):
    model = make_model()
    with torch.no_grad():
        getattr(model, head).weight[1, 3] = float("nan")
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(saved()).save_pretrained(tmp_path)
    with pytest.raises(NonFiniteError, match="prompt 0: the embeddings are not finite"):
        GPMPipeline(tmp_path).compare(PROMPT, "a", "b")
