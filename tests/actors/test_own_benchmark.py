"""A benchmark of a user's own: one file outside the repository, named by dotted path, scored in a study on real Ray."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from raysys.results import Results
from raysys.spec import SpecError
from raysys.study import run
from raysys.summary import summarise
from tests.actors import small

pytestmark = pytest.mark.timeout(240)

PAGE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny model, edits and CONTRIBUTING's benchmark as it stands, on PYTHONPATH; Ray started there."""
    found = small.folder(tmp_path_factory.mktemp("own"))
    [code] = re.findall(r"```python\n# benchmarks/capitals.py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (found / "code").mkdir()
    (found / "code" / "my_capitals.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYSYS_CACHE", str(found / "cache"))
        patch.setenv("PYTHONPATH", str(found / "code"))
        patch.syspath_prepend(str(found / "code"))
        with small.cluster():
            yield found


@pytest.fixture(scope="module")
def results(place: Path) -> Results:
    own = {"name": "my_capitals:Capitals", "label": "capitals", "limit": 2}
    tuned = {"name": "ft_m", "layers": [1], "steps": 2, "lr": 1e-3}
    return run(small.spec(place, snapshots=[0, 2], methods=[tuned], benchmarks=[own]))


def test_its_questions_are_scored_at_every_snapshot(results: Results) -> None:
    assert results.manifest["complete"] and not results.failures()
    rows = results.scores().to_pylist()
    assert {(r["edits"], r["query"], r["metric"]) for r in rows} == {
        (edits, f"capitals/{country}", "accuracy") for edits in (0, 2) for country in ("France", "Italy")
    }
    assert {r["benchmark"] for r in rows} == {"capitals"} and all(r["value"] in (0.0, 1.0) for r in rows)


def test_it_counts_as_an_ability(results: Results) -> None:
    assert summarise(results).ability == [("capitals", "accuracy")]


def test_a_wrong_path_or_setting_is_told_before_anything_runs(place: Path) -> None:
    with pytest.raises(SpecError, match=r"no module 'my_capital'; is its folder on PYTHONPATH"):
        small.spec(place, benchmarks=[{"name": "my_capital:Capitals"}])
    with pytest.raises(SpecError, match=r"unknown setting 'limits'. Did you mean 'limit'"):
        small.spec(place, benchmarks=[{"name": "my_capitals:Capitals", "limits": 2}])
