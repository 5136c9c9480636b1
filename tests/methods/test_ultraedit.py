"""UltraEdit: normalised over all edits so far, written by least squares."""

import pytest
import torch

from methods.parts import gradients
from methods.parts.hypernet import Stats
from methods.ultraedit import UltraEdit
from raysys import patch
from raysys.types import EditRequest, remembered
from tests.families import tiny

FACTS = [
    EditRequest("anna", "{} was born in the city of", "Anna", "Rome", "Paris"),
    EditRequest("dora", "The singer {} works as a", "Dora", "baker pilot", "singer"),
    EditRequest("oslo", "{} is the capital of", "Oslo", "Italy", "Norway"),
]


def dense(p):
    delta = torch.zeros(p.shape)
    p.add_to(delta)
    return delta


def tokens(model, facts, names, **how):
    rows = [gradients.row(model, q, last=True) for q in facts]
    return gradients.trace(model, gradients.lay(model, rows), names).modules


def test_the_statistics_are_mean_and_deviation_of_all_tokens_of_all_edits():
    model = tiny("llama")
    ready = UltraEdit(lr=0.0).prepare(model)
    memory, seen = None, {}
    for fact in FACTS:
        edit = ready.edit(model, [fact], memory)
        memory = remembered(ready, memory, edit.memory)
        for name, trace in tokens(model, [fact], list(ready.shapes)).items():
            d_in, d_out = ready.shapes[name]
            seen.setdefault(f"{d_in}x{d_out}", []).append(torch.cat((trace.x, trace.delta), 1))
    assert len(seen) == len(memory) / 3
    for key, parts in seen.items():
        rows = torch.cat(parts).double()
        stats = Stats(*(memory[f"{key}.{what}"] for what in ("n", "mean", "m2")))
        assert int(stats.n) == len(rows)
        torch.testing.assert_close(stats.mean, rows.mean(0))
        torch.testing.assert_close(stats.std, rows.std(0))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_change_is_the_dense_solution_in_few_terms_or_as_a_matrix(family):
    model = tiny(family)
    ready = UltraEdit(lr=1e-3, ridge=0.5, batch=3).prepare(model)
    edit = ready.edit(model, FACTS)
    found = tokens(model, FACTS, list(ready.shapes))
    for p, (name, trace) in zip(edit.patches, found.items(), strict=True):
        rows = torch.cat((trace.x, trace.delta), 1).double()
        hat = (rows - rows.mean(0)) / (rows.std(0) + 1e-7)
        d_in = trace.x.shape[1]
        value = -1e-3 * hat[:, :d_in].square().sum(1, keepdim=True) * hat[:, d_in:]
        h = trace.x.double()
        wanted = torch.linalg.solve(h.T @ h + 0.5 * torch.eye(d_in, dtype=torch.float64), h.T @ value)
        error = (dense(p).double() - wanted.T).norm() / wanted.norm()
        assert p.weight == f"{name}.weight" and float(error) < 1e-4
    alone = ready.edit(model, FACTS[:1])
    assert {p.kind for p in alone.patches} == {"low_rank"}


def test_only_target_tokens_may_count():
    model = tiny("gpt2")
    every, few = (UltraEdit(lr=1e-3, tokens=t).prepare(model).edit(model, FACTS[1:2]) for t in ("all", "target"))
    row = gradients.row(model, FACTS[1])
    assert few.log["tokens"] == len(row.labels) and every.log["tokens"] == len(row.ids) + 1


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_batches_of_one_pass_make_no_difference_but_for_the_published_code(family):
    model = tiny(family)
    for published in (False, True):
        one, many = (
            UltraEdit(lr=1e-3, batch=3, at_once=n, published=published).prepare(model).edit(model, FACTS)
            for n in (1, 3)
        )
        same = all(torch.allclose(dense(a), dense(b)) for a, b in zip(one.patches, many.patches, strict=True))
        assert same is not published  # padding is a target there, and moves the positions


def test_the_published_normaliser_counts_deviations_too_large():
    model = tiny("gpt2")
    right, theirs = (UltraEdit(lr=1e-3, published=p).prepare(model).edit(model, FACTS[:1]) for p in (False, True))
    for key in (k for k in right.memory if k.endswith(".m2")):
        n = float(right.memory[key.replace("m2", "n")])
        torch.testing.assert_close(theirs.memory[key], right.memory[key] * n / (n - 1), rtol=1e-4, atol=1e-12)


def test_an_edit_makes_its_target_likelier():
    model = tiny("llama")
    row = gradients.row(model, FACTS[0])
    batch = gradients.lay(model, [row])

    def loss():
        with torch.no_grad():
            found = gradients.logprobs(model, batch, gradients.trunk(model, batch, [model.mlp_out(1)]))
        return float(gradients.nll(batch, found)[0])

    before = loss()
    edit = UltraEdit(lr=3e-4).prepare(model).edit(model, FACTS[:1])
    with patch.wearing(model, edit.patches):
        assert loss() < before
