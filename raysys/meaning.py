"""What the parts of a study say of themselves, kept with its results.

A study writes it down when it starts. Whoever reads a run folder later takes it from there: a report needs no plug-in
of the study's to be installed, and a stranger's folder can't have any code imported by naming it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raysys import names
from raysys.frame import Metric

if TYPE_CHECKING:
    from raysys.results import Results
    from raysys.spec import ComponentSpec, StudySpec

KEY = "meaning"  # in the manifest of a run
PUBLISHED = "a published variant, which computes something else than the method as it should be."


class Said(BaseModel):
    """What a benchmark says of its metrics, by class variables of these names and its `chance()`."""

    model_config = ConfigDict(frozen=True)

    ability: bool = True  # one of its metrics is a general ability
    safety: bool = False  # what a constant answer scores says nothing
    units: dict[str, str] = Field(default_factory=dict)  # metric -> unit; the others are shares
    lower_is_better: frozenset[str] = frozenset()
    chance: dict[str, float] = Field(default_factory=dict)  # metric -> what guessing would score


class Meaning(BaseModel):
    """Of one study: benchmarks by title; for methods run as published, a sentence on what is meant by that."""

    model_config = ConfigDict(frozen=True)

    benchmarks: dict[str, Said] = Field(default_factory=dict)
    published: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def of(cls, spec: StudySpec, plugins: bool = True) -> Meaning:
        """Asks the components themselves; without `plugins` only those that belong to raysys."""
        benchmarks = [b for b in spec.benchmarks if plugins or b.name in names.BENCHMARKS]
        methods = [m for m in spec.methods if m.settings.get("published") is True]
        methods = [m for m in methods if plugins or m.name in names.METHODS]
        return cls(
            benchmarks={b.title: _said(b) for b in benchmarks},
            published={m.title: f"{PUBLISHED} {_means(names.method(m.name))}".rstrip() for m in methods},
        )

    @classmethod
    def read(cls, results: Results) -> Meaning:
        """What a run folder says; of one that says nothing, what the components of raysys say. Raises ValueError."""
        told = results.manifest.get(KEY)
        if told is None:
            return cls.of(results.spec, plugins=False)
        try:
            return cls.model_validate(told)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, (KEY, *fault["loc"])))
            raise ValueError(f"{results.folder}: manifest.json is damaged ({where}: {fault['msg']})") from error

    def able(self, benchmark: str) -> bool:
        """Whether one of a benchmark's metrics is a general ability."""
        return self.benchmarks.get(benchmark, Said()).ability

    @property
    def safety(self) -> frozenset[str]:
        """Benchmarks on safety."""
        return frozenset(title for title, said in self.benchmarks.items() if said.safety)

    @property
    def units(self) -> Mapping[Metric, str]:
        """Units of what is no share."""
        return {(title, m): unit for title, said in self.benchmarks.items() for m, unit in said.units.items()}

    @property
    def falling(self) -> frozenset[Metric]:
        """Metrics of which less is better."""
        return frozenset((title, m) for title, said in self.benchmarks.items() for m in said.lower_is_better)

    @property
    def chances(self) -> dict[Metric, float]:
        """What guessing would score, as far as the benchmarks say."""
        return {(title, m): share for title, said in self.benchmarks.items() for m, share in said.chance.items()}


def _said(part: ComponentSpec) -> Said:
    cls = names.benchmark(part.name)
    told: dict[str, Any] = {n: getattr(cls, n) for n in Said.model_fields if n != "chance" and hasattr(cls, n)}
    return Said(**told, chance=dict(names.build(cls, part.settings, part.title).chance()))


def _means(cls: Any) -> str:
    """What a method's own words say of its published variant: its `published_means`, else the paragraph of its
    docstring that begins with `published`."""
    if means := getattr(cls, "published_means", ""):
        return str(means)
    _, found, means = (cls.__doc__ or "").partition("`published`")
    means = " ".join(means.partition("\n\n")[0].replace("`", "").split())
    return f"Published{'' if means.startswith(':') else ' '}{means}" if found else ""
