"""R-ROME and p-ROME: one key everywhere, so that the update can't explode."""

import json

import pytest
import torch

from methods.parts import locate
from methods.r_rome import PRESETS, RRome
from methods.rome import Rome
from raysys.patch import wearing
from raysys.types import EditRefused
from tests.families import tiny
from tests.methods.dense import FACTS

SETTINGS = {"layer": 1, "steps": 6, "lr": 0.3, "weight_decay": 0.0, "contexts": ((5, 5),), "documents": 9, "ridge": 0.1}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("keys", ["mean", "bare"])
def test_the_edited_matrix_maps_the_one_key_to_the_value(family, keys, corpus, tmp_path):
    model = tiny(family)
    ready = RRome(**SETTINGS, keys=keys, corpus=corpus).prepare(model, tmp_path)
    texts = ready.rome.contexts.texts
    module = model.mlp_out(1)
    edit = ready.edit(model, FACTS[:1])
    reading = locate.read(model, module, [locate.row(model, FACTS[0], c) for c in texts])
    key = reading.inputs.mean(0) if keys == "mean" else reading.inputs[0]
    search = locate.Search(steps=6, lr=0.3, weight_decay=0.0, clamp=4.0, kl=0.0625)
    [value] = locate.values(model, FACTS[:1], texts, 1, search, "mlp")
    with wearing(model, edit.patches):
        bias = model.module(module).bias
        got = model.matrix(f"{module}.weight") @ key + (0 if bias is None else bias)
    torch.testing.assert_close(got, value.wanted, rtol=1e-4, atol=1e-4 * float(value.wanted.norm()))


def test_the_direction_is_the_inverse_second_moment_times_the_one_key(corpus, tmp_path):
    model = tiny("gpt2")
    for keys in ("mean", "bare"):
        ready = RRome(**SETTINGS, keys=keys, corpus=corpus).prepare(model, tmp_path)
        rows = [locate.row(model, FACTS[0], c) for c in ready.rome.contexts.texts]
        read = locate.read(model, model.mlp_out(1), rows).inputs.double()
        key = read.mean(0) if keys == "mean" else read[0]
        c = ready.rome.moment.matrix
        wanted = torch.linalg.solve(c + 0.1 * c.diagonal().mean() * torch.eye(len(c)), key)
        [change] = ready.edit(model, FACTS[:1]).patches
        torch.testing.assert_close(change.right[0], (wanted / wanted.norm()).float(), rtol=1e-4, atol=1e-5)
        reach = float(ready.edit(model, FACTS[:1]).log["reach"])
        assert reach > 0  # k̄ᵀ C⁻¹ k̄ can't be zero


def test_with_the_bare_context_alone_all_three_are_the_same(corpus, tmp_path):
    model = tiny("llama")
    alone = {**SETTINGS, "contexts": (), "corpus": corpus}
    edits = [m.prepare(model, tmp_path).edit(model, FACTS[:1]) for m in (
        Rome(**alone), RRome(**alone), RRome(**alone, keys="bare"))]  # fmt: skip
    for other in edits[1:]:
        assert torch.equal(edits[0].patches[0].left, other.patches[0].left)
        assert torch.equal(edits[0].patches[0].right, other.patches[0].right)


def test_identity_names_the_method_and_what_it_was_made_from(corpus, tmp_path):
    said = RRome(**SETTINGS, corpus=corpus).prepare(tiny("gpt2"), tmp_path).identity()
    assert json.loads(json.dumps(said))["name"] == "r_rome"
    assert set(said["artifacts"]) == {"contexts", "second_moment"} and said["settings"]["keys"] == "mean"


def test_without_a_second_moment_the_direction_is_the_key(corpus, tmp_path):
    ready = RRome(**SETTINGS, corpus=corpus, second_moment=False).prepare(tiny("gpt2"), tmp_path)
    assert ready.rome.moment is None and "second_moment" not in ready.identity()["artifacts"]


def test_two_requests_are_refused(corpus, tmp_path):
    model = tiny("gpt2")
    with pytest.raises(EditRefused, match="one edit at a time"):
        RRome(**SETTINGS, corpus=corpus).prepare(model, tmp_path).edit(model, FACTS[:2])


def test_presets_are_those_of_rome():
    assert PRESETS["gpt2-xl"]["layer"] == 17 and PRESETS["llama-2-7b"]["layer"] == 5
