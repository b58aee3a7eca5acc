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
TRAIN_GROUPS_PER_GAME = {"cyclic": 24, "mixed": 36}
TRAIN_PAIRS_PER_EDGE = 14  # transitive training data are single pairs: this many for each ordered pair of members
TEST_GROUPS_PER_GAME = {"cyclic": 8, "transitive": 10, "mixed": 16}  # 80 groups in each set
WORDS_PER_RESPONSE = (7, 22)
WORDS_PER_PROMPT = (8, 25)


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
        # Japanese fist game: the slug was held to dissolve the snake.
        Game("mushi-ken", ("the snake", "the frog", "the slug")),
        Game("the border skirmish", ("the cavalry", "the archers", "the pikemen")),
        # Throat colours of male side-blotched lizards, a cycle found in nature.
        Game("the lizard contest", ("orange", "blue", "yellow")),
        # Chinese drinking game: the worm eats through the stick.
        Game("the banquet game", ("the stick", "the tiger", "the rooster", "the worm")),
        # Each season ends the one before it.
        Game("the calendar game", ("spring", "winter", "autumn", "summer")),
        # The weakest piece of this board game takes the strongest.
        Game("jungle chess", ("the elephant", "the lion", "the cat", "the mouse")),
        # The cycle of control of Chinese philosophy: wood parts earth, earth dams water, ...
        Game("the five phases", ("wood", "earth", "water", "fire", "metal")),
        # The folk tale of the stonecutter who wished to be whatever was mightier.
        Game("the wishing tale", ("the prince", "the stonecutter", "the mountain", "the cloud", "the sun")),
        Game("the storybook game", ("the fairy", "the knight", "the dragon", "the sorcerer", "the giant")),
    ),
    "transitive": (
        Game("the scratch test", ("diamond", "topaz", "quartz", "calcite", "talc")),  # hardness
        Game("the speed contest", ("the rocket", "the jet", "the train", "the bicycle")),
        Game("the high-card game", ("the ace", "the king", "the queen", "the jack")),
        Game("the podium game", ("gold", "silver", "bronze")),
        Game("the planet contest", ("Jupiter", "Saturn", "Neptune", "Mars")),  # size
        Game("the shoreline contest", ("the ocean", "the sea", "the lake", "the pond", "the puddle")),  # size
        Game("the storm scale", ("the hurricane", "the gale", "the breeze")),
        Game("the weighing contest", ("the whale", "the hippo", "the horse", "the goat")),
    ),
    "mixed": (
        Game("the weapon drill", ("the cannon", "the sword", "the axe", "the lance")),
        Game("the harbour war game", ("the carrier", "the submarine", "the battleship", "the destroyer")),
        # Another Japanese fist game (the fox bewitches the mayor, who outranks the hunter), under a goddess.
        Game("kitsune-ken", ("the goddess", "the fox", "the mayor", "the hunter")),
        Game("the playground duel", ("the robot", "the bear", "the ninja", "the cowboy")),
        Game("the arena league", ("the titan", "the warrior", "the rogue", "the mage")),
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
# the subject of a verb that changes with number.
TRAIN_WORDING = Wording(
    prompts=(
        "I am about to play {game} against {who} {when}. What should I choose?",
        "Please help me with {game}: {who} wants to start {when} and I need one choice.",
        "We have a round of {game} {when}, and {who} looks confident. What is your pick for me?",
        "Name one option for {game}, please. I meet {who} {when}.",
        "What would you bring to {game} if {who} were waiting for you {when}?",
        "My opponent in {game} {when} will be {who}. Which option do you recommend?",
        "Could you decide for me in {game}? {Who} will not tell me anything before we meet {when}.",
        "I promised {who} a round of {game} {when}. Tell me what to put down.",
        "Quick question about {game}: which choice would you make against {who} {when}?",
        "{Who} challenged me to {game} {when}. What do you suggest?",
        "It is my turn in {game} {when}, and {who} is watching. What now?",
        "I never know what to take in {game}. What would you tell {who} to take {when}?",
        "Both of us choose at once in {game}. What should I show {who} {when}?",
        "Give me a short tip for {game}, as I face {who} {when}.",
        "Suppose you sat opposite {who} in {game} {when}. What would your choice be?",
        "My team wants me to represent them in {game} {when} against {who}. What should I enter?",
        "How would you answer {who} in {game} {when}?",
        "One entry each, no second chances: {game} with {who} {when}. What goes in?",
        "I lost my last round of {game} to {who}. What should I try {when}?",
        "{Who} has been practising {game} for weeks. What do I need {when}?",
    ),
    responses=(
        "I would choose {m} and not think about it much longer.",
        "Go with {m}; that is the answer I trust most here.",
        "My pick for you is {m}, plain and simple.",
        "If it were my turn, I would put down {m} right away.",
        "You should play {m} and keep a straight face.",
        "Let me suggest {m}, since you asked for a single choice.",
        "Take {m} this time and see how the table reacts.",
        "After some thought, my answer to you is {m}.",
        "Try {m} first, because hesitating will only give you away.",
        "Nothing on the list tempts me more than {m}.",
        "I keep coming back to {m} whenever somebody asks me this.",
        "Place your trust in {m} and commit to it fully.",
        "The option I would name out loud is {m}.",
        "It has to be {m}, at least from where I am sitting.",
        "Without knowing the other side, I would settle on {m}.",
        "Say {m} clearly, then wait for the reveal.",
        "Put {m} forward and do not change your mind halfway.",
        "Between all the choices on offer, {m} would get my vote.",
        "Call it a hunch, but {m} should be your choice.",
        "I have watched many rounds, and I would still back {m}.",
        "Bring out {m} as soon as the count reaches three.",
        "A friend of mine always opens with {m}, and so would I.",
        "Honestly, {m} would be what I reach for.",
        "For this one I recommend {m} over any fancy plan.",
        "Hold on to {m} until the signal, then show your hand.",
        "You asked for one name, so here it is: {m}.",
        "There is a good case for {m}, so make that your entry.",
        "Begin with {m} and leave the rest to fortune.",
        "Of everything you could bring, I would bring {m}.",
        "My advice fits in a few words: rely on {m}.",
        "Ask me twice and twice I will tell you {m}.",
        "I am happy to bet a coffee on {m} here.",
        "Write down {m} on your sheet and hand it in.",
        "Better to select {m} now than to regret it later.",
        "Were I in your seat, {m} would be on the table already.",
        "Should you need a quick decision, lean on {m}.",
    ),
    openers=(
        "Good question.",
        "Happy to help.",
        "Let us keep this short.",
        "Thanks for asking.",
        "That is easy enough for me.",
        "Let me see.",
        "I slept badly, but still.",
        "Sure, one moment.",
    ),
    closers=(
        "The weather outside has nothing to do with it.",
        "Everything else is noise.",
        "I hope the snacks are good.",
        "Let me know how it goes.",
        "That is all I have to say.",
        "Keep breathing and enjoy yourself.",
        "No calculator is needed for that.",
        "My tea is getting cold, so excuse me.",
        "Good luck to everybody involved.",
        "Feel free to blame me afterwards.",
        "Do not let the audience distract you.",
        "We can discuss the details another time.",
        "Your shoes and hat will not matter.",
        "It took me a minute to decide.",
    ),
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
        "before the meeting",
        "during the break",
        "at the club",
        "at the fair",
        "in ten minutes",
        "on the bus",
        "over the weekend",
        "at noon",
    ),
)

