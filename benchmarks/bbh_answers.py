"""What counts as the answer in a reply to a BIG-Bench Hard question: the rules of lm-evaluation-harness 0.4.13.

Direct answers count by the first match in the reply, worked ones by the last.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache

NOTHING = "[invalid]"
COT = re.compile(r"(?<=the answer is )(.*)(?=.)")  # drops the line's last character, which should be a full stop
STRICT = re.compile("|".join(rf"(?<={lead})(.*)(?=.)" for lead in (
    "The answer is ", "the answer is ", "The answer: ", "The final answer: ")))  # fmt: skip
IGNORED = tuple(map(re.compile, (r"\.$", r"[,\n\\\"]")))  # removed from both sides before they are compared
LETTER = re.compile(r"(\([A-Z]\))")
OPTION = re.compile(r"\([A-Z]\)([^\n^(]*)")
NUMBER = re.compile(r"([-0-9]+)")
PATTERNS: Mapping[str, re.Pattern[str]] = {
    "boolean_expressions": re.compile(r"\b(True|False)\b"),
    "causal_judgement": re.compile(r"\b(Yes|No|yes|no)\b"),
    "navigate": re.compile(r"\b(Yes|No|yes|no)\b"),
    "dyck_languages": re.compile(r"(?<= )([\" \[\(<{}>\)\]]+)|([\" \[\(<{}>\)\]]+)"),
    "formal_fallacies": re.compile(r"\b(valid|invalid)\b"),
    "number_sorting": re.compile(r"(\d+(?: \d+)*)"),  # this and the next two: the built-in world's own subtasks
    "comparison": re.compile(r"(\d+)"),
    "list_position": re.compile(r"(\w+)"),
}
MAPS: Mapping[str, tuple[tuple[str, str], ...]] = {  # the first pattern that is in the match decides
    "sports_understanding": ((r"\b(no|not plausible)\b", "no"), (r"\b(yes|plausible)\b", "yes")),
    "web_of_lies": (
        (r"\b(no|does not tell the truth|is not telling the truth)\b", "no"),
        (r"\b(yes|tells the truth|is telling the truth)\b", "yes"),
    ),
}
NUMBERS = ("multistep_arithmetic_two", "object_counting")
SORTED = ("word_sorting",)


def normal(text: str) -> str:
    """What the zero-shot forms compare."""
    for pattern in IGNORED:
        text = pattern.sub("", text)
    return text.lower()


def concluded(text: str, pattern: re.Pattern[str]) -> str:
    """What follows the first "the answer is " (or as `pattern` has it)."""
    found = _pick(pattern, text, 0)
    return NOTHING if found is None else found


def options(question: str) -> list[str]:
    """The texts of a question's options; letter X stands for the one at its place in the alphabet."""
    return [text.strip() for text in OPTION.findall(question)]


def listed(question: str) -> list[str]:
    """The words that a word_sorting question lists."""
    return question.partition("List:")[2].partition("List:")[0].split()


def extracted(task: str, text: str, at: int, known: Sequence[str]) -> str:
    """The answer of a zero-shot reply; `at`: 0 for the first match, -1 for the last.

    `known`: the question's options or, in word_sorting, its words.
    """
    if task in PATTERNS:
        found = _pick(PATTERNS[task], text, at)
        return NOTHING if found is None else found
    if task in MAPS:
        return _mapped(MAPS[task], text.lower(), at) or NOTHING
    if task in NUMBERS:
        return _pick(NUMBER, text, at) or _spelled(text, at) or NOTHING
    if task in SORTED:
        return _in_order(text, known)
    return _letter(text, at, known) or NOTHING


def _pick(pattern: re.Pattern[str], text: str, at: int) -> str | None:
    """The match at place `at`: its first group with something in it, without blanks around; None without a match."""
    found = pattern.findall(text)
    if not found:
        return None
    match = found[at]
    if isinstance(match, tuple):
        match = next((part for part in match if part), None)
        if match is None:
            return None
    return str(match).strip()


