"""Who is let near a cluster: an open one is refused, a token is never sent on, TLS keeps others out."""

from __future__ import annotations

import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from cluster import access
from tests import heads
from tests.cluster import studies
from tests.conftest import ROOT

pytestmark = pytest.mark.timeout(400)


@contextmanager
def server(answers: dict[str, tuple[int, str]], host: str = "127.0.0.1") -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A web server that answers by the token it is shown; its address, and (path, token) of every request."""
    seen: list[tuple[str, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            seen.append((self.path, token))
            status, body = answers.get(token, (403, ""))
            self.send_response(status)
            if status == 302:
                self.send_header("Location", body)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer((host, 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        try:
            yield f"http://{host}:{served.server_port}", seen
        finally:
            served.shutdown()
            thread.join()


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    path = tmp_path / "token"
    path.write_text("right\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    return path


def outside() -> str:
    """An address of this machine that others can reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        try:
            made.connect(("192.0.2.1", 9))  # sends nothing: it only asks which address would be used
        except OSError:
            pytest.skip("this machine has no address beside loopback")
        return str(made.getsockname()[0])


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("[::1]", True), ("localhost", True), ("0.0.0.0", False),
     ("10.0.0.1", False), ("head.example", False), ("127.0.0.1.example", False), ("localhost.example", False)],
)  # fmt: skip
def test_loopback_is_this_machine_alone(host: str, local: bool) -> None:
    assert access.loopback(host) is local


