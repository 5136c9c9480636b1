"""Names of the built-in world: invented proper names, seeded, and short lists of plain words for what they point to."""

from __future__ import annotations

import random
from typing import Final

ONSETS: Final = "b br d dr f g gr h j k kr l m n p r s st t tr v z".split()
VOWELS: Final = "a e i o u".split()
CODAS: Final = ["", "", "", "l", "m", "n", "r", "s", "x"]
AVOID: Final = frozenset("horton diton samia honora molar lota siro nato peco hico".split())

ENDINGS: Final = {
    "first": ["a", "o", "el", "in", "is"],
    "last": ["dahl", "mont", "wick", "sen", "quist", "rov", "shaw", "field"],
    "city": ["burg", "ton", "mar", "port", "dal", "ford"],
    "country": ["ia", "land", "ora", "istan"],
    "company": ["co", "tek", "works", "ix"],
    "currency": ["ar", "in", "el"],
    "group": ["ans", "ites"],
}

WORDS: Final[dict[str, list[str]]] = {
    "profession": "baker tailor doctor farmer lawyer teacher painter carpenter plumber sailor miner barber butcher "
    "gardener librarian judge nurse pilot chemist potter".split(),
    "workplace": "bakery workshop hospital farm court school studio ship mine salon market garden library airport "
    "laboratory".split(),
    "tool": "sieve needle syringe plough gavel chalk brush hammer wrench compass pickaxe razor cleaver spade catalogue "
    "hood bandage radar flask wheel".split(),
    "instrument": "piano guitar violin flute trumpet drum harp cello clarinet banjo tuba lute fiddle gong bugle "
    "zither".split(),
    "material": "wood brass silver bronze bamboo".split(),
    "food": "bread cheese soup rice honey lemon ginger pepper melon cabbage noodle mushroom pickle pudding mustard "
    "walnut".split(),
    "taste": "sweet sour bitter salty spicy mild".split(),
    "pet": "cat dog horse parrot rabbit goat snake turtle mouse lizard pigeon ferret donkey hamster frog hen".split(),
    "home": "kennel stable cage burrow barn desert pond nest".split(),
    "product": "cars shoes lamps boats clocks glasses bicycles candles carpets knives mirrors pianos radios ropes "
    "tents umbrellas".split(),
    "fame": "bridges castles gardens markets museums towers temples theatres".split(),
    "continent": "Northreach Southmoor Eastfall Westhold Midmark".split(),
}

TIES: Final[dict[str, list[str]]] = {
    "workplace": "bakery workshop hospital farm court school studio workshop workshop ship mine salon market garden "
    "library court hospital airport laboratory studio".split(),
    "material": "wood wood wood silver brass bamboo wood wood bamboo wood brass wood wood bronze bronze wood".split(),
    "taste": "mild salty salty mild sweet sour spicy spicy sweet bitter mild mild sour sweet bitter bitter".split(),
    "home": "nest kennel stable cage burrow barn desert pond burrow desert nest cage stable cage pond barn".split(),
}


def invent(kind: str, count: int, taken: set[str]) -> list[str]:
    """`count` new names of a kind, none of them in `taken`, which grows by them."""
    rng = random.Random(f"names of kind {kind}")
    made: list[str] = []
    while len(made) < count:
        name = rng.choice(ONSETS) + rng.choice(VOWELS)
        if kind in ("country", "group", "currency"):
            name += rng.choice(CODAS[3:])
        elif kind != "first" or rng.random() < 0.5:
            name += rng.choice(CODAS)
        if kind == "first":
            name += rng.choice([*ONSETS[-5:], "l", "n", "m", "r", "d"])
        name = (name + rng.choice(ENDINGS[kind])).capitalize()
        if name.lower() in AVOID or name in taken or len(name) < 3:
            continue
        taken.add(name)
        made.append(name)
    return made
