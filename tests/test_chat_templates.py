"""Chat templates of real models, from the installed TRL: every text stands in the ids, or the record is refused."""

import copy
import re
from functools import cache
from pathlib import Path

import pytest

from general_preference.datasets.messages import PREFIX
from general_preference.datasets.tokenization import ComparisonTokenizer
from general_preference.errors import InputError
from scripts.make_tiny_model import train_tokenizer
from tests.conftest import TEXTS

trl = pytest.importorskip("trl")
TEMPLATES = {path.stem: path for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}
CONTROL = re.compile(r"<[|｜][^<>\n|｜]{1,40}[|｜]>|\[/?[A-Z_]{3,}\]|<\w+_of_\w+>|</s>")
SPELLED = ["<|im_end|>", "<|im_start|>", "</s>", "<|eot_id|>", "<end_of_turn>", "<｜User｜>", "[INST]"]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def thinking(thought, text):
    return assistant(f"<think>\n{thought}\n</think>\n\n{text}")


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "its name"}}, "required": ["city"]}
WEATHER = {"name": "weather", "description": "the weather of a city", "parameters": CITY}
TOOLS = {"tools": [{"type": "function", "function": WEATHER}]}
ASKED = [user("Which?")]
BOTH = [[assistant("rock")], [assistant("paper")]]
CALLED = [user("Rain?"), assistant("", tool_calls=[CALL])]
RESULT = {"role": "tool", "content": "dry", "name": "weather", "tool_call_id": "abcdefghi"}
# name: (prompt, responses, variables of the template, texts that must be there)
CASES = {
    "plain": (ASKED, BOTH, {}, "Which? rock paper"),
    "system": ([{"role": "system", "content": "Brief."}, *ASKED], BOTH, {}, "Brief. Which? rock paper"),
    "turns": ([*ASKED, assistant("One."), user("And?")], BOTH, {}, "Which? One. And? rock paper"),
    "thoughts": (ASKED, [[thinking("hm", "rock")], [assistant("paper")]], {}, "Which? hm rock paper"),
    "history": ([*ASKED, thinking("hm", "One."), user("And?")], BOTH, {}, "Which? One. And? rock paper"),
    "reasoning": (ASKED, [[assistant("rock", reasoning_content="hm")], [assistant("paper")]], {}, "Which? hm rock"),
    "calls": (CALLED[:1], [CALLED[1:], [assistant("No")]], TOOLS, "weather Rain? weather Oslo No"),
    "results": ([*CALLED, RESULT], BOTH, TOOLS, "weather Rain? Oslo dry rock paper"),
    "repeated": ([user("weather Oslo?"), CALLED[1], RESULT], BOTH, TOOLS, "weather Oslo? Oslo dry rock paper"),
    "empty": (ASKED, [[assistant("")], [assistant("paper")]], {}, "Which? paper"),
    "foreign": ([{"role": "oracle", "content": "Which?"}], BOTH, {}, "Which? rock paper"),
    "space": ([user("Which? \n")], [[assistant("rock \n")], [assistant(" paper")]], {}, "Which? rock paper"),
    "spelled": ([user("x".join(SPELLED))], [[assistant("rock" + "y".join(SPELLED))], [assistant("paper")]], {},
                " ".join(["x".join(SPELLED), "rock" + "y".join(SPELLED), "paper"])),
    "prefill": ([*ASKED, assistant("The ", **{PREFIX: True})], BOTH, {}, "Which? The rock paper"),
    "several": (ASKED, [[assistant("rock"), user("Sure?"), assistant("yes")], [assistant("paper")]], {},
                "Which? rock Sure? yes paper"),
}  # fmt: skip
# What some templates refuse; every template takes all other cases.
REFUSALS = {
    "reasoning": "leaves out thoughts",
    "calls": "leaves out 'tool_calls'|leaves out the tools",
    "results": "leaves out ('tool_calls'|the tools|the message of role 'tool')|refuses the messages",
    "repeated": "leaves out ('tool_calls'|the tools|the message of role 'tool')|refuses the messages",
    "foreign": "leaves out the message of role 'oracle'|refuses the messages",
}


@cache
def encoder(name):
    text = TEMPLATES[name].read_text(encoding="utf-8")
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.add_special_tokens({"extra_special_tokens": sorted({*CONTROL.findall(text), *SPELLED})})
    tokenizer.chat_template = text
    return ComparisonTokenizer(tokenizer)


