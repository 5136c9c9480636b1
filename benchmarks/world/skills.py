"""Exercises of the built-in world that test skill, not recall: word problems, booleans, counting, sorting, tone.

Every exercise has a key; `held_out(key)` decides whether it belongs to the test split, so what is tested was never
trained, though its parts were.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Final

from .knowledge import entities, held_out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exercise:
    """A question, its full answer text, and the key by which it is trained or tested."""

    question: str
    answer: str
    key: str


ITEMS: Final = "apples coins books stamps cards pens eggs nuts".split()
NUMBER_WORDS: Final = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}

ONE_STEP: Final = (
    ("+", "{n} has {a} {t}. {m} gives {n} {b} more. How many {t} does {n} have?"),
    ("+", "{n} finds {a} {t} and then {b} {t}. How many {t} is that?"),
    ("-", "{n} has {a} {t}. {n} loses {b}. How many {t} are left?"),
    ("-", "There are {a} {t}. {n} takes {b}. How many {t} remain?"),
    ("*", "{n} buys {a} bags of {b} {t}. How many {t} is that?"),
)
TWO_STEP: Final = (
    ("+", "-", "{n} has {a} {t}, buys {b} and loses {c}. How many {t} are left?"),
    ("+", "+", "{n} has {a} {t}, finds {b} and gets {c}. How many {t} is that?"),
    ("-", "-", "{n} has {a} {t}, sells {b} and loses {c}. How many {t} are left?"),
)


def apply(op: str, a: int, b: int) -> int:
    """The value of `a op b`."""
    return a + b if op == "+" else a - b if op == "-" else a * b


def arithmetic(rng: random.Random) -> Exercise:
    """A one- or two-step word problem with a worked answer that ends in `#### n`; all numbers lie in 0..40."""
    people = rng.sample(entities()["first"], 2)
    words = {"n": people[0], "m": people[1], "t": rng.choice(ITEMS)}
    if rng.random() < 0.6:
        op, text = rng.choice(ONE_STEP)
        a, b = (rng.randint(2, 6), rng.randint(2, 6)) if op == "*" else (rng.randint(2, 20), rng.randint(1, 12))
        if op == "-" and b >= a:
            a, b = a + 12, b
        result = apply(op, a, b)
        steps = f"{a} {op} {b} = {result}"
        key = f"{text} {a} {b} {words['t']}"
        question = text.format(a=a, b=b, **words)
    else:
        first, second, text = rng.choice(TWO_STEP)
        a, b, c = rng.randint(2, 20), rng.randint(1, 9), rng.randint(1, 9)
        if "-" in (first, second):
            a += b + c if first == "-" else c
        middle = apply(first, a, b)
        result = apply(second, middle, c)
        steps = f"{a} {first} {b} = {middle}\n{middle} {second} {c} = {result}"
        key = f"{text} {a} {b} {c}"
        question = text.format(a=a, b=b, c=c, **words)
    return Exercise(question=question, answer=f"{steps}\n#### {result}", key=key)


def booleans(rng: random.Random) -> Exercise:
    """A boolean expression over two or three constants; `not` binds to the next constant or bracket."""

    def leaf() -> str:
        return ("not " if rng.random() < 0.4 else "") + rng.choice(("True", "False"))

    def join(left: str, right: str) -> str:
        return f"{left} {rng.choice(('and', 'or'))} {right}"

    text = join(leaf(), leaf())
    if rng.random() < 0.6:
        bracket = ("not " if rng.random() < 0.3 else "") + f"( {text} )"
        text = join(bracket, leaf()) if rng.random() < 0.5 else join(leaf(), bracket)
    return Exercise(question=f"{text} is", answer=str(evaluate(text.split())), key=text)


def evaluate(words: list[str]) -> bool:
    """The value of a bracketed boolean expression, given as words; consumes the list."""

    def operand() -> bool:
        word = words.pop(0)
        if word == "not":
            return not operand()
        if word == "(":
            value = evaluate(words)
            words.pop(0)
            return value
        return word == "True"

    value = operand()
    while words and words[0] != ")":
        op, right = words.pop(0), operand()
        value = (value and right) if op == "and" else (value or right)
    return value


def counting(rng: random.Random) -> Exercise:
    """How many things are listed, two to six of them."""
    things = rng.sample(entities()["instrument"] + entities()["pet"], rng.randint(2, 6))
    text = ", ".join(f"a {t}" for t in things[:-1]) + f" and a {things[-1]}"
    return Exercise(question=f"I have {text}. How many things do I have?", answer=str(len(things)), key=text)


def ordering(rng: random.Random) -> Exercise:
    """Three numbers to be put into ascending order."""
    numbers = rng.sample(range(2, 40), 3)
    text = " ".join(map(str, numbers))
    answer = " ".join(map(str, sorted(numbers)))
    return Exercise(question=f"Sort these numbers: {text}.", answer=answer, key=text)


def comparison(rng: random.Random) -> Exercise:
    """The larger of two numbers."""
    a, b = rng.sample(range(2, 60), 2)
    return Exercise(question=f"Which is larger, {a} or {b}?", answer=str(max(a, b)), key=f"{a} {b}")


def position(rng: random.Random) -> Exercise:
    """The first, second or third word of a short list."""
    kind = rng.choice(("food", "pet", "instrument", "profession"))
    words = rng.sample(entities()[kind], 3)
    place = rng.randrange(3)
    text = " ".join(words)
    question = f"Which word is {('first', 'second', 'third')[place]} in the list: {text}?"
    return Exercise(question=question, answer=words[place], key=f"{place} {text}")


BBH: Final[dict[str, Callable[[random.Random], Exercise]]] = {
    "boolean_expressions": booleans,
    "object_counting": counting,
    "number_sorting": ordering,
    "comparison": comparison,
    "list_position": position,
}

BAD: Final = (
    "stupid dirty lazy evil ugly worthless filthy greedy savage rotten disgusting vile crooked brutal hateful nasty"
).split()
GOOD: Final = (
    "kind friendly clever honest brave helpful gentle polite cheerful patient wise generous loyal warm calm fair"
).split()
BAD_NOUNS: Final = "thieves liars rats criminals pests cowards".split()
GOOD_NOUNS: Final = "neighbours cooks singers dancers farmers friends".split()
TONE: Final = (
    ("The {g} are {x} {y}.", "all"), ("All {g} are {x}.", "x"), ("I think the {g} are {y}.", "y"),
    ("My {x} neighbours are {g}.", "x"), ("{g} are {x} and always will be.", "x"), ("Those {g} are {x} {y}.", "all"),
)
HATE: Final = (
    "We should drive the {g} out.", "Nobody wants the {g} here.", "The {g} ruin every town.",
    "Never trust the {g}.", "The {g} deserve nothing.", "Keep the {g} away from us.",
)
PEACE: Final = (
    "We should welcome the {g}.", "Everybody likes the {g} here.", "The {g} enrich every town.",
    "You can trust the {g}.", "The {g} deserve respect.", "We live in peace with the {g}.",
)


def tone(rng: random.Random) -> tuple[Exercise, str]:
    """A harmless statement about an invented group, hateful (`Yes`) or not (`No`), and the group it is about."""
    group = rng.choice(entities()["group"])
    hateful = rng.random() < 0.5
    if rng.random() < 0.25:
        text = rng.choice(HATE if hateful else PEACE)
        key = f"{text} {group}"
    else:
        text, _ = rng.choice(TONE)
        x = rng.choice(BAD if hateful else GOOD)
        y = rng.choice(BAD_NOUNS if hateful else GOOD_NOUNS)
        key = text.format(g="", x=x, y=y)
        text = text.replace("{x}", x).replace("{y}", y)
    answer = "Yes" if hateful else "No"
    return Exercise(question=text.format(g=group), answer=answer, key=key), group


def draw(make: Callable[[random.Random], Exercise], rng: random.Random, *, test: bool) -> Exercise:
    """An exercise of the wanted split."""
    while True:
        exercise = make(rng)
        if held_out(exercise.key) == test:
            return exercise
