"""How MALMEN and RLEdit learn: losses of edited models, by the shift, and from there into the network, chunk by chunk.

Tan, Zhang, Fu, "Massive Editing for Large Language Models via Meta Learning", ICLR 2024, arXiv:2311.04661, section 3.2
and algorithm 1: the loss of the edited model is taken back to the shift of each matrix, and only then, through the
normal equation, to the network, so that network and model are never in one graph. Li et al., "Reinforced Lifelong
Editing for Language Models", ICML 2025, arXiv:2502.05759, section 3: the same along a stream of shifts, each answering
for the loss after it on its own edits and those some steps back; MALMEN is the stream of one shift.

A *stream* is a model that is edited `length` times; several are run side by side, in one batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from methods.parts import gradients, locate
from methods.parts.gradients import Batch, Trace
from methods.parts.hypernet import HyperNet
from methods.parts.ridge import Ridge, Shift
from raysys.model import Model, Trunk
from raysys.types import EditCase, EditRefused, EditRequest

Tokens = Literal["all", "target"]
Change = Callable[[Tensor], Tensor]  # x (rows, T, d_in) -> what a stream's changes add (rows, T, d_out)


@dataclass(frozen=True, kw_only=True)
class Course:
    """What is learned: how often a stream is edited, with how many edits, and what counts.

    `general` and `local`: texts drawn for each edit, of those that should follow from it and that should not change.
    `since`: what must not change is compared with the unedited model ("start") or the one before the shift ("before").
    """

    streams: int = 1  # side by side, for each update of the network
    edits: int = 1  # in one shift
    length: int = 1  # shifts in a stream
    depth: int = 1  # how many of the latest shifts' edits are asked for after each
    decay: float = 1.0  # a shift's weight among these: decay ** (how many ago)
    loc_coef: float = 1.0
    reg: float = 0.0  # of |ΔW|²
    general: int = 1
    local: int = 1
    since: Literal["start", "before"] = "start"
    tokens: Tokens = "all"
    chunk: int = 1024  # tokens of one pass of the network
    begin: bool = False  # with the network of MALMEN's editor for the model, instead of a new one


@dataclass(frozen=True, eq=False)
class Lesson:
    """An edit as tokens: its own text, texts that should follow from it (its own first), texts that must not change."""

    request: EditRequest
    text: locate.Row
    general: tuple[locate.Row, ...]
    local: tuple[locate.Row, ...]


def lessons(model: Model, cases: Sequence[EditCase]) -> list[Lesson]:
    """The cases that fit the model, in order; one without neighbours takes those of the case before it.

    Raises ValueError when no case fits, or none has neighbours.
    """
    made: list[Lesson] = []
    for case in cases:
        try:
            text = gradients.row(model, case.request)
            follow = [gradients.text(model, p.prompt, p.right) for p in case.probes if p.kind == "paraphrase"]
            stay = [gradients.text(model, p.prompt, p.right) for p in case.probes if p.kind == "neighbourhood"]
        except ValueError:  # too long, or without tokens
            continue
        made.append(Lesson(case.request, text, (text, *follow), tuple(stay)))
    others = [lesson.local for lesson in made if lesson.local]
    if not others:
        raise ValueError(
            f"none of {len(cases)} training cases has neighbours (facts that an edit must leave alone) and fits the "
            f"{model.max_length} tokens that the model reads: take another data set"
        )
    last = others[0]
    for i, lesson in enumerate(made):
        last = lesson.local or last
        made[i] = Lesson(lesson.request, lesson.text, lesson.general, last)
    return made


# --- shifts ----------------------------------------------------------------------------------------------------------


def traced(
    model: Model, rows: Sequence[locate.Row], modules: Sequence[str], tokens: Tokens, requests: Sequence[EditRequest]
) -> tuple[dict[str, Trace], Tensor]:
    """Keys and gradients of `modules` at the chosen tokens of `rows`, each with its own loss; the losses (B,)."""
    batch = gradients.lay(model, rows)
    found = gradients.trace(model, batch, modules, requests)
    if tokens == "all":
        return found.modules, found.losses
    width = batch.ids.shape[1]
    places = batch.mask.bool().flatten().nonzero()[:, 0]
    keep = torch.isin(places, batch.row * width + batch.column)
    return {n: Trace(t.x[keep], t.delta[keep], t.row[keep]) for n, t in found.modules.items()}, found.losses


def differences(net: HyperNet, name: str, trace: Trace) -> Tensor:
    """The value differences that the network wants at each token, (T, d_out): -η (k · k̃) ṽ (MALMEN, eq. 4)."""
    key, value = net.transformed(name, trace)
    return -net.lr(name) * (trace.x * key).sum(1, keepdim=True) * value


def shift(net: HyperNet, name: str, trace: Trace, chunk: int) -> Shift:
    """The shift of module `name` for the edits that `trace` is of. Raises ValueError for what can't be solved."""
    with torch.no_grad():
        wanted = torch.cat([differences(net, name, part) for part in _chunks(trace, chunk)])
    return Ridge(trace.x, log_ridge(net, name), net.shapes[name][1]).shift(wanted)


