"""EMMET: one request gives the averaged-key rank-one update, a batch meets every key, dependent keys are handled."""

import pytest
import torch

from methods.emmet import PRESETS, Emmet
from raysys.types import EditRefused, EditRequest
from tests.families import tiny

FACTS = [
    EditRequest("anna", "{} was born in the city of", "Anna", "Rome", "Paris"),
    EditRequest("dora", "The singer {} works as a", "Dora", "baker pilot", "singer"),
    EditRequest("oslo", "{} is the capital of", "Oslo", "Italy", "Norway"),
]
SETTINGS = {"layer": 1, "steps": 6, "lr": 0.1, "weight": 5.0, "contexts": ((5, 4),), "documents": 50, "ridge": 0.01}


@pytest.fixture
def prepare(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("Anna was born in Rome .\nThe Eiffel tower is in Paris .\nOslo is the capital of Norway .\n" * 9)
    return lambda model, **settings: Emmet(**{**SETTINGS, "corpus": str(path), **settings}).prepare(model, tmp_path)


def _parts(ready, model, facts):
    """Change, keys, residual of a batch, and C as the space has it."""
    module = model.mlp_out(1)
    done, _ = ready.solved(model, facts)
    [change], k = done.patches, done.keys[module]
    [aims] = done.aims.values()
    factor = ready.space.factor
    return (change.left @ change.right).double(), k, aims - done.now[module], factor @ factor.T


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_one_request_without_slack_is_the_rank_one_update_with_the_averaged_key_everywhere(family, prepare):
    model = tiny(family)
    change, k, residual, c = _parts(prepare(model, slack=0.0), model, FACTS[:1])
    u = torch.linalg.solve(c, k)
    torch.testing.assert_close(change, residual @ u.T / (u.T @ k), rtol=1e-4, atol=1e-5)


def test_a_batch_equals_its_closed_form(prepare):
    model = tiny("llama")
    ready = prepare(model, slack=0.3, norm_weight=2.0)
    change, k, residual, c = _parts(ready, model, FACTS)
    inner = 5.0 * c
    middle = k.T @ torch.linalg.solve(inner, k) + 0.3 * torch.eye(3, dtype=torch.float64)
    wanted = residual @ torch.linalg.solve(middle, k.T) @ torch.linalg.inv(inner)
    torch.testing.assert_close(change, wanted, rtol=1e-4, atol=1e-5)


def test_the_weight_on_the_norm_is_added_to_the_second_moment(prepare):
    model = tiny("gpt2")
    plain, heavy = (prepare(model, ridge=0.0, norm_weight=m) for m in (1.0, 6.0))
    c, more = (r.space.factor @ r.space.factor.T for r in (plain, heavy))
    torch.testing.assert_close(more - c, torch.eye(len(c), dtype=torch.float64))  # (6 - 1) / λ


def test_without_slack_every_key_of_the_batch_is_met(prepare):
    model = tiny("gpt2")
    change, k, residual, _ = _parts(prepare(model, slack=0.0), model, FACTS)
    torch.testing.assert_close(change @ k, residual, rtol=1e-4, atol=1e-4)


def test_the_same_fact_twice_is_refused_without_slack_and_written_with_it(prepare):
    model = tiny("gpt2")
    twice = [FACTS[0], FACTS[0]]
    with pytest.raises(EditRefused, match=r"'anna', 'anna': the change of .* not a finite number"):
        prepare(model, slack=0.0).edit(model, twice)
    change, k, residual, _ = _parts(prepare(model, slack=1e-3, weight=1e-3), model, twice)
    torch.testing.assert_close(change @ k, residual, rtol=0.05, atol=1e-2)


def test_presets_name_the_published_layers():
    assert PRESETS["gpt2-xl"]["layer"] == 17 and PRESETS["llama-3-8b"]["weight"] == 1e5
