"""One BOS, the end token read, nothing overwritten, and the truncation rule, for many kinds of tokenizer."""

import json

import pytest
import transformers
from tokenizers.processors import TemplateProcessing

from general_preference.datasets.records import parse_record
from general_preference.datasets.tokenization import ComparisonTokenizer, load_tokenizer, plain_template
from general_preference.errors import InputError
from scripts.make_tiny_model import train_tokenizer
from tests.conftest import TEXTS

SYSTEM = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Which throw wins?"}]
MULTI_TURN = [*SYSTEM, {"role": "assistant", "content": "The rock."}, {"role": "user", "content": "Sure? äöü 你好 🎲"}]


def answer(text):
    return [{"role": "assistant", "content": text}]


def variant(kind):
    """Tokenizers as they come: without pad, without template, pad = eos, adding BOS themselves, or plain."""
    tokenizer = train_tokenizer(TEXTS, 300)
    if kind == "no_pad":
        tokenizer.pad_token = None
    if kind == "pad_is_eos":
        tokenizer.pad_token = tokenizer.eos_token
    if kind in ("no_template", "adds_bos_no_template"):
        tokenizer.chat_template = None
    if kind in ("adds_bos", "adds_bos_no_template"):
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    return tokenizer


KINDS = ["plain", "no_pad", "pad_is_eos", "no_template", "adds_bos", "adds_bos_no_template"]


@pytest.fixture(params=KINDS)
def loaded(request, tmp_path):
    variant(request.param).save_pretrained(tmp_path)
    return request.param, load_tokenizer(str(tmp_path))


def test_every_kind_of_tokenizer(loaded):
    kind, tokenizer = loaded
    encoder = ComparisonTokenizer(tokenizer)
    responses = [answer("The paper."), answer("The scissors, always — ✂️")]
    (row,) = encoder.encode([MULTI_TURN], [responses])
    expected_bos = 0 if kind == "no_template" else 1
    assert row["prompt_ids"].count(tokenizer.bos_token_id) == expected_bos
    assert (row["prompt_ids"][0] == tokenizer.bos_token_id) == bool(expected_bos)
    for ids, response in zip(row["response_ids"], responses, strict=True):
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.bos_token_id not in ids
        assert tokenizer.decode(ids[:-1]) == response[0]["content"]
    text = tokenizer.decode(row["prompt_ids"])
    for message in MULTI_TURN:
        assert message["content"] in text
    assert tokenizer.pad_token_id is not None


