"""The small system gives what the large one gives: Woodbury equals LU, with and without keys of earlier edits."""

import pytest
import torch

from methods import metric

D = 40


def _moment(seed=0, conditioned=1e-4):
    torch.manual_seed(seed)
    a = torch.randn(D, 3 * D, dtype=torch.float64) * torch.logspace(0, -2, D, dtype=torch.float64)[:, None]
    return a @ a.T / (3 * D) + conditioned * torch.eye(D, dtype=torch.float64)


def _keys(n, seed=1):
    torch.manual_seed(seed)
    return torch.randn(D, n, dtype=torch.float64)


def _error(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("weight", [1.0, 15.0, 15000.0])
@pytest.mark.parametrize("n", [1, 7, 60])
def test_woodbury_equals_lu(weight, n):
    c, k = _moment(), _keys(n)
    wanted = torch.linalg.solve(weight * c + k @ k.T, k)
    assert _error(metric.answer(metric.Whitened.of(c, 0.0), k, weight), wanted) < 1e-8


def test_keys_of_earlier_edits_count_as_if_the_large_matrix_held_them():
    c, space = _moment(), metric.Whitened.of(_moment(), 0.0)
    steps = [_keys(n, seed) for seed, n in enumerate((1, 5, 1, 30, 20), 2)]
    memory, held = None, 15 * c
    for k in steps:
        memory = metric.remembered({"m": space}, memory, {"m": k.float()}, 15.0)
        held = held + k.float().double() @ k.float().double().T
    k = _keys(3)
    got = metric.answer(space, k, 15.0, memory["m"])
    assert _error(got, torch.linalg.solve(held + k @ k.T, k)) < 1e-8


def test_remembering_leaves_what_was_remembered_before_as_it_was():
    space = metric.Whitened.of(_moment(), 0.0)
    before = metric.remembered({"m": space}, None, {"m": _keys(2)}, 15.0)
    seen, factor = before["m"].seen.clone(), before["m"].factor.clone()
    after = metric.remembered({"m": space}, before, {"m": _keys(2, 9)}, 15.0)
    assert torch.equal(before["m"].seen, seen) and torch.equal(before["m"].factor, factor)
    assert after["m"].seen.shape == (D, 4)


def test_with_no_floor_keys_are_met_exactly_and_dependent_ones_give_no_number():
    space, k = metric.Whitened.of(_moment(), 0.0), _keys(5)
    got = metric.answer(space, k, 0.0)
    torch.testing.assert_close(got.T @ k, torch.eye(5, dtype=torch.float64), rtol=1e-8, atol=1e-8)
    twice = torch.cat([k, k[:, :1]], 1)
    assert metric.answer(space, twice, 0.0).isnan().all()
    assert metric.answer(space, twice, 15.0).isfinite().all()


def test_the_way_back_undoes_the_way_in():
    space, k = metric.Whitened.of(_moment(), 0.0), _keys(4)
    torch.testing.assert_close(space.factor @ space.into(k), k)
    torch.testing.assert_close(space.factor.T @ space.back(k), k)
