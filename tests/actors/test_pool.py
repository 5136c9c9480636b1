"""The pool on several real nodes: it grows and shrinks, leaves nodes, and survives what kills or hangs evaluators."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors import pool as pools
from actors.places import Limits
from actors.pool import EvaluatorPool, PoolError
from actors.waiting import Done, Failed
from tests.actors import light, small

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A head with two CPUs; tests add nodes and take them away again."""
    with small.machines(2) as cluster:
        yield cluster


def told(events: list[tuple[str, dict[str, Any]]], what: str) -> list[dict[str, Any]]:
    return [details for name, details in events if name == what]


@pytest.fixture
def events() -> list[tuple[str, dict[str, Any]]]:
    return []


@pytest.fixture
def pool(nodes: Any, events: list[Any], request: pytest.FixtureRequest) -> Iterator[EvaluatorPool]:
    """Up to two evaluators, let go after half a second; `request.param` changes the limits."""
    limits: dict[str, Any] = {"fewest": 0, "most": 2, "retries": 1, "idle": 0.5, "stall": 60.0}
    limits |= getattr(request, "param", {})
    made = EvaluatorPool(light.start, Limits(**limits), lambda what, **more: events.append((what, more)))
    yield made
    made.close()


def test_it_grows_with_the_units_and_shrinks_to_nothing(pool: EvaluatorPool, events: list[Any], tmp_path: Path) -> None:
    assert pool.size == 0
    pool.submit(light.units(["0.01"]))
    assert pool.size == 1
    light.work(pool)
    gate = tmp_path / "gate"
    pool.submit(light.units([str(gate)] * 4, "t"))
    light.work(pool, until=lambda: pool.busy == 2)
    gate.touch()
    done = light.work(pool)
    assert len({d.about["evaluator"] for d in done if isinstance(d, Done)}) == 2
    light.work(pool, until=lambda: pool.size == 0)
    assert len(told(events, "evaluator retired")) == 2
    pool.submit(light.units(["0.01"], "u"))  # and it comes back
    assert len(light.work(pool)) == 1


def test_a_unit_that_kills_whoever_takes_it_is_given_up_and_the_others_are_scored(
    pool: EvaluatorPool, events: list[Any]
) -> None:
    pool.submit(light.units(["0.05", "kill", "0.05", "raise", "0.05"]))
    finished = light.work(pool)
    failed = {f.unit.id: f for f in finished if isinstance(f, Failed)}
    assert set(failed) == {"s/1", "s/3"} and len(finished) == 5
    assert all(f.tries == 2 for f in failed.values())
    assert failed["s/3"].reason == "ArithmeticError: it can't be scored"
    assert len(told(events, "evaluator lost")) == 3  # among others, and twice alone
    assert not pool.tries and not pool.moves  # nothing is kept of units that are over


