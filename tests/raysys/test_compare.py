"""What `python -m tests.compare` makes of scores, worked by hand."""

from __future__ import annotations

import numpy as np
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
