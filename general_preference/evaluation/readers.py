"""A row of each evaluation set -> a `Record`. Every column is read, known to describe the row, or refused by name."""

from dataclasses import dataclass, field

from general_preference.datasets.known_sets import DESCRIBES
from general_preference.datasets.messages import Message, parse_prompt
from general_preference.datasets.reading import described, holds_text
from general_preference.errors import InputError
from general_preference.evaluation.aggregates import (
    CORRECTNESS,
    DOMAINS,
    INSTRUCTION_TYPES,
    JUDGEBENCH_SOURCES,
    LANGUAGE_MARK,
    RMB_SECTIONS,
)
from general_preference.evaluation.records import Record
from general_preference.evaluation.rewardbench.scoring import ROWS_1
from general_preference.evaluation.rules import ALL, GRAPH, PAIRS, SECOND, STYLES

ALL_ROWS = "all"  # the subset of sets that have none
TIES = ("tie", "tie (bothbad)", "both_bad")


@dataclass
class Row:
    """The columns of a row, and which of them were `read`; `part` is the file or configuration it stands in."""

    set: str
    part: str
    columns: dict
    read: set[str] = field(default_factory=set)

    def take(self, name: str, kind: type, expected: str):
        """A column's value, which must be a `kind`."""
        if name not in self.columns:
            raise InputError(f"no column {name!r}, found {', '.join(map(str, self.columns)) or 'none'}")
        self.read.add(name)
        value = self.columns[name]
        if not isinstance(value, kind):
            raise InputError(f"column {name!r} is {described(value)}, expected {expected}")
        return value

    def text(self, name: str) -> str:
        """A column that is a text."""
        return self.take(name, str, "text")

    def texts(self, name: str, count: int) -> list[str]:
        """A column that is a list of `count` texts."""
        values = self.take(name, list, f"a list of {count} texts")
        if len(values) != count or not all(isinstance(value, str) for value in values):
            raise InputError(f"column {name!r} is {described(values)}, expected a list of {count} texts")
        return values

    def name(self, column: str) -> str:
        """A column that is an id, a number or a text."""
        return str(self.take(column, str | int, "an id"))

    def known(self, value: str, column: str, names) -> str:
        """`value`, if it is one of `names`."""
        if value not in names:
            raise InputError(f"column {column!r} is {value!r}, expected one of {', '.join(names)}")
        return value

    def record(self, name: str, subset: str, prompt, responses: list[str], pairs, rule: str, language="") -> Record:
        """The record, once every column is accounted for."""
        rest = {name: value for name, value in self.columns.items() if name not in self.read}
        if unread := [c for c, value in rest.items() if holds_text(value) and not DESCRIBES.fullmatch(c)]:
            cure = "name it in ignore_columns if no response or prompt is lost by it"
            raise InputError(f"nothing reads the text of column {unread[0]!r}: {cure}")
        messages = _bare(parse_prompt(prompt))
        answers = [[{"role": "assistant", "content": text}] for text in responses]
        try:
            "".join([name, language, *(message["content"] for message in messages), *responses]).encode()
        except UnicodeEncodeError as error:
            raise InputError("it is not valid Unicode (half of a surrogate pair)") from error
        return Record(name, self.set, subset, language, messages, answers, pairs, rule)


def _bare(prompt: list[Message]) -> list[Message]:
    """Messages of role and content; RMB's `language` describes them, anything else would be lost."""
    for message in prompt:
        if more := message.keys() - {"role", "content", "language"}:
            raise InputError(f"nothing reads the field {min(more)!r} of a message")
    if prompt[-1]["role"] == "assistant":
        raise InputError("the prompt ends with the assistant's turn, expected the user's")
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


def _are_indices(pair: object, count: int) -> bool:
    """Whether these are two different indices below `count`; true and false are none."""
    two = isinstance(pair, list | tuple) and len(pair) == 2 and pair[0] != pair[1]
    return two and all(type(index) is int and 0 <= index < count for index in pair)


def read_ppe_preference(row: Row) -> Record | None:
    """A vote between two responses; None for a tie, which is left out."""
    winner = row.text("winner")
    row.known(winner, "winner", ("model_a", "model_b", *TIES))
    responses = [row.text("response_1"), row.text("response_2")]
    name, prompt, language = row.name("question_id"), row.text("prompt"), row.text("language")
    row.read.add("conv_metadata")  # counts of turns and tokens, an object
    pairs = [(0, 1)] if winner == "model_a" else [(1, 0)]
    record = row.record(name, ALL_ROWS, prompt, responses, pairs, PAIRS, language)
    return None if winner in TIES else record


