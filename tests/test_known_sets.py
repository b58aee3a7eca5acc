"""The field's public sets, three rows each in the layout of the hub, and what becomes of every column."""

import contextlib
import copy
import functools
import json

import datasets
import pytest

from general_preference.datasets.known_sets import canonical_record
from general_preference.datasets.preparation import load_tokenized, summarize_table
from general_preference.datasets.reading import Reading
from general_preference.datasets.records import parse_record
from general_preference.datasets.sources import Source
from general_preference.datasets.tokenization import ComparisonTokenizer
from general_preference.errors import InputError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def turns(*texts):
    return [(user, assistant)[number % 2](text) for number, text in enumerate(texts)]


def parts(*texts):
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in turns(*texts)]


def rating(value):
    return {"Rating": value, "Rationale": "because"}


def completion(text, honesty, helpfulness, overall=5.0):
    return {
        "model": "m", "response": text, "annotations": {"honesty": rating(honesty), "helpfulness": rating(helpfulness)},
        "overall_score": overall, "fine-grained_score": 3.5, "critique": "Well.", "principle": "honesty",
        "custom_system_prompt": "You are honest.",
    }  # fmt: skip


def helpsteer_2(strength, prompt="q"):
    return {"split": "train", "prompt": prompt, "response_1": "a", "response_2": "b", "preference_strength": strength,
            "preference_statement": "one is better", "preference_elaboration": "since"}  # fmt: skip


def helpsteer_3(strength):
    return {"domain": "code", "language": "python", "context": turns("q", "r", "s"), "response1": "a", "response2": "b",
            "overall_preference": strength, "individual_preference": [{"score": 1, "reasoning": "x"}]}  # fmt: skip


def shp(labels, **more):
    return {"post_id": "p", "domain": "askx", "history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": labels,
            "score_A": 3, "score_B": 2, "seconds_difference": 1.5, "c_root_id_A": "x"} | more  # fmt: skip


def webgpt(score):
    quotes = {"title": ["t"], "extract": ["e"]}
    return {"question": {"dataset": "eli5", "id": "1", "full_text": "q"}, "quotes_0": quotes, "quotes_1": quotes,
            "answer_0": "a", "answer_1": "b", "score_0": score, "score_1": -score}  # fmt: skip


def summary(info, choice):
    summaries = [{"text": text, "policy": "sup", "note": "ok"} for text in ("a", "b")]
    return {"info": info, "summaries": summaries, "choice": choice, "worker": "w", "batch": "b1", "split": "train",
            "extra": {"confidence": 5}}  # fmt: skip


def arena(winner, make=turns):
    return {"question_id": "x", "model_a": "m", "model_b": "n", "winner": winner, "judge": "arena_user_1", "turn": 1,
            "conversation_a": make("q", "a"), "conversation_b": make("q", "b"), "language": "English",
            "openai_moderation": {"categories": {"hate": False}}, "tstamp": 1.5}  # fmt: skip


def arena_55k(winner, answers=("a", "b")):
    votes = {f"winner_{name}": int(name == winner) for name in ("model_a", "model_b", "tie")}
    sides = {f"response_{side}": json.dumps([text, "c"]) for side, text in zip("ab", answers, strict=True)}
    return {"id": 3, "model_a": "m", "model_b": "n", "prompt": json.dumps(["q", "r"]), **sides, **votes}


def safe(better, safer):
    return {"prompt": "q", "response_0": "a", "response_1": "b", "prompt_source": "x", "response_0_source": "y",
            "is_response_0_safe": True, "better_response_id": better, "safer_response_id": safer,
            "response_0_sha256": "ff", "response_0_harm_category": {"Fraud": False}}  # fmt: skip


def candidates(*scores):
    texts = [{"model": f"m{i}", "text": text, "scores": one} for i, (text, one) in enumerate(zip("abc", scores))]  # noqa: B905
    return {"instruction": "do", "input": "it", "output": "gold", "candidates": texts}


def unified(first, second):
    return {"source": "x", "conv_A": turns("q", "a"), "conv_B": turns("q", "b"), "conv_A_rating": first,
            "conv_B_rating": second}  # fmt: skip