def test_prompt_ids_are_those_of_the_rendered_prompt(tokenizer):
    (row,) = ComparisonTokenizer(tokenizer).encode([SYSTEM], [[answer("x")]])
    rendered = tokenizer.apply_chat_template(SYSTEM, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(row["prompt_ids"]) == rendered
    whole = tokenizer.apply_chat_template(SYSTEM + answer("x"), tokenize=False)
    assert tokenizer.decode(row["prompt_ids"] + row["response_ids"][0]) == whole


def test_batches_equal_single_calls(tokenizer):
    encoder = ComparisonTokenizer(tokenizer, 40)
    prompts = [SYSTEM, MULTI_TURN, SYSTEM[1:]]
    responses = [[answer("a"), answer("b c d")], [answer("e")] * 2, [answer("The rock"), answer("x"), answer("")]]
    together = encoder.encode(prompts, responses)
    assert together == [encoder.encode([p], [r])[0] for p, r in zip(prompts, responses, strict=True)]
    assert together[2]["response_ids"][2] == [tokenizer.eos_token_id]


@pytest.mark.parametrize("limit", [8, 16, 33, 64, 200])
@pytest.mark.parametrize(("prompt_words", "response_words"), [(3, 3), (200, 3), (3, 200), (200, 200)])
def test_truncation(tokenizer, limit, prompt_words, response_words):
    prompt = [{"role": "user", "content": "rock " * prompt_words}]
    responses = [answer("paper " * response_words), answer("scissors")]
    (whole,) = ComparisonTokenizer(tokenizer).encode([prompt], [responses])
    (cut,) = ComparisonTokenizer(tokenizer, limit).encode([prompt], [responses])
    lengths = [len(cut["prompt_ids"]) + len(ids) for ids in cut["response_ids"]]
    assert max(lengths) <= limit
    assert cut["prompt_ids"][0] == tokenizer.bos_token_id and cut["prompt_ids"].count(tokenizer.bos_token_id) == 1
    for ids, full in zip(cut["response_ids"], whole["response_ids"], strict=True):
        assert ids[-1] == tokenizer.eos_token_id
        assert ids[:-1] == full[: len(ids) - 1], "a response is cut at its end only"
    tail = cut["prompt_ids"][1:]
    assert tail == whole["prompt_ids"][len(whole["prompt_ids"]) - len(tail) :], "a prompt is cut at its oldest end only"
    if cut["response_cut"]:
        assert len(cut["prompt_ids"]) == min(len(whole["prompt_ids"]), limit // 4), "the prompt goes first"
        assert max(lengths) == limit
    assert cut["prompt_cut"] == (cut["prompt_ids"] != whole["prompt_ids"])
    assert cut["response_cut"] == (cut["response_ids"] != whole["response_ids"])


def test_a_template_without_system_role_gets_it_in_the_first_turn(tokenizer):
    refuses = train_tokenizer(TEXTS, 300)
    refuses.chat_template = (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template.replace("{{ bos_token }}", "")
    )
    (row,) = ComparisonTokenizer(refuses).encode([SYSTEM], [[answer("x")]])
    text = refuses.decode(row["prompt_ids"])
    assert "be brief\n\nWhich throw wins?" in text and "system" not in text


def test_white_space_after_the_end_of_turn_is_not_read(tokenizer):
    newline = train_tokenizer(TEXTS, 300)
    newline.chat_template = tokenizer.chat_template.replace("'<|end|>'", "'<|end|>\\n'")
    (row,) = ComparisonTokenizer(newline).encode([SYSTEM], [[answer("x"), answer("y \n")]])
    for ids in row["response_ids"]:
        assert ids[-1] == newline.eos_token_id and ids.count(newline.eos_token_id) == 1


def test_input_template_replaces_the_chat_template(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), input_template="Q: {} A:")
    (row,) = ComparisonTokenizer(loaded).encode([SYSTEM], [[answer("x")]])
    assert loaded.decode(row["prompt_ids"]) == "be brief\nQ: Which throw wins? A:"
    with pytest.raises(InputError, match=r"has no '\{\}'"):
        plain_template("Human:")


def test_fingerprint_follows_what_changes_ids(tokenizer):
    base = ComparisonTokenizer(tokenizer, 64)
    assert base.fingerprint() == ComparisonTokenizer(tokenizer, 64).fingerprint()
    other = train_tokenizer(TEXTS, 300)
    other.chat_template = plain_template("{}")
    changed = [
        ComparisonTokenizer(tokenizer, 65),
        ComparisonTokenizer(tokenizer, 64, "released"),
        ComparisonTokenizer(other, 64),
    ]
    changed.append(ComparisonTokenizer(train_tokenizer(TEXTS, 280), 64))
    assert base.fingerprint() not in {encoder.fingerprint() for encoder in changed}


def test_a_tokenizer_that_is_none(tmp_path):
    with pytest.raises(InputError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot load the tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_response_longer_than_one_message(tokenizer):
    found = parse_record({"chosen": [*MULTI_TURN, *answer("yes")], "rejected": [*SYSTEM, *answer("no")]})
    (row,) = ComparisonTokenizer(tokenizer).encode([found.prompt], [found.responses])
    assert tokenizer.decode(row["response_ids"][0]).endswith("<|assistant|>yes<|end|>")
    assert tokenizer.decode(row["response_ids"][1]) == "no<|end|>"


def test_a_tokenizer_of_sentencepiece_alone_is_read(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentences = ["the rock, the paper and the scissors", "which throw wins? name one", "a b c d e f g h i j k l m"] * 50
    options = {"vocab_size": 320, "model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False}
    prefix = str(tmp_path / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=prefix, minloglevel=2, **options
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | special))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    try:
        loaded = load_tokenizer(str(tmp_path))
    except InputError as error:
        assert "reads tokenizer.model with losses" in str(error) and transformers.__version__ < "5.23"
        return
    text, pieces = "Which throw wins? ÄÖ 你好", sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    assert loaded(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)
    (row,) = ComparisonTokenizer(loaded).encode([SYSTEM], [[answer("a</s>b"), answer("c")]])
    assert loaded.eos_token_id not in row["response_ids"][0][:-1]
