"""SERAC and IKE on the built-in world, with the editors that are shipped with it."""

import dataclasses

import pytest

from benchmarks.edits import World
from methods.ike import PAPER_LAYOUT, Ike
from methods.serac import Serac
from raysys.checks import ask, shares, single_edits
from raysys.model import Model
from raysys.patch import Wearer, merge


@pytest.fixture(scope="module")
def model():
    return Model.load("world/small")


@pytest.mark.parametrize("method", [Serac(), Ike()], ids=lambda m: m.name)
def test_single_edits_hold_in_scope_and_leave_the_rest_alone(model, method, tmp_path):
    cases = list(World().cases())[:12]
    found = shares(list(single_edits(model, method.prepare(model, tmp_path), cases)))
    assert found["rewrite/likelier"] >= 0.9 and found["paraphrase/likelier"] >= 0.9
    assert found["neighbourhood/unchanged"] >= 0.9


@pytest.mark.parametrize("method", [Serac(), Ike()], ids=lambda m: m.name)
def test_edits_one_after_the_other_hold_too(model, method, tmp_path):
    cases = list(World().cases())[:30]
    ready, wearer, worn = method.prepare(model, tmp_path), Wearer(model), ()
    before = [ask(model, case.probes) for case in cases]
    for case in cases:
        worn = merge(worn, ready.edit(model, [case.request]).patches)
        wearer.wear(worn)
    inside, outside = [], []
    for case, was in zip(cases, before, strict=True):
        for probe, now, then in zip(case.probes, ask(model, case.probes), was, strict=True):
            if probe.kind in ("rewrite", "paraphrase"):
                inside.append(now[0])
            elif probe.kind == "neighbourhood":
                outside.append(now == then)
    wearer.take_off()
    assert sum(inside) / len(inside) >= 0.9 and sum(outside) / len(outside) >= 0.9


def test_the_papers_layout_is_not_understood_by_the_world_model(model, tmp_path):
    """Why the preset has another: whatever stands before a question, it answers from its weights."""
    cases = list(World().cases())
    paper = dataclasses.replace(Ike(), layout=PAPER_LAYOUT, k=16)
    paper.train(model, list(World(part="training").cases()), tmp_path)
    found = shares(list(single_edits(model, paper.prepare(model, tmp_path), cases[:8])))
    assert found["rewrite/likelier"] < 0.2
