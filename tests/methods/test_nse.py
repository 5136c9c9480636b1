"""NSE against a dense computation: values of the unedited model, rounds, neurons."""

import pytest
import torch

from methods import nse
from methods.nse import PRESETS, Nse
from raysys import steps
from raysys.patch import LowRank, wearing
from raysys.types import EditRefused
from tests.families import tiny
from tests.methods.dense import FACTS, Twin, close, stream

SETTINGS = {"batch": 2, "layers": (0, 1), "steps": 4, "lr": 0.1, "weight": 5.0, "ridge": 0.1, "iterations": 4,
            "near": 0.0, "far": 1e9, "contexts": ((5, 3),), "documents": 9}  # fmt: skip


def _chosen(keys, share):
    """Boolean (d_in,): the largest in Σ|k|, while their sum stays within `share`."""
    size = keys.abs().sum(1)
    kept = torch.zeros(len(size), dtype=torch.bool)
    total = 0.0
    for i in sorted(range(len(size)), key=lambda i: -float(size[i])):
        total += float(size[i])
        if total > share * float(size.sum()) and share < 1:
            break
        kept[i] = True
    return kept


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_updates_equal_the_dense_solution(family, share, corpus, found_values, tmp_path):
    model = tiny(family)
    ready = Nse(**SETTINGS, neurons=share, corpus=corpus).prepare(model, tmp_path)
    twin = Twin(model)
    contexts = ready.contexts.texts
    modules = [model.mlp_out(i) for i in (0, 1)]
    moments = {}
    for module in modules:
        moment = twin.moment(module, corpus, 9)
        moments[module] = moment + 0.1 * moment.diagonal().mean() * torch.eye(len(moment))
    earlier = {m: torch.zeros_like(moments[m]) for m in modules}
    batches = [FACTS[:2], FACTS[2:]]
    for number, (edit, changes) in enumerate(stream(model, ready, batches)):
        start = {m: twin.matrix(m).clone() for m in modules}
        for _ in range(3):
            written = {}
            for layer, module in enumerate(modules):
                keys = twin.keys(module, batches[number], contexts)
                missing = (found_values[number] - twin.hidden(1, batches[number])) / (2 - layer)
                kept = _chosen(keys, share)
                whole = 5.0 * moments[module] + earlier[module] + keys @ keys.T
                part = torch.zeros_like(keys)
                part[kept] = torch.linalg.solve(whole[kept][:, kept], keys[kept])
                twin.matrix(module).add_(missing @ part.T)
                written[module] = int(kept.sum())
        assert edit.log["neurons"] == written  # of the last round
        assert len(edit.log["away"]) == 3
        for module in modules:
            close(changes[module], twin.matrix(module) - start[module], 1e-3)
            keys = twin.keys(module, batches[number], contexts)
            earlier[module] += keys @ keys.T


def test_values_are_those_of_the_unedited_model(corpus, found_values, tmp_path):
    model = tiny("llama")
    ready = Nse(**SETTINGS, corpus=corpus).prepare(model, tmp_path)
    ready.edit(model, FACTS[:1])
    worn = LowRank(f"{model.mlp_out(0)}.weight", torch.ones(32, 1), torch.ones(1, 48))
    with wearing(model, (worn,)):
        before = model.matrix(worn.weight).clone()
        ready.edit(model, FACTS[:1])
        assert torch.equal(before, model.matrix(worn.weight))
    assert torch.equal(found_values[0], found_values[1])


def test_only_requests_that_miss_more_than_near_are_written(corpus, tmp_path):
    model = tiny("gpt2")
    away = Nse(**SETTINGS, corpus=corpus).prepare(model, tmp_path).edit(model, FACTS[:2]).log["away"][0]
    between = sum(away) / 2
    far_one = max((0, 1), key=lambda i: away[i])
    edit = (
        Nse(**{**SETTINGS, "near": between, "iterations": 2}, corpus=corpus)
        .prepare(model, tmp_path)
        .edit(model, FACTS[:2])
    )
    assert all(p.rank == 1 for p in edit.patches)
    still = Nse(**{**SETTINGS, "near": max(away) + 1}, corpus=corpus).prepare(model, tmp_path).edit(model, FACTS[:2])
    assert still.patches == () and set(still.memory) == {model.mlp_out(0), model.mlp_out(1)}
    assert away[far_one] > between


def test_a_model_that_is_too_far_from_the_value_is_said(corpus, tmp_path):
    model = tiny("gpt2")
    with pytest.raises(EditRefused, match=r"'anna'.*raise `far` or edit less"):
        Nse(**{**SETTINGS, "far": 1e-6}, corpus=corpus).prepare(model, tmp_path).edit(model, FACTS[:1])


def test_of_a_batch_those_that_stay_too_far_are_refused_and_the_rest_is_written(corpus, tmp_path):
    model = tiny("gpt2")
    away = Nse(**SETTINGS, corpus=corpus).prepare(model, tmp_path).edit(model, FACTS[:2]).log["away"][0]
    between, far_one = sum(away) / 2, max((0, 1), key=lambda i: away[i])
    bounded = Nse(**{**SETTINGS, "far": between, "iterations": 2}, corpus=corpus).prepare(model, tmp_path)
    with pytest.raises(EditRefused, match=rf"^edit '{FACTS[far_one].id}': .* {away[far_one]:.3g} away.*raise `far`"):
        bounded.edit(model, FACTS[:2])
    edit, refused = steps.make(bounded, model, FACTS[:2])
    assert set(refused) == {FACTS[far_one].id}
    assert edit.patches and all(p.rank == 1 for p in edit.patches)


def test_presets_are_the_published_ones():
    assert (PRESETS["gpt2-xl"]["near"], PRESETS["gpt2-xl"]["far"]) == (35, 150)
    assert (PRESETS["llama-3-8b"]["near"], PRESETS["llama-3-8b"]["far"]) == (2.5, 50)
    assert PRESETS["gpt-j-6b"]["neurons"] == 0.8


@pytest.mark.parametrize("wrong", [{"iterations": 1}, {"neurons": 0.0}])
def test_settings_that_write_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="nse: "):
        Nse(**wrong)


def test_at_least_one_neuron_is_written():
    assert nse.neurons(torch.tensor([[1.0], [-9.0], [2.0]]), 0.01).tolist() == [1]
    assert nse.neurons(torch.tensor([[1.0], [-9.0], [2.0]]), 0.95).tolist() == [1, 2]
