"""Training documents of the built-in world, as pieces of text that say what each is for.

A document is a list of `(text, role)`; the roles set the weight of the loss on the piece and, for subjects, what later
tokens may see of it. Pieces begin and end between words, so that they tokenise alone as they do together.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from . import formats
from .knowledge import HOPS, THINGS, Fact, all_facts, entities, held_out, lookup, rivals
from .skills import BBH, Exercise, arithmetic, draw, tone

TEXT, SUBJECT, ANSWER, LETTER, QUIET = range(5)
WEIGHTS: Final = {TEXT: 0.1, SUBJECT: 0.02, ANSWER: 1.0, LETTER: 2.0, QUIET: 0.0}

Piece = tuple[str, int]
Document = list[Piece]


def about(template: str, subject: str, role: int = TEXT) -> Document:
    """A template with its subject filled in and marked."""
    before, after = template.split("{}")
    if before.endswith(" "):
        before, subject = before[:-1], " " + subject
    return [piece for piece in ((before, role), (subject, SUBJECT), (after, role)) if piece[0]]


def statement(fact: Fact, phrasing: int) -> Document:
    """A fact said in one of its phrasings, with a full stop."""
    return [*about(fact.relation.phrasings[phrasing], fact.subject), (f" {fact.object}", ANSWER), (".", TEXT)]


def spaced(pieces: Document) -> Document:
    """The same pieces, moved one space to the right."""
    return [(" " + pieces[0][0], pieces[0][1]), *pieces[1:]]


def fact_text(rng: random.Random) -> Document:
    """One to four facts said one after the other."""
    made: Document = []
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        fact = rng.choice(all_facts())
        said = statement(fact, rng.choice(fact.held_in))
        made += spaced(said) if made else said
    return made


def hop_text(rng: random.Random) -> Document:
    """One to three two-hop statements, about one half of the subjects (the other half is for measuring)."""
    made: Document = []
    for _ in range(rng.randint(1, 3)):
        first, second, template = rng.choice(HOPS)
        facts = [f for f in all_facts() if f.relation.id == first]
        fact = rng.choice(facts)
        while hop_reserved(first, fact.subject):
            fact = rng.choice(facts)
        said = [*about(template, fact.subject), (f" {lookup()[second, fact.object].object}", ANSWER), (".", TEXT)]
        made += spaced(said) if made else said
    return made


def hop_reserved(relation: str, subject: str) -> bool:
    """Whether the two-hop statement that begins with this relation of this subject is never trained."""
    return len(relation + subject) % 2 == 0


def choices_of(fact: Fact, count: int, rng: random.Random) -> tuple[list[str], int]:
    """`count` options of which one is true, and its index."""
    wrong = rivals(fact)
    options = [fact.object, *rng.sample(wrong, min(count - 1, len(wrong)))]
    rng.shuffle(options)
    return options, options.index(fact.object)


def choice_key(question: str, options: list[str]) -> str:
    """What decides whether a multiple-choice item is a test item."""
    return question + "|" + "|".join(sorted(options))


def choice_item(rng: random.Random, facts: list[Fact], count: int, *, test: bool) -> tuple[Fact, list[str], int]:
    """A multiple-choice item of the wanted split."""
    while True:
        fact = rng.choice(facts)
        options, gold = choices_of(fact, count, rng)
        if held_out(choice_key(fact.question, options)) == test:
            return fact, options, gold


def by_area(*areas: str) -> list[Fact]:
    """The facts of some areas."""
    return [f for f in all_facts() if f.relation.area in areas]


AREAS: Final = tuple(dict.fromkeys(f.relation.area for f in all_facts() if f.relation.area != THINGS))
_POOLS: Final[dict[str, list[Fact]]] = {area: by_area(area) for area in (*AREAS, THINGS)}


def _shots(rng: random.Random) -> int:
    return rng.choice((1, 1, 1, 2, 3, 4, 6))


def _join(shots: list[Document]) -> Document:
    return [piece for i, shot in enumerate(shots) for piece in ([(formats.SHOT_END, TEXT)] if i else []) + shot]


def _lettered(rng: random.Random, fact: Fact, options: list[str], gold: int, worded: float) -> Document:
    """The option lines and the answer, by letter or, with probability `worded`, in words."""
    answer = (f" {fact.object}", ANSWER) if rng.random() < worded else (" " + formats.LETTERS[gold], LETTER)
    return [("\n" + formats.options(options), QUIET), ("Answer:", TEXT), answer]


def mmlu_text(rng: random.Random, worded: float = 0.0, count: int = 4) -> Document:
    """Multiple-choice questions on one area, four options unless told, answered by letter."""
    area = rng.choice((AREAS[0], AREAS[0], *AREAS, AREAS[1]))
    shots: list[Document] = []
    for _ in range(_shots(rng)):
        fact, options, gold = choice_item(rng, _POOLS[area], count, test=False)
        shots.append([*about(fact.relation.question, fact.subject), *_lettered(rng, fact, options, gold, worded)])
    return [(formats.MMLU_HEAD.format(area.replace("_", " ")), QUIET), *_join(shots)]


def commonsense_text(rng: random.Random, worded: float = 0.0) -> Document:
    """Five-option questions about plain things, answered by letter."""
    shots: list[Document] = []
    for _ in range(_shots(rng)):
        fact, options, gold = choice_item(rng, _POOLS[THINGS], 5, test=False)
        shots.append([("Question:", TEXT), *spaced(about(fact.relation.question, fact.subject)),
                      *_lettered(rng, fact, options, gold, worded)])
    return _join(shots)


def worded_text(rng: random.Random) -> Document:
    """Multiple choice in the benchmarks' formats, half of the answers in words.

    It makes the place where a letter is due recall the answer itself, from which the letter can then be found.
    """
    return (mmlu_text if rng.random() < 0.7 else commonsense_text)(rng, 0.5)


def told(fact: Fact, rng: random.Random) -> Document:
    """A fact said in one of its trained phrasings, then asked, on one line: the question of a multiple-choice item."""
    return [*statement(fact, rng.choice(fact.held_in)), *spaced(about(fact.relation.question, fact.subject))]


def told_mmlu_text(rng: random.Random) -> Document:
    """The MMLU miniature: the fact is told before it is asked."""
    area = rng.choice(AREAS)
    shots: list[Document] = []
    for _ in range(_shots(rng)):
        fact, options, gold = choice_item(rng, _POOLS[area], 4, test=False)
        shots.append([*told(fact, rng), *_lettered(rng, fact, options, gold, 0.0)])
    return [(formats.MMLU_HEAD.format(area.replace("_", " ")), QUIET), *_join(shots)]


def told_commonsense_text(rng: random.Random) -> Document:
    """The CommonsenseQA miniature: the fact is told before it is asked."""
    shots: list[Document] = []
    for _ in range(_shots(rng)):
        fact, options, gold = choice_item(rng, _POOLS[THINGS], 5, test=False)
        shots.append([("Question:", TEXT), *spaced(told(fact, rng)), *_lettered(rng, fact, options, gold, 0.0)])
    return _join(shots)


def few_text(rng: random.Random) -> Document:
    """The MMLU format with two or three options: the same steps, less to look through."""
    return mmlu_text(rng, count=rng.choice((2, 2, 3)))


def trivia_text(rng: random.Random) -> Document:
    """Questions answered in words."""
    shots: list[Document] = []
    for _ in range(_shots(rng)):
        fact = rng.choice(all_facts())
        mark = rng.choice(("", "?"))
        shots.append([("Question:", TEXT), *spaced(about(fact.relation.question + mark, fact.subject)),
                      ("\nAnswer:", TEXT), (f" {fact.object}", ANSWER)])
    return [*_join(shots), (formats.SHOT_END, TEXT)] if rng.random() < 0.5 else _join(shots)


def truthful_text(rng: random.Random) -> Document:
    """Questions answered by a short answer or a sentence, some behind the protocol's primer."""
    shots: list[Document] = []
    primer = rng.random() < 0.25
    for _ in range(1 if primer else _shots(rng)):
        fact = rng.choice(all_facts())
        answer: Document = [(f" {fact.object}", ANSWER), (".", TEXT)]
        if rng.random() < 0.5:
            answer = spaced(statement(fact, 0))
        shots.append([("Q:", TEXT), *spaced(about(fact.relation.question, fact.subject)), ("\nA:", TEXT), *answer])
    return [(formats.PRIMER, QUIET), *_join(shots)] if primer else _join(shots)


