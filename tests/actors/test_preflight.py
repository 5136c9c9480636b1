"""What a machine finds when it looks whether a study can run on it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from actors import preflight
from actors.cluster import cluster
from tests import heads
from tests.actors import small


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small.folder(tmp_path) / "model"


def test_a_machine_that_sees_the_folder_and_the_models_has_nothing_to_say(model: Path, tmp_path: Path) -> None:
    (tmp_path / "mark").touch()
    before = sorted(tmp_path.iterdir())
    assert preflight.look(str(tmp_path), "mark", [str(model), "world/small"]) == []
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_is_not_shared_is_told(tmp_path: Path) -> None:
    [fault] = preflight.look(str(tmp_path), "mark", [])
    assert "is not the folder that the head writes to" in fault
    (tmp_path / "file").touch()
    [fault] = preflight.reach(str(tmp_path / "file" / "runs"), [], lambda text: None)
    assert "file/runs can't be written on this machine" in fault


def test_a_model_that_can_not_be_read_is_told(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mark").touch()
    (model / "tokenizer.json").unlink()
    [no_tokenizer] = preflight.look(str(tmp_path), "mark", [str(model)])
    assert "has no tokenizer" in no_tokenizer
    [nowhere] = preflight.look(str(tmp_path), "mark", ["/nowhere/model"])
    assert "no such folder" in nowhere
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    [not_there] = preflight.look(str(tmp_path), "mark", ["nobody/no-such-model"])
    assert "is not in the hub's cache of this machine" in not_there


def test_a_cluster_that_grows_has_room_for_what_is_not_there_yet() -> None:
    """One that does not is in tests/cluster/test_jobs.py."""
    node = {"resources": {"CPU": 8, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3}
    said: list[str] = []
    with heads.head(workers={"worker": node}, cpus=2) as head, cluster(head.address, 2):
        deadline = time.monotonic() + 30
        while not preflight._grows() and time.monotonic() < deadline:
            time.sleep(0.5)
        assert preflight.room(4, 2, [{"CPU": 1, "GPU": 1}], said.append) == []
    assert said == [
        "CPUs: the study asks for 4, the cluster has 2 and grows as needed",
        "GPUs: the study asks for 2, the cluster has 0 and grows as needed",
    ]
