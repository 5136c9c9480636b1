"""Studies on models that are split over two processes: the scores of whole ones, whatever rank is killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import ActorDiedError

from actors import group
from raysys.journal import load_all
from raysys.patch import merge
from raysys.plan import plan
from raysys.resources import needs
from raysys.results import Results
from raysys.spec import SpecError, StudySpec
from raysys.study import run
from tests import families, processes
from tests.actors import small

pytestmark = pytest.mark.timeout(280)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with an odd number of heads, its edits, and a corpus that gives a sound second moment."""
    path = small.folder(tmp_path_factory.mktemp("split"), "opt")
    sizes: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 3, "word_embed_proj_dim": 48, "ffn_dim": 51}
    families.network("opt", max_position_embeddings=256, **sizes).save_pretrained(path / "model")
    return path


def study(place: Path, name: str, ranks: int, **changes: Any) -> StudySpec:
    """ROME and MEMIT on a model over `ranks` processes."""
    rome = small.tree(place)["methods"][0]
    memit = {k: v for k, v in rome.items() if k != "layer"} | {"name": "memit", "layers": [0, 1], "weight": 20.0}
    settings: dict[str, Any] = {"methods": [rome, memit], "cluster": {"evaluators": 1, "tensor_parallel": ranks}}
    return small.spec(place, name=name, **(settings | changes))


@pytest.fixture(scope="module")
def whole(cluster: None, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    os.environ["RAYSYS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return run(study(place, "whole", 1))


@pytest.fixture(scope="module")
def split(whole: Results, place: Path) -> Results:
    return run(study(place, "split", 2))


def changes(results: Results) -> dict[str, dict[str, torch.Tensor]]:
    """What each method changed in all, by weight."""
    found = {}
    for name in [cell.id for cell in results.cells()]:
        patches = merge((), [p for e in load_all(results.cell_folder(name) / "journal") for p in e.patches])
        found[name] = {}
        for patch in patches:
            found[name][patch.weight] = torch.zeros(patch.shape)
            patch.add_to(found[name][patch.weight])
    return found


def test_a_split_model_scores_as_the_whole_one(whole: Results, split: Results) -> None:
    assert whole.manifest["complete"] and split.manifest["complete"]
    one, two = ({row[:6]: row for row in small.contents(r)} for r in (whole, split))
    assert set(one) == set(two) and len(one) > 200
    compared = 0
    for key, row in one.items():
        here, there = json.loads(two[key][8]), json.loads(row[8])
        assert here.get("chosen") == there.get("chosen") and here.get("text") == there.get("text")
        for a, b in zip(here.get("logprob", ()), there.get("logprob", ()), strict=True):
            assert abs(a - b) <= 1e-4
            compared += 1
    assert compared > 200


def test_a_split_model_is_edited_as_the_whole_one(whole: Results, split: Results) -> None:
    one, two = changes(whole), changes(split)
    assert set(one) == set(two) and len(one) == 2
    for name, weights in one.items():
        assert set(weights) == set(two[name])
        for weight, delta in weights.items():
            assert float((two[name][weight] - delta).norm() / delta.norm()) <= 1e-5


def test_ranks_that_are_killed_change_no_result(split: Results, place: Path) -> None:
    killed: list[str] = []
    over = threading.Event()

    def kill() -> None:
        """Another rank of the evaluator in the middle of a call, and the first one of the editor."""
        left = ["rank: answers", "memit-0: to 6 edits"]
        while left and not over.is_set():
            below = processes.below(os.getpid())
            for pid, name in below.items():
                if what := next((w for w in left if w in name), None):
                    os.kill(pid, signal.SIGKILL)
                    left.remove(what)
                    killed.append(what)
            time.sleep(0.005)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        results = run(study(place, "killed", 2))
    finally:
        over.set()
        thread.join()
    assert len(killed) == 2
    lost = [e["what"] for e in results.events()]
    assert lost.count("editor lost") == 1 and lost.count("evaluator lost") == 1
    assert not results.failures()
    assert [row[:9] for row in small.contents(results)] == [row[:9] for row in small.contents(split)]


def test_ended_groups_give_their_place_back(split: Results) -> None:
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 8 and time.monotonic() < deadline:  # type: ignore[no-untyped-call]
        time.sleep(0.2)
    assert ray.available_resources().get("CPU") == 8  # type: ignore[no-untyped-call]
    groups = ray.util.placement_group_table().values()
    assert groups and all(one["state"] == "REMOVED" for one in groups)


def test_every_process_counts_in_what_a_study_needs(place: Path) -> None:
    spec = study(place, "n", 2, cluster={"evaluators": 2, "tensor_parallel": 2, "threads": 3})
    cpus, _, bundles = needs(spec)
    assert cpus == 3 * 2 * 3 + 2
    assert {"CPU": 6.0} in bundles  # on one node each
    spread = spec.cluster.model_copy(update={"across_nodes": True})
    assert {"CPU": 3.0} in needs(spec.model_copy(update={"cluster": spread}))[2]


def test_a_study_says_when_a_model_or_a_method_can_not_be_split(place: Path, tmp_path: Path) -> None:
    small.folder(tmp_path, "gpt2")
    with pytest.raises(ValueError, match="keeps query, key and value in one matrix"):
        run(study(tmp_path, "gpt2", 2))
    with pytest.raises(ValueError, match="keeps query, key and value in one matrix"):
        plan(study(tmp_path, "gpt2", 2))
    grace = [{"name": "grace", "layer": 1}]
    with pytest.raises(ValueError, match=r"over 2 processes: method grace does not work.*tensor_parallel = 1"):
        run(study(place, "grace", 2, methods=grace))
    with pytest.raises(SpecError, match=r"gpus_per_editor: a model that is split over 2 processes needs one GPU"):
        small.spec(place, cluster={"tensor_parallel": 2, "gpus_per_editor": 1})


def test_how_a_model_is_split_is_part_of_what_a_study_is(place: Path) -> None:
    assert study(place, "x", 1).hash != study(place, "x", 2).hash
    assert "tensor_parallel" not in study(place, "x", 1).identity


class Lead:
    """A first rank whose own part hangs, as NCCL does when another rank is lost."""

    def go(self, peer: Any, how: str) -> str:
        group.PATIENCE = 1.0
        with group._together([peer.do.remote(how)], [peer]):
            time.sleep(0.2 if how == "well" else 200)
        return "done"


class Peer:
    """Another rank: it does well, raises, or dies."""

    def do(self, how: str) -> None:
        if how == "raise":
            raise MemoryError("this rank alone")
        if how == "die":
            os._exit(1)


@pytest.mark.parametrize("how", ["well", "raise", "die"])
def test_a_first_rank_that_waits_for_a_lost_one_ends_itself(cluster: None, how: str) -> None:
    lead, peer = (ray.remote(cls).options(num_cpus=1).remote() for cls in (Lead, Peer))
    call = lead.go.remote(peer, how)
    if how == "well":
        assert ray.get(call, timeout=60) == "done"
    else:
        with pytest.raises(ActorDiedError):
            ray.get(call, timeout=150)
    for actor in (lead, peer):
        ray.kill(actor)