def log_ridge(net: HyperNet, name: str) -> float:
    """log λ of module `name`."""
    assert net.lamdas is not None
    return float(net.lamdas[net.names.index(name)].detach())


def back(net: HyperNet, name: str, trace: Trace, made: Shift, gradient: Tensor, chunk: int) -> None:
    """Take a loss's gradient by `made.free` on to the network: the second stage, one chunk of tokens at a time."""
    assert net.lamdas is not None
    by_values, by_ridge = made.ridge.back(made, gradient)
    with torch.enable_grad():
        (net.lamdas[net.names.index(name)] * by_ridge).backward()  # type: ignore[no-untyped-call]
        for number, part in enumerate(_chunks(trace, chunk)):
            wanted = by_values[number * chunk : (number + 1) * chunk]
            (differences(net, name, part) * wanted).sum().backward()  # type: ignore[no-untyped-call]


def _chunks(trace: Trace, chunk: int) -> Iterator[Trace]:
    for start in range(0, len(trace.x), chunk):
        at = slice(start, start + chunk)
        yield Trace(trace.x[at], trace.delta[at], trace.row[at])


# --- learning --------------------------------------------------------------------------------------------------------


class Learner:
    """What parts/training.py trains: each call of `learn` runs streams of `length` shifts of `edits` cases each."""

    def __init__(
        self,
        model: Model,
        net: HyperNet,
        taught: Sequence[Lesson],
        course: Course,
        seed: int = 0,
        left_out: int = 0,
    ) -> None:
        self.model, self.net, self.course, self.seed = model, net, course, seed
        self.left_out = left_out  # cases that no lesson could be made of
        self.lessons = list(taught)
        self.modules = net.names

    @property
    def count(self) -> int:
        """How many cases there are."""
        return len(self.lessons)

    def learn(self, cases: Sequence[int]) -> Mapping[str, float]:
        """Add the gradient of the streams' mean loss to the network's, whose statistics take in the traces seen."""
        return self._run(self._streams(cases), learning=True)

    def judge(self, cases: Sequence[int]) -> Mapping[str, float]:
        """Mean losses over `cases`, the network as it is; which texts are asked depends on the cases alone."""
        streams = self._streams(cases)
        found = [self._run(streams[i : i + 8], learning=False) for i in range(0, len(streams), 8)]
        weights = [len(streams[i : i + 8]) for i in range(0, len(streams), 8)]
        return {k: sum(f[k] * w for f, w in zip(found, weights, strict=True)) / sum(weights) for k in found[0]}

    def _streams(self, cases: Sequence[int]) -> list[list[list[Lesson]]]:
        """Streams of shifts of lessons; fewer cases than one stream takes make a shorter one."""
        c = self.course
        shifts = [[self.lessons[n] for n in cases[i : i + c.edits]] for i in range(0, len(cases), c.edits)]
        shifts = [s for s in shifts if len(s) == c.edits] or shifts
        length = min(c.length, len(shifts))
        return [shifts[i : i + length] for i in range(0, len(shifts) - length + 1, length)]

    def _run(self, streams: Sequence[Sequence[Sequence[Lesson]]], learning: bool) -> dict[str, float]:
        rng = random.Random(f"{self.seed} {[lesson.request.id for s in streams for step in s for lesson in step]}")
        worn: list[dict[str, Tensor]] = [{} for _ in streams]  # per stream and module the sum of its shifts, transposed
        totals: dict[str, float] = {}
        length = len(streams[0])
        for t in range(length):
            traces, shifts = self._shifts([s[t] for s in streams], worn, learning)
            for made in shifts:
                for of_module in made.values():
                    of_module.free.requires_grad_(learning)
            with torch.set_grad_enabled(learning):
                loss, parts = self._loss(streams, t, worn, shifts, rng)
            if learning:
                free = [s.free for made in shifts for s in made.values()]
                by_free = iter(torch.autograd.grad(loss / length, free))
                for trace, made in zip(traces, shifts, strict=True):
                    for name, of_module in made.items():
                        back(self.net, name, trace[name], of_module, next(by_free), self.course.chunk)
            if t + 1 < length:
                for wears, made in zip(worn, shifts, strict=True):
                    for name, of_module in made.items():
                        change = of_module.matrix().detach().T
                        wears[name] = wears[name] + change if name in wears else change
            for key, value in {"loss": float(loss.detach()), **parts}.items():
                totals[key] = totals.get(key, 0.0) + value / length
        return totals

    def _shifts(
        self, now: Sequence[Sequence[Lesson]], worn: Sequence[dict[str, Tensor]], learning: bool
    ) -> tuple[list[dict[str, Trace]], list[dict[str, Shift]]]:
        """Each stream's keys and gradients on the model as it now is, and the shifts that the network makes of them."""
        flat = [lesson for step in now for lesson in step]
        ends = _ends([len(step) for step in now])
        with self._wearing([list(_changes(w, {})) for w in worn], ends, self.modules if any(worn) else ()):
            found, _ = traced(
                self.model, [o.text for o in flat], self.modules, self.course.tokens, [o.request for o in flat]
            )
        if learning:
            for name, trace in found.items():
                self.net.observe(name, trace)
        traces = [{n: _between(t, lo, hi) for n, t in found.items()} for lo, hi in ends]
        try:
            shifts = [{n: shift(self.net, n, t, self.course.chunk) for n, t in of.items()} for of in traces]
        except ValueError as error:
            raise EditRefused(f"edits {', '.join(repr(o.request.id) for o in flat)}: {error}") from error
        return traces, shifts

    def _loss(
        self,
        streams: Sequence[Sequence[Sequence[Lesson]]],
        t: int,
        worn: Sequence[dict[str, Tensor]],
        shifts: Sequence[dict[str, Shift]],
        rng: random.Random,
    ) -> tuple[Tensor, dict[str, float]]:
        """The mean over streams of what a stream pays after its shift number `t`, and its parts."""
        c = self.course
        general, local = _Asked(), _Asked()
        for s in streams:
            for ago in range(min(c.depth, t + 1)):
                step = s[t - ago]
                weight = c.decay**ago / (len(streams) * len(step))
                general.add([rng.sample(o.general, min(c.general, len(o.general))) for o in step], weight)
                local.add([rng.sample(o.local, min(c.local, len(o.local))) for o in step], weight)
            general.end()
            local.end()
        nll, share = self._general(general, worn, shifts)
        kl = self._local(local, worn, shifts)
        loss = nll + c.loc_coef * kl
        if c.reg:
            size = sum((s.square() for made in shifts for s in made.values()), torch.zeros((), device=nll.device))
            loss = loss + c.reg * size / len(streams)
        return loss, {"nll": float(nll.detach()), "kl": float(kl.detach()), "right": share}

    def _general(
        self, asked: _Asked, worn: Sequence[dict[str, Tensor]], shifts: Sequence[dict[str, Shift]]
    ) -> tuple[Tensor, float]:
        batch, base = self._laid(asked)
        after = self._logprobs(batch, base, asked, worn, shifts)
        nll = (gradients.nll(batch, after) * asked.weights(after)).sum()
        right = (after.detach().argmax(-1) == batch.label).float().mean()
        return nll, float(right)

    def _local(self, asked: _Asked, worn: Sequence[dict[str, Tensor]], shifts: Sequence[dict[str, Shift]]) -> Tensor:
        batch, base = self._laid(asked)
        nothing: list[dict[str, Any]] = [{} for _ in worn]
        with torch.no_grad():
            since = worn if self.course.since == "before" else nothing
            before = self._logprobs(batch, base, asked, since, nothing)
        after = self._logprobs(batch, base, asked, worn, shifts)
        return (gradients.divergence(batch, before, after) * asked.weights(after)).sum()

    def _laid(self, asked: _Asked) -> tuple[Batch, Trunk]:
        batch = gradients.lay(self.model, asked.rows)
        return batch, gradients.trunk(self.model, batch, self.modules)

    def _logprobs(
        self,
        batch: Batch,
        base: Trunk,
        asked: _Asked,
        worn: Sequence[Mapping[str, Tensor]],
        shifts: Sequence[Mapping[str, Shift]],
    ) -> Tensor:
        """(M, V) log-probabilities, each stream's rows under its own changes."""
        changes = [list(_changes(w, s)) for w, s in zip(worn, shifts, strict=True)]
        touched = self.modules if any(changes) else ()
        with self._wearing(changes, asked.ends, touched):
            return gradients.logprobs(self.model, batch, base)

    def _wearing(
        self,
        changes: Sequence[Sequence[tuple[str, Change]]],
        ends: Sequence[tuple[int, int]],
        modules: Sequence[str],
    ) -> AbstractContextManager[None]:
        """Rows lo to hi of every batch, (lo, hi) = ends[i], are those of a model with `changes[i]`."""
        rows = ends[-1][1]

        def extra(name: str) -> gradients.Extra:
            mine = [[change for n, change in of if n == name] for of in changes]
            d_out = self.net.shapes[name][1]

            def more(x: Tensor) -> Tensor:
                wide = x.reshape(rows, -1, x.shape[-1])  # some families flatten rows and tokens
                parts = []
                for (lo, hi), of in zip(ends, mine, strict=True):
                    added = [change(wide[lo:hi]) for change in of]
                    nothing = wide.new_zeros(hi - lo, wide.shape[1], d_out)
                    parts.append(sum(added[1:], added[0]) if added else nothing)
                return torch.cat(parts).reshape(*x.shape[:-1], d_out)

            return more

        return gradients.adding(self.model, {name: extra(name) for name in modules})


