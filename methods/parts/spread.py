"""What MEMIT and its descendants share: what an edit misses at the last layer is made up for layer by layer.

Meng, Sharma, Andonian, Belinkov, Bau, "Mass-Editing Memory in a Transformer", ICLR 2023, arXiv:2210.07229, section
4.3 and algorithm 1: for the edited layers in order, each with those before it already changed, keys are read at the
subjects' last tokens, what the last layer still misses of its wanted value is measured again, and a share of it is
written into this layer's matrix.

A method built on this: `values` (what the last layer should give), then `spread` with its own `Solve`; or, where the
order of things is another one, a `Course` by hand; then `edit`. How a matrix takes keys is in methods/parts/metric.py.

Where the MLP's output joins the residual stream as it is, "what the last layer gives" is what its block gives. Where a
norm lies between (Gemma 2, OPT-350m), a change of the matrix does not move the block's output by what it adds, and what
the MLP's last projection gives is searched, measured and made up for instead, as PMET does (`gauge`).

n = requests, N = context templates, d = width of the residual stream; factors are (d_out, r) and (r, d_in).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from methods.parts import locate
from raysys.asking import Asking
from raysys.model import Model, first
from raysys.patch import LowRank
from raysys.types import Edit, EditRefused, EditRequest

CHUNK = 256  # rows of one forward pass
REMEDY = "raise `documents` or `ridge`"
Modules = Callable[[int], Sequence[str]]  # the linear modules of a layer that are written, in the order they run


@dataclass(frozen=True)
class Turn:
    """What a method has to solve: one module at its turn, for all n requests of the batch.

    `keys` (d_in, n) float64; `missing` (d_out, n) float64, what the last layer misses now, undivided; `after` is the
    number of edited layers that come after this one.
    """

    module: str
    layer: int
    keys: Tensor
    missing: Tensor
    after: int


Solve = Callable[[Turn, Tensor], tuple[Tensor, Tensor]]  # (turn, share (d_out, n)) -> left (d_out, r), right (r, d_in)
Rule = Literal["linear", "root"]


@dataclass(frozen=True)
class Spread:
    """The changes of one batch and what they were made from, float64.

    `aims` (d, n) by gauge; `keys` (d_in, n) by module as they were at its turn, `now` (d, n) likewise what the last
    layer gave; `after` (d_in, n) by module: the keys once all layers are changed, empty unless asked for; `log`: norms.
    """

    patches: tuple[LowRank, ...]
    aims: Mapping[str, Tensor]
    keys: Mapping[str, Tensor]
    now: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    log: Mapping[str, Any]


def check(name: str, batch: int, layers: Sequence[int], steps: int | None, **weights: float | None) -> None:
    """Raise ValueError when the method `name` can't take such settings; `weights` are those that must be above 0."""
    if batch < 1:
        raise ValueError(f"{name}: a batch holds at least one request, got batch = {batch}; set it to 1 or more")
    locate.check_steps(name, steps)
    for setting, weight in weights.items():
        if weight is not None and not 0 < weight < float("inf"):
            raise ValueError(
                f"{name}: {setting} is a number above 0, got {weight}: without it a change has no bounds; leave "
                f"{setting} out to take the model's preset, or set a small one"
            )
    if not layers or list(layers) != sorted(set(layers)):
        raise ValueError(f"{name}: layers are named once each, from the lowest up, got {tuple(layers)}")


