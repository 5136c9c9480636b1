"""Before a study starts on a cluster: is there room for it, and can every machine reach its files and its models?

A study that lacks something would wait, or fail after an hour. Each check gives sentences: what is wrong, and where.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.machine import reason_of
from raysys.files import Location, place, write_bytes
from raysys.stores import Remote

SECONDS = 120.0  # that a machine may take to look

Say = Callable[[str], None]


def room(cpus: float, gpus: float, bundles: Sequence[Mapping[str, float]], say: Say) -> list[str]:
    """Whether the cluster has what a study asks, or can grow to have it; faults.

    `bundles` is what must fit on one machine each.
    """
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    most, grows = _most(), _grows()
    faults = []
    for name, wanted in (("CPU", cpus), ("GPU", gpus)):
        has, limit = there.get(name, 0.0), max(most.get(name, 0.0), there.get(name, 0.0))
        more = f" and may grow to {limit:g}" if limit > has else " and grows as needed" if grows and not most else ""
        if wanted or has:
            say(f"{name}s: the study asks for {wanted:g}, the cluster has {has:g}{more}")
        if wanted > limit and (most or not grows):
            faults.append(
                f"the study asks for {wanted:g} {name}s and the cluster has {has:g}{more}: give the study fewer "
                f"evaluators or threads ([cluster] in its file), or add machines"
            )
    if faults or grows:  # what machines will be like that are to come is not known
        return faults
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
    for bundle in bundles:
        if not any(all(n.get(k, 0) >= v for k, v in bundle.items()) for n in nodes):
            what = ", ".join(f"{v:g} {k}" for k, v in bundle.items())
            return [f"no machine of the cluster has {what}, which one actor of the study takes"]
    return []


def _most() -> dict[str, float]:
    """What the autoscaler says that it may grow the cluster to; empty when it says nothing (Ray's first version)."""
    try:
        from ray._private.state import state

        return {k: float(v) for k, v in (state.get_max_resources_from_cluster_config() or {}).items()}
    except (ImportError, AttributeError, RayError):
        return {}


def _grows() -> bool:
    """Whether an autoscaler adds machines. Ray has no public word for it: where there is none, it names the types of
    machines after the machines."""
    try:
        from ray.experimental.internal_kv import _internal_kv_get

        told = json.loads(_internal_kv_get(b"__autoscaling_status") or b"{}")
        return bool(_most()) or any(not k.startswith("node_") for k in told["autoscaler_report"]["active_nodes"])
    except (ImportError, AttributeError, KeyError, TypeError, ValueError, RayError):
        return bool(_most())


def reach(root: str, models: Sequence[str], say: Say) -> list[str]:
    """Whether every machine can write under `root` (a folder, or a URI such as s3://bucket/runs), sees there what this
    one writes, and reads `models`; faults."""
    mark = f".preflight-{uuid.uuid4().hex}"
    try:
        where = _place(root)
        write_bytes(where / mark, b"written by the head")
    except (OSError, ValueError) as error:
        return [f"the run folder's place {root} can't be written on this machine: {reason_of(error)}"]
    try:
        alive = [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
        looks = {n["NodeName"]: _on(n["NodeID"]).remote(root, mark, list(models)) for n in alive}
        faults = []
        for name, ref in looks.items():
            try:
                faults += [f"machine {name}: {fault}" for fault in ray.get(ref, timeout=SECONDS)]
            except GetTimeoutError:
                faults.append(f"machine {name}: did not look within {SECONDS:g} s; is it overloaded?")
            except RayError as error:
                faults.append(f"machine {name}: can't run the study's code: {reason_of(error)}")
    finally:
        with suppress(OSError):
            (where / mark).unlink()
    if not faults:
        say(f"{len(looks)} of {len(looks)} machines reach {root} and can read {', '.join(models)}")
    return faults


def look(root: str, mark: str, models: Sequence[str]) -> list[str]:
    """On one machine: is the file `mark` under `root`, can something be written there, can `models` be read? Faults."""
    faults = []
    try:
        where = _place(root)
        if (where / mark).is_file():
            beside = where / f"{mark}-{uuid.uuid4().hex}"
            write_bytes(beside, b"written by a worker")
            beside.unlink()
        else:
            faults.append(f"{root} is not the folder that the head writes to; it must be on storage that all share")
    except (OSError, ValueError) as error:
        faults.append(f"{root} can't be used: {reason_of(error)}")
    return faults + [fault for name in models if (fault := _model(name))]


def _place(root: str) -> Location:
    """Where runs are kept; object storage that is away is not waited for here."""
    where = place(root)
    return where.hasty() if isinstance(where, Remote) else where


def _model(name: str) -> str:
    """Why `name` can't be read here; "" when it can. A model of the hub is asked for, not downloaded."""
    from raysys.loading import locate

    try:
        folder = Path(locate(name))
    except ValueError as error:
        return str(error)
    if folder.is_dir():
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with file.open("rb") as opened:
                    opened.read(8)
            except OSError as error:
                return f"model {name!r}: {file} can't be read: {error.strerror}"
        return ""
    return _hub(name)


def _hub(name: str) -> str:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return ""
    if constants.HF_HUB_OFFLINE:
        return f"model {name!r} is not in the hub's cache of this machine, and $HF_HUB_OFFLINE is set"
    try:
        HfApi().auth_check(name)
    except GatedRepoError:
        return f"model {name!r} is gated: accept its terms on the hub, then submit with --hub-token"
    except RepositoryNotFoundError:
        return f"model {name!r}: the hub has none of this name, or it is private (submit with --hub-token)"
    except (HfHubHTTPError, OSError, ValueError) as error:
        return f"model {name!r}: the hub can't be asked: {str(error).strip().splitlines()[0]}"
    return ""


def _on(node: str) -> Any:
    """`look` on one machine, whatever else is going on there."""
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    env = {"env_vars": {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}}
    return ray.remote(look).options(
        num_cpus=0, scheduling_strategy=place, name="preflight", runtime_env=env, max_retries=0
    )
