"""Every record shape that is accepted, and what is said of those that are not."""

import pytest

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
    found = parse_record(record, custom=True)
    assert found.prompt == [user("q")] and found.responses == [[assistant("a")], [assistant("b")]]
    with pytest.raises(InputError, match="is_custom_dataset expects"):
        parse_record({"prompt": "q", "chosen": "a", "rejected": "b"}, custom=True)


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
    ],
)
def test_what_does_not_fit_is_refused(record, message):
    with pytest.raises(InputError, match=message):
        parse_record(record)
