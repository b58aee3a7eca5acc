"""Every record shape that is accepted, and what is said of those that are not."""

import json

import pytest

from general_preference.datasets.reading import Reading
from general_preference.datasets.records import parse_record
from general_preference.errors import InputError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_shared_leading_messages_are_the_prompt():
    shared = [user("a"), assistant("b"), user("c")]
    found = parse_record({"chosen": [*shared, assistant("yes")], "rejected": [*shared, assistant("no")], "margin": 2})
    assert found.prompt == shared
    assert found.responses == [[assistant("yes")], [assistant("no")]]
    assert found.preferences == [(0, 1, 1.0)] and found.margin == 2.0


def test_responses_may_be_several_messages_or_equal():
    found = parse_record(
        {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")], "rejected": [user("a"), assistant("x")]}
    )
    assert found.prompt == [user("a")] and len(found.responses[0]) == 3
    equal = [user("a"), assistant("b")]
    assert parse_record({"chosen": equal, "rejected": equal}).responses == [[assistant("b")]] * 2


@pytest.mark.parametrize("prompt", ["q", [user("q")]])
@pytest.mark.parametrize("response", ["r", [assistant("r")], [user("q"), assistant("r")]])
def test_explicit_prompt(prompt, response):
    found = parse_record({"prompt": prompt, "chosen": response, "rejected": "other"})
    assert found.prompt == [user("q")] and found.responses == [[assistant("r")], [assistant("other")]]


def test_custom_format():
    record = {"instruction": "q", "chosen": {"response": "a"}, "reject": "b", "label": 3}
    found = parse_record(record, Reading(custom=True))
    assert found.prompt == [user("q")] and found.responses == [[assistant("a")], [assistant("b")]]
    with pytest.raises(InputError, match="is_custom_dataset expects"):
        parse_record({"prompt": "q", "chosen": "a", "rejected": "b"}, Reading(custom=True))


def test_soft_labels_put_the_preferred_side_first():
    record = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert parse_record(record | {"chosen_probability": 0.75}).preferences == [(0, 1, 0.75)]
    assert parse_record(record | {"chosen_probability": 0.25}).preferences == [(1, 0, 0.75)]
    assert parse_record(record | {"chosen_probability": 0.5}).preferences == [(0, 1, 0.5)]


def test_groups():
    found = parse_record({"id": 7, "prompt": "q", "responses": ["a", "b", "c"], "preferences": [[0, 1], [2, 0, 0.1]]})
    assert found.id == "7" and len(found.responses) == 3
    assert found.preferences == [(0, 1, 1.0), (0, 2, 0.9)]


def test_lists_of_chosen_and_rejected_texts():
    found = parse_record({"prompt": "q", "chosen": ["a", "b"], "rejected": ["c", "d"], "subset": "Ties"})
    assert [response[0]["content"] for response in found.responses] == ["a", "b", "c", "d"]
    assert found.preferences == [(0, 2, 1.0), (0, 3, 1.0), (1, 2, 1.0), (1, 3, 1.0)] and found.subset == "Ties"


@pytest.mark.parametrize("role", ["human", "Human", "prompter", "user"])
@pytest.mark.parametrize("other", ["gpt", "GPT", "bot", "model", "assistant"])
def test_usual_names_of_roles_and_fields_are_translated(role, other):
    sides = [
        [{"from": role, "value": "q"}, {"role": other, "content": [{"type": "text", "text": text}]}] for text in "ab"
    ]
    found = parse_record({"chosen": sides[0], "rejected": sides[1]})
    assert found.prompt == [user("q")] and found.responses == [[assistant("a")], [assistant("b")]]


def test_messages_are_read_whole():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm", "name": None}
    told = [asked, {"role": "tool", "content": "3", "tool_call_id": "7"}, assistant("b")]
    found = parse_record({"prompt": "q", "chosen": told, "rejected": {"role": "assistant", "content": "no"}})
    parsed = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    message = {"role": "assistant", "content": "", "tool_calls": [parsed], "reasoning_content": "hm"}
    assert found.responses == [[message, told[1], told[2]], [assistant("no")]]
    talk = [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}]
    talk += [{"from": "observation", "value": "3"}]
    found = parse_record(
        {"conversations": talk, "chosen": {"from": "gpt", "value": "a"}, "rejected": {"value": "b", "from": "gpt"}}
    )
    assert [message["role"] for message in found.prompt] == ["user", "assistant", "tool"]
    assert found.prompt[1]["tool_calls"][0]["function"] == parsed["function"]


