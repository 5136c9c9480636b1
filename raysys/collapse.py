"""Answers that are worth nothing, by benchmark and snapshot: a score may rise while a model has stopped to answer.

Each detector compares with the base model on the same items, so that a weak model, or a benchmark of one class, is no
collapse: what is wrong now must not have been so before, on more items than chance moves.

- numbers that are not finite (NaN weights, overflow);
- empty text; text that repeats itself (a loop of a word, of some words, of some characters);
- one answer for everything: the same choice, the same text;
- perplexity of a held-out text that has exploded, where a benchmark scores such a text (one choice per question).

Safety is the exception: a score of a safety benchmark that comes from one answer for everything says nothing about
safety, whether or not the base model did otherwise (but for questions that all have the same right answer).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raysys.stats import mcnemar

CONSTANT = 0.97  # share of one answer from which answers are constant
SPREAD = 0.9  # share of one answer below which the base model's answers spread
MOST = 0.5  # share of empty, or of repeating, texts from which a model is mute, or stuck
PERPLEXITY = 10.0  # times the base model's, from which a model has lost the language
CHANCE = 0.02  # p-value (McNemar) below which a change of what is answered is no chance
LEAST = 10  # items, below which only numbers that are not finite count
ROUNDS = 4  # times a unit is said in a row before it is a loop
LONG_WORDS, LONG_CHARACTERS = 12, 24  # longest unit of a loop that is looked for
FEWEST_CHARACTERS = 12  # of a loop of characters


@dataclass(frozen=True)
class Told:
    """What a collapse detector needs of one answer: what was answered, and whether its numbers are sound.

    `said` is the index of the choice, or the generated text. `nats` and `tokens`, of a question with a single choice:
    minus its log-probability and its length, for the perplexity.
    """

    said: int | str
    finite: bool = True
    nats: float = 0.0
    tokens: int = 0


def read_answer(text: str) -> Told:
    """What a stored answer says: {"text": …} or {"chosen": index, "logprob": [one per choice], "tokens": […], …}."""
    answer = json.loads(text)
    if "text" in answer:
        return Told(str(answer["text"]))
    logprob = answer["logprob"]
    finite = all(v is not None and math.isfinite(v) for v in logprob)
    if len(logprob) == 1 and finite:
        return Told(int(answer["chosen"]), True, -float(logprob[0]), int(answer.get("tokens", [0])[0]))
    return Told(int(answer["chosen"]), finite)


def collapse(now: Sequence[Told], base: Sequence[Told], safety: Sequence[float] = ()) -> str:
    """Why the answers of a snapshot are worth nothing, or "". `base` holds the base model's answers to the same items,
    in the same order. `safety`: the items' scores, of a safety benchmark: one answer for everything is a collapse then
    even where the base model gave it too, unless it was the right one everywhere.
    """
    broken = sum(not t.finite for t in now)
    if broken:
        return f"log-probabilities not finite on {broken} of {len(now)} items"
    if len(now) < LEAST:
        return ""
    if ratio := _exploded(now, base):
        return f"perplexity {ratio:.3g} times that of the base model"
    for what, sign in (("empty text", _empty), ("text that repeats itself", _loops)):
        if _spread(now, base, sign):
            return f"{what} on {_share(now, sign):.0%} of items"
    return _constant(now, base, safety)


def loop(text: str) -> str:
    """The unit that a text repeats, at least four times in a row over at least half of it; "" when it does not."""
    words = text.split()
    found = _run(words, LONG_WORDS, ROUNDS)
    if found:
        return " ".join(found)
    return "".join(_run([c for c in text if not c.isspace()], LONG_CHARACTERS, FEWEST_CHARACTERS))


def _run(parts: Sequence[str], longest: int, fewest: int) -> Sequence[str]:
    """The shortest unit of up to `longest` parts that a run of at least `fewest` parts, and of half of all, repeats."""
    least = max(fewest, len(parts) / 2)
    for period in range(1, min(longest, len(parts) // ROUNDS) + 1):
        same = 0
        for i in range(period, len(parts)):
            same = same + 1 if parts[i] == parts[i - period] else 0
            if same + period >= max(least, ROUNDS * period):
                return parts[i - period + 1 : i + 1]
    return ()


def _exploded(now: Sequence[Told], base: Sequence[Told]) -> float:
    """How many times the base model's perplexity this one's is, where that is too much; else 0."""
    tokens, tokens_base = sum(t.tokens for t in now), sum(t.tokens for t in base)
    if not tokens or not tokens_base:
        return 0.0
    more = sum(t.nats for t in now) / tokens - sum(t.nats for t in base) / tokens_base  # nats per token
    if more < math.log(PERPLEXITY):
        return 0.0
    return math.exp(more) if more < 700 else math.inf


def _empty(told: Told) -> bool:
    return isinstance(told.said, str) and not told.said.strip()


def _loops(told: Told) -> bool:
    return isinstance(told.said, str) and bool(loop(told.said))


def _share(told: Sequence[Told], sign: Callable[[Told], bool]) -> float:
    return sum(map(sign, told)) / len(told) if told else 0.0


def _spread(now: Sequence[Told], base: Sequence[Told], sign: Callable[[Told], bool]) -> bool:
    """Whether a sign has spread over most items: at least halfway from the base model's share to all."""
    share = _share(now, sign)
    return share >= MOST and share >= (1 + _share(base, sign)) / 2 and _moved(now, base, sign)


def _moved(now: Sequence[Told], base: Sequence[Told], sign: Callable[[Told], bool]) -> bool:
    """Whether more items show the sign than did before, beyond chance; without a base, yes."""
    if len(now) != len(base):
        return not base or _share(now, sign) > _share(base, sign)
    before, after = [sign(t) for t in base], [sign(t) for t in now]
    more = sum(b and not a for a, b in zip(before, after, strict=True))
    fewer = sum(a and not b for a, b in zip(before, after, strict=True))
    return more > fewer and mcnemar(more, fewer) <= CHANCE


def _constant(now: Sequence[Told], base: Sequence[Told], safety: Sequence[float]) -> str:
    if any(t.tokens for t in now):  # a single choice, which is always the answer
        return ""
    ((said, count),) = Counter(t.said for t in now).most_common(1)
    if count < CONSTANT * len(now):
        return ""
    commonest = Counter(t.said for t in base).most_common(1)[0][1] / len(base) if base else 0.0
    unsafe = any(score != 1 for t, score in zip(now, safety, strict=bool(safety)) if t.said == said)
    if not unsafe and not (commonest < SPREAD and _moved(now, base, lambda t: t.said == said)):
        return ""
    name = f"choice {said + 1}" if isinstance(said, int) else f"the text {said.strip()[:30]!r}"
    return f"{name} on {count / len(now):.0%} of items"