@pytest.mark.parametrize("pool", [{"fewest": 2}], indirect=True)
def test_nobody_has_two_units_while_another_has_none(pool: EvaluatorPool, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    light.work(pool, until=lambda: not pool.starting)
    pool.submit(light.units([str(gate)] * 2))
    assert [len(p.busy) for p in pool.places] == [1, 1]
    pool.submit(light.units([str(gate)] * 2, "t"))
    assert [len(p.busy) for p in pool.places] == [2, 2]
    gate.touch()
    assert len(light.work(pool)) == 4


@pytest.mark.parametrize("pool", [{"fewest": 2}], indirect=True)
def test_a_bad_evaluator_fails_no_unit_that_another_can_score(pool: EvaluatorPool, events: list[Any]) -> None:
    light.work(pool, until=lambda: not pool.starting)
    pool.submit(light.units(["not evaluator-0"] * 12))
    finished = light.work(pool)
    assert len(finished) == 12 and all(isinstance(f, Done) for f in finished)
    assert {f.about["evaluator"] for f in finished if isinstance(f, Done)} == {"evaluator-1"}
    again = [e["unit"] for e in told(events, "unit tried again")]
    assert again and len(set(again)) == len(again)


@pytest.mark.parametrize("pool", [{"fewest": 2}], indirect=True)
def test_a_place_where_everything_fails_is_given_up(pool: EvaluatorPool, events: list[Any]) -> None:
    light.work(pool, until=lambda: not pool.starting)
    finished: list[Any] = []
    for n in range(20):
        if pool.size == 1:
            break
        pool.submit(light.units(["not evaluator-0"] * 8, f"s{n}"))
        finished += light.work(pool)
        light.work(pool, until=lambda: not pool.starting)
    assert pool.size == 1
    assert len(pool._kept) == 1  # it holds what is bad until the end
    [given_up] = told(events, "evaluator given up")
    assert given_up["evaluator"].startswith("evaluator-0") and "illegal memory access" in given_up["reason"]
    assert finished and all(isinstance(f, Done) for f in finished)


@pytest.mark.parametrize("pool", [{"fewest": 2}], indirect=True)
def test_an_evaluator_with_another_model_is_not_asked(pool: EvaluatorPool, events: list[Any]) -> None:
    light.work(pool, until=lambda: not pool.starting)
    pool._start = lambda name: light.start(name, digest="other")
    ray.kill(pool.places[1].actor)
    pool.submit(light.units(["0.3"] * 6))
    finished = light.work(pool)
    assert len(finished) == 6 and all(isinstance(f, Done) for f in finished)
    light.work(pool, until=lambda: not pool.starting)
    assert pool.size == 1
    assert any("holds another model" in e["reason"] for e in told(events, "evaluator lost"))


@pytest.mark.parametrize("pool", [{"stall": 2.0, "retries": 0}], indirect=True)
def test_an_evaluator_that_hangs_is_killed_and_replaced(pool: EvaluatorPool, events: list[Any]) -> None:
    pool.submit(light.units(["hang", "0.05", "0.05", "0.05"]))
    finished = light.work(pool)
    [failed] = [f for f in finished if isinstance(f, Failed)]
    assert failed.unit.id == "s/0" and "no result for 2 s; it was killed" in failed.reason
    assert len(finished) == 4
    assert "no result for 2 s" in told(events, "evaluator lost")[0]["reason"]


@pytest.mark.parametrize("pool", [{"stall": 10.0}], indirect=True)
def test_one_that_hangs_while_it_gets_ready_is_replaced_and_one_that_waits_for_room_is_not(
    pool: EvaluatorPool, events: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "LOOKING", 0.1)
    monkeypatch.setattr(pools, "LOADING", 10.0)
    elsewhere = {"evaluator-0": on("room that comes late", "evaluator-0")}
    pool._start = lambda name: (
        elsewhere.get(name) or ray.remote(Hangs if name == "evaluator-1" else light.Waits).remote(name)
    )
    pool.submit(light.units(["0.05", "0.05"]))
    finished = light.work(pool)
    assert len(finished) == 2 and all(isinstance(f, Done) for f in finished)
    assert [e["evaluator"] for e in told(events, "evaluator lost")] == ["evaluator-1"]
    assert "not ready after 10 s" in told(events, "evaluator lost")[0]["reason"]


@pytest.mark.parametrize("pool", [{"retries": 0}], indirect=True)
def test_what_is_lost_with_a_node_is_no_failure(nodes: Any, pool: EvaluatorPool, events: list[Any]) -> None:
    node = nodes.add_node(num_cpus=2, resources={"spot": 2})
    pool._start = lambda name: on("spot", name)
    pool.submit(light.units(["1.0"] * 6))
    light.work(pool, until=lambda: pool.busy == 2)
    nodes.remove_node(node, allow_graceful=False)  # as a machine that is switched off
    nodes.add_node(num_cpus=2, resources={"spot": 2})
    finished = light.work(pool)
    assert len(finished) == 6 and all(isinstance(f, Done) for f in finished)  # no retry was allowed
    assert told(events, "node lost")


def test_a_node_that_is_lost_while_an_evaluator_gets_ready_is_no_failed_start(
    nodes: Any, pool: EvaluatorPool, events: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "LOOKING", 0.1)
    node = nodes.add_node(num_cpus=1, resources={"frail": 1})
    first = ray.remote(Hangs).options(num_cpus=1, resources={"frail": 1}).remote("evaluator-0")
    pool._start = lambda name: first if name == "evaluator-0" else light.start(name)
    pool.submit(light.units(["0.05"]))
    light.work(pool, until=lambda: bool(pool.places[0].nodes))
    assert pool.places[0].nodes == (node.node_id,)
    nodes.remove_node(node, allow_graceful=False)
    finished = light.work(pool)
    assert [type(f) for f in finished] == [Done]
    assert [e["evaluator"] for e in told(events, "node lost")] == ["evaluator-0"] and not told(events, "evaluator lost")


def test_a_node_that_is_to_leave_gets_no_new_unit(
    nodes: Any, pool: EvaluatorPool, events: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pools, "LOOKING", 0.1)
    nodes.add_node(num_cpus=1, resources={"doomed": 1})
    pool._start = lambda name: on("doomed" if name == "evaluator-0" else "CPU", name)
    gate = tmp_path / "gate"
    pool.submit(light.units([str(gate)] * 4 + ["0.1"] * 8))
    light.work(pool, until=lambda: pool.busy == 2)
    doomed = next(p.nodes[0] for p in pool.places if p.number == 0)
    notice(nodes, doomed)
    light.work(pool, until=lambda: bool(told(events, "node is to leave")))
    gate.touch()
    finished = light.work(pool)
    assert {f.unit.id for f in finished if isinstance(f, Done)} == {f"s/{n}" for n in range(12)}
    assert len(finished) == 12 and not told(events, "unit tried again")
    there = [f for f in finished if isinstance(f, Done) and f.about["node"] == doomed]
    assert len(there) <= 1  # what ran when the notice came
    assert told(events, "node is to leave")[0]["node"] == doomed


def test_evaluators_that_can_not_start_end_the_study_with_a_reason(pool: EvaluatorPool) -> None:
    def broken(name: str) -> Any:
        return ray.remote(Broken).options(num_cpus=0).remote()

    pool._start = broken
    pool.submit(light.units(["0.1"]))
    with pytest.raises(PoolError, match=r"no evaluator can be started: .*no weights here"):
        light.work(pool)


class Hangs(light.Waits):
    """Never gets ready."""

    def __init__(self, name: str) -> None:
        time.sleep(1000)


class Broken:
    """Can't be made."""

    def __init__(self) -> None:
        raise ValueError("no weights here")

    def describe(self) -> None:
        """Never reached."""


def on(resource: str, name: str) -> Any:
    """A light evaluator on a node that has `resource`."""
    more: Any = {"num_cpus": 1} if resource == "CPU" else {"num_cpus": 1, "resources": {resource: 1}}
    return ray.remote(light.Waits).options(name=f"{os.urandom(4).hex()}:{name}", **more).remote(name)


def notice(nodes: Any, node: str) -> None:
    """Tell the cluster that a node will be pre-empted in a minute, as a cloud does."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int((time.time() + 60) * 1000)
    accepted, why = GcsClient(address=nodes.address).drain_node(node, reason, "it is taken away", deadline)
    assert accepted, why
