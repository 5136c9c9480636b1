"""The small system gives what the large one gives: Woodbury equals LU, with and without keys of earlier edits."""

import pytest
import torch

from methods.parts import metric

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


def test_a_value_goes_on_in_several_ways_and_none_of_them_sees_another():
    space = {"m": metric.Whitened.of(_moment(), 0.0)}
    trunk, apart = (metric.remembered(space, None, {"m": _keys(3)}, 15.0) for _ in range(2))
    ways = [metric.remembered(space, trunk, {"m": _keys(2, seed)}, 15.0) for seed in (7, 8)]
    again = [ways[0], metric.remembered(space, apart, {"m": _keys(2, 8)}, 15.0)]
    for one, other in zip(ways, again, strict=True):
        assert torch.equal(one["m"].seen, other["m"].seen) and torch.equal(one["m"].factor, other["m"].factor)
    assert not torch.equal(ways[0]["m"].seen, ways[1]["m"].seen)


def test_a_long_stream_is_the_same_whether_it_goes_on_or_is_taken_up_again_and_answers_leave_it_alone():
    space, k = {"m": metric.Whitened.of(_moment(), 0.0)}, _keys(2, 99)
    steps = [{"m": _keys(1 + seed % 4, seed).float()} for seed in range(30)]
    live, found = None, []
    for step in steps:
        live = metric.remembered(space, live, step, 15.0)
        seen, factor = live["m"].seen.clone(), live["m"].factor.clone()
        found.append(metric.answer(space["m"], k, 15.0, live["m"]))
        assert torch.equal(live["m"].seen, seen) and torch.equal(live["m"].factor, factor)
    resumed = None
    for step, wanted in zip(steps, found, strict=True):
        resumed = metric.remembered(space, resumed, step, 15.0)
        assert torch.equal(metric.answer(space["m"], k, 15.0, resumed["m"]), wanted)
    whole = torch.cat([s["m"].double() for s in steps], 1)
    held = 15 * _moment() + whole @ whole.T
    assert _error(found[-1], torch.linalg.solve(held + k @ k.T, k)) < 1e-8


def test_remembering_copies_what_it_has_only_when_room_runs_out():
    space = {"m": metric.Whitened.of(_moment(), 0.0)}
    memory, rooms = None, set()
    for seed in range(200):
        memory = metric.remembered(space, memory, {"m": _keys(1, seed)}, 15.0)
        rooms.add(memory["m"].room.keys.data_ptr())
    assert len(rooms) <= 5  # 16, 32, 64, 128, 256


@pytest.mark.parametrize("seed", range(20))
def test_a_single_key_that_depends_on_earlier_ones_gives_no_number(seed):
    space, k = metric.Whitened(torch.eye(4, dtype=torch.float64)), _keys(2, seed)[:4]
    memory = metric.remembered({"m": space}, None, {"m": k}, 0.0)
    assert metric.answer(space, k[:, :1] + k[:, 1:], 0.0, memory["m"]).isnan().all()
    assert metric.answer(space, _keys(1, seed + 50)[:4], 0.0, memory["m"]).isfinite().all()


def test_keys_that_cannot_be_remembered_are_told_instead_of_kept():
    space, k = {"m": metric.Whitened.of(_moment(), 0.0)}, _keys(3)
    memory = metric.remembered(space, None, {"m": k}, 1e-13)
    with pytest.raises(ValueError, match=r"^m: the keys of this edit can't be remembered.*raise"):
        metric.remembered(space, memory, {"m": k[:, :1]}, 1e-13)
    with pytest.raises(ValueError, match="can't be remembered"):
        metric.remembered(space, None, {"m": k * float("inf")}, 15.0)
    assert memory["m"].seen.shape == (D, 3) and memory["m"].factor.isfinite().all()
