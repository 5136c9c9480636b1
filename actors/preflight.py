"""Before a study starts on a cluster: is there room for it, and can every machine reach its files and its models?

A study that lacks something would wait, or fail after an hour. Each check gives sentences: what is wrong, and where.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

SECONDS = 120.0  # that a machine may take to look

Say = Callable[[str], None]


def room(cpus: float, gpus: float, bundles: Sequence[Mapping[str, float]], say: Say) -> list[str]:
    """Whether the cluster has what a study asks, or can grow to have it; faults.

    `bundles` is what must fit on one machine each.
    """
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    most = _most()
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
    faults = []
    for name, wanted in (("CPU", cpus), ("GPU", gpus)):
        has, limit = there.get(name, 0.0), max(most.get(name, 0.0), there.get(name, 0.0))
        grows = f", it may grow to {limit:g}" if limit > has else ""
        if wanted or has:
            say(f"{name}s: the study asks for {wanted:g}, the cluster has {has:g}{grows}")
        if wanted > limit:
            faults.append(
                f"the study asks for {wanted:g} {name}s and the cluster has {has:g}{grows}: give the study fewer "
                f"evaluators or threads ([cluster] in its file), or add machines"
            )
    for bundle in bundles if not most else ():  # what machines will be like that are to come is not known
        if not faults and not any(all(n.get(k, 0) >= v for k, v in bundle.items()) for n in nodes):
            what = ", ".join(f"{v:g} {k}" for k, v in bundle.items())
            faults.append(f"no machine of the cluster has {what}, which one actor of the study takes")
    return faults


def _most() -> dict[str, float]:
    """What the autoscaler may grow the cluster to; empty without one. Ray has no public word for it."""
    try:
        from ray._private.state import state

        return {k: float(v) for k, v in (state.get_max_resources_from_cluster_config() or {}).items()}
    except (ImportError, AttributeError, RayError):
        return {}


def reach(root: Path, models: Sequence[str], say: Say) -> list[str]:
    """Whether every machine can write under `root`, sees there what this one writes, and reads `models`; faults."""
    mark = root / f".preflight-{uuid.uuid4().hex}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        mark.write_text("written by the head")
    except OSError as error:
        return [f"the run folder's place {root} can't be written on this machine: {error.strerror}"]
    try:
        alive = [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
        looks = {n["NodeName"]: _on(n["NodeID"]).remote(str(mark), list(models)) for n in alive}
        faults = []
        for name, ref in looks.items():
            try:
                faults += [f"machine {name}: {fault}" for fault in ray.get(ref, timeout=SECONDS)]
            except GetTimeoutError:
                faults.append(f"machine {name}: did not look within {SECONDS:g} s; is it overloaded?")
            except RayError as error:
                faults.append(f"machine {name}: can't run the study's code: {str(error).strip().splitlines()[-1]}")
    finally:
        with suppress(OSError):
            mark.unlink()
    if not faults:
        say(f"{len(looks)} of {len(looks)} machines reach {root} and can read {', '.join(models)}")
    return faults


def look(mark: str, models: Sequence[str]) -> list[str]:
    """On one machine: is the file `mark` there, can something be written beside it, can `models` be read? Faults."""
    faults = []
    path = Path(mark)
    beside = path.with_name(f"{path.name}-{uuid.uuid4().hex}")
    try:
        path.read_text()
        beside.write_text("written by a worker")
        beside.unlink()
    except FileNotFoundError:
        faults.append(f"{path.parent} is not the folder that the head writes to; it must be on storage that all share")
    except OSError as error:
        faults.append(f"{path.parent} can't be used: {error.strerror}")
    return faults + [fault for name in models if (fault := _model(name))]


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
