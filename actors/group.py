"""A model over several processes: rank actors in one placement group, led by the first, which looks like any actor.

DeepSpeed-inference cuts the matrices (AutoTP); raysys/shards.py does what has to be done between the ranks, with
gradients. The first rank takes calls as an evaluator or an editor does, hands each to the others and then does its own
part; so calls reach all ranks in one order. A group is one failure unit: when any rank is lost, the first one ends
itself, whoever started the group ends what is left, and a new group is made under a new name.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta
from functools import partial
from typing import Any, Literal, NoReturn, TypeVar

import ray
import torch.distributed as dist
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError, RayTaskError
from torch import nn

from actors.editor import Editor, Job
from actors.evaluator import Evaluator, Task
from actors.machine import as_actor, settle
from raysys.journal import Entry, Journal, Stream
from raysys.model import Model
from raysys.shards import Columns, OutOfStep, Ranks, Rows, Sharded
from raysys.snapshot import Snapshot

A = TypeVar("A")
Kind = Literal["editor", "evaluator"]
log = logging.getLogger(__name__)

SILENCE = 900.0  # seconds that a rank waits for the others, of which one may have to load a model first
PATIENCE = 60.0  # seconds within which all ranks end a call, once one of them has
NOTICE = 90.0  # seconds that Ray takes at most to find out that a node is lost


# --- one rank's part of a model --------------------------------------------------------------------------------------


def split(whole: Model, ranks: Ranks, device: str = "cpu") -> Sharded:
    """This rank's part of `whole` (on the CPU), on `device` (cpu, cuda); `whole` is used up. All ranks call it at once.

    Embeddings and head stay whole on every rank: a head that DeepSpeed cuts has no gradients.
    """
    net, head = whole.net, whole.net.get_output_embeddings()
    os.environ["DS_ACCELERATOR"] = device
    os.environ |= {"RANK": str(ranks.rank), "WORLD_SIZE": str(ranks.size), "LOCAL_RANK": "0"}
    with _quietly():
        import deepspeed
        from deepspeed.module_inject.layers import LinearAllreduce

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # wants a compiler, and crashes without one
        net.set_output_embeddings(nn.Identity())
        parallel = {"tp_size": ranks.size}
        net = deepspeed.init_inference(
            net, tensor_parallel=parallel, dtype=whole.dtype, replace_with_kernel_inject=False
        ).module
    net.set_output_embeddings(head.to(device))
    for name, layer in list(net.named_modules()):
        if (sizes := getattr(layer, "_partition_sizes", None)) is not None:
            parent, _, leaf = name.rpartition(".")
            made = (Rows if isinstance(layer, LinearAllreduce) else Columns)(layer.weight, layer.bias, sizes, ranks)
            setattr(net.get_submodule(parent), leaf, made)
    return Sharded(whole, net, ranks)


@contextmanager
def _quietly() -> Iterator[None]:
    """DeepSpeed prints and logs what it finds in a model."""
    kept = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(kept)


class SharedJournal(Journal):
    """A journal that the first rank alone reads and writes; the others are told, and fail where it fails."""

    def __init__(self, ranks: Ranks, folder: Any, stream: Stream) -> None:
        super().__init__(folder, stream)
        self.ranks = ranks

    def append(self, entry: Entry) -> None:
        self._first(lambda: super(SharedJournal, self).append(entry))

    def keep_snapshots(self) -> None:
        self._first(super().keep_snapshots)

    def keep(self, snapshot: Snapshot) -> None:
        self._first(lambda: super(SharedJournal, self).keep(snapshot))

    def entries(self) -> Iterator[Entry]:
        there = super().entries()
        while (entry := self._first(lambda: next(there, None))) is not None:
            yield entry

    def _first(self, call: Callable[[], A]) -> A:
        """What `call` gives on the first rank, or what it raises there."""
        told: list[Any] = [None, None]
        fault: Exception | None = None
        if self.ranks.rank == 0:
            try:
                told[0] = call()
            except (OSError, ValueError) as error:
                fault, told[1] = error, str(error)
        dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise fault or ValueError(told[1])
        found: A = told[0]
        return found


def _work(kind: Kind, name: str, model: Sharded, dtype: str, device: str, threads: int, engine: Any) -> Any:
    """The evaluator or the editor of one rank."""
    if kind == "evaluator":
        return Evaluator(name, model, dtype, device, threads, **engine)
    return Editor(model, dtype, device, threads, partial(SharedJournal, model.split))


# --- ranks as actors -------------------------------------------------------------------------------------------------


class _Rank:
    """What every rank does: joins the others, loads the model and keeps its part."""

    def __init__(self, kind: Kind, name: str, rank: int, size: int, threads: int, **how: Any) -> None:
        settle(threads)
        self.kind, self.name, self.rank, self.size, self.threads, self.how = kind, name, rank, size, threads, how

    def __repr__(self) -> str:
        return f"{self.kind.capitalize()}({self.name}, rank {self.rank} of {self.size})"

    def _begin(self, store: Any) -> None:
        how = dict(self.how)
        model, dtype, device = how.pop("model"), how.pop("dtype"), how.pop("device")
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        limit = timedelta(seconds=SILENCE)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=limit)
        part = split(Model.load(model, dtype, "cpu"), Ranks(self.rank, self.size), device)
        part.check(part.digest)
        self.work = _work(self.kind, self.name, part, dtype, device, self.threads, how)


class Rank(_Rank):
    """A rank that does what the first one does."""

    def join(self, host: str, port: int) -> str:
        """Become part of the group whose first rank waits at `host`; the node that this rank is on."""
        self._begin(dist.TCPStore(host, port, self.size, False, timedelta(seconds=SILENCE)))  # type: ignore[attr-defined]
        return str(ray.get_runtime_context().get_node_id())

    def follow(self, call: str, given: Any) -> None:
        """The first rank's part of `call` is its own affair; this rank does what both must."""
        getattr(self.work, call)(given)


