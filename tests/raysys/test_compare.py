"""What `python -m tests.compare` makes of scores, worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests import compare
from tests.compare import Measured


def sheet(*rows: list[float], items: int = 400) -> np.ndarray:
    """(orders, snapshots, items): each row one order's shares, as that many items right."""
    return np.array([[[float(i < share * items) for i in range(items)] for share in row] for row in rows])


def scores(ability: list[float], locality: list[float], efficacy: float = 1.0) -> dict[str, np.ndarray]:
    both = sheet(ability, ability)
    return {
        "mmlu": both,
        "gsm8k": both,
        "locality": sheet(locality, locality),
        "efficacy": sheet([efficacy], [efficacy]),
    }


def data() -> Measured:
    return Measured(
        (0, 10, 20, 30),
        {
            "rome": scores([1.0, 0.9, 0.7, 0.9], [1.0, 1.0, 1.0, 1.0]),
            "r_rome": scores([1.0, 0.9, 0.9, 0.9], [1.0, 1.0, 0.9, 0.5]),
            "mend": scores([1.0, 1.0, 1.0, 0.5], [1.0, 1.0, 1.0, 1.0], 0.9),
            "mend (published)": scores([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], 0.1),
        },
    )


def test_edits_are_survived_up_to_the_first_snapshot_below_the_level() -> None:
    found = {f.what: f for f in compare.findings(data(), 0.8) if f.first == "r_rome"}
    [survived] = found.values()
    assert survived.figures == ([20.0, 20.0], [10.0, 10.0])
    assert (survived.difference, survived.low, survived.high) == (10.0, 10.0, 10.0)
    assert survived.verdict == "r_rome has more"


def test_a_contrary_result_is_told_as_one() -> None:
    kept = next(f for f in compare.findings(data(), 0.8) if f.what.startswith("ability") and f.first == "mend")
    assert kept.difference == pytest.approx(-0.5)
    assert kept.low < -0.45 < kept.high + 0.1
    assert kept.verdict == "mend (published) has more"
    hold = next(f for f in compare.findings(data(), 0.8) if f.what.startswith("edits that hold"))
    assert hold.difference == pytest.approx(0.8)


def test_the_same_method_twice_is_not_decided() -> None:
    same = Measured(data().snapshots, {"r_rome": data().scores["rome"], "rome": data().scores["rome"]})
    [found] = compare.findings(same, 0.8)
    assert (found.difference, found.low, found.high, found.verdict) == (0.0, 0.0, 0.0, "not decided")


def test_the_study_behind_it_is_one_that_runs() -> None:
    spec = compare.study(200, 10, 3, list(compare.METHODS), "runs")
    assert [m.title for m in spec.methods] == list(compare.METHODS)
    assert spec.snapshots[-1] == 200
    assert len(spec.grid()) == 18


class Scores:
    """Stands for results: all of a study's scores, apart from what `lacks` leaves out."""

    def __init__(self, lacks: Callable[[dict[str, Any]], bool]) -> None:
        self.spec = compare.study(10, 10, 2, ["rome", "r_rome"], "runs")
        self.lacks = lacks

    def scores(self) -> pa.Table:
        rows = [
            {"query": f"q{i}", "metric": compare.METRICS[name], "value": 1.0, "method": method, "order": order,
             "edits": edits, "benchmark": "probes" if name == "efficacy" else name}
            for name, method, order, edits, i in product(compare.METRICS, ("rome", "r_rome"), (0, 1), (0, 10), range(3))
        ]  # fmt: skip
        return pa.Table.from_pylist([row for row in rows if not self.lacks(row)])

    def failures(self) -> list[Any]:
        return []


def test_a_method_whose_items_differ_is_left_out_aloud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(compare.measured(Scores(lambda row: False)).scores) == {"rome", "r_rome"}  # type: ignore[arg-type]

    def lacks(row: dict[str, Any]) -> bool:
        place = (row["method"], row["benchmark"], row["order"], row["edits"], row["query"])
        return place == ("r_rome", "locality", 1, 10, "q2")

    monkeypatch.setattr(compare, "run", lambda *_: Scores(lacks))
    monkeypatch.setattr("sys.argv", ["compare", "--json"])
    assert compare.main() == 1
    said = capsys.readouterr()
    assert said.err == "not compared: r_rome: locality: order 1 after 10 edits lacks items, or has others\n"
    assert said.out == "[]\n"
