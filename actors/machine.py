"""How an actor is started, how it settles in, and what it knows of the machine under it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RuntimeEnvSetupError

from raysys.stores import PUBLIC


def settle(threads: int) -> None:
    """Fix what rounding depends on: the number of threads, and algorithms that give the same bits every time."""
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.matmul.allow_tf32 = False


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware, host and process, and the node of the cluster."""
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    about = {"hardware": hardware(device), "host": platform.node(), "pid": os.getpid(), "node": node}
    return about | {"torch": str(torch.__version__)}


def nodes(about: Mapping[str, Any]) -> tuple[str, ...]:
    """The nodes of whoever said `about` in `describe`: several where a model is spread over them."""
    found = about.get("nodes") or [about.get("node")]
    return tuple(sorted({node for node in found if node}))


def hardware(device: torch.device) -> str:
    """The kind of processor that does the arithmetic: results are bit-identical only within one kind."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def as_actor(cls: type, name: str, threads: int, gpus: float, **more: Any) -> Any:
    """`cls` as a Ray actor class with its share of a node; Ray never restarts it and never repeats a call.

    `more`: further options of Ray's.
    """
    share: Any = {"num_cpus": threads, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
    told = {name: os.environ[name] for name in PUBLIC if name in os.environ}  # where storage is; never a secret
    env = {"env_vars": {"OMP_NUM_THREADS": str(threads)} | told}
    return ray.remote(cls).options(name=name, runtime_env=env, **share, **more)


def end(actor: Any) -> None:
    """End an actor, or whatever stands for several and knows how to `end` them. One that is gone is no error."""
    if actor is None:
        return
    several = getattr(type(actor), "end", None)
    with suppress(ValueError, RayActorError):
        several(actor) if several else ray.kill(actor)


def reason_of(error: Exception) -> str:
    """One line a person can use, of Ray's many."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {cause}" if not isinstance(cause, ValueError) else str(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, RuntimeEnvSetupError):
        return lines[-1]  # the first says that something failed, the last what
    return next((line for line in lines if line.startswith(("ValueError", "RuntimeError", "OSError"))), lines[0])
