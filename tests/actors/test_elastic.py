"""A study on a cluster that has no worker nodes: they come when there is work, and go when there is none."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import ray

from actors.cluster import cluster
from raysys.study import run
from tests import heads
from tests.actors import small

pytestmark = pytest.mark.timeout(400)


def workers() -> int:
    """Living nodes beside the head."""
    return sum(n["Alive"] for n in ray.nodes()) - 1  # type: ignore[no-untyped-call]


def test_worker_nodes_come_for_a_study_and_go_after_it(tmp_path: Path) -> None:
    small.folder(tmp_path)
    os.environ["RAYSYS_CACHE"] = str(tmp_path / "cache")
    words = {"name": "tests.actors.small:Words", "label": "words", "items": 96, "seconds": 0.25}
    node = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3}
    with heads.head(workers={"worker": node}, cpus=2) as head, cluster(head.address, 2):
        seen, over = [workers()], threading.Event()

        def watch() -> None:
            while not over.wait(0.5):
                seen.append(workers())

        watcher = threading.Thread(target=watch)
        watcher.start()
        pool = {"evaluators": {"min": 0, "max": 4}, "idle": 3, "retries": 2}
        results = run(small.spec(tmp_path, benchmarks=[words], snapshots=[0, 3, 6], cluster=pool))
        deadline = time.monotonic() + 90
        while workers() and time.monotonic() < deadline:
            time.sleep(0.5)
        over.set()
        watcher.join()
        assert (seen[0], max(seen), workers()) == (0, 3, 0)
    assert not results.failures()
    used = set(results.units()["evaluator"].to_pylist())
    assert len(used) >= 4  # one beside the editor on the head, and one on each node
