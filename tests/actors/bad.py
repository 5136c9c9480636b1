"""A data set outside benchmarks/ that gives methods what they can't serve; for tests of refusals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from raysys.types import EditCase, EditRequest, Probe

REQUESTS = (
    EditRequest("good-1", "{} was born in", "Anna", "Rome", "Paris"),
    EditRequest("zero-tokens", "{} was born in", "Bert", " ", "Paris"),
    EditRequest("subject-twice", "{} was born in {}", "Carla", "Rome", "Paris"),
    EditRequest("subject-missing", "Emil was born in", "Dora", "Rome", "Paris"),
    EditRequest("too-long", "{} was" + " born" * 300, "Emil", "Rome", "Paris"),
    EditRequest("duplicate", "{} was born in", "Anna", "Lima", "Paris"),
    EditRequest("good-2", "{} is the capital of", "Oslo", "Italy", "Norway"),
)
REFUSED = ("zero-tokens", "subject-twice", "subject-missing", "too-long")


@dataclass(frozen=True, kw_only=True)
class Bad:
    """Two good edits, one that collides with the first, and four that no method can make."""

    name: ClassVar[str] = "bad"
    version: ClassVar[str] = "1"

    def cases(self) -> Iterator[EditCase]:
        for number, request in enumerate(REQUESTS, 1):
            probe = Probe("rewrite", f"{request.subject} was born in", "Rome", "Paris")
            yield EditCase(request, (probe,), f"bad, record {number}")

    def held_out(self, edited: Sequence[EditCase]) -> list[Probe]:
        return []