AB, BA, TIE = [(0, 1, 1.0)], [(1, 0, 1.0)], [(0, 1, 0.5)]
Q, A, B = turns("q"), [assistant("a")], [assistant("b")]
PAIR = {"chosen": "a", "rejected": "b"}
# name, column not read, then rows: (record, prompt, preferences[, responses])
SETS = [
    ("hh-rlhf", None, [
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, Q, AB),
        ({side: f"\n\nHuman: q\n\nAssistant: r\n\nHuman: s?\n\nAssistant: {text}" for side, text in PAIR.items()},
         turns("q", "r", "s?"), AB),
        ({"chosen": "\n\nHuman: x\n\ny: Human\n\nAssistant: a", "rejected": "\n\nHuman: x\n\ny: Human\n\nAssistant: b"},
         turns("x\n\ny: Human"), AB),
    ]),
    ("UltraFeedback, binarized", "prompt_id", [
        ({"prompt": prompt, "prompt_id": "7", "chosen": chosen, "rejected": rejected, "messages": chosen,
          "score_chosen": 8.0, "score_rejected": 3.0}, shared, AB)
        for prompt, chosen, rejected, shared in [
            ("q", turns("q", "a"), turns("q", "b"), Q),
            ("q ", turns("q", "a"), turns("q", "b"), Q),
            ("q", [{"role": "system", "content": "s"}, *turns("q", "a")],
             [{"role": "system", "content": "s"}, *turns("q", "b")], [{"role": "system", "content": "s"}, *Q]),
        ]
    ]),
    ("UltraFeedback", "completions.principle", [
        ({"source": "x", "instruction": "q", "models": ["m"], "correct_answers": ["None"],
          "completions": [completion("a", *first), completion("b", *second)]}, Q, expected)
        for first, second, expected in [(("5", "4"), ("3", "4"), AB), (("1", "N/A"), ("3", "2"), BA), (("1", "3"),
                                                                                              ("2", "2"), TIE)]
    ]),
    ("argilla", "chosen_model", [
        ({"instruction": text, "chosen_response": "a", "rejected_response": "b", "chosen_avg_rating": 5,
          "chosen_model": "m"}, turns(text), AB) for text in ("q", "r", "s")
    ]),
    ("PairRM candidates", "output", [
        (candidates({"bartscore": -1.5}, {"bartscore": -2.0}), turns("do\nit"), AB),
        (candidates({"bartscore": -3}, {"bartscore": -2.0}), turns("do\nit"), BA),
        (candidates({"x": 1, "bartscore": 1}, {"y": 2, "bartscore": 1}), turns("do\nit"), TIE),
    ]),
    ("custom format", None, [
        ({"instruction": "q", "chosen": {"response": "a"}, "reject": {"response": "b"}}, Q, AB),
        ({"instruction": "q", "chosen": "a", "reject": "b", "margin": 0}, Q, AB),
        ({"instruction": "Translate.", "input": "good morning", "chosen": "a", "reject": "b"},
         turns("Translate.\ngood morning"), AB),
    ]),
    ("LLaMA-Factory, alpaca", None, [
        (PAIR | {"instruction": "q", "input": ""}, Q, AB),
        (PAIR | {"instruction": "q", "history": [["o", "p"]], "system": "s"},
         [{"role": "system", "content": "s"}, *turns("o", "p", "q")], AB),
        (PAIR | {"instruction": "Translate to German.", "input": "good morning"},
         turns("Translate to German.\ngood morning"), AB),
    ]),
    ("LLaMA-Factory, sharegpt", None, [
        ({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"},
          "rejected": {"from": "gpt", "value": "b"}} | more, system + Q, AB)
        for more, system in [({}, []), ({"system": "s"}, [{"role": "system", "content": "s"}]), ({"tools": ""}, [])]
    ]),
    ("Orca", None, [
        (PAIR | {"system": "s", "question": "q"}, [{"role": "system", "content": "s"}, *Q], AB),
        (PAIR | {"system": "", "question": "q"}, Q, AB),
        (PAIR | {"system": "s", "input": "q", "rating": [5, 1]},
         [{"role": "system", "content": "s"}, *Q], AB),
    ]),
    ("HelpSteer 2", "preference_statement", [
        (helpsteer_2(-3), Q, AB), (helpsteer_2(0), Q, TIE),
        (helpsteer_2(1, "q\n<extra_id_1>Assistant\nr\n<extra_id_1>User\ns"), turns("q", "r", "s"), BA),
    ]),
    ("HelpSteer 3", "individual_preference", [
        (helpsteer_3(-1), turns("q", "r", "s"), AB), (helpsteer_3(0), turns("q", "r", "s"), TIE),
        (helpsteer_3(3), turns("q", "r", "s"), BA),
    ]),
    ("Nectar", "source", [
        ({"prompt": "\n\nHuman: q\n\nAssistant: ", "source": ["x"], "turns": 1,
          "answers": [{"answer": text, "model": "m", "rank": rank} for text, rank in zip("ab", ranks, strict=True)]},
         Q, expected) for ranks, expected in [((1.0, 2.0), AB), ((7.0, 1.0), BA), ((3.0, 3.0), TIE)]
    ]),
    ("SHP", "post_id", [(shp(1), Q, AB), (shp(0), Q, AB, [B, A]), (shp(1, score_A=1), Q, AB)]),
    ("WebGPT", "quotes_0", [(webgpt(0.5), Q, AB), (webgpt(-1), Q, BA), (webgpt(0), Q, TIE)]),
    ("summarize_from_feedback", "worker", [
        (summary({"id": "1", "post": "p", "title": "t", "subreddit": "cats"}, 0),
         turns("SUBREDDIT: r/cats\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"), AB),
        (summary({"id": "1", "article": "news", "site": "x", "post": None}, 0), turns("Article: news\n\nTL;DR:"), AB),
        (summary({"id": "1", "post": "p"}, 1), turns("POST: p\n\nTL;DR:"), AB, [B, A]),
    ]),
    ("Arena", "question_id", [
        (arena("model_a"), Q, AB), (arena("model_b", parts), Q, BA), (arena("tie (bothbad)"), Q, TIE),
    ]),
    ("Arena, 55k", "model_a", [
        (arena_55k(winner), Q, expected, [turns("q", one, "r", "c")[1:] for one in "ab"])
        for winner, expected in [("model_a", AB), ("model_b", BA), ("tie", TIE)]
    ]),
    ("PKU-SafeRLHF", "prompt_source", [
        (safe(0, 1), Q, AB), (safe(1, 0), Q, AB, [B, A]), (safe(0, 0), Q, AB),
    ]),
    ("Unified-Feedback", "source", [(unified(1, 0), Q, AB), (unified(0, 1), Q, BA), (unified(2, 2), Q, TIE)]),
    ("conversations", "source", [
        ({"chosen": turns("q", "a"), "rejected": turns("q", "b"), "source": "magpie"}, Q, AB),  # Skywork
        ({"chosen": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "source": "x",
          "rejected": turns("q", "b")}, Q, AB),
        ({"chosen": parts("q", "a"), "rejected": parts("q", "b"), "source": "y", "images": [], "tag": None}, Q, AB),
    ]),
    ("group", None, [
        ({"prompt": "q", "responses": ["a", "b"], key: value}, Q, expected)
        for key, value, expected in [("scores", [2, 1], AB), ("ranks", [2, 1], BA), ("ranking", [1, 0], BA)]
    ]),
    ("prompt, chosen, rejected", None, [
        (PAIR | {"prompt": "q"}, Q, AB), (PAIR | {"prompt": Q, "margin": 0}, Q, AB),
        (PAIR | {"prompt": "q", "chosen": turns("q", "a")}, Q, AB),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "unread", "rows"), SETS, ids=[name for name, *_ in SETS])