def _mapped(patterns: Sequence[tuple[str, str]], text: str, at: int) -> str | None:
    whole = _pick(re.compile("|".join(pattern for pattern, _ in patterns)), text, at)
    if not whole:
        return None
    return next((value for pattern, value in patterns if re.search(pattern, whole)), None)


def _letter(text: str, at: int, known: Sequence[str]) -> str | None:
    """A letter in brackets; else an option's own text, the longest first; else a bare letter behind a colon."""
    if found := _pick(LETTER, text, at):
        return found
    known = known[:26]  # letters A to Z
    letters = {bare(option): f"({chr(ord('A') + i)})" for i, option in enumerate(known)}
    names = [re.escape(bare(option)) for option in known]
    pattern = re.compile("|".join(sorted(names, key=len, reverse=True)))
    if found := _pick(pattern, bare(text), at):
        return letters.get(found, found)
    alone = "|".join(chr(ord("A") + i) for i in range(len(known)))
    found = _pick(re.compile(rf":[\s]*({alone})"), text, at)
    return f"({found})" if found else None


def bare(text: str) -> str:
    """Lower case, without any of Unicode's punctuation."""
    return text.lower().translate(_punctuation())


@cache
def _punctuation() -> dict[int, None]:
    return dict.fromkeys(i for i in range(sys.maxunicode) if unicodedata.category(chr(i)).startswith("P"))


def _in_order(text: str, words: Sequence[str]) -> str:
    """The listed words in the order in which the reply says each for the last time."""
    said = re.findall("|".join(rf"\b{re.escape(word)}\b" for word in words), text)
    last = dict.fromkeys(reversed(said))
    return " ".join(reversed(last))


# --- numbers in words ------------------------------------------------------------------------------------------------

UNITS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
         "seventeen eighteen nineteen").split()  # fmt: skip
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
WORDS: Mapping[str, int] = (
    {w: i for i, w in enumerate(UNITS)} | {w: 10 * i for i, w in enumerate(TENS, 2)} | {"hundred": 100} | SCALES
)


def _alternatives(teens: str, eight: str) -> str:
    """One word of a number. The harness' pattern has three of these, which differ in what may end a word."""
    return (
        f"(?:zero|one|two|three|four|five|(?:twen|thir|for|fif|six|seven|nine)(?:{teens})|eight(?:{eight})|ten|eleven"
        "|twelve|fourteen|hundred|thousand|(?:m|b|tr)illion)"
    )


_FIRST = _alternatives("teen|ty", "|een|y")
_MIDDLE = _alternatives("|teen|ty", "een|y").removesuffix(")") + r"|[^\S\r\n]|,|and|&)"
_LAST = _alternatives("teen|ty", "een|y")  # so "six" or "eight" by itself is not read, as in the harness
SPELLED = re.compile(f"((?:{_FIRST}{_MIDDLE}+)?{_LAST})")


def _spelled(text: str, at: int) -> str | None:
    found = _pick(SPELLED, text.lower(), at)
    value = number(found) if found else None
    return None if value is None else str(value)


def number(text: str) -> int | None:
    """The number that words say ("two hundred and five": 205); None where they say none."""
    words = [word for word in text.replace("-", " ").split() if word in WORDS]
    at = [words.index(scale) for scale in reversed(SCALES) if scale in words]
    if not words or at != sorted(at) or any(words.count(scale) > 1 for scale in SCALES):
        return None
    if len(words) == 1:
        return WORDS[words[0]]
    total, start = 0, 0
    for end in at:
        part = _below_thousand([WORDS[word] for word in words[start:end]])
        if part is None:
            return None
        total += part * SCALES[words[end]]
        start = end + 1
    rest = _below_thousand([WORDS[word] for word in words[start:]]) if start < len(words) else 0
    return None if rest is None else total + rest


def _below_thousand(parts: Sequence[int]) -> int | None:
    """What up to four parts say: the first counts the second (hundreds) where there are three or a hundred among two.

    As the harness' helper has it, also for what nobody says: of more parts only the first counts.
    """
    if len(parts) > 4:
        return parts[0]
    if len(parts) > 2 or (len(parts) == 2 and 100 in parts):
        return parts[0] * parts[1] + sum(parts[2:])
    return sum(parts) if parts else None
