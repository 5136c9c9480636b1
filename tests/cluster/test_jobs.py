"""Studies as jobs on a real cluster that asks for a token: submit, watch, stop, submit again; who is turned away."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster import access
from raysys.job import PASSED
from raysys.results import Results
from tests import heads
from tests.actors import small
from tests.cluster import studies

pytestmark = pytest.mark.timeout(600)
HUB_TOKEN = "hf_thisisnobodystokenbutitmustnotbeseen"


@dataclass(frozen=True)
class Place:
    """A cluster with its token, and a user's folder."""

    head: heads.Head
    address: str
    token: Path
    here: Path
    root: Path

    def raysys(self, *arguments: str | Path, code: int = 0, **env: str) -> str:
        """What a command says; it ends with `code`."""
        given = {"RAY_AUTH_TOKEN_PATH": str(self.token)} | env
        done = studies.raysys(self.here, *arguments, "--address", self.address, env=given)
        assert done.returncode == code, (done.args, done.stdout[-6000:], done.stderr[-6000:])
        assert "Traceback" not in done.stderr
        return " ".join((done.stdout + done.stderr).split())

    def submit(self, *arguments: str, code: int = 0, **env: str) -> str:
        return self.raysys("submit", "study.toml", *arguments, self.cache, code=code, **env)

    @property
    def cache(self) -> str:
        return f"--env=RAYSYS_CACHE={self.here / 'cache'}"

    def interrupted(self, *arguments: str) -> str:
        """What a command says on standard error that is interrupted (Ctrl-C) once the study has begun."""
        env = {"RAY_AUTH_TOKEN_PATH": str(self.token), "HF_TOKEN": HUB_TOKEN}
        with studies.started(self.here, *arguments, "--address", self.address, env=env) as process:
            assert process.stdout is not None and process.stderr is not None
            for line in process.stdout:
                if PASSED in line:
                    break
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
        assert "Traceback" not in said
        return " ".join(said.split())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    here = tmp_path_factory.mktemp("user")
    studies.folder(here)
    token, port = here / "token", heads.free_port()
    token.write_text(secrets.token_hex(32))
    token.chmod(0o644)
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    options = ("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}")
    with heads.head(*options, cpus=4, env=env) as head:
        found = Place(head, f"http://127.0.0.1:{port}", token, here, here / "shared")
        deadline = time.monotonic() + 60
        while True:
            try:
                access._get(found.address, True)
                break
            except ValueError:
                assert time.monotonic() < deadline, head.log()
                time.sleep(0.5)
        yield found


# --- who is turned away ----------------------------------------------------------------------------------------------


def test_without_a_token_or_with_a_wrong_one_nothing_is_submitted(place: Place, tmp_path: Path) -> None:
    root = f"root={place.root}"
    said = place.submit(root, code=2, RAY_AUTH_TOKEN_PATH="", HOME=str(tmp_path))
    assert f"{place.address} wants a token, and there is none here" in said
    assert "Copy the cluster's token to" in said
    wrong = tmp_path / "wrong"
    wrong.write_text(secrets.token_hex(32))
    said = place.submit(root, code=2, RAY_AUTH_TOKEN_PATH=str(wrong))
    assert f"does not accept the token in {wrong}" in said
    assert wrong.read_text() not in said
    assert "no studies were submitted" in place.raysys("status")
    assert not place.root.exists()


def test_a_token_that_others_can_read_is_closed_to_them(place: Place) -> None:
    place.token.chmod(0o644)
    place.raysys("status")
    assert place.token.stat().st_mode & 0o777 == 0o600


def test_a_study_that_can_not_run_there_is_told_so_by_the_cluster_and_nothing_is_run(place: Place) -> None:
    said = place.submit(f"root={place.root}", "cluster.evaluators=50", 'models=["/nowhere/model"]', code=2)
    assert "the study asks for 53 CPUs and the cluster has 4" in said
    assert "model '/nowhere/model': no such folder" in said
    assert "preflight: passed" not in said and "refused, for the reasons above" in said
    assert list(place.root.iterdir()) == []
    assert "would lie in the job's own folder" in place.submit("root=runs", code=2)


# --- the promise -----------------------------------------------------------------------------------------------------


def test_a_study_submitted_stopped_and_submitted_again_finds_what_a_local_run_finds(place: Place) -> None:
    root = f"root={place.root}"
    hold = place.here / "hold"  # while it is there, the study's questions wait
    said = place.submit(root, "--detach", f"--env=HOLD={hold}")
    assert "preflight: CPUs: the study asks for 4, the cluster has 4" in said
    assert "1 of 1 machines reach" in said
    [job] = [word for word in said.split() if word.startswith(access.JOB)][:1]
    deadline = time.monotonic() + 240
    while not (begun := [f for f in place.root.glob("small-*") if Results(f).done()]):
        assert time.monotonic() < deadline, place.raysys("logs", job, "--no-follow")
        time.sleep(0.1)
    hold.touch()
    [folder] = begun
    assert "runs already as" in place.submit(root, "--detach", code=2)
    about = json.loads(place.raysys("status", job, "--json"))
    assert (about["state"], about["folder"], about["code"]) == ("RUNNING", str(folder), None)
    assert "preflight: passed" in place.raysys("logs", job, "--no-follow")

    assert "STOPPED" in place.raysys("stop", job)
    assert "was stopped" in place.raysys("logs", "small", code=4)
    before = set(Results(folder).done())
    assert before
    hold.unlink()
    stopped = time.time()

    seen = place.here / "seen"
    again = place.interrupted("submit", "study.toml", root, place.cache, "--hub-token", f"--env=SEEN={seen}")
    assert f"interrupted here; the job goes on. Follow: raysys logs {access.JOB}" in again
    assert "complete; results:" in place.raysys("logs", "small")
    assert seen.read_text() == HUB_TOKEN[::-1]
    results = Results(folder)
    rows = results.units().to_pylist()
    assert {r["unit"] for r in rows if r["ended"] < stopped} == before

    local = studies.raysys(place.here, "run", "study.toml", "root=local", "cluster.dashboard=false", "--quiet")
    assert local.returncode == 0, local.stderr
    [alone] = (place.here / "local").glob("small-*")
    assert alone.name == folder.name
    assert small.contents(results) == small.contents(Results(alone))


def test_a_token_of_the_hub_is_in_no_log_and_in_no_run_folder(place: Place) -> None:
    """Runs after the study above, which was given one."""
    logs = place.head.folder / "t" / "session_latest" / "logs"
    assert (logs / "runtime_env_agent.log").is_file()
    for folder in (logs, place.root):
        found = subprocess.run(["grep", "-rl", HUB_TOKEN, str(folder)], capture_output=True, text=True, check=False)
        assert found.stdout == ""
    sent = [p for p in (place.head.folder / "t").rglob(".hub_token") if p.read_text() == HUB_TOKEN]
    assert sent and all(p.stat().st_mode & 0o077 == 0 for p in sent)
