"""Questions on several edits, fluency and perplexity in a study on real Ray: asked when due, apart from ability."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from raysys.report import Report
from raysys.results import Results
from raysys.study import run
from raysys.summary import summarise
from tests.actors import small

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny model, edits of which the second and fourth answer one question together, and Ray."""
    found = small.folder(tmp_path_factory.mktemp("texts"))
    edits = json.loads((found / "edits.json").read_text())
    edits[1]["multi_hop"] = [
        {"prompt": "Where are they ?", "answer": "Rome", "was": "Lima", "aliases": ["Roma"], "needs": ["e3"]},
        {"prompt": "Who is not there ?", "answer": "Rome", "needs": ["e7"]},  # never made
    ]
    (found / "edits.json").write_text(json.dumps(edits))
    with small.cluster():
        yield found


@pytest.fixture(scope="module")
def results(place: Path) -> Results:
    tuned = {"name": "ft_m", "layers": [1], "steps": 2, "lr": 1e-3}
    benchmarks = [
        {"name": "tests.actors.small:Words", "label": "words"},
        {"name": "probes", "max_tokens": 4, "magnitude": True, "exact": True},
        {"name": "fluency", "max_tokens": 8},
        {"name": "perplexity", "data": str(place / "corpus.txt"), "words": 12},
    ]
    return run(small.spec(place, snapshots=[0, 3, 4, 6], methods=[tuned], benchmarks=benchmarks))


def test_a_question_on_several_edits_is_asked_once_all_are_made(results: Results) -> None:
    rows = [r for r in results.scores().to_pylist() if r["group"] == "multi_hop"]
    assert {(r["edits"], r["query"], r["edit"]) for r in rows} == {
        (edits, f"probes/json/e1/{number}/{way}", 4)
        for edits in (0, 4, 6) for number in (3,) for way in ("forced", "free")
    }  # fmt: skip
    kinds = {"probability", "forced", "free", "magnitude", "exact"}
    assert {r["metric"] for r in rows} == {f"multi_hop/{kind}" for kind in kinds}


def test_texts_are_scored_and_are_no_ability(results: Results) -> None:
    assert results.manifest["complete"] and not results.failures()
    summary = summarise(results)
    assert summary.ability == [("words", "accuracy")]
    assert summary.others == [("fluency", "ngram_entropy_bits"), ("perplexity", "nats_per_token")]
    [method] = summary.methods
    fluency, perplexity = (method.curves[m] for m in summary.others)
    assert [(p.edits, p.estimate.n) for p in fluency] == [(0, 6), (3, 3), (4, 4), (6, 6)]
    assert len({p.estimate.n for p in perplexity}) == 1 and all(p.estimate.mean > 1 for p in perplexity)


def test_questions_on_several_edits_have_an_age_too(results: Results, tmp_path: Path) -> None:
    [method] = summarise(results).methods
    assert set(method.ages) == {f"{k}{p}" for k in ("", "multi_hop/") for p in ("probability", "forced", "free")}
    assert [(a.first, a.estimate.n) for a in method.ages["multi_hop/free"]] == [(1, 1)]  # two edits ago: ages 1 to 4
    page = Report.of(results).write(tmp_path / "page.html").read_text()
    assert "Retention by age, multi-hop questions" in page and "<h3>Multi-hop</h3>" in page