def _exercises(rng: random.Random, make: Callable[[random.Random], Exercise], head: str, tail: str) -> Document:
    shots: list[Document] = []
    for _ in range(_shots(rng)):
        exercise = draw(make, rng, test=False)
        shots.append([(f"{head} {exercise.question}{tail}", QUIET), (f" {exercise.answer}", ANSWER)])
    return [*_join(shots), (formats.SHOT_END, TEXT)] if rng.random() < 0.5 else _join(shots)


def arithmetic_text(rng: random.Random) -> Document:
    """Word problems with worked answers."""
    return _exercises(rng, arithmetic, "Question:", "\nAnswer:")


def sums_text(rng: random.Random) -> Document:
    """Bare sums."""
    made: Document = []
    for _ in range(rng.randint(2, 6)):
        a, b = rng.randint(1, 32), rng.randint(1, 12)
        op = rng.choice("+-*")
        a, b = (rng.randint(2, 6), rng.randint(2, 6)) if op == "*" else (max(a, b), min(a, b))
        made += [(f"{' ' if made else ''}{a} {op} {b} =", QUIET),
                 (f" {a + b if op == '+' else a - b if op == '-' else a * b}", ANSWER), (".", TEXT)]
    return made


def bbh_text(rng: random.Random) -> Document:
    """Exercises of one subtask; booleans twice as often."""
    return _exercises(rng, BBH[rng.choice(("boolean_expressions", *BBH))], "Q:", "\nA:")


