"""The Ray cluster under a study: the one that is there, or one of our own on this machine."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError

from cluster import access

EACH = 1e-4  # seconds that others are given to become ready, for each reference that is waited for


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
        context = _joined(address, options)
    else:
        own: Any = {"num_cpus": cpus, "include_dashboard": dashboard, "dashboard_host": "127.0.0.1"}
        context = ray.init(address="local", **own, **options)
        access.private(access.token_file())  # Ray writes it readable by all; whoever has it can run code here
    quiet_data()
    try:
        yield context.dashboard_url or ""
    finally:
        ray.shutdown()


def _joined(address: str, options: Mapping[str, Any]) -> Any:
    """Join a cluster, with this user's token if there is one. Raises NoResources that says what to try.

    Raises ValueError for one that lets in whoever can reach it.
    """
    try:
        from ray._private.authentication import authentication_token_setup as tokens

        tokens.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as `ray start` does, but not `init`
    except (ImportError, AttributeError):  # no public word for it: then RAY_AUTH_MODE has to be set by the user
        pass
    if ":" in address:
        access.refuse_open(address)
    try:
        context = ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise NoResources(
            f"can't join the Ray cluster at {address}: {said}. Is it up (`ray status --address {address}`), and is the "
            "token in ~/.ray/auth_token (or $RAY_AUTH_TOKEN) that of the cluster? To start a cluster of the study's "
            "own, leave out cluster.address and unset RAY_ADDRESS."
        ) from error
    try:
        if ":" not in address:  # "auto": it was found, not named
            access.refuse_open(ray.get_runtime_context().gcs_address)
    except ValueError:
        ray.shutdown()
        raise
    return context


def wait_for(
    cpus: float, gpus: float, seconds: float, say: Callable[[str], None], bundles: Sequence[Mapping[str, float]] = ()
) -> None:
    """Return when the cluster can hold `cpus` and `gpus`; say what is missing while it grows.

    `bundles` is what must fit on one node each: an autoscaler is asked for nodes that can hold them. Raises NoResources
    after `seconds`. An actor that can't be placed would wait for ever without a word.
    """
    with _asked_for(bundles):
        _wait_for(cpus, gpus, seconds, say)


@contextmanager
def _asked_for(bundles: Sequence[Mapping[str, float]]) -> Iterator[None]:
    """Meanwhile the autoscaler, if there is one, makes room for `bundles`."""
    from ray.autoscaler.sdk import request_resources

    if not bundles:
        yield
        return
    request_resources(bundles=[dict(b) for b in bundles])
    try:
        yield
    finally:
        request_resources(bundles=[])


def _wait_for(cpus: float, gpus: float, seconds: float, say: Callable[[str], None]) -> None:
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


def gpus_there() -> float:
    """GPUs that the cluster has now, taken or not."""
    return float(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]


def ready(refs: list[Any], timeout: float = 1.0) -> list[Any]:
    """All of `refs` that are ready, as soon as one is; none when none is within `timeout` seconds.

    A look at many takes as long for one that is ready as for twenty: the more there are, the longer others are given to
    become ready too (0.1 ms for each reference; actors have a call more in hand, and don't wait for us).
    """
    if not refs:
        time.sleep(timeout / 10)  # nothing can come, but time brings something
    if not refs or not ray.wait(refs, timeout=timeout)[0]:
        return []
    time.sleep(EACH * len(refs))
    found: list[Any] = ray.wait(refs, num_returns=len(refs), timeout=0)[0]
    return found


def alive(node: str) -> bool:
    """Whether a node (hex id) is part of the cluster now."""
    return any(n["NodeID"] == node and n["Alive"] for n in ray.nodes())  # type: ignore[no-untyped-call]


def where(actor: Any) -> tuple[str, ...]:
    """Nodes (hex ids) of an actor's process, or of all those that it stands for, though they may still be getting
    ready; none while it waits for room.

    Ray has no public word for it: where there is none, nobody is taken to hang while getting ready.
    """
    try:
        from ray._private.state import actors

        there = [actors(a._actor_id.hex()) for a in (actor, *getattr(actor, "peers", ()))]
        return tuple(sorted({a["Address"]["NodeID"] for a in there})) if all(a.get("Pid") for a in there) else ()
    except (ImportError, AttributeError, KeyError, RayError, RuntimeError):
        return ()


def draining() -> list[str]:
    """Hex ids of nodes that are to be taken away (a spot machine that was given notice, an idle one).

    Ray has no public word for it: where its own bookkeeping can't be asked, there are none.
    """
    try:
        from ray._private.state import state

        return list(state.get_draining_nodes())
    except (ImportError, AttributeError, RayError):
        return []


def quiet_data() -> None:
    """Ray Data without its own progress bars: the study shows its own."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
