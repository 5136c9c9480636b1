"""The Ray cluster under a study: the one that is there, or one of our own on this machine."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray


class NoResources(RuntimeError):
    """The cluster does not have what the study needs; the message says what is missing."""


@contextmanager
def cluster(address: str | None, cpus: int, dashboard: bool = True) -> Iterator[str]:
    """Connect to `address`, $RAY_ADDRESS or the cluster this process is in; else start one with `cpus` logical CPUs.

    Yields the address of the dashboard ("" without one). Ends only what it started. The dashboard listens on loopback.
    """
    if ray.is_initialized():
        yield ""
        return
    os.environ.setdefault("RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", "1")  # snapshots and blocks are never written into
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    options: Any = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        context = ray.init(address=address, **options)
    else:
        own: Any = {"num_cpus": cpus, "include_dashboard": dashboard, "dashboard_host": "127.0.0.1"}
        context = ray.init(address="local", **own, **options)
        _private_token()
    quiet_data()
    try:
        yield context.dashboard_url or ""
    finally:
        ray.shutdown()


def wait_for(cpus: float, gpus: float, seconds: float, say: Callable[[str], None]) -> None:
    """Return when the cluster can hold `cpus` and `gpus`; say what is missing while it grows.

    Raises NoResources after `seconds`. An actor that can't be placed would wait for ever without a word.
    """
    deadline, said = time.monotonic() + seconds, 0.0
    while True:
        there = ray.cluster_resources()  # type: ignore[no-untyped-call]
        missing = [
            f"{wanted:g} {name}s (it has {there.get(name, 0):g})"
            for name, wanted in (("CPU", cpus), ("GPU", gpus))
            if there.get(name, 0) < wanted
        ]
        if not missing:
            return
        message = f"the cluster lacks {' and '.join(missing)}"
        if time.monotonic() > deadline:
            raise NoResources(
                f"{message} after {seconds:g} s of waiting. Give the study fewer evaluators or threads "
                f"([cluster] in its file), or a larger cluster."
            )
        if time.monotonic() - said > 15:
            say(f"waiting: {message}")
            said = time.monotonic()
        time.sleep(1)


def quiet_data() -> None:
    """Ray Data without its own progress bars: the study shows its own."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _private_token() -> None:
    """Ray writes the token of a local cluster readable by all; whoever has it can run code here."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if token.is_file() and token.stat().st_mode & 0o077:
        token.chmod(0o600)