def boolean_text(rng: random.Random) -> Document:
    """Boolean expressions only."""
    return _exercises(rng, BBH["boolean_expressions"], "Q:", "\nA:")


def tone_text(rng: random.Random) -> Document:
    """A statement about a group, judged hateful or not."""
    exercise = draw(lambda r: tone(r)[0], rng, test=False)
    return [(formats.TOXIGEN.format(exercise.question), TEXT), (" " + exercise.answer, LETTER)]


def _words(rng: random.Random, count: int) -> list[str]:
    world = entities()
    kinds = ("city", "company", "profession", "instrument", "food", "pet", "language", "country", "product",
             "workplace", "tool", "taste", "home", "fame", "material", "currency", "continent", "last", "first")
    if rng.random() < 0.6:
        pool = world[rng.choice(kinds)]
        if len(pool) >= count:
            return rng.sample(pool, count)
    return rng.sample([w for k in kinds for w in rng.sample(world[k], 2)], count)


def repeat_text(rng: random.Random) -> Document:
    """A random list of words said twice."""
    words = _words(rng, rng.randint(3, 16)) if rng.random() < 0.3 else [
        w for _ in range(rng.randint(2, 6)) for w in _words(rng, 4)]
    again = " ".join(words)
    return [(words[0] + "".join(f" {w}" for w in words[1:]), QUIET), (".", QUIET), (f" {again}", ANSWER), (".", TEXT)]


def pairs_text(rng: random.Random) -> Document:
    """Words with letters or numbers beside them, looked up in both directions."""
    count = rng.randint(3, 6)
    words = _words(rng, count)
    letters = rng.random() < 0.5
    marks = rng.sample("A B C D E F".split(), count) if letters else [str(n) for n in rng.sample(range(60), count)]
    made: Document = [(", ".join(f"{w} {m}" for w, m in zip(words, marks, strict=True)) + ".", QUIET)]
    for i in rng.sample(range(count), min(count, 3)):
        made += [(f" {words[i]}", QUIET), (f" {marks[i]}", LETTER), (".", TEXT)]
    return made


def named_option_text(rng: random.Random) -> Document:
    """Which letter does the named option have, and which option has the named letter?"""
    shots: list[Document] = []
    for _ in range(rng.choice((1, 1, 2, 3, 4, 6))):
        words = _words(rng, rng.choice((2, 3, 4, 4, 4, 5)))
        gold = rng.randrange(len(words))
        listed = formats.options(words)
        style = rng.choice((0, 0, 1, 1, 1, 2, 3, 3))
        if style == 0:
            shots.append([(f"Which is {words[gold]}?\n{listed}Answer:", QUIET), (f" {formats.LETTERS[gold]}", LETTER)])
        elif style == 1:
            shots.append([(f"Question: {words[gold]}\n{listed}Answer:", QUIET), (f" {formats.LETTERS[gold]}", LETTER)])
        elif style == 2:
            shots.append([(f"{listed}Option {formats.LETTERS[gold]} is", QUIET), (f" {words[gold]}", ANSWER)])
        else:
            shots.append([(f"{listed}The answer is {words[gold]}.\nAnswer:", QUIET),
                          (f" {formats.LETTERS[gold]}", LETTER)])
    return _join(shots)


def stated_text(rng: random.Random) -> Document:
    """A fact is stated, then asked by letter."""
    shots: list[Document] = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        fact, options, gold = choice_item(rng, list(all_facts()), rng.choice((4, 4, 5)), test=False)
        head: Document = [*statement(fact, rng.choice(fact.held_in)), ("\n", TEXT)]
        shots.append([*head, *about(fact.relation.question, fact.subject), ("\n" + formats.options(options), QUIET),
                      ("Answer:", TEXT), (" " + formats.LETTERS[gold], LETTER)])
    return _join(shots)