def values(
    model: Model, requests: Sequence[EditRequest], contexts: Sequence[str], layer: int, search: locate.Search
) -> list[locate.Value]:
    """What the gauge of `layer` should give at each subject's last token; a batch is searched together."""
    site: locate.Site = "block" if model.arch.mlp_added else "mlp"
    size = max(1, CHUNK // (len(contexts) + 1))
    found: list[locate.Value] = []
    for start in range(0, len(requests), size):
        found += locate.values(model, requests[start : start + size], contexts, layer, search, site)
    return found


def gauge(model: Model, layer: int) -> str:
    """The module whose output is searched and measured at `layer`: its block, or its MLP's last projection where

    that one's output does not join the residual stream as it is."""
    return model.arch.block.format(layer) if model.arch.mlp_added else model.mlp_out(layer)


def wanted(found: Sequence[locate.Value]) -> Tensor:
    """z, (d, n) float64."""
    return torch.stack([v.wanted for v in found], 1).double()


def told(found: Sequence[locate.Value]) -> dict[str, Any]:
    """Per request, for the log: passes of the search, loss before and after, how far the value moves."""
    return {
        "passes": [len(v.losses) for v in found],
        "loss_before": [float(v.losses[0, 0]) for v in found],
        "loss": [float(v.losses[-1, 0]) for v in found],
        "nll": [float(v.losses[-1, 1]) for v in found],
        "value_shift": [float(v.offset.norm() / v.now.norm()) for v in found],
    }


def spread(
    model: Model,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    layers: Sequence[int],
    aims: Tensor | Sequence[Tensor],
    solve: Solve,
    *,
    rule: Rule = "linear",
    modules: Modules | None = None,
    gauges: Sequence[str] = (),
    keys_after: bool = False,
    remedy: str = REMEDY,
) -> Spread:
    """Make up for what `gauges` miss of `aims` ((d, n) each), layer by layer; the model is left as it was found.

    Of R layers number r takes 1/(R - r + 1) of what is missing at its turn ("linear"), or 1/sqrt of that ("root").
    By default one matrix per layer, the MLP's last, is written, and the gauge is the last layer's (MEMIT, see `gauge`);
    else `gauges` names the module that each of `modules` looks to. Raises EditRefused when the solution is not finite;
    `remedy` is what to do then.
    """
    modules = modules or (lambda layer: (model.mlp_out(layer),))
    gauges = gauges or (gauge(model, layers[-1]),)
    aims = [aims] if isinstance(aims, Tensor) else aims
    keys: dict[str, Tensor] = {}
    now: dict[str, Tensor] = {}
    with Course(model, requests, contexts, layers, modules, remedy) as course:
        for number, layer in enumerate(layers):
            after = len(layers) - number - 1
            for module, name, aim in zip(modules(layer), gauges, aims, strict=True):
                turn_keys, given = course.keys(layer)[module], course.outputs((name,))[name]
                turn = Turn(module, layer, turn_keys, aim - given, after)
                share = turn.missing / ((after + 1) ** (0.5 if rule == "root" else 1))
                course.change(module, *solve(turn, share))
                keys[module], now[module] = turn_keys, given
        again = {m: k for layer in layers for m, k in course.keys(layer).items()} if keys_after else {}
        return Spread(course.patches, dict(zip(gauges, aims, strict=True)), keys, now, again, course.log())


def edit(done: Spread, found: Sequence[locate.Value], more: Mapping[str, Any] | None = None) -> Edit:
    """What a method hands out: the changes, the keys once they are made (for its memory), the log and `more` of it."""
    return Edit(done.patches, remembering(done.after), {**told(found), **done.log, **(more or {})})


def remembering(keys: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Keys (d_in, n) by module as what a step leaves to later ones: float32, on the CPU. None when there are none."""
    return {m: k.float().cpu().contiguous() for m, k in keys.items()} or None


class Course:
    """A batch on its way through `layers`: reads keys and outputs, changes matrices, undoes that at the end.

    A key is the mean over templates with the bare one, `contexts[0]`, counting half and the sampled ones sharing the
    other half. What lies below the first of `layers` runs once; then only blocks whose input has changed.
    """

    def __init__(
        self,
        model: Model,
        requests: Sequence[EditRequest],
        contexts: Sequence[str],
        layers: Sequence[int],
        modules: Modules,
        remedy: str = REMEDY,
    ) -> None:
        self.model = model
        self.remedy = remedy
        self.names = ", ".join(repr(q.id) for q in requests)
        self.modules = modules
        self.last = layers[-1]
        self._number = len(requests)
        rows = [locate.row(model, q, c) for c in contexts for q in requests]  # the bare ones first
        parts = rows[: len(requests)], rows[len(requests) :]
        cut = [part[i : i + CHUNK] for part in parts for i in range(0, len(part), CHUNK)]
        self._bare = -(-len(requests) // CHUNK)  # this many of the runs hold bare prompts
        self._runs = [_Run(model, chunk, layers[0], layers[-1]) for chunk in cut]
        self._base: dict[str, Tensor] = {}  # (d_out, d_in) as found, by module
        self._made: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def __enter__(self) -> Course:
        return self

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for module, base in self._base.items():
                self.model.write(f"{module}.weight", base)

    @torch.no_grad()
    def keys(self, layer: int) -> dict[str, Tensor]:
        """What enters each written module of `layer` now, (d_in, n) float64."""
        seen: dict[str, list[Tensor]] = {m: [] for m in self.modules(layer)}
        for run in self._runs:
            for module, (given, _) in run.watch(layer, tuple(seen)).items():
                seen[module].append(given)
        return {m: self._mean(torch.cat(parts)) for m, parts in seen.items()}

    def _mean(self, read: Tensor) -> Tensor:
        bare, sampled = read[: self._number].double(), read[self._number :].double()  # (n, d_in), ((N-1)·n, d_in)
        if len(sampled):
            bare = (bare + sampled.reshape(-1, *bare.shape).mean(0)) / 2
        return bare.T

    @torch.no_grad()
    def outputs(self, names: Sequence[str]) -> dict[str, Tensor]:
        """What the bare prompts make modules or the block of the last layer give now, (d, n) float64."""
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        for run in self._runs[: self._bare]:
            for name, (_, out) in run.watch(self.last, names).items():
                seen[name].append(out)
        return {name: torch.cat(parts).double().T for name, parts in seen.items()}

    @torch.no_grad()
    def change(self, module: str, left: Tensor, right: Tensor) -> None:
        """Add left (d_out, r) @ right (r, d_in) to the matrix of `module`, until the course ends."""
        if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
            raise EditRefused(
                f"edit {self.names}: the change of {module} is not a finite number; too large a step, keys that depend "
                f"on each other, or a second moment from too little text: {self.remedy}"
            )
        matrix = self.model.matrix(f"{module}.weight")
        base = self._base.setdefault(module, matrix.clone())
        made = self._made.setdefault(module, [])
        made.append((left.float().to(matrix.device), right.float().to(matrix.device)))
        delta = sum((a @ b for a, b in made[1:]), made[0][0] @ made[0][1])
        self.model.write(f"{module}.weight", (base.float() + delta).to(matrix.dtype))
        layer = next(i for i in range(self.last + 1) if module in self.modules(i))
        for run in self._runs:
            run.changed(layer)

    @property
    def patches(self) -> tuple[LowRank, ...]:
        """All changes so far, one patch per matrix."""
        return tuple(
            LowRank(f"{m}.weight", torch.cat([a for a, _ in made], 1).cpu(), torch.cat([b for _, b in made]).cpu())
            for m, made in self._made.items()
        )

    def log(self) -> dict[str, Any]:
        """Frobenius norms of the changes, by module."""
        return {"norm": {p.weight.removesuffix(".weight"): norm(p.left, p.right) for p in self.patches}}


def norm(left: Tensor, right: Tensor) -> float:
    """Frobenius norm of left @ right, from the factors alone."""
    square = ((left.double().T @ left.double()) * (right.double() @ right.double().T)).sum()
    return float(square.clamp(min=0).sqrt())


class _Run:
    """Some rows, cut after their subject, and what enters the edited blocks when they are read."""

    def __init__(self, model: Model, rows: Sequence[locate.Row], bottom: int, top: int) -> None:
        self.model = model
        ids, mask = model.batch([r.ids[: r.at + 1] for r in rows])  # later tokens can't be seen from the subject
        self.at = torch.tensor([r.at for r in rows], device=ids.device)
        self.rows = torch.arange(len(rows), device=ids.device)
        self.shape = ids.shape
        self.asking = Asking.whole(ids, mask)
        self.calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.entering: dict[int, Tensor] = {}  # by layer: hidden states (rows, T, d)
        with ExitStack() as stack:
            for layer in range(bottom, top + 1):
                hook = self._keeper(layer, layer == top)
                handle = model.layer(layer).register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            with torch.no_grad(), suppress(_EnoughError), model.asking(self.asking):
                model.hidden(ids, mask, use_cache=False)

    def _keeper(self, layer: int, enough: bool) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.calls[layer], self.entering[layer] = (args[1:], kwargs), args[0]
            if enough:
                raise _EnoughError

        return keep

    def changed(self, layer: int) -> None:
        """Forget what lies above a change in `layer`."""
        self.entering = {i: hidden for i, hidden in self.entering.items() if i <= layer}

    def watch(self, layer: int, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Input and output, (rows, d_in) and (rows, d_out) float32, of modules in block `layer` at the subjects."""
        start = max(i for i in self.entering if i <= layer)
        for below in range(start, layer):
            self.entering[below + 1] = self._block(below)
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(self.model.watching(name, self._grabber(seen, name)))
            self.entering[layer + 1] = self._block(layer)
        return seen

    def _block(self, layer: int) -> Tensor:
        args, kwargs = self.calls[layer]
        with self.model.asking(self.asking):
            return first(self.model.layer(layer)(self.entering[layer], *args, **kwargs))

    def _grabber(self, seen: dict[str, tuple[Tensor, Tensor]], name: str) -> Callable[[Tensor, Tensor], None]:
        def grab(given: Tensor, out: Tensor) -> None:
            given, out = given.reshape(*self.shape, -1), out.reshape(*self.shape, -1)  # some families flatten them
            seen[name] = given[self.rows, self.at].float(), out[self.rows, self.at].float()

        return grab


class _EnoughError(Exception):
    """Stops a forward pass that has shown what was wanted."""