def shows_parts_alone(name):
    """Templates of multimodal models that read no text, but lists of parts."""
    return bool({"idefics3", "smolvlm", "llava_next"} & {name, name.removesuffix("_training")})


def test_there_are_templates_of_many_models():
    assert len(TEMPLATES) >= 60


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_text_is_there_or_the_record_is_refused(name, case):
    prompt, responses, options, texts = CASES[case]
    tokenizer, before = encoder(name).tokenizer, copy.deepcopy((prompt, responses, options))
    try:
        (row,) = encoder(name).encode([prompt], [responses], [options])
    except InputError as error:
        assert re.search(REFUSALS.get(case, "never"), str(error)), error
        return
    assert (prompt, responses, options) == before
    shown = [tokenizer.decode(ids) for ids in (row["prompt_ids"], *row["response_ids"])]
    end = 0
    for text in texts.split(" "):
        end = "".join(shown).index(text, end)
    assert [text.endswith(tokenizer.eos_token) for text in shown] == [False, True, True]
    (alone,) = encoder(name).encode([prompt], [responses[1:]], [options])
    assert alone["prompt_ids"] == row["prompt_ids"] and alone["response_ids"] == row["response_ids"][1:]
    if case in ("plain", "turns", "calls", "results", "several"):
        messages = [*prompt, *responses[1]]
        if shows_parts_alone(name):
            messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        assert shown[0] + shown[2].removesuffix(tokenizer.eos_token) == whole.rstrip().removesuffix(tokenizer.eos_token)


@pytest.mark.parametrize("name", TEMPLATES)
def test_both_sides_are_framed_alike_whatever_they_say(name):
    texts = ["", "rock", " paper\n", "<think>\nhm\n</think>\n\nrock", "hm</think>rock", "<think>rock", SPELLED[0]]
    frames = set()
    for text in texts:
        try:
            (row,) = encoder(name).encode([ASKED], [[[assistant(text)]]])
        except InputError as error:
            assert "think>" in text and "leaves out" in str(error)
            continue
        shown = encoder(name).tokenizer.decode(row["response_ids"][0])
        if "think>" not in text:
            frames.add(shown.replace(text.strip(), "", 1) if text.strip() else shown)
        prompt = encoder(name).tokenizer.decode(row["prompt_ids"])
        assert prompt == encoder(name).tokenizer.decode(encoder(name).encode([ASKED], [BOTH])[0]["prompt_ids"])
    assert len({frame.replace(" ", "").replace("\n", "") for frame in frames}) == 1, frames


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_make_no_control_tokens(name):
    control = set(encoder(name).control.ids.values())
    found = []
    for text in (SPELLED[0], "".join(SPELLED), "plain"):
        (row,) = encoder(name).encode([[user(text)]], [[[assistant(text)], [assistant("paper")]]])
        found.append(
            [[token for token in ids if token in control] for ids in (row["prompt_ids"], *row["response_ids"])]
        )
    assert found[0] == found[1] == found[2]


def test_what_only_generation_prompts_write_is_no_part_of_prompts():
    (row,) = encoder("deepseek_r1_distill").encode([ASKED], [[[thinking("hm", "good")], [assistant("bad")]]])
    shown = [encoder("deepseek_r1_distill").tokenizer.decode(ids) for ids in (row["prompt_ids"], *row["response_ids"])]
    assert encoder("deepseek_r1_distill").template.opening() == "<think>\n"
    assert "".join(shown).count("<think>") == 1 and "bad" in shown[2]


def test_thoughts_of_earlier_turns_may_be_left_out_and_are_counted():
    prompt, responses, options, _ = CASES["history"]
    for name, left_out in [("qwen3", True), ("qwen2_5", False)]:
        (row,) = encoder(name).encode([prompt], [responses], [options])
        assert row["thoughts_left_out"] == left_out


@pytest.mark.parametrize("name", [name for name, path in TEMPLATES.items() if "strftime_now" in path.read_text()])
def test_templates_write_the_same_date_every_day(name):
    fixed = encoder(name).tokenizer
    assert "strftime_now(" not in fixed.chat_template
    assert encoder(name).fingerprint() == ComparisonTokenizer(copy.deepcopy(fixed)).fingerprint()
    assert re.search("2024|Jul", fixed.apply_chat_template(ASKED, tokenize=False))