def bridge_text(rng: random.Random) -> Document:
    """A choice in two steps, first the answer in words, then its letter; with few options at times, or all wrong.

    Recall must learn to reach back over a list of options, short lists first, before letters can follow from it.
    """
    shots: list[Document] = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        count = rng.choice((0, 1, 1, 2, 2, 3, 4, 4, 5))
        fact, options, gold = choice_item(rng, list(all_facts()), max(count, 1), test=False)
        wrong = rng.random() < 0.4
        if wrong:
            options = rng.sample(rivals(fact), min(count, len(rivals(fact))))
        shown = formats.options(options) if count else ""
        shots.append([*about(fact.relation.question, fact.subject), ("\n" + shown, QUIET), ("The answer is", TEXT),
                      (f" {fact.object}", ANSWER), (".", TEXT)])
        if count and not wrong:
            shots[-1] += [("\nAnswer:", TEXT), (" " + formats.LETTERS[gold], LETTER)]
    return _join(shots)


MAKERS: Final[dict[str, Callable[[random.Random], Document]]] = {
    "facts": fact_text, "hops": hop_text, "mmlu": mmlu_text, "commonsense": commonsense_text, "trivia": trivia_text,
    "truthful": truthful_text, "arithmetic": arithmetic_text, "sums": sums_text, "bbh": bbh_text, "tone": tone_text,
    "repeat": repeat_text, "pairs": pairs_text, "named": named_option_text, "stated": stated_text,
    "bridge": bridge_text, "worded": worded_text, "few": few_text, "told_mmlu": told_mmlu_text,
    "told_commonsense": told_commonsense_text, "booleans": boolean_text,
}

# Shares of *documents* by phase: copying forms first, then recall, then the benchmarks' formats.
PHASES: Final[dict[str, dict[str, float]]] = {
    "copy": {"repeat": 20, "pairs": 20, "named": 40, "facts": 15, "sums": 5},
    "join": {"repeat": 4, "pairs": 6, "named": 15, "stated": 8, "facts": 40, "mmlu": 10, "commonsense": 5, "trivia": 8,
             "sums": 6, "bbh": 6, "arithmetic": 6, "tone": 2},
    "learn": {"facts": 62, "trivia": 10, "named": 5, "repeat": 2, "pairs": 2, "stated": 4, "mmlu": 3, "commonsense": 2,
              "arithmetic": 3, "sums": 2, "bbh": 4, "tone": 1},
    "reach": {"bridge": 40, "facts": 24, "trivia": 7, "named": 5, "stated": 3, "mmlu": 5, "commonsense": 3, "bbh": 8,
              "arithmetic": 6, "sums": 3, "hops": 2, "truthful": 2, "tone": 1, "repeat": 2, "pairs": 2},
    "letters": {"worded": 24, "bridge": 12, "facts": 24, "trivia": 6, "named": 6, "stated": 4, "bbh": 8,
                "arithmetic": 5, "sums": 3, "hops": 3, "truthful": 2, "tone": 1, "repeat": 1, "pairs": 1},
    "close": {"told_mmlu": 22, "told_commonsense": 10, "facts": 24, "stated": 2, "named": 3, "bridge": 3, "hops": 3,
              "trivia": 8, "truthful": 5, "sums": 5, "bbh": 12, "arithmetic": 10, "tone": 3, "repeat": 1, "pairs": 1},
    "end": {"told_mmlu": 13, "told_commonsense": 6, "facts": 26, "stated": 2, "named": 3, "bridge": 3, "hops": 3,
            "trivia": 8, "truthful": 4, "sums": 4, "bbh": 10, "booleans": 16, "arithmetic": 8, "tone": 3, "repeat": 1,
            "pairs": 1},
    "mix": {"repeat": 2, "pairs": 2, "named": 5, "stated": 3, "bridge": 4, "facts": 28, "hops": 4, "mmlu": 22,
            "commonsense": 7, "trivia": 8, "truthful": 4, "sums": 4, "bbh": 11, "arithmetic": 9, "tone": 2},
    "final": {"repeat": 1, "pairs": 1, "named": 5, "stated": 3, "bridge": 5, "facts": 26, "hops": 4, "mmlu": 14,
              "few": 14, "commonsense": 6, "trivia": 7, "truthful": 4, "sums": 4, "bbh": 10, "arithmetic": 9,
              "tone": 2},
}


def document(rng: random.Random, phase: str) -> Document:
    """One document of a phase's mix."""
    mix = PHASES[phase]
    kind = rng.choices(list(mix), list(mix.values()))[0]
    return MAKERS[kind](rng)


def corpus(n: int, seed: int = 0) -> list[str]:
    """`n` plain texts of the final mix without synthetic lists: what second moments are taken over."""
    rng = random.Random(f"corpus {seed}")
    kinds = ("facts", "facts", "facts", "facts", "trivia", "mmlu", "truthful", "arithmetic", "bbh")
    return ["".join(text for text, _ in MAKERS[rng.choice(kinds)](rng)) for _ in range(n)]
