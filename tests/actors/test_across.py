"""A model split over processes on several nodes: what one node with them computes, also when a node is lost.

GPUs are Ray's bookkeeping alone here: shares of them decide which node a rank may lie on, and CPUs compute.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from raysys.results import Results
from raysys.spec import StudySpec
from raysys.study import run
from tests.actors import small

pytestmark = pytest.mark.timeout(280)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """An evaluator's group has to lie on two of three nodes, the editor's on the head. A node is to spare."""
    with small.machines(4) as cluster:
        cluster.workers = [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(3)]
        yield cluster


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.folder(tmp_path_factory.mktemp("across"), "opt")


def study(place: Path, name: str) -> StudySpec:
    spread = {"tensor_parallel": 2, "across_nodes": True, "gpus_per_evaluator": 2}
    words = {"name": "tests.actors.small:Words", "label": "words", "items": 32, "seconds": 0.1}
    methods = [small.tree(place)["methods"][0]]
    return small.spec(
        place, name=name, device="cpu", methods=methods, benchmarks=[words], cluster={"evaluators": 1} | spread
    )


def across() -> set[str]:
    """Nodes of the groups that lie on more than one."""
    groups = [set(g["bundles_to_node_id"].values()) for g in ray.util.placement_group_table().values()
              if g["state"] == "CREATED"]  # fmt: skip
    return {node for nodes in groups if len(nodes) > 1 for node in nodes if node}


def watched(spec: StudySpec, when: Callable[[], bool]) -> tuple[Results, bool]:
    """The study's results, and whether `when` came true while it ran."""
    over, seen = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(0.1) and not seen.is_set():
            if when():
                seen.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return run(spec), seen.is_set()
    finally:
        over.set()
        watcher.join()


def test_a_group_may_lie_on_two_nodes_and_a_node_that_is_lost_is_nobodys_fault(
    nodes: Any, place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAYSYS_CACHE", str(tmp_path))
    alone, spread = watched(study(place, "alone"), lambda: bool(across()))
    assert spread
    assert alone.failures() == []
    assert not any("lost" in e["what"] for e in alone.events())

    spec = study(place, "struck")

    def strike() -> bool:
        """Take away a node that a group lies on beside another, once some units are on disk."""
        used = [node for node in nodes.workers if node.node_id in across()]
        if not used or len(list(spec.folder.glob("units/*.parquet"))) < 3:
            return False
        nodes.remove_node(used[0], allow_graceful=False)  # as a machine that is switched off
        return True

    struck, done = watched(spec, strike)
    assert done
    assert struck.failures() == []
    events = {e["what"] for e in struck.events()}
    assert "node lost" in events
    assert events.isdisjoint({"evaluator lost", "editor lost", "unit tried again"})
    assert [row[:9] for row in small.contents(struck)] == [row[:9] for row in small.contents(alone)]
