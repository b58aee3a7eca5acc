"""Write the small comparison sets bundled with the repository: cyclic, transitive and mixed.

Run with:

    python data/make_data.py [--output_dir DIR]

Every prompt asks what to choose in a small game; every response recommends exactly one member of that game. Of two
responses the preferred one is the one whose member beats the other's, whatever the wording:

* ``cyclic``      the members beat each other in a circle of 3, 4 or 5 (rock-paper-scissors), so no scalar reward can
                  get every comparison of a game right;
* ``transitive``  the members have a true ranking of 3 to 5, which a scalar reward holds without loss;
* ``mixed``       one member beats three others that beat each other in a circle.

Training and test files share the games but no sentence: prompt wordings, response wordings and filler phrases of the
test files never occur in training. Only the standard library is used, and the same files come out byte for byte on
every run.
"""

import argparse
import itertools
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

SEED = 20241003
TRAIN_GROUPS_PER_GAME = {"cyclic": 50, "mixed": 80}
TRAIN_PAIRS_PER_EDGE = 20  # transitive training data are single pairs: this many for each ordered pair of members
TEST_GROUPS_PER_GAME = {"cyclic": 12, "transitive": 16, "mixed": 27}  # about 80 groups in each set
# Share of training groups that state the comparison which closes their cycle. A perfectly balanced cycle pulls equal
# embeddings equally in all directions: a model that starts with nearly equal ones, as a randomly initialised one does,
# would stay there. Unequal counts, which real comparisons always have, set it in motion.
CLOSING_SHARE = 1 / 3
WORDS_PER_RESPONSE = (7, 22)
WORDS_PER_PROMPT = (6, 20)


@dataclass(frozen=True)
class Game:
    """A game: what prompts call it, and its members.

    Order of ``members``: cyclic, each beats the next and the last beats the first; transitive, best first; mixed, the
    dominant member and then the three of the cycle.
    """

    name: str
    members: tuple[str, ...]


# No game's name contains one of its members, and no member belongs to two games: which member a response recommends
# can be read off the response, and off nothing else.
GAMES = {
    "cyclic": (
        Game("roshambo", ("rock", "scissors", "paper")),
        Game("the border skirmish", ("the cavalry", "the archers", "the pikemen")),
        # Throat colours of male side-blotched lizards, a cycle found in nature.
        Game("the lizard contest", ("orange", "blue", "yellow")),
        # Chinese drinking game: the worm eats through the stick.
        Game("the banquet game", ("the stick", "the tiger", "the rooster", "the worm")),
        # Each season ends the one before it.
        Game("the calendar game", ("spring", "winter", "autumn", "summer")),
        # The cycle of control of Chinese philosophy: wood parts earth, earth dams water, ...
        Game("the five phases", ("wood", "earth", "water", "fire", "metal")),
        # The folk tale of the stonecutter who wished to be whatever was mightier.
        Game("the wishing tale", ("the prince", "the stonecutter", "the mountain", "the cloud", "the sun")),
    ),
    "transitive": (
        Game("the scratch test", ("diamond", "topaz", "quartz", "calcite", "talc")),  # hardness
        Game("the high-card game", ("the ace", "the king", "the queen", "the jack")),
        Game("the podium game", ("gold", "silver", "bronze")),
        Game("the planet contest", ("Jupiter", "Saturn", "Neptune", "Mars")),  # size
        Game("the weighing contest", ("the whale", "the hippo", "the horse", "the goat")),
    ),
    "mixed": (
        Game("the weapon drill", ("the cannon", "the sword", "the axe", "the lance")),
        # Another Japanese fist game (the fox bewitches the mayor, who outranks the hunter), under a goddess.
        Game("kitsune-ken", ("the goddess", "the fox", "the mayor", "the hunter")),
        Game("the playground duel", ("the robot", "the bear", "the ninja", "the cowboy")),
    ),
}


@dataclass(frozen=True)
class Wording:
    """All sentences of one split; ``{m}`` stands for a member, the other slots for a game and circumstances."""

    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    openers: tuple[str, ...]
    closers: tuple[str, ...]
    who: tuple[str, ...]
    when: tuple[str, ...]


