"""The figures behind a method's presets."""

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from methods.ft import FtM
from methods.parts import locate
from methods.rome import Rome
from raysys import checks
from raysys.tables import singles_table, singles_tree
from raysys.types import EditCase, EditRequest, Probe
from tests.families import tiny

CASE = EditCase(
    EditRequest("anna", "{} was born in the city of", "Anna", "Rome", "Paris"),
    (
        Probe("rewrite", "Anna was born in the city of", "Rome", "Paris"),
        Probe("paraphrase", "The city of Anna is", "Rome", "Paris"),
        Probe("neighbourhood", "Bert was born in", "Oslo", "Rome"),
        Probe("neighbourhood", "Carla was born in", "Lima"),
    ),
)
REFUSED = EditCase(EditRequest("none", "{} was born in", "Anna", " "), ())


def test_single_edits_are_probed_before_and_after_and_taken_back(tmp_path):
    model = tiny("llama")
    model.net.lm_head.weight.data.mul_(8)
    before = {k: v.clone() for k, v in model.net.state_dict().items()}
    tuned = FtM(layers=(0, 1, 2), steps=50, lr=3e-3)
    done, refused = checks.single_edits(model, tuned.prepare(model), [CASE, REFUSED])
    assert all((v == before[k]).all() for k, v in model.net.state_dict().items())
    assert [o.kind for o in done.outcomes] == [p.kind for p in CASE.probes]
    assert done.outcomes[0].likelier and done.outcomes[0].greedy and not done.outcomes[0].was_greedy
    assert "has no tokens" in refused.refused
    found = checks.shares([done, refused])
    assert found["rewrite/likelier"] == found["rewrite/greedy"] == 1.0
    assert set(found) == {
        f"{k}/{m}" for k in ("rewrite", "paraphrase", "neighbourhood") for m in ("likelier", "greedy", "unchanged")
    }


def test_the_worn_matrix_is_held_against_the_change(tmp_path):
    model = tiny("gpt2")
    settings = Rome(layer=0, steps=3, lr=0.1, weight_decay=0.5, second_moment=False, corpus="none", documents=1)
    [done] = checks.single_edits(model, settings.prepare(model, tmp_path), [CASE])
    assert 0 < done.miss < 1e-4
    assert done.log["passes"] == 3 and done.seconds > 0 and not done.refused


def test_a_probe_without_a_rival_is_neither_likelier_nor_not():
    model = tiny("llama")
    [first, *_, last] = checks.ask(model, CASE.probes)
    assert isinstance(first[0], bool) and last[0] is None
    [done] = checks.single_edits(model, FtM(layers=(1,), steps=1, lr=1e-3).prepare(model), [CASE])
    held = [o.likelier for o in done.outcomes if o.kind == "neighbourhood"]
    assert checks.shares([done])["neighbourhood/likelier"] == float(held[0])
    alone = replace(done, outcomes=done.outcomes[-1:])
    text = StringIO()
    Console(file=text, width=100).print(singles_table("one", singles_tree([alone], checks.shares([alone]))))
    assert text.getvalue().split()[-3:-1] == ["neighbourhood", "–"]
    assert set(checks.shares([alone])) == {"neighbourhood/greedy", "neighbourhood/unchanged"}


def test_a_refused_edit_fails_what_it_should_have_changed():
    model = tiny("llama")
    refused = replace(REFUSED, probes=CASE.probes)
    [done] = checks.single_edits(model, FtM(layers=(1,), steps=1, lr=1e-3).prepare(model), [refused])
    assert done.refused and all(o.unchanged for o in done.outcomes)
    told = replace(done, outcomes=tuple(replace(o, likelier=True, greedy=True) for o in done.outcomes))
    ways = ("likelier", "greedy")
    tree = singles_tree([told], checks.shares([told]))
    assert "1 refused edit: failed" in str(singles_table("one", tree).renderables[-1].caption)
    assert checks.shares([told]) == {f"{k}/{w}": 0.0 for k in ("rewrite", "paraphrase") for w in ways}


def test_the_model_is_the_base_again_when_reading_it_fails(tmp_path, monkeypatch):
    model = tiny("gpt2")
    before = {k: v.clone() for k, v in model.net.state_dict().items()}
    settings = Rome(layer=0, steps=3, lr=0.1, weight_decay=0.5, second_moment=False, corpus="none", documents=1)
    ready = settings.prepare(model, tmp_path)
    edit = ready.edit(model, [CASE.request])
    read, reads = locate.read, []

    def broken(*given):
        reads.append(1)
        if len(reads) == 2:
            raise RuntimeError("out of memory")
        return read(*given)

    monkeypatch.setattr(locate, "read", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        checks._miss(model, CASE.request, edit)
    assert all((v == before[k]).all() for k, v in model.net.state_dict().items())
