"""An invented world as text: facts to remember, small instruction tasks, and the demo's new task.

Everything is drawn from seeded `random.Random` objects, so the same seed gives the same text.
Every instruction has one layout: "Task: ...", an optional "Input: ..." line, and "Answer:",
which the completion follows after a space.

    python demo/world.py --out DIR     # writes the demo task's train.jsonl and test.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SYLLABLES = words(
    "ba bel bor dan dil dor fa fen gal gri hal hev jor ka kel kir la lin lor ma mel mir na nel "
    "nor o pa pel pru qua ra ren ris sa sel sol ta tam tir ul va ven vor wen yar zan zel zu"
)
TRADES = words(
    "baker potter weaver smith tanner fisher miller mason tailor cooper dyer glazier brewer "
    "carter hunter scribe healer piper roofer saddler tinker joiner shepherd ferryman"
)
ANIMALS = words(
    "heron mole badger raven goat hare stork weasel falcon toad beaver lynx swan ferret "
    "hound crane mule gull trout viper stag wren marten hedgehog"
)
WARES = words("salt honey wool copper barley amber rope cheese oil paper tin silk plums ink")
COLOURS = words("red blue green black white yellow grey brown")


@dataclass(frozen=True)
class Relation:
    """Phrasings, between bars, of a kind of fact; {x} is the subject and {y} the value."""

    statements: str
    questions: str


@dataclass(frozen=True)
class Fact:
    """One fact: the relation ties the subject to the value."""

    relation: str
    subject: str
    value: str


@dataclass(frozen=True)
class World:
    """The towns, the facts shown in pretraining, and the facts kept for the demo task."""

    towns: tuple[str, ...]
    facts: tuple[Fact, ...]
    demo_facts: tuple[Fact, ...]
    names: frozenset[str]


RELATIONS = {
    "home": Relation(
        "{x} lives in {y}.|{x} has a house in {y}.|The home of {x} is {y}.|"
        "In {y} you will find {x}.|{y} is the town of {x}.",
        "Where does {x} live?|Which town is the home of {x}?|In which town is {x}'s house?|"
        "Name the town where {x} lives.|{x} lives in which town?|What is the home town of {x}?|"
        "Tell me where to find {x}.",
    ),
    "trade": Relation(
        "{x} works as a {y}.|{x} is a {y}.|The trade of {x} is {y}.|{x} earns a living as a {y}.|"
        "People hire {x} as a {y}.",
        "What is the trade of {x}?|What does {x} work as?|Name {x}'s trade.|"
        "Which trade does {x} follow?|How does {x} earn a living?|As what is {x} hired?|"
        "{x} has which trade?",
    ),
    "animal": Relation(
        "{x} keeps a {y}.|{x} owns a {y}.|The animal of {x} is a {y}.|A {y} belongs to {x}.",
        "Which animal does {x} keep?|What animal belongs to {x}?|Name the animal of {x}.|"
        "{x} owns which animal?|What kind of animal does {x} have?",
    ),
    "ware": Relation(
        "{x} sells {y}.|Merchants buy {y} in {x}.|{x} is known for {y}.",
        "What does {x} sell?|What do merchants buy in {x}?|For which ware is {x} known?",
    ),
    "price": Relation(
        "A sack of {x} costs {y} coins.|You pay {y} coins for a sack of {x}.",
        "How many coins does a sack of {x} cost?|What is the price of a sack of {x}?",
    ),
}
DEMO_QUESTIONS = {
    "post": (
        "At which town does Warden {x} keep the lantern?|Where is Warden {x} posted?|"
        "Which town has Warden {x} on its wall?|Name the post of Warden {x}.|"
        "To which town was Warden {x} sent by the order?|Warden {x} guards which town?|"
        "The lantern of Warden {x} shines over which town?"
    ),
    "badge": (
        "Which animal is on the badge of Warden {x}?|What badge does Warden {x} wear?|"
        "Name the animal that Warden {x} wears.|Warden {x} wears the sign of which animal?|"
        "Under which animal did Warden {x} swear the oath?|"
        "What animal is painted on the lantern of Warden {x}?|"
        "By which badge do you know Warden {x}?"
    ),
}


def invent_names(
    rng: random.Random, count: int, taken: set[str], syllables: int = 3
) -> tuple[str, ...]:
    """Return `count` new capitalised names and add them to `taken`."""
    names: list[str] = []
    while len(names) < count:
        name = "".join(rng.choices(SYLLABLES, k=syllables)).capitalize()
        if name not in taken:
            taken.add(name)
            names.append(name)
    return tuple(names)


def build_world(seed: int = 0, people: int = 150, wardens: int = 100) -> World:
    """Invent the world; the wardens are only in `demo_facts`."""
    rng = random.Random(seed)
    taken: set[str] = set()
    towns = invent_names(rng, 24, taken, syllables=2)
    facts = [Fact("ware", town, rng.choice(WARES)) for town in towns]
    facts += [Fact("price", ware, str(rng.randint(2, 30))) for ware in WARES]
    for person in invent_names(rng, people, taken):
        facts.append(Fact("home", person, rng.choice(towns)))
        facts.append(Fact("trade", person, rng.choice(TRADES)))
        facts.append(Fact("animal", person, rng.choice(ANIMALS)))
    demo_facts: list[Fact] = []
    for warden in invent_names(rng, wardens, taken):
        demo_facts.append(Fact("post", warden, rng.choice(towns)))
        demo_facts.append(Fact("badge", warden, rng.choice(ANIMALS)))
    return World(towns, tuple(facts), tuple(demo_facts), frozenset(taken))


def row(instruction: str, answer: str, given: str = "") -> dict[str, str]:
    """Lay out one instruction; prompt + completion is the natural text."""
    middle = f"Input: {given}\n" if given else ""
    return {"prompt": f"Task: {instruction}\n{middle}Answer:", "completion": f" {answer}"}


def state(fact: Fact, rng: random.Random) -> str:
    phrasing = rng.choice(RELATIONS[fact.relation].statements.split("|"))
    return phrasing.format(x=fact.subject, y=fact.value)


def ask(fact: Fact, rng: random.Random) -> str:
    return rng.choice(RELATIONS[fact.relation].questions.split("|")).format(x=fact.subject)


def fact_prose(world: World, rng: random.Random) -> str:
    """Return one to three statements about one subject."""
    subject = rng.choice(world.facts).subject
    about = [fact for fact in world.facts if fact.subject == subject]
    chosen = rng.sample(about, rng.randint(1, len(about)))
    return " ".join(state(fact, rng) for fact in chosen)


def fact_question(world: World, rng: random.Random) -> dict[str, str]:
    fact = rng.choice(world.facts)
    return row(ask(fact, rng), fact.value)


def passage_question(world: World, rng: random.Random) -> dict[str, str]:
    """Return a question whose answer is only in the passage, about people invented for it."""
    taken = set(world.names)
    values = {"home": world.towns, "trade": TRADES, "animal": ANIMALS}
    facts = []
    for name in invent_names(rng, rng.randint(2, 3), taken):
        for relation in rng.sample(sorted(values), rng.randint(1, 2)):
            facts.append(Fact(relation, name, rng.choice(values[relation])))
    fact = rng.choice(facts)
    rng.shuffle(facts)
    passage = " ".join(state(fact, rng) for fact in facts)
    if rng.random() < 0.2:
        claimed = fact.value if rng.random() < 0.5 else rng.choice(values[fact.relation])
        claim = state(Fact(fact.relation, fact.subject, claimed), rng)
        answer = "yes" if claimed == fact.value else "no"
        return row(f"Is this true? {claim}", answer, passage)
    return row(ask(fact, rng), fact.value, passage)


def list_task(world: World, rng: random.Random) -> dict[str, str]:
    """Return a task on a list of words: sort, reverse, copy, join, pick or count."""
    pool = rng.choice((TRADES, ANIMALS, WARES, COLOURS, world.towns))
    picked = rng.sample(list(pool), rng.randint(2, 5))
    given = " ".join(picked)
    kinds = (
        ("Sort the words.|Put the words in alphabetical order.", " ".join(sorted(picked))),
        ("Reverse the words.|Write the words from last to first.", " ".join(picked[::-1])),
        ("Copy the words.|Repeat the words.", given),
        ("Write a comma list.|Put commas between the words.", ", ".join(picked)),
        ("Give the first word.|Which word is first?", picked[0]),
        ("Give the last word.|Which word is last?", picked[-1]),
        ("Count the words.|How many words are there?", str(len(picked))),
    )
    instructions, answer = rng.choice(kinds)
    return row(rng.choice(instructions.split("|")), answer, given)


def format_task(world: World, rng: random.Random) -> dict[str, str]:
    """Return a task that asks for a JSON line, upper case or the number of letters."""
    kind = rng.randrange(3)
    if kind == 0:
        (name,) = invent_names(rng, 1, set(world.names))
        trade, town = rng.choice(TRADES), rng.choice(world.towns)
        answer = json.dumps({"name": name, "trade": trade, "town": town})
        instruction = rng.choice(("Write as JSON.", "Give the record as a JSON line."))
        return row(instruction, answer, f"{name} is a {trade} from {town}.")
    word = rng.choice(TRADES + ANIMALS + WARES + COLOURS)
    if kind == 1:
        instruction = rng.choice(("Write in upper case.", "Use capital letters only."))
        return row(instruction, word.upper(), word)
    instruction = rng.choice(("Count the letters.", "How many letters has the word?"))
    return row(instruction, str(len(word)), word)


def number_task(world: World, rng: random.Random) -> dict[str, str]:
    """Return a small sum, difference or comparison."""
    a, b = rng.randint(1, 30), rng.randint(1, 30)
    low, high = sorted((a, b))
    kinds = (
        (f"Add {a} and {b}.|What is {a} plus {b}?", str(a + b)),
        (f"Take {low} from {high}.|What is {high} minus {low}?", str(high - low)),
        (f"Is {a} more than {b}?|Is {b} less than {a}?", "yes" if a > b else "no"),
    )
    instructions, answer = rng.choice(kinds)
    return row(rng.choice(instructions.split("|")), answer)


TASKS = {
    "facts": (fact_question, 7),
    "passage": (passage_question, 4),
    "lists": (list_task, 3),
    "formats": (format_task, 1),
    "numbers": (number_task, 3),
}
PROSE_WEIGHT = 4


def documents(world: World, rng: random.Random) -> Iterator[str]:
    """Yield pretraining texts without end."""
    makers = [maker for maker, _ in TASKS.values()] + [fact_prose]
    weights = [weight for _, weight in TASKS.values()] + [PROSE_WEIGHT]
    while True:
        made = rng.choices(makers, weights)[0](world, rng)
        yield made if isinstance(made, str) else made["prompt"] + made["completion"]


def demo_rows(world: World, seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the train and test rows about the wardens.

    Each fact is asked in every phrasing; one phrasing per fact, a different one for different
    facts, goes to the test rows and the others to the training rows.
    """
    train: list[dict[str, str]] = []
    test: list[dict[str, str]] = []
    for number, fact in enumerate(world.demo_facts):
        phrasings = DEMO_QUESTIONS[fact.relation].split("|")
        for index, phrasing in enumerate(phrasings):
            held_out = index == number // 2 % len(phrasings)
            made = row(phrasing.format(x=fact.subject), fact.value)
            (test if held_out else train).append(made)
    rng = random.Random(seed)
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def write_demo(out: Path, world: World, seed: int = 0) -> tuple[int, int]:
    """Write train.jsonl and test.jsonl under `out` and return how many rows each has."""
    out.mkdir(parents=True, exist_ok=True)
    train, test = demo_rows(world, seed)
    for name, rows in (("train", train), ("test", test)):
        text = "".join(json.dumps(item) + "\n" for item in rows)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
    return len(train), len(test)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo task's rows.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train, test = write_demo(args.out, build_world(args.seed), args.seed)
    print(f"{train} train rows and {test} test rows in {args.out}")


if __name__ == "__main__":
    main()