class First(_Rank):
    """The rank that is asked. Whatever happens to another rank during a call, it ends with an answer or ends itself."""

    def __init__(self, peers: Sequence[Any], kind: Kind, name: str, threads: int, **how: Any) -> None:
        super().__init__(kind, name, 0, len(peers) + 1, threads, **how)
        self.peers = peers
        host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        limit = timedelta(seconds=SILENCE)
        store = dist.TCPStore(host, 0, self.size, True, limit, wait_for_workers=False)  # type: ignore[attr-defined]
        joining = [peer.join.remote(host, store.port) for peer in peers]
        with _together(joining, peers):
            self._begin(store)
        self.nodes: list[str] = ray.get(joining)

    def describe(self) -> dict[str, Any]:
        """The machine this runs on and the digest of the base model; also the sign of life after a start."""
        about: dict[str, Any] = self.work.describe()
        return about | {"ranks": self.size, "nodes": [about["node"], *self.nodes]}

    def score(self, task: Task) -> Any:
        """As `Evaluator.score`."""
        return self.work.score(task, self._all("answers", task))

    def open(self, job: Job) -> Any:
        """As `Editor.open`."""
        with self._all("open", job):
            return self.work.open(job)

    def publish(self, edits: int) -> Any:
        """As `Editor.publish`."""
        with self._all("advance", edits):
            return self.work.publish(edits)

    def _all(self, call: str, given: Any) -> Any:
        others = [peer.follow.options(name=f"rank: {call}").remote(call, given) for peer in self.peers]
        return _together(others, self.peers)


@contextmanager
def _together(others: Sequence[Any], peers: Sequence[Any]) -> Iterator[None]:
    """Within it this rank does its part of what `others` refer to, calls of `peers`; then all have done it, or all have
    failed alike.

    Else the group is broken, and this process ends: NCCL would let it wait for a lost rank, and a rank that fails alone
    leaves the others in the middle of something.
    """
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(list(others), peers, over), daemon=True)
    watch.start()
    try:
        yield
    except OutOfStep as error:
        _give_up(str(error))
    except Exception as error:
        over.set()
        if not all(_failed(other, peers) for other in others):
            _give_up(f"the first rank failed alone: {error}")
        raise
    else:
        over.set()
        if any(_failed(other, peers) for other in others):
            _give_up("another rank failed alone")
    finally:
        over.set()
        watch.join()


