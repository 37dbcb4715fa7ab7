"""Made-up documents with questions, where no SQuAD and no HotpotQA is at hand.

The documents tell of towns and people that do not exist, so that a model can answer from the
context alone. They are the same each time.

    library = single_hop()
    question = library.questions[0]
    library.documents[question.own[0]]            # the document that has question.answers[0]
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

PEOPLE_COUNT = TOWN_COUNT = 600
FIRST_NAMES = (
    "Ada Bruno Clara Dario Edith Felix Greta Hugo Irma Jonas Klara Leon Marta Nils Olga Pavel "
    "Rosa Simon Thea Urban Vera Walter Yvonne Zeno"
).split()
BEGINNINGS = "Bel Cor Dren El Fal Gar Hol Is Kel Lor Mar Nor Os Pel Quil Ren Sar Tol Ul Ver".split()
MIDDLES = "a e i o u ar en il or un".split()
ENDS = "bury dale field ford ham holm mere mouth ness stead ton wick".split()
RIVERS = "Amber Birch Clear Deep Elder Fern Green Heron Iron Juniper Long Mill Otter Swift".split()
RIVER_ENDS = "Beck Brook Run Stream Water".split()
CRAFTS = (
    "blue glass, bronze bells, carved masks, clay pipes, dried plums, linen sails, oak barrels, "
    "paper lanterns, pear cider, rye bread, silver combs, smoked eel, tin whistles, wool carpets"
).split(", ")
JOBS = "architect baker botanist captain engineer painter poet sculptor surgeon weaver".split()


@dataclass(frozen=True)
class Question:
    """A question. own: documents that belong to it. more: documents that come next to them.

    Any of the answers is right.
    """

    text: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    more: tuple[int, ...] = ()


@dataclass(frozen=True)
class Library:
    """Documents, and questions about them."""

    documents: list[str]
    questions: list[Question]


@dataclass(frozen=True)
class _Town:
    name: str
    year: str
    founder: str
    river: str
    craft: str

    def document(self) -> str:
        return (
            f"{self.name}\n{self.name} is a small town on the {self.river}. It was founded in "
            f"{self.year} by {self.founder}. The town is known for its {self.craft}, sold at a "
            "market each spring."
        )


@cache
def _towns() -> list[_Town]:
    rng = random.Random("towns")
    names = [begin + middle + end for begin in BEGINNINGS for middle in MIDDLES for end in ENDS]
    return [
        _Town(
            name,
            str(rng.randrange(1100, 1900)),
            _person(rng),
            f"{rng.choice(RIVERS)} {rng.choice(RIVER_ENDS)}",
            rng.choice(CRAFTS),
        )
        for name in rng.sample(names, TOWN_COUNT)
    ]


def _person(rng: random.Random) -> str:
    name = rng.choice(BEGINNINGS) + rng.choice(MIDDLES) + rng.choice(ENDS)
    return f"{rng.choice(FIRST_NAMES)} {name}"


@cache
def single_hop() -> Library:
    """Questions whose answer stands in one document, as in SQuAD."""
    towns = _towns()
    questions = []
    for number, town in enumerate(towns):
        asked = (
            (f"In which year was {town.name} founded?", town.year),
            (f"Who founded {town.name}?", town.founder),
            (f"On which river is {town.name}?", town.river),
            (f"What is {town.name} known for?", town.craft),
        )
        text, answer = asked[number % len(asked)]
        questions.append(Question(text, (answer,), (number,)))
    return Library([town.document() for town in towns], questions)


@cache
def two_hops() -> Library:
    """Questions that need a document on a person and one on a town, as in HotpotQA."""
    rng = random.Random("people")
    towns = _towns()
    documents, questions = [town.document() for town in towns], []
    people = sorted({_person(rng) for _ in range(2 * PEOPLE_COUNT)})
    for name in rng.sample(people, PEOPLE_COUNT):
        number = rng.randrange(len(towns))
        town, job = towns[number], rng.choice(JOBS)
        asked = (
            (f"On which river is the town where {name} was born?", town.river),
            (f"Who founded the town where {name} was born?", town.founder),
            (f"In which year was the town founded where {name} was born?", town.year),
        )
        text, answer = asked[len(questions) % len(asked)]
        questions.append(Question(text, (answer,), (number, len(documents))))
        documents.append(
            f"{name}\n{name} was born in {town.name} and worked as a {job}. Letters to a brother "
            f"tell of {rng.randrange(12, 60)} years as a {job}."
        )
    return Library(documents, questions)