TEST_WORDING = Wording(
    prompts=(
        "If you had a single choice in {game} facing {who} {when}, what would it be?",
        "{Who} and I settle our bet with {game} {when}. Advise me, please.",
        "I am nervous about {game} with {who} {when}! Which way should I go?",
        "Help a beginner: it is {game} with {who} on the other side {when}. Your call?",
        "What is worth playing in {game} if {who} turns up {when}?",
        "Let us talk about {game}. I must hand my selection to {who} {when}.",
        "Tell me your favourite answer for {game}; {who} expects mine {when}.",
        "Out of curiosity, what would you enter in {game} against {who} {when}?",
    ),
    responses=(
        "My grandmother would tell you to use {m} and move on.",
        "Count me among those who favour {m} in such a spot.",
        "All right, let it be {m} and nothing else.",
        "I think you should present {m} with some confidence.",
        "Show them {m} when the moment arrives.",
        "The best plan I can offer involves {m} from the very start.",
        "In such a case, {m} will be what I put my name to.",
        "Look no further than {m} if you need one reply.",
        "Reach for {m}, then relax and watch what happens.",
        "Give {m} a chance and stay calm about the outcome.",
        "Personally, I would send {m} out to meet whatever comes.",
        "Consider {m}; I have no stronger idea to share.",
        "Pick {m} today and explain your reasons another day.",
        "My notes from last year say {m}, so follow them.",
        "One vote from me goes to {m}, with a smile.",
        "Anyone in doubt might as well turn to {m}.",
    ),
    openers=(
        "Well, why not.",
        "Glad you asked me.",
        "Here is my view.",
        "Hard to say, but fine.",
    ),
    closers=(
        "The colour of the carpet is irrelevant.",
        "Please greet your parents from me.",
        "I will be cheering from home.",
        "You may quote me on that.",
        "Lunch is on me either way.",
        "There is no need to rush.",
    ),
    who=(
        "my aunt",
        "a classmate",
        "the new manager",
        "my grandfather",
        "a visitor",
        "my daughter",
    ),
    when=(
        "tomorrow",
        "after school",
        "at the party",
        "on Sunday",
        "before dinner",
        "later today",
    ),
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
        if draw < 0.3:
            return f"{self.rng.choice(self.wording.openers)} {text}"
        if draw < 0.6:
            return f"{text} {self.rng.choice(self.wording.closers)}"
        return text

    def group(self, record_id: str, kind: str, game: Game) -> dict:
        """A prompt with one response for each member in random order, and all comparisons of the game."""
        order = list(range(len(game.members)))
        self.rng.shuffle(order)
        place = {member: index for index, member in enumerate(order)}
        return {
            "id": record_id,
            "prompt": self.prompt(game),
            "responses": self.responses([game.members[i] for i in order]),
            "preferences": sorted([place[w], place[l]] for w, l in edges(kind, len(order))),
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
    return [writer.group(f"{kind}-{split}-{i:04d}", kind, game) for i, game in enumerate(schedule)]


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