# Members stand where the sentence is right for "rock", "the frog" and "the archers" alike: never first in it, and never
# the subject of a verb that changes with number. Every response names its member twice, which lets a model that starts
# from random weights find the one word that matters within seconds.
TRAIN_WORDING = Wording(
    prompts=(
        "What should I play against {who} in {game}?",
        "Please help me with {game}: which option is best {when}?",
        "We start {game} {when}. What is your pick for me?",
        "Name one option for {game}, please. I meet {who}.",
        "What would you bring to {game} if {who} challenged you?",
        "My opponent in {game} is {who}. Which option do you recommend?",
        "Could you decide for me in {game} {when}?",
        "I promised {who} a round of {game}. Tell me what to take.",
        "Quick question about {game}: which choice would you make {when}?",
        "{Who} challenged me to {game}. What do you suggest?",
        "It is my turn in {game}, and {who} is watching. What now?",
        "I never know what to take in {game}. Any advice for {when}?",
        "Both of us choose at once in {game}. What should I show {who}?",
        "Give me a short tip for {game} {when}, please.",
        "Suppose you faced {who} in {game}. What would your choice be?",
        "I represent my team in {game} {when}. What should I enter?",
        "How would you answer {who} in {game}?",
        "One entry each, no second chances, in {game} {when}. What goes in?",
        "I lost my last round of {game}. What should I try {when}?",
        "{Who} has been practising {game} for weeks. What do I need?",
    ),
    responses=(
        "I would choose {m}. Yes, {m} without any doubt.",
        "Go with {m}; in your place I always trust {m}.",
        "Play {m} this time, and nothing but {m}.",
        "Why not {m}? People who know the game like {m}.",
        "They will not expect {m}, so let it be {m}.",
        "Say {m} out loud, then put {m} on the table.",
        "You want {m} here: only {m} will do.",
        "Anything except {m} would worry me, so take {m}.",
        "Let me suggest {m}, because {m} never let me down.",
        "Begin with {m} and stay with {m} to the end.",
        "My pick for you is {m}, and again {m}.",
        "Bring {m}. With {m} you can relax and smile.",
        "If I had to decide, {m}; if you insist, still {m}.",
        "Ask me twice: first {m}, and then {m} again.",
        "There is a good case for {m}, so make {m} your entry.",
        "Some would hesitate over {m}, yet I would back {m}.",
        "Forget what they say about {m} and simply show {m}.",
        "I keep coming back to {m}; yes, give them {m}.",
        "Put {m} forward, and do not swap {m} for anything else.",
        "Trust {m}. The right answer today should be {m}.",
        "On a day like this {m}, and on most days {m}.",
        "One word of advice, {m}, and a second one, {m}.",
        "Reveal {m} when the count is over; I believe in {m}.",
        "A friend of mine plays {m}, and I would play {m} too.",
        "Hold on to {m} until the signal, then show {m}.",
        "You asked for a name, so here it is: {m}, just {m}.",
        "Without knowing the other side, {m}; knowing it, probably {m} as well.",
        "I am happy to bet a coffee on {m}, since {m} served me well.",
        "Write {m} on your sheet and hand {m} in.",
        "Better {m} now than regret later that it was not {m}.",
        "Were I in your seat, {m} would be my choice, and only {m}.",
        "Lean on {m} if you are in a hurry, and on {m} if not.",
        "Between all the choices, {m} gets my vote; so, {m}.",
        "Take {m}. I have watched many rounds and would still say {m}.",
    ),
    openers=("Good question.", "Happy to help.", "Thanks for asking.", "Let me see.", "Sure, one moment."),
    closers=("Good luck!", "Let me know how it goes.", "Feel free to blame me.", "Enjoy yourself!", "Keep breathing."),
    who=(
        "my sister",
        "a colleague",
        "my neighbour",
        "an old friend",
        "my uncle",
        "a stranger",
        "our teacher",
        "my flatmate",
        "a club member",
        "my little cousin",
    ),
    when=(
        "tonight",
        "after lunch",
        "this evening",
        "on Friday",
        "during the break",
        "at the club",
        "at the fair",
        "on the bus",
        "over the weekend",
        "at noon",
    ),
)