def _failed(other: Any, peers: Sequence[Any]) -> bool:
    """Whether a rank's part ended with an error, once it has; one that does not end, or is lost, ends the group."""
    try:
        ray.get(other, timeout=PATIENCE)
    except RayTaskError as error:
        if isinstance(error, RayActorError):
            _lost(error, peers)
        return True
    except (RayError, TimeoutError) as error:
        _lost(error, peers)
    return False


def _watch(others: list[Any], peers: Sequence[Any], over: threading.Event) -> None:
    """Until this rank's part is over: end the group when another rank is lost, or failed a while ago."""
    failed: float | None = None
    while others and not over.is_set():
        ready, others = ray.wait(others, num_returns=1, timeout=0.5)
        for other in ready:
            try:
                ray.get(other)
            except RayTaskError:
                failed = failed or time.monotonic()
            except RayError as error:
                _lost(error, peers)
    while failed and not over.wait(0.5):
        if time.monotonic() - failed > PATIENCE:
            _give_up("another rank failed, and this one still waits for it")


def _lost(error: Exception, peers: Sequence[Any]) -> NoReturn:
    """End this process for the sake of one of `peers`. One that is out of reach may have gone with its node: that is
    known first, for then nobody is to blame, and whoever replaces the group looks only once."""
    deadline, unsure = time.monotonic() + NOTICE, isinstance(error, ActorUnavailableError | TimeoutError)
    while unsure and time.monotonic() < deadline:
        unsure = False
        for peer in peers:
            try:
                ray.get(peer.__ray_ready__.remote(), timeout=0.5)
            except ActorDiedError as known:
                _give_up(str(known))
            except (RayError, TimeoutError):
                unsure = True  # at work, or out of reach
        time.sleep(0.1)
    _give_up(str(error))


def _give_up(reason: str) -> NoReturn:
    """End this process: whoever started the group replaces it."""
    log.error("the group is broken: %s", reason.strip().splitlines()[0])
    os._exit(1)


# --- starting and ending them ----------------------------------------------------------------------------------------


class Group:
    """Stands where an actor is expected: calls go to the first rank, `end` ends all of them and frees their place."""

    def __init__(self, first: Any, peers: Sequence[Any], place: Any) -> None:
        self.first, self.peers, self.place = first, peers, place

    def __getattr__(self, name: str) -> Any:
        return getattr(self.first, name)

    def end(self) -> None:
        """End every rank."""
        for actor in (self.first, *self.peers):
            with suppress(ValueError, RayActorError):
                ray.kill(actor)
        ray.util.remove_placement_group(self.place)


def start(kind: Kind, ranks: int, across: bool, name: str, model: str, threads: int, gpus: float, **how: Any) -> Group:
    """An editor or evaluator whose model is split over `ranks` actors; `gpus` are of all of them together.

    They share a node, or, with `across`, may lie on several. `how`: dtype, device, settings of `Engine`.
    """
    share = {"CPU": float(threads)} | ({"GPU": gpus / ranks} if gpus else {})
    place = ray.util.placement_group([share] * ranks, "PACK" if across else "STRICT_PACK", f"{model}:{name}")

    def placed(cls: type, rank: int, suffix: str) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        where = PlacementGroupSchedulingStrategy(place, rank)
        return as_actor(cls, f"{model}:{name}{suffix}", threads, gpus / ranks, scheduling_strategy=where)

    how |= {"model": model, "threads": threads}
    peers = [placed(Rank, r, f"/rank-{r}").remote(kind, name, r, ranks, **how) for r in range(1, ranks)]
    return Group(placed(First, 0, "").remote(peers, kind, name, **how), peers, place)


def makers(ranks: int, across: bool) -> tuple[Callable[..., Group], Callable[..., Group]] | None:
    """What stands in for `editor.start` and `evaluator.start` where models are split over several `ranks`."""
    if ranks == 1:
        return None
    return partial(start, "editor", ranks, across), partial(start, "evaluator", ranks, across)