def test_public_sets(name, unread, rows):
    assert len(rows) == 3
    for record, prompt, preferences, *responses in rows:
        before = json.dumps(record)
        found = parse_record(record)
        assert found.reader == name and found.prompt == prompt
        assert found.responses == (responses[0] if responses else [A, B])
        assert found.preferences == preferences
        assert (unread in found.unread) if unread else not found.unread
        assert json.dumps(record) == before


def test_the_data_summary_says_what_files_are_read_as(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    sources = []
    for number, (_, _, rows) in enumerate(SETS):
        file = tmp_path / f"set{number}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record, *_ in rows), encoding="utf-8")
        sources.append(Source(f"set{number}", str(file)))
    tables, summaries = load_tokenized(sources, ComparisonTokenizer(tokenizer))
    assert [len(table) for table in tables] == [3] * len(SETS)
    for (name, unread, _), source, summary in zip(SETS, sources, summaries, strict=True):
        assert str(summary).startswith(f"{source.name}: 3 records of {source.path} read as {name}")
        assert ("; columns not read: " in str(summary)) == bool(unread)
    assert str(summaries[1]).endswith("read as UltraFeedback, binarized; columns not read: prompt_id")
    shown = json.loads(summarize_table("train", tables[1], summaries[1:2]).to_json())["sources"]
    assert shown[0]["read_as"] == {"UltraFeedback, binarized": 3} and shown[0]["columns_not_read"] == {"prompt_id": 3}


def test_a_stated_strength_is_a_margin_or_a_soft_label():
    for record in (helpsteer_2(2), helpsteer_3(2)):
        found = parse_record(record)
        assert (found.preferences, found.margin) == (BA, 2.0)
        found = parse_record(record, Reading(strength="label"))
        assert (found.preferences, found.margin) == ([(1, 0, pytest.approx(5 / 6))], 0.0)
    with pytest.raises(InputError, match=r"strength of preference is 4\.0"):
        parse_record(helpsteer_2(4))


def test_one_of_several_ratings_decides():
    record = {"instruction": "q", "completions": [completion("a", "5", "1", 2.0), completion("b", "4", "N/A", 3.0)]}
    assert parse_record(record).preferences == BA  # 3 against 4
    for criterion, expected in [("honesty", AB), ("overall_score", BA)]:
        assert parse_record(record, Reading(criterion=criterion)).preferences == expected
    for criterion, message in [("helpfulness", "completion 1 has no rating 'helpfulness', found honesty"),
                               ("fun", "completion 0 has no rating 'fun', found honesty, helpfulness")]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            parse_record(record, Reading(criterion=criterion))
    assert parse_record(safe(0, 1), Reading(criterion="safer")).responses == [B, A]
    scored = candidates({"x": 1, "y": 2}, {"x": 2, "y": 1}, {"x": 3, "y": 1})
    assert parse_record(scored, Reading(criterion="x")).preferences == [(1, 0, 1.0), (2, 0, 1.0), (2, 1, 1.0)]
    for criterion, message in [(None, "scores x, y: expected a criterion"), ("z", "expected no criterion 'z'")]:
        with pytest.raises(InputError, match=message):
            parse_record(scored, Reading(criterion=criterion))
    with pytest.raises(InputError, match="criterion 'x' chooses among ratings, found prompt, chosen, rejected"):
        parse_record(PAIR | {"prompt": "q"}, Reading(criterion="x"))


def test_columns_are_named_by_keys():
    row = {"question": "q", "better": "a", "worse": "b", "persona": "s", "id": "7", "model": "m"}
    keys = {"prompt_key": "question", "chosen_key": "better", "rejected_key": "worse", "system_key": "persona"}
    found = parse_record(row, Reading(**keys))
    assert found.prompt == [{"role": "system", "content": "s"}, *Q] and found.responses == [A, B]
    assert (found.id, found.unread, found.reader) == ("7", ["model"], "columns named by keys")
    assert parse_record({"chosen": "a", "rejected": "b", "text": "q"}, Reading(prompt_key="text")).prompt == Q
    with pytest.raises(InputError, match=r"prompt_key names the column 'quest', found columns .*'question'"):
        parse_record(row, Reading(**keys | {"prompt_key": "quest"}))
    del keys["system_key"]
    with pytest.raises(InputError, match="nothing reads the text of column 'persona'"):
        parse_record(row, Reading(**keys))
    assert parse_record(row, Reading(**keys, ignore_columns=("persona",))).unread == ["persona", "model"]


def test_numbers_in_a_csv_file_are_texts():
    for record in (shp(1), webgpt(0.5), helpsteer_2(-3), arena_55k("tie"), safe(1, 0), unified(1, 2)):
        texts = {key: str(int(value) if isinstance(value, bool) else value) if isinstance(value, int | float) else value
                 for key, value in record.items()}  # fmt: skip
        found, expected = parse_record(texts), parse_record(record)
        assert (found.prompt, found.responses, found.preferences) == (
            expected.prompt, expected.responses, expected.preferences)  # fmt: skip
    with pytest.raises(InputError, match="column 'labels' is text 'A', expected a number"):
        parse_record(shp("A"))


@pytest.mark.parametrize("value", ["good morning", ["text"], {"a": {"b": "text"}}, b"\x89PNG", [{"bytes": b"x"}]])
@pytest.mark.parametrize("column", ["input", "context", "task", "document", "images"])
def test_a_text_that_nothing_reads_is_refused_by_name(column, value):
    record = PAIR | {"prompt": "q", column: value}
    with pytest.raises(InputError, match=f"nothing reads the text of column '{column}'.* ignore_columns"):
        parse_record(record)
    assert parse_record(record, Reading(ignore_columns=(column,))).unread == [column]


@pytest.mark.parametrize("value", [None, "", " \n", [], {}, [None, ""], 3, 2.5, True, {"a": False}])
def test_columns_without_text_are_harmless(value):
    assert parse_record(PAIR | {"prompt": "q", "input": value}).unread == []


ABOUT = [
    *("chosen_model", "model_a", "source", "prompt_id", "row_id", "category", "subset_source", "dataset_source", "url"),
    *("response_0_sha256", "additional_metadata", "models", "chosen-rating", "language", "score_a", "Model"),
]


@pytest.mark.parametrize("column", ABOUT)
def test_columns_about_a_record_are_left_out_and_listed(column):
    assert parse_record(PAIR | {"prompt": "q", column: "text"}).unread == [column]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "q", "response": "a", "helpfulness": 4, "verbosity": 2}, "one rated response a record"),
        ({"prompt": "q", "completion": "a", "label": True}, "'completion' and 'label' are one labeled response"),
        (shp(2), "'labels' is float 2.0"),
        (arena("both"), "'winner' is text 'both'"),
        (arena_55k("nobody"), "the winner is nobody"),
        (arena_55k("model_a", (None, "b")), "'response_a' is text .*all of them texts"),
        (arena_55k("model_a") | {"prompt": "plain"}, "'prompt' is text 'plain', expected a JSON list"),
        (arena_55k("model_a") | {"prompt": '["q"]'}, "1 turns of the user, but 2 answers"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b\n\nHuman: more"},
         "response 1 ends with a user turn"),
        ({"instruction": "q", "completions": [{"response": "a"}, {"response": "b"}]}, "completion 0 has no ratings"),
        ({"instruction": "q", "completions": ["a", "b"]}, "'completions' has text 'a', expected objects with response"),
        (PAIR | {"prompt_id": "1", "messages": turns("other", "text"), "chosen": turns("q", "a"),
                 "rejected": turns("q", "b")}, "column 'messages'"),
        (PAIR | {"instruction": "q", "history": ["x"]}, "'history' is a list"),
    ],
)  # fmt: skip
def test_what_a_reader_cannot_read_is_refused(record, message):
    with pytest.raises(InputError, match=message):
        parse_record(record)


JUNK = [None, "", 3, "x", [], {}, [1], ["a"], {"a": 1}, True, float("nan"), [[]], [{}], {"role": "user"}, 10**400, b"x"]


def places(value, path=()):
    """Every place in nested lists and objects."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@pytest.mark.parametrize("rows", [rows for *_, rows in SETS], ids=[name for name, *_ in SETS])
def test_whatever_stands_in_a_record_it_is_read_or_refused(rows):
    for record, *_ in rows:
        for *path, last in filter(None, places(record)):
            for junk in JUNK:
                changed = copy.deepcopy(record)
                inner = functools.reduce(lambda value, key: value[key], path, changed)
                inner[last] = junk
                with contextlib.suppress(InputError):
                    parse_record(changed)


def test_the_reader_takes_nothing_from_the_record_it_was_given():
    record = {"chosen": turns("q", "a"), "rejected": turns("q", "b"), "source": "x"}
    assert canonical_record(record, Reading())[0] == "conversations" and list(record) == [
        "chosen",
        "rejected",
        "source",
    ]
