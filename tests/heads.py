"""A Ray head node as a user starts one, in processes of its own that are ended one by one: never `ray stop`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from tests import processes

HEAD_ID = "f" * 51 + "00000"  # what the provider of fake nodes takes for the head
SECONDS = 120  # that a head may take to answer


@dataclass(frozen=True)
class Head:
    """A running head: where it listens, and the process above all of its own."""

    address: str
    pid: int
    folder: Path

    def log(self) -> str:
        """What `ray start` said."""
        return (self.folder / "ray.log").read_text(errors="replace")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


@contextmanager
def head(*options: str, workers: Mapping[str, Any] | None = None, cpus: int = 2, env: Mapping[str, str] | None = None) \
        -> Iterator[Head]:  # fmt: skip
    """A head with `cpus`; `workers`: node types that an autoscaler adds and removes (as processes on this machine).

    `options` go to `ray start`; `env` beside the environment of this process.
    """
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as made:  # short: sockets
        folder, port = Path(made), free_port()
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}",
            f"--num-cpus={cpus}", f"--temp-dir={folder / 't'}", f"--dashboard-agent-listen-port={free_port()}",
            "--include-dashboard=false", "--disable-usage-stats", *options,
        ]  # fmt: skip
        more = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"} if workers else {}
        more |= {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID} if workers else {}
        if workers:
            config = folder / "autoscaler.json"
            config.write_text(json.dumps(_autoscaler(workers, cpus, port)))
            command.append(f"--autoscaling-config={config}")
        with (folder / "ray.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **more, **(env or {})}, start_new_session=True
            )
        found = Head(f"127.0.0.1:{port}", process.pid, folder)
        try:
            _answers(port, process, found)
            yield found
        finally:
            end(process)


def _autoscaler(workers: Mapping[str, Any], cpus: int, port: int) -> dict[str, Any]:
    kinds = {"head": {"resources": {"CPU": cpus}, "node_config": {}, "max_workers": 0}, **workers}
    return {
        "cluster_name": "test",
        "max_workers": sum(w.get("max_workers", 0) for w in workers.values()),
        "upscaling_speed": 100,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"{ray.util.get_node_ip_address()}:{port}",
            "disable_node_updaters": True,
            "use_node_id_as_ip": True,  # they share one address
        },
        "available_node_types": {"ray.head.default": kinds.pop("head"), **kinds},
        "head_node_type": "ray.head.default",
        "auth": {}, "file_mounts": {}, "cluster_synced_files": [], "initialization_commands": [],
        "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [],
        "head_start_ray_commands": [], "worker_start_ray_commands": [],
    }  # fmt: skip


def _answers(port: int, process: subprocess.Popen[bytes], found: Head) -> None:
    deadline = time.monotonic() + SECONDS
    while "Ray runtime started" not in found.log():
        assert process.poll() is None and time.monotonic() < deadline, found.log()
        time.sleep(0.2)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a node, and whatever it started."""
    below = list(processes.below(process.pid))
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)
    for pid in [process.pid, *below]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
