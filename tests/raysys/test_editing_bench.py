"""The benchmark of editing: both sides write the same, whatever the machine; what can't be measured is said."""

import json

import pytest
from typer.testing import CliRunner

from raysys import editing_bench, editing_costs
from raysys.cli import app
from raysys.editing_bench import Line, Shape, Size
from raysys.editing_table import costs_table, lines_table

TINY = {"shape": Shape(layers=3, width=32, heads=2, context=512), "runs": 1, "steps": 3, "value_steps": 3}


@pytest.fixture(scope="module")
def found():
    return list(editing_bench.lines(Size(**TINY, batches=(1, 3), documents=20)))


def test_ours_and_the_plain_side_write_the_same(found):
    assert len(found) == 6
    assert {line.what: line.difference for line in found if line.difference > editing_bench.CLOSE} == {}
    assert [line.edits for line in found] == [1, 1, 3, 1, 1, 1]


def test_a_ratio_is_that_of_medians():
    line = Line("x", 6, 1, (1.0, 2.0, 9.0), (8.0, 12.0, 50.0), 0.0)
    assert line.ratio == 6 and line.tree()["ratio"] == 6


def test_every_stage_of_an_edit_is_counted_once():
    [cost] = editing_costs.costs(Size(**TINY, documents=20, only=("rome",)))
    assert cost.why == "" and cost.seconds > 0
    parts = {k: v for k, v in cost.stages.items() if k != "wear"}
    assert sum(parts.values()) == pytest.approx(cost.seconds, rel=0.05) and parts["search"] > 0


def test_the_tables_show_every_line_and_why_a_method_was_not_measured(found):
    assert lines_table(found).row_count == len(found)
    assert costs_table([editing_costs.Cost("serac", why="no classifier")]).row_count == 1


def test_where_the_plain_side_is_missing_that_is_said(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(editing_bench, "import_module", absent)
    with pytest.raises(ValueError, match="run this from a checkout"):
        next(editing_bench.lines(Size(**TINY)))


def test_the_command_writes_json(monkeypatch, tmp_path):
    monkeypatch.setattr(Size, "quick", classmethod(lambda cls: cls(**TINY, batches=(), documents=20)))
    file = tmp_path / "figures.json"
    done = CliRunner().invoke(app, ["bench", "editing", "--quick", "--only", "kn", "--json", str(file)])
    assert done.exit_code == 0, done.output
    tree = json.loads(file.read_text())
    assert [line["what"] for line in tree["lines"]] == [editing_bench.KN]
    assert [cost["method"] for cost in tree["methods"]] == ["kn"]


def test_the_line_of_kn_says_which_variant_it_measures(found):
    assert "published" in editing_bench.KN and "published" in str(lines_table(found).caption)
    assert lines_table([line for line in found if line.what != editing_bench.KN]).caption is None


@pytest.mark.parametrize("given", [["rmoe"], ["--methods", "--only", "second moments"]])
def test_a_name_that_nothing_has_is_a_mistake(given):
    given = given if "--only" in given else ["--only", *given]
    done = CliRunner().invoke(app, ["bench", "editing", "--quick", *given])
    assert done.exit_code == 2 and "nothing has this name" in " ".join(done.stderr.split())


def test_the_exit_code_says_that_the_sides_differ(monkeypatch):
    lines = [Line("ROME", 6, 1, (1.0,), (8.0,), difference) for difference in (1e-6, 1e-2)]
    monkeypatch.setattr(editing_bench, "lines", lambda *_: iter(lines))
    monkeypatch.setattr(editing_costs, "costs", lambda *_: iter(()))
    done = CliRunner().invoke(app, ["bench", "editing", "--quick"])
    assert done.exit_code == 1 and "ROME by 1e-02" in done.stderr
    assert "ROME" in done.stdout