def test_a_token_is_read_where_ray_reads_it_and_closed_to_others(token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token.chmod(0o644)
    found = access.token()
    assert found == access.Token("right", str(token))
    assert "right" not in repr(found)
    assert token.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("RAY_AUTH_TOKEN", "first")
    assert access.token() == access.Token("first", "$RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    token.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        access.token()
    token.unlink()
    with pytest.raises(ValueError, match="does not exist"):
        access.token()


def test_a_token_is_shown_to_who_asks_for_one_and_is_not_sent_on(token: Path) -> None:
    with server({"": (200, "[]")}) as (address, seen):
        found = access.approach(address)
        assert (found.token, found.insisted, len(found.warnings)) == (None, False, 1)
        assert seen == [("/api/jobs/", "")]
    with server({"": (200, "[]")}) as (elsewhere, stolen):
        with server({"": (401, ""), "right": (302, f"{elsewhere}/")}) as (address, _), pytest.raises(ValueError):
            access.approach(address)
        assert stolen == []
    with server({"": (401, ""), "right": (200, "[]")}) as (address, _):
        found = access.approach(address + "/")
        assert (found.address, found.insisted, found.warnings) == (address, False, ())
        assert found.headers == {"Authorization": "Bearer right"}
    with server({"": (401, ""), "right": (403, "")}) as (address, _), pytest.raises(ValueError, match="not accept"):
        access.approach(address)


def test_what_is_no_dashboard_is_told() -> None:
    with server({"": (200, "<html>")}) as (address, _), pytest.raises(ValueError, match="is no Ray dashboard"):
        access.approach(address)
    with pytest.raises(ValueError, match=r"nothing answers at http://127.0.0.1:\d+ .*tunnel"):
        access.approach(f"127.0.0.1:{heads.free_port()}")
    for wrong in ("ftp://127.0.0.1", "http://", "http://me:secret@127.0.0.1"):
        with pytest.raises(ValueError, match="wants the address of the dashboard"):
            access.approach(wrong)


def test_a_cluster_that_others_can_reach_without_a_token_is_refused_unless_the_user_insists(tmp_path: Path) -> None:
    study, host, port = studies.folder(tmp_path), outside(), heads.free_port()
    options = (
        f"--node-ip-address={host}",
        "--include-dashboard=true",
        "--dashboard-host=0.0.0.0",
        f"--dashboard-port={port}",
    )
    env = {"RAY_AUTH_MODE": "disabled", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with heads.head(f"--node-ip-address={host}", *options, cpus=1, env=env) as head:
        address = f"{host}:{head.address.rpartition(':')[2]}"
        said = studies.raysys(tmp_path, "run", study.name, f"cluster.address={address}", env=env)
        assert (said.returncode, said.stdout) == (2, "")
        assert f"the Ray cluster at {address} asks for no token" in " ".join(said.stderr.split())
        dashboard = f"http://{host}:{port}"
        said = studies.raysys(tmp_path, "submit", study.name, f"root={tmp_path}/runs", "--address", dashboard, env=env)
        assert (said.returncode, said.stdout) == (2, "")
        assert f"{dashboard} asks for no token" in " ".join(said.stderr.split())
        tunnel = f"http://127.0.0.1:{port}"  # the dashboard seems to be here: the job sees that the cluster is not
        said = studies.raysys(tmp_path, "submit", study.name, f"root={tmp_path}/made", "--address", tunnel, env=env)
        assert said.returncode == 2, said.stdout
        assert f"the Ray cluster at {address} asks for no token" in " ".join(said.stdout.split())
        assert not (tmp_path / "made").exists()
        insist = ("--address", dashboard, access.INSIST)
        said = studies.raysys(tmp_path, "status", *insist, env=env)
        assert said.returncode == 0, said.stderr
        assert "warning" in said.stderr and "FAILED (exit code 2)" in said.stdout


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_with_tls_only_who_has_a_certificate_is_let_in(tmp_path: Path) -> None:
    host = outside()
    script = ["sh", str(ROOT / "cluster" / "tls" / "certificates.sh"), str(tmp_path / "authority")]
    for machine in ("ours", "theirs"):
        subprocess.run([*script, str(tmp_path / machine), host, "127.0.0.1"], check=True, capture_output=True)
        script[2] = str(tmp_path / "another")  # theirs is of an authority of their own
    token = tmp_path / "token"
    token.write_text("0" * 64)
    token.chmod(0o600)
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}

    def tls(machine: str) -> dict[str, str]:
        files = {"CA_CERT": "ca.crt", "SERVER_CERT": "tls.crt", "SERVER_KEY": "tls.key"}
        return {"RAY_USE_TLS": "1"} | {f"RAY_TLS_{k}": str(tmp_path / machine / v) for k, v in files.items()}

    asks = "import ray, sys; ray.init(sys.argv[1]); print(ray.get(ray.remote(lambda: 6 * 7).remote(), timeout=60))"

    def knocks(machine: str, **metadata: str) -> str:
        """What the head says to who trusts its authority and shows the certificate of `machine`, if any."""
        files = [(tmp_path / machine / f).read_bytes() for f in ("tls.key", "tls.crt")] if machine else [None, None]
        shown = grpc.ssl_channel_credentials((tmp_path / "ours" / "ca.crt").read_bytes(), *files)
        with grpc.secure_channel(address, shown) as channel:
            ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
            try:
                ask(b"", timeout=10, metadata=tuple(metadata.items()))
            except grpc.RpcError as error:
                return str(error.code().name)
            return "let in"

    with heads.head(f"--node-ip-address={host}", cpus=1, env=auth | tls("ours")) as head:
        address = f"{host}:{head.address.rpartition(':')[2]}"
        assert knocks("ours", authorization=f"Bearer {token.read_text()}") == "let in"
        assert knocks("ours") == "UNAUTHENTICATED"  # a certificate, and no token
        assert knocks("theirs", authorization=f"Bearer {token.read_text()}") == "UNAVAILABLE"
        assert knocks("", authorization=f"Bearer {token.read_text()}") == "UNAVAILABLE"
        env = {**os.environ, **auth, **tls("ours")}
        said = subprocess.run(
            [sys.executable, "-c", asks, address], env=env, capture_output=True, text=True, check=False, timeout=120
        )
        assert said.stdout.strip() == "42", said.stderr[-2000:]
