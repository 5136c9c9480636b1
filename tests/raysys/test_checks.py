"""The figures behind a method's presets."""

from methods.ft import FtM
from methods.rome import Rome
from raysys import checks
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
