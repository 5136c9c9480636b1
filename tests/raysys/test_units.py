"""Scores that are no shares are told in their own unit, and one that should be low is not praised for rising."""

from __future__ import annotations

from raysys import report, report_tables
from raysys.meaning import Meaning
from raysys.spec import StudySpec
from raysys.stats import Difference, Estimate
from raysys.summary import Point

ESTIMATE = Estimate(3.228, 0.1, 3.0, 3.456, 50)
RISE = Difference(1.25, 1.0, 1.5, 50, 0, 0.001, 50)
FALL = Difference(-1.25, -1.5, -1.0, 0, 50, 0.001, 50)


def point(change: Difference, falling: bool) -> Point:
    return Point(10, ESTIMATE, change, unit="nats", falling=falling)


def test_nats_are_not_per_cent() -> None:
    assert report._score(point(RISE, True)).plain == "3.23 ±0.23 +1.25"
    cell = report_tables._cell(point(RISE, True), True)
    assert "3.23" in cell and "+1.25" in cell and "322" not in cell


def test_red_is_what_got_worse() -> None:
    def red(p: Point) -> bool:
        return any(span.style == "red" for span in report._score(p).spans)

    assert red(point(RISE, True)) and not red(point(FALL, True))
    assert red(point(FALL, False)) and not red(point(RISE, False))


def test_shares_are_told_as_before() -> None:
    share = Estimate(0.712, 0.01, 0.692, 0.732, 400)
    assert report._score(Point(1, share, Difference(-0.08, -0.1, -0.06, 1, 33, 0.001, 400))).plain == "71.2 ±2.0 −8.0"


def test_benchmarks_say_what_their_scores_mean() -> None:
    benchmarks = [{"name": n} for n in ("perplexity", "toxigen", "mmlu", "fluency")]
    spec = StudySpec.check({"methods": [{"name": "rome"}], "benchmarks": benchmarks, "edits": {"count": 100}})
    means = Meaning.of(spec)
    assert means.safety == {"toxigen"}
    assert means.falling == {("perplexity", "nats_per_token")}
    assert dict(means.units) == {("perplexity", "nats_per_token"): "nats", ("fluency", "ngram_entropy_bits"): "bits"}
