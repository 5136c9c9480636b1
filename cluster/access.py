"""Who may use a cluster: Ray's token, and whether a cluster asks for one. No Ray in here.

Whoever can talk to a Ray cluster runs code on it. So a cluster that asks for no token, and that others can reach (it is
not on loopback), is refused unless the user insists in so many words.
"""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

INSIST = "--allow-unauthenticated-cluster"
INSISTED = "RAYSYS_ALLOW_UNAUTHENTICATED_CLUSTER"  # environment variable: "1" where the user insisted
JOB = "job-"  # every id of a submitted study begins so
DEFAULT = "http://127.0.0.1:8265"  # where a tunnel to the head's dashboard ends
SECONDS = 20.0  # that a cluster may take to answer


@dataclass(frozen=True)
class Token:
    """Ray's token and where it was found; `value` never shows in a message."""

    value: str = field(repr=False)
    where: str


@dataclass(frozen=True)
class Access:
    """How to talk to a cluster's job server. `warnings` are for the user; `insisted`: it may do without a token.

    Without that a job looks at the cluster's own address too: the dashboard may be reached through a tunnel.
    """

    address: str
    token: Token | None
    insisted: bool
    warnings: tuple[str, ...] = ()

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return _bearer(self.token)


def insisted() -> bool:
    """Whether the user said that an unauthenticated cluster will do."""
    return os.environ.get(INSISTED) == "1"


def loopback(host: str) -> bool:
    """Whether `host` (a name or an address, without a port) is this machine alone."""
    host = host.strip("[]")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_file(environment: Mapping[str, str] | None = None) -> Path:
    """Where Ray looks for its token when $RAY_AUTH_TOKEN is not set."""
    environment = os.environ if environment is None else environment
    given = environment.get("RAY_AUTH_TOKEN_PATH")
    return Path(given).expanduser() if given else Path.home() / ".ray" / "auth_token"


def token() -> Token | None:
    """Ray's token, by the places where Ray itself looks; a token file that others can read is closed to them.

    Raises ValueError for a file that is named and can't be used.
    """
    if value := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return Token(value, "$RAY_AUTH_TOKEN")
    path = token_file()
    try:
        value = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        if os.environ.get("RAY_AUTH_TOKEN_PATH"):
            raise ValueError(f"$RAY_AUTH_TOKEN_PATH names {path}, which does not exist") from None
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the token file {path} can't be read: {error}") from error
    if not value:
        raise ValueError(f"the token file {path} is empty; copy the cluster's token into it")
    private(path)
    return Token(value, str(path))


def private(path: Path) -> None:
    """Make a token file of this user's readable by its owner alone. Raises ValueError when it can't be."""
    try:
        if path.is_file() and path.stat().st_mode & 0o077 and path.stat().st_uid == os.geteuid():
            path.chmod(0o600)
    except OSError as error:
        raise ValueError(f"others can read the token file {path}, and its mode can't be changed: {error}") from error


def approach(address: str, allow_open: bool = False) -> Access:
    """Find out how the job server at `address` (http://host:port) is to be talked to.

    Raises ValueError when nothing answers there, when it wants a token that is missing or another one, and when it
    wants none although others can reach it, unless `allow_open`.
    """
    parts = urlsplit(address if "://" in address else f"http://{address}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise ValueError(f"--address {address}: wants the address of the dashboard, such as {DEFAULT}")
    address = f"{parts.scheme}://{parts.netloc}"
    local = loopback(parts.hostname)
    if _get(address, local) == 200:
        if not (local or allow_open):
            raise ValueError(
                f"{address} asks for no token: whoever reaches it can run code on the cluster. Start it with "
                f"RAY_AUTH_MODE=token (cluster/README.md shows how), or insist with {INSIST}."
            )
        bare = (f"{address} asks for no token: whoever reaches it can run code there",)
        return Access(address, None, allow_open, bare)
    mine = token()
    if mine is None:
        raise ValueError(
            f"{address} wants a token, and there is none here. Copy the cluster's token to {token_file()} (mode 0600), "
            f"or set $RAY_AUTH_TOKEN_PATH to its file."
        )
    if (status := _get(address, local, mine)) != 200:
        raise ValueError(
            f"{address} does not accept the token in {mine.where} (HTTP {status}). Copy this cluster's own token there."
        )
    bare = (f"the token goes to {parts.hostname} unencrypted; use a tunnel to loopback, or https",)
    return Access(address, mine, allow_open, () if local or parts.scheme == "https" else bare)


class _Stay(HTTPRedirectHandler):
    """Follows no redirection: the token is for this address alone."""

    def redirect_request(self, *about: Any) -> None:
        return None


def _get(address: str, local: bool, mine: Token | None = None) -> int:
    """The status of a request for the list of jobs: 200, 401 or 403. Raises ValueError for anything else."""
    handlers: list[Any] = [_Stay(), *([ProxyHandler({})] if local else [])]
    try:
        request = Request(f"{address}/api/jobs/", headers=_bearer(mine))
        with build_opener(*handlers).open(request, timeout=SECONDS) as said:
            json.loads(said.read())
            return 200
    except HTTPError as error:
        if error.code in (401, 403):
            return error.code
        raise ValueError(f"{address} is no Ray dashboard, or a broken one: it answers HTTP {error.code}") from error
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"nothing answers at {address} ({reason}). Is the cluster up, and the tunnel to its dashboard open?"
        ) from error
    except ValueError as error:
        raise ValueError(f"{address} is no Ray dashboard: its list of jobs is not JSON") from error


def _bearer(mine: Token | None) -> dict[str, str]:
    return {} if mine is None else {"Authorization": f"Bearer {mine.value}"}


# --- the cluster's own ports -----------------------------------------------------------------------------------------


def refuse_open(address: str) -> None:
    """Raise ValueError when the cluster at `address` (host:port of its head) lets anyone in who can reach it.

    Silent on loopback, where the user insisted, and where Ray's TLS is on, which lets in who has a certificate.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit() or loopback(host) or insisted() or os.environ.get("RAY_USE_TLS") == "1":
        return
    if _lets_in(f"{host}:{port}"):
        raise ValueError(
            f"the Ray cluster at {address} asks for no token: whoever reaches it can run code on it. Start it with "
            f"RAY_AUTH_MODE=token (cluster/README.md shows how), or insist with {INSIST}."
        )


def _lets_in(address: str) -> bool:
    """Whether a head answers a question that comes without a token."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            ask(b"", timeout=SECONDS)
        except grpc.RpcError as error:
            return bool(error.code() == grpc.StatusCode.UNIMPLEMENTED)  # something that listens to anyone
        return True