def test_variables_of_the_template_are_kept():
    record = {"prompt": "q", "chosen": "a", "rejected": "b", "chat_template_kwargs": {"enable_thinking": False}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": None}}}]
    found = parse_record(record | {"tools": json.dumps(tools)})
    kept = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert found.options == {"tools": kept, "enable_thinking": False}
    assert parse_record(record | {"tools": tools}).options == found.options
    for value, message in [("{", "'tools' is no JSON"), ({"a": 1}, "'tools' is an object"), ("3", "'tools' is int 3")]:
        with pytest.raises(InputError, match=message):
            parse_record(record | {"tools": value})


SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("prompt", "system"),
    [
        ("Which tea?", []), ("Which tea? ", []), ([user("Which tea?")], []), ("Which tea?", [SYSTEM]),
        ([user(" Which tea?")], [SYSTEM]), ([SYSTEM, user("Which tea? ")], [SYSTEM]),
    ],
)  # fmt: skip
def test_a_prompt_that_the_conversations_repeat_stands_once(prompt, system):
    sides = [[*system, user("Which tea?"), assistant(text)] for text in ("Green.", "Black.")]
    found = parse_record({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
    assert found.prompt[-1]["content"].strip() == "Which tea?" and len(found.prompt) == 1 + len(system)
    assert found.responses == [[assistant("Green.")], [assistant("Black.")]]


def test_a_prompt_that_ends_with_the_assistants_turn_is_begun():
    begun = [user("q"), assistant("The ")]
    found = parse_record({"prompt": begun, "chosen": "rock.", "rejected": [assistant("paper.")]})
    assert found.prompt == [user("q"), assistant("The ") | {"prefix": True}]
    several = [[*begun, assistant(text)] for text in ("a", "b")]
    assert parse_record({"chosen": several[0], "rejected": several[1]}).prompt == begun


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "expected a JSON object"),
        ({"prompt": "q", "chosen": ["a"], "rejected": "b"}, "'rejected' is text 'b', expected a list of texts"),
        ({"prompt": "q", "chosen": ["a"], "rejected": []}, "expected a list of texts"),
        ({"chosen": ["a"], "rejected": ["b"]}, "need the key 'prompt'"),
        ({"prompt": "q", "chosen": ["a"], "rejected": ["b"], "chosen_probability": 0.7}, "belongs to one chosen"),
        ({}, "no keys"),
        ({"chosen": "a"}, "no key 'rejected'"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "'chosen' is int 3, expected text"),
        ({"prompt": "q", "chosen": None, "rejected": "b"}, "no key 'chosen'"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "expected a list of messages"),
        ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "expected a message"),
        ({"chosen": "a", "rejected": "b"}, "text without a 'prompt'"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}, "no leading message"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "big"}, "'margin' is text 'big'"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": float("nan")}, "finite number"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "chosen_probability": 1.5}, "from 0 to 1"),
        ({"prompt": "q", "responses": ["a"], "preferences": [[0, 1]]}, "at least two"),
        ({"prompt": "q", "responses": ["a", "b"], "preferences": []}, "winner, loser"),
        ({"prompt": "q", "responses": ["a", "b"], "preferences": [[0, 2]]}, "names response 2"),
        ({"prompt": "q", "responses": ["a", "b"], "preferences": [[1, 1]]}, "with itself"),
        ({"prompt": "q", "responses": ["a", 4], "preferences": [[0, 1]]}, "responses\\[1\\]"),
        ({"responses": ["a", "b"], "preferences": [[0, 1]]}, "needs the key 'prompt'"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 2], "chosen": "c"}, "text of column 'chosen'"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 2], "chosen_probability": 0.7}, "found a group"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "ranking": "b > a"}, "text of column 'ranking'"),
        ({"prompt": "q", "responses": ["a", "b"]}, "needs one of the keys 'preferences', 'scores'"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 2], "ranks": [1, 2]}, "found 'scores' and 'ranks'"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1]}, "one number for each of 2"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, "2"]}, "one number for each of 2"),
        ({"prompt": "q", "responses": ["a", "b"], "ranking": [1, 2]}, "the indices 0 to 1"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, float("nan")]}, "one number for each of 2"),
        ({"prompt": "other", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
         "'prompt' text 'other' is not what 'chosen' and 'rejected' begin with"),
        ({"prompt": [user("x"), assistant("y"), user("q")], "chosen": [user("q"), assistant("a")], "rejected": "b"},
         "'chosen' begins with a user turn"),
        ({"prompt": "q", "chosen": "a", "rejected": [assistant("b"), user("c")]}, "response 1 ends with a user turn"),
        ({"prompt": "q", "chosen": [{"role": "assistant", "content": [{"type": "image", "image": "x"}]}],
          "rejected": "b"}, "content of type 'image'"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "system": [1]}, "'system' is a list"),
        ({"prompt": [{"role": "system", "content": "t"}, user("q")], "chosen": "a", "rejected": "b", "system": "s"},
         "'system' differs from the system message"),
        ({"prompt": "q", "chosen_input_ids": [1], "rejected_input_ids": [2]}, "token ids of another tokenizer"),
        ({"input_ids_chosen": [1], "input_ids_rejected": [2]}, "token ids of another tokenizer"),
        ({"prompt": "q", "chosen": [{"role": "assistant", "content": "a", "weight": "heavy"}], "rejected": 4}, "int 4"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(record, message):
    with pytest.raises(InputError, match=message):
        parse_record(record)