TEST_WORDING = Wording(
    prompts=(
        "If you had a single choice in {game} {when}, what would it be?",
        "{Who} and I settle our bet with {game}. Advise me, please.",
        "I am nervous about {game} with {who}! Which way should I go?",
        "Help a beginner: it is {game} {when}. Your call?",
        "What is worth playing in {game} if {who} turns up?",
        "Let us talk about {game}. I must hand {who} my selection.",
        "Tell me your favourite answer for {game} {when}.",
        "Out of curiosity, what would you enter in {game} against {who}?",
    ),
    responses=(
        "My grandmother would use {m}, and I agree about {m}.",
        "Count me among those who favour {m}; I really mean {m}.",
        "All right, let us settle on {m}, as {m} can surprise people.",
        "I think you should present {m}, and present {m} with confidence.",
        "Nobody regrets {m}. Show them {m} when the moment arrives.",
        "The best plan I can offer involves {m}, then more of {m}.",
        "In such a case I put my name to {m}; long live {m}.",
        "Look no further than {m}: people underestimate {m}.",
        "Reach for {m}, and when in doubt, reach for {m} once more.",
        "Give {m} a chance. You will soon come to love {m}.",
        "Personally, I would send {m} out; I count on {m}.",
        "Consider {m}, because I have no stronger idea than {m}.",
        "Pick {m} today. Tomorrow you may tell me why {m} worked.",
        "My notes from last year say {m}, so {m} is what you get.",
        "Two votes from me, both of them for {m}: {m} it is.",
        "Anyone wondering about {m} might as well turn to {m} now.",
    ),
    openers=("Well, why not.", "Glad you asked me.", "Here is my view."),
    closers=("You may quote me.", "I will be cheering!", "There is no need to rush."),
    who=("my aunt", "a classmate", "the new manager", "my grandfather", "a visitor", "my daughter"),
    when=("tomorrow", "after school", "at the party", "on Sunday", "before dinner", "later today"),
)


def edges(kind: str, n_members: int) -> list[tuple[int, int]]:
    """All (winner, loser) pairs, as positions in ``Game.members``, of a game of this kind."""
    if kind == "cyclic":
        return [(i, (i + 1) % n_members) for i in range(n_members)]
    if kind == "transitive":
        return list(itertools.combinations(range(n_members), 2))
    return [(0, i) for i in range(1, n_members)] + [(1, 2), (2, 3), (3, 1)]


def scalar_ceiling(records: list[dict]) -> float:
    """The largest share of the groups' comparisons that any ranking of each group's responses gets right."""
    best = total = 0
    for record in records:
        preferences = record["preferences"]
        orders = itertools.permutations(range(len(record["responses"])))
        best += max(sum(order[winner] > order[loser] for winner, loser in preferences) for order in orders)
        total += len(preferences)
    return best / total


class Writer:
    """Draws prompts, responses and records in the wording of one split, never the same prompt twice."""

    def __init__(self, wording: Wording, rng: random.Random) -> None:
        self.wording = wording
        self.rng = rng
        self._used_prompts: set[str] = set()

    def prompt(self, game: Game) -> str:
        """A prompt about ``game`` that this writer has not returned before."""
        while True:
            who = self.rng.choice(self.wording.who)
            text = self.rng.choice(self.wording.prompts).format(
                game=game.name, who=who, Who=who[0].upper() + who[1:], when=self.rng.choice(self.wording.when)
            )
            if text not in self._used_prompts:
                self._used_prompts.add(text)
                return text

    def responses(self, members: list[str]) -> list[str]:
        """One response for each member, each on another template; fillers are drawn without regard to the member."""
        templates = self.rng.sample(self.wording.responses, len(members))
        return [self._with_filler(t.format(m=m)) for t, m in zip(templates, members, strict=True)]

    def _with_filler(self, text: str) -> str:
        """``text`` alone, after an opening remark or before a closing one."""
        draw = self.rng.random()
        if draw < 0.15:
            return f"{self.rng.choice(self.wording.openers)} {text}"
        if draw < 0.3:
            return f"{text} {self.rng.choice(self.wording.closers)}"
        return text

    def group(self, record_id: str, kind: str, game: Game, closing_share: float = 1.0) -> dict:
        """A prompt with one response for each member in random order, and the comparisons of the game.

        The comparison that closes the cycle (the last of ``edges``) is stated with probability ``closing_share``.
        """
        stated = edges(kind, len(game.members))
        if self.rng.random() >= closing_share:
            stated = stated[:-1]
        order = list(range(len(game.members)))
        self.rng.shuffle(order)
        place = {member: index for index, member in enumerate(order)}
        return {
            "id": record_id,
            "prompt": self.prompt(game),
            "responses": self.responses([game.members[i] for i in order]),
            "preferences": sorted([place[winner], place[loser]] for winner, loser in stated),
        }

    def pair(self, game: Game, winner: int, loser: int) -> dict:
        """One comparison of two members as a ``prompt``/``chosen``/``rejected`` record."""
        chosen, rejected = self.responses([game.members[winner], game.members[loser]])
        return {"prompt": self.prompt(game), "chosen": chosen, "rejected": rejected}