class _Asked:
    """Texts of all streams in one list, with their weights in the loss, and where each stream's begin and end."""

    def __init__(self) -> None:
        self.rows: list[locate.Row] = []
        self.ends: list[tuple[int, int]] = []
        self._weights: list[float] = []

    def add(self, per_edit: Sequence[Sequence[locate.Row]], weight: float) -> None:
        """The texts of each edit of one shift: together they weigh `weight` times the number of edits."""
        for rows in per_edit:
            self.rows += rows
            self._weights += [weight / len(rows)] * len(rows)

    def end(self) -> None:
        """The stream's texts are complete."""
        self.ends.append((self.ends[-1][1] if self.ends else 0, len(self.rows)))

    def weights(self, like: Tensor) -> Tensor:
        """(rows,) weights in the loss, on the device of `like`."""
        return torch.tensor(self._weights, device=like.device)


def _changes(worn: Mapping[str, Tensor], shifts: Mapping[str, Shift]) -> Iterator[tuple[str, Change]]:
    for name, matrix in worn.items():
        yield name, lambda x, m=matrix: x @ m  # type: ignore[misc]
    for name, made in shifts.items():
        yield name, made.added


def _ends(sizes: Sequence[int]) -> list[tuple[int, int]]:
    ends, at = [], 0
    for size in sizes:
        ends.append((at, at + size))
        at += size
    return ends


def _between(trace: Trace, lo: int, hi: int) -> Trace:
    keep = (trace.row >= lo) & (trace.row < hi)
    return Trace(trace.x[keep], trace.delta[keep], trace.row[keep] - lo)