def read_ppe_correctness(row: Row) -> Record | None:
    """Responses to one question, right or wrong by `scores`, and which pairs of them count; None where none does."""
    count = sum(name.startswith("response_") for name in row.columns)
    responses = [row.text(f"response_{number}") for number in range(1, count + 1)]
    scores = row.take("scores", list, "a list of numbers")
    if len(scores) != count or not all(isinstance(score, bool | int | float) for score in scores):
        raise InputError(f"column 'scores' is {described(scores)}, expected a number for each of {count} responses")
    pairs = []
    for pair in row.take("sampled_conflict_pairs", list, "a list of pairs of responses"):
        if not _are_indices(pair, count):
            raise InputError(f"a conflict pair is {described(pair)}, expected two indices below {count}")
        one, other = pair
        if not (scores[one] > scores[other] or scores[one] < scores[other]):  # NaN is neither
            both = f"{scores[one]} and {scores[other]}"
            raise InputError(f"the conflict pair {pair} has scores {both}, which say of neither that it is better")
        pairs.append((one, other) if scores[one] > scores[other] else (other, one))
    name = f"{row.part}:{row.name('question_id')}:{row.text('model_name')}"
    subset = row.known(row.part, "repository", CORRECTNESS)
    record = row.record(name, subset, row.text("prompt"), responses, pairs, PAIRS)
    return record if pairs else None


def read_rmb(row: Row) -> Record:
    """A pair, or the best of several and those it must all beat; the first two parts of `category_path` say which."""
    section = row.known("/".join(row.text("category_path").split("/")[:2]), "category_path", RMB_SECTIONS)
    pairwise = section.startswith("Pairwise")
    best, others = ("chosen", "reject") if pairwise else ("bon_best", "loser_list")
    losers = row.take(others, dict if pairwise else list, "an object" if pairwise else "a list of objects")
    answers = [row.take(best, dict, "an object"), *([losers] if pairwise else losers)]
    if len(answers) < 2 or not all(isinstance(one, dict) and isinstance(one.get("answer"), str) for one in answers):
        raise InputError(f"{best!r} and {others!r} hold no two objects with a text 'answer'")
    prompt = row.take("conversation_input", list, "a list of messages")
    name = f"{section}:{row.name('pair_uid' if pairwise else 'bon_uid')}"
    languages = {message.get("language", "") for message in prompt if isinstance(message, dict)}
    pairs = [(0, index) for index in range(1, len(answers))]
    language = min(languages) if len(languages) == 1 else ""
    texts = [answer["answer"] for answer in answers]
    return row.record(name, section, prompt, texts, pairs, PAIRS if pairwise else ALL, language)


def read_rm_bench(row: Row) -> Record:
    """Three right and three wrong responses by style; both parts of safety are one domain."""
    responses = row.texts("chosen", 3) + row.texts("rejected", 3)
    domain = row.text("domain")
    subset = row.known(domain.partition("-")[0], "domain", DOMAINS)
    pairs = [(right, 3 + wrong) for right in range(3) for wrong in range(3)]
    return row.record(f"{domain}:{row.name('id')}", subset, row.text("prompt"), responses, pairs, STYLES)


def read_judgebench(row: Row) -> Record:
    """Two responses in the order in which they are judged."""
    source = row.text("source")
    subset = next((name for name in JUDGEBENCH_SOURCES if source.startswith(name)), source)
    row.known(subset, "source", JUDGEBENCH_SOURCES)
    label = row.known(row.text("label"), "label", ("A>B", "B>A"))
    responses = [row.text("response_A"), row.text("response_B")]
    pairs = [(0, 1)] if label == "A>B" else [(1, 0)]
    return row.record(row.name("pair_id"), subset, row.text("question"), responses, pairs, SECOND)


def read_m_rewardbench(row: Row) -> Record:
    """A pair of RewardBench in one language; `source` is RewardBench's subset."""
    subset = row.known(row.text("source"), "source", ROWS_1)
    responses = [row.text("chosen"), row.text("rejected")]
    name = f"{row.part}:{row.name('id')}"
    group = f"{row.part}{LANGUAGE_MARK}{subset}"
    return row.record(name, group, row.text("prompt"), responses, [(0, 1)], PAIRS, row.part)


def read_if_rewardbench(row: Row) -> Record:
    """Up to eight responses and the edges of a partial order between them."""
    for judged in ("checklist", "constraint_type"):  # what the responses were judged by: no part of the prompt
        row.take(judged, list, "a list")
    responses = [one.get("response") if isinstance(one, dict) else one for one in row.take("responses", list, "a list")]
    if not all(isinstance(text, str) for text in responses):
        raise InputError(f"'responses' is {described(responses)}, expected objects with a text 'response'")
    pairs = []
    for edge in row.take("preference_graph", list, "a list of edges"):
        try:
            pair = (edge["chosen"]["response_id"], edge["rejected"]["response_id"])
        except (TypeError, KeyError) as error:
            message = "expected {'chosen': {'response_id'}, 'rejected': {'response_id'}}"
            raise InputError(f"an edge is {described(edge)}, {message}") from error
        if not _are_indices(pair, len(responses)):
            raise InputError(f"an edge joins responses {pair}, expected two indices below {len(responses)}")
        pairs.append(pair)
    if not pairs:
        raise InputError("'preference_graph' has no edge")
    kind = row.known(row.text("instruction_type"), "instruction_type", INSTRUCTION_TYPES)
    return row.record(row.name("id"), kind, row.take("messages", list, "messages"), responses, pairs, GRAPH)