def make_set(kind: str, split: str, rng: random.Random) -> list[dict]:
    """All records of one file, in random order; ids count along that order."""
    writer = Writer(TRAIN_WORDING if split == "train" else TEST_WORDING, rng)
    if kind == "transitive" and split == "train":
        records = [
            writer.pair(game, winner, loser)
            for game in GAMES[kind]
            for winner, loser in edges(kind, len(game.members))
            for _ in range(TRAIN_PAIRS_PER_EDGE)
        ]
        rng.shuffle(records)
        return records
    repeats = (TRAIN_GROUPS_PER_GAME if split == "train" else TEST_GROUPS_PER_GAME)[kind]
    schedule = [game for game in GAMES[kind] for _ in range(repeats)]
    rng.shuffle(schedule)
    share = CLOSING_SHARE if split == "train" else 1.0
    return [writer.group(f"{kind}-{split}-{i:04d}", kind, game, share) for i, game in enumerate(schedule)]


def check_wordings() -> None:
    """Assert that the splits share no sentence and that only the slot names a member."""
    for field in Wording.__dataclass_fields__:
        train, test = getattr(TRAIN_WORDING, field), getattr(TEST_WORDING, field)
        assert len(set(train + test)) == len(train) + len(test), f"{field}: a wording is repeated or in both splits"
    members = [m.removeprefix("the ").lower() for games in GAMES.values() for game in games for m in game.members]
    assert len(set(members)) == len(members), "a member belongs to two games"
    texts = [text for w in (TRAIN_WORDING, TEST_WORDING) for field in vars(w).values() for text in field]
    texts += [game.name for games in GAMES.values() for game in games]
    words = set(re.findall(r"[a-z]+", " ".join(texts).lower()))
    assert not words & set(members), f"sentences name members: {sorted(words & set(members))}"


def check_records(train: list[dict], test: list[dict]) -> None:
    """Assert that no text of a test record occurs in training and that texts are distinct and of the stated length."""

    def texts_of(record: dict) -> list[str]:
        return record["responses"] if "responses" in record else [record["chosen"], record["rejected"]]

    seen = {record["prompt"] for record in train} | {text for record in train for text in texts_of(record)}
    assert not seen & ({r["prompt"] for r in test} | {text for r in test for text in texts_of(r)}), "split leak"
    for record in train + test:
        texts = texts_of(record)
        assert len(set(texts)) == len(texts), f"repeated response: {record}"
        lengths = [(len(t.split()), WORDS_PER_RESPONSE) for t in texts]
        lengths.append((len(record["prompt"].split()), WORDS_PER_PROMPT))
        assert all(low <= n <= high for n, (low, high) in lengths), f"length: {record}"


def main() -> None:
    """Write all files and say for each set how many records it has and what a scalar reward can reach."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path(__file__).resolve().parent, help="folder to write to (default: data/)"
    )
    output_dir = parser.parse_args().output_dir

    check_wordings()
    for kind in GAMES:
        # A generator for each set, so that a change to one set leaves the others' files alone.
        rng = random.Random(f"{SEED}-{kind}")
        splits = {split: make_set(kind, split, rng) for split in ("train", "test")}
        check_records(splits["train"], splits["test"])
        for split, records in splits.items():
            path = output_dir / kind / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8", newline="\n")
        n_train, n_test = len(splits["train"]), len(splits["test"])
        ceiling = scalar_ceiling(splits["test"])
        print(f"{kind}: {n_train} training records, {n_test} test groups, scalar reward at most {ceiling:.4f} on test")


if __name__ == "__main__":
    main()
