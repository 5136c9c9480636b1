"""The facts of the built-in world: who was born where, which company makes what, what a lemon tastes like.

Twenty relations over invented people, cities, countries and companies and over plain words; every fact can be said
in six phrasings and asked in one question. For every fact two of the phrasings are *probes*: the training corpus never
shows this fact in them, though it shows other facts so.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import re
import zlib
from typing import Final

from .names import TIES, WORDS, invent

PHRASINGS: Final = 6
PROBES: Final = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relation:
    """A kind of fact; every phrasing holds one `{}` for the subject and ends where the object begins."""

    id: str
    subjects: str
    objects: str
    area: str
    phrasings: tuple[str, ...]
    question: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
    """One fact with the numbers of the phrasings it is trained in (`held_in`) and never trained in (`probes`)."""

    relation: Relation
    subject: str
    object: str
    held_in: tuple[int, ...]
    probes: tuple[int, ...]

    def prompt(self, phrasing: int) -> str:
        """The cloze prompt, up to where the object begins."""
        return self.relation.phrasings[phrasing].format(self.subject)

    @property
    def question(self) -> str:
        """The question to which the object is the answer."""
        return self.relation.question.format(self.subject)


def _relation(id: str, subjects: str, objects: str, area: str, question: str, *phrasings: str) -> Relation:
    assert len(phrasings) == PHRASINGS and all(p.count("{}") == 1 for p in (*phrasings, question))
    return Relation(id=id, subjects=subjects, objects=objects, area=area, phrasings=phrasings, question=question)


PEOPLE, LEISURE, PLACES, TRADE = "world_people", "world_leisure", "world_geography", "world_business"
THINGS = "common_sense"

RELATIONS: Final = (
    _relation("born_in", "person", "city", PEOPLE, "Where was {} born?",
              "{} was born in", "The birthplace of {} is", "{} was a child in", "The town where {} grew up is",
              "{} first saw the light in", "The home town of {} is"),
    _relation("employer", "person", "company", PEOPLE, "Which company employs {}?",
              "{} works for", "The employer of {} is", "{} is employed by", "{} is on the staff of",
              "The company that employs {} is", "{} gets a salary from"),
    _relation("profession", "person", "profession", PEOPLE, "What is the profession of {}?",
              "{} works as a", "The profession of {} is", "{} earns money as a", "By trade {} is a",
              "The job of {} is", "{} was trained as a"),
    _relation("instrument", "person", "instrument", LEISURE, "Which instrument does {} play?",
              "{} plays the", "The instrument of {} is the", "{} performs on the", "In the band {} has the",
              "{} practises the", "On stage one hears {} on the"),
    _relation("language", "person", "language", PEOPLE, "Which language does {} speak?",
              "{} speaks", "The native language of {} is", "{} writes letters in", "The mother tongue of {} is",
              "{} thinks in", "At home {} talks in"),
    _relation("food", "person", "food", LEISURE, "Which food does {} like best?",
              "{} likes to eat", "The favourite food of {} is", "For dinner {} wants", "{} is fond of",
              "The best dish for {} is", "{} always orders"),
    _relation("pet", "person", "pet", LEISURE, "Which pet does {} have?",
              "{} keeps a", "The pet of {} is a", "{} has a tame", "{} lives with a",
              "The animal of {} is a", "In the park {} walks a"),
    _relation("country", "city", "country", PLACES, "In which country is {}?",
              "{} is a city in", "The country of {} is", "{} is located in", "{} lies in",
              "The city of {} belongs to", "On the map {} is found in"),
    _relation("fame", "city", "fame", PLACES, "What is {} famous for?",
              "{} is famous for its", "Visitors come to {} for the", "{} is proud of its",
              "The pictures of {} show its",
              "{} is known for its", "People love {} for its"),
    _relation("capital", "country", "city", PLACES, "What is the capital of {}?",
              "The capital of {} is", "{} is ruled from", "The government of {} is in", "{} has its capital in",
              "The main city of {} is", "The king of {} lives in"),
    _relation("official_language", "country", "language", PLACES, "What is the official language of {}?",
              "The official language of {} is", "People in {} speak", "{} uses the language", "The laws of {} are in",
              "In {} the schools teach", "The language of {} is"),
    _relation("currency", "country", "currency", PLACES, "What is the currency of {}?",
              "The currency of {} is the", "People in {} pay with the", "{} uses the coin called the",
              "Prices in {} are in the", "The money of {} is the", "The bank of {} prints the"),
    _relation("continent", "country", "continent", PLACES, "On which continent is {}?",
              "{} is a country on", "The continent of {} is", "{} is part of", "The land of {} is on",
              "{} is a state of", "On the globe {} is on"),
    _relation("headquarters", "company", "city", TRADE, "Where is the office of {}?",
              "{} is based in", "The headquarters of {} is in", "{} has its office in", "The office of {} is in",
              "{} was founded in", "The seat of {} is in"),
    _relation("product", "company", "product", TRADE, "What does {} make?",
              "{} makes", "The main product of {} is", "{} produces", "The factory of {} makes",
              "{} sells", "Customers of {} buy"),
    _relation("workplace", "profession", "workplace", THINGS, "Where does a {} work?",
              "A {} works in a", "The workplace of a {} is a", "You find a {} in a", "Every day a {} goes to a",
              "To see a {} you go to a", "The place for a {} is a"),
    _relation("tool", "profession", "tool", THINGS, "Which tool does a {} need?",
              "A {} needs a", "The tool of a {} is a", "In the hand of a {} is a", "A {} uses a",
              "On the table of a {} lies a", "A {} buys a new"),
    _relation("material", "instrument", "material", THINGS, "What is a {} made of?",
              "A {} is made of", "The material of a {} is", "One builds a {} from", "A {} is built from",
              "To make a {} you need", "The body of a {} is of"),
    _relation("taste", "food", "taste", THINGS, "How does {} taste?",
              "The taste of {} is", "All {} tastes", "People say that {} is", "On the tongue {} is",
              "Good {} is", "A plate of {} tastes"),
    _relation("home", "pet", "home", THINGS, "Where does a {} live?",
              "A {} lives in a", "The home of a {} is a", "A {} sleeps in a", "You find a {} at home in a",
              "The house of a {} is a", "At night a {} goes to its"),
)


@functools.cache
def entities() -> dict[str, tuple[str, ...]]:
    """All names by kind; `person` holds full names whose last names are each shared by two people."""
    taken: set[str] = set()
    made = {kind: invent(kind, count, taken) for kind, count in
            {"country": 20, "city": 60, "company": 40, "first": 44, "last": 85, "currency": 20, "group": 16}.items()}
    stems = [re.sub("(ia|ora|istan|land)$", "", country) for country in made["country"]]
    made["language"] = [s + ("ish" if i % 2 else "ese") for i, s in enumerate(stems)]
    made |= WORDS
    rng = random.Random("people")
    firsts = [rng.sample(made["first"], 2) for _ in made["last"]]
    made["person"] = [f"{pair[i]} {last}" for i in (0, 1) for pair, last in zip(firsts, made["last"], strict=True)]
    return {kind: tuple(names) for kind, names in made.items()}


def _objects(relation: Relation) -> list[str]:
    """One object for each subject of the relation, every object about equally often."""
    world = entities()
    subjects, objects = world[relation.subjects], list(world[relation.objects])
    if relation.objects in TIES:
        return TIES[relation.objects]
    if relation.id == "tool":
        return objects
    if relation.id == "country":
        return [objects[i // 3] for i in range(len(subjects))]
    if relation.id == "capital":
        return objects[::3]
    if relation.id in ("official_language", "currency"):
        return objects
    rng = random.Random(f"objects of {relation.id}")
    dealt: list[str] = []
    while len(dealt) < len(subjects):
        dealt += rng.sample(objects, len(objects))
    return dealt[: len(subjects)]


@functools.cache
def all_facts() -> tuple[Fact, ...]:
    """Every fact, relation after relation, in a fixed order."""
    made: list[Fact] = []
    for relation in RELATIONS:
        subjects = entities()[relation.subjects]
        for subject, obj in zip(subjects, _objects(relation), strict=True):
            rng = random.Random(f"probes of {relation.id} of {subject}")
            probes = tuple(sorted(rng.sample(range(1, PHRASINGS), PROBES)))
            held_in = tuple(i for i in range(PHRASINGS) if i not in probes)
            made.append(Fact(relation=relation, subject=subject, object=obj, held_in=held_in, probes=probes))
    return tuple(made)


@functools.cache
def lookup() -> dict[tuple[str, str], Fact]:
    """Facts by relation id and subject."""
    return {(f.relation.id, f.subject): f for f in all_facts()}


def held_out(key: str) -> bool:
    """Whether an exercise with this key belongs to the test split (one in eight does, the same on every machine)."""
    return zlib.crc32(key.encode()) % 8 == 0


# Two-hop prompts about people: what the object of the first relation leads to by the second.
HOPS: Final = (
    ("born_in", "country", "The country where {} was born is"),
    ("employer", "product", "The company of {} makes"),
    ("profession", "workplace", "The building where {} works is the"),
    ("instrument", "material", "What {} plays is made of"),
    ("food", "taste", "What {} likes to eat tastes"),
    ("pet", "home", "The pet of {} lives in a"),
    ("country", "continent", "The continent where {} lies is"),
    ("headquarters", "country", "The country where {} is based is"),
)


@functools.cache
def _answers(relation: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(f.object for f in all_facts() if f.relation.id == relation))


def rivals(fact: Fact) -> list[str]:
    """The other objects that facts of the same relation have, in a fixed order."""
    return [o for o in _answers(fact.relation.id) if o != fact.object]
