"""MELO: low-rank blocks beside a few layers, and a code book below them that says which block a prompt wakes.

Yu, Chen, Zhou, He, "MELO: Enhancing Model Editing with Neuron-Indexed Dynamic LoRA", AAAI 2024, arXiv:2312.11795:
section 3.2 (dynamic LoRA: one block for a group of edits), 3.3 (neuron indexes: clusters with centres and radii).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from methods.parts import locate, presets, recall
from methods.parts.clusters import Book, Cluster, Point
from raysys.asking import Asking
from raysys.model import Model
from raysys.types import Edit, EditRefused, EditRequest

HALVED = 20, 0.5  # every so many steps the step size shrinks by this factor
PRESETS: Mapping[str, presets.Settings] = {  # EasyEdit, hparams/MELO; "world/small" was tuned on its own facts
    "world/small": {"layer": 4, "layers": (5,), "site": "in", "radius": 40.0},
    "gpt2-xl": {"layer": 35, "layers": (36, 37), "site": "in"},
}


def rule(model: Model) -> presets.Settings:
    """As published for GPT-2 XL: the code book three quarters of the way up, blocks in the two layers above."""
    layer = max(0, min(round(35 / 48 * model.layers), model.layers - 3))
    above = tuple(range(layer + 1, min(layer + 3, model.layers)))
    return {"layer": layer, "layers": above, "site": "in", "radius": 0.5, "lr": 1e-3}


@dataclass(frozen=True, kw_only=True)
class Melo:
    """A group of requests trains one block: W x becomes W x + scale · B A x in `layers`, for prompts that wake it.

    What the code book's layer gives at a prompt's last token is compared with the clusters' centres, as in the
    authors' code; within the nearest one's radius its nearest member says which block the whole row wears, the tokens
    generated afterwards included. No cluster: the base model's answer.

    The authors' code compares targets by the sum of their token numbers, and splits a radius of zero when the same
    prompt comes with another target; here tokens are compared, and such a prompt changes hands.
    """

    layer: int | None = None  # of the code book, below all of `layers`
    layers: tuple[int, ...] | None = None  # of the blocks
    site: recall.Site | None = None  # the MLP's first or last projection, for both
    radius: float | None = None  # of a new cluster
    rank: int = 2  # of a block
    scale: float = 350.0  # the authors' number of blocks, by which an adapter of 700 ranks amplifies 2 of them
    steps: int = 50
    lr: float | None = None
    seed: int = 0  # of the blocks' first factors
    batch_size: int = 4  # requests that share a block

    name: ClassVar[str] = "melo"
    version: ClassVar[str] = "1"

    @property
    def batch(self) -> int:
        """Requests of one call of `edit`."""
        return self.batch_size

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedMelo:
        """Settle open settings; there is nothing to collect. Raises ValueError for layers that can't be."""
        settings: Melo = presets.settled(self, model, PRESETS, rule)
        s = settings
        assert s.layer is not None and s.layers is not None and s.site is not None
        if not s.layers or s.layer >= min(s.layers):
            raise ValueError(f"melo: the code book's layer {s.layer} must lie below those of the blocks, {s.layers}")
        modules = tuple(recall.site(model, layer, s.site) for layer in s.layers)
        return PreparedMelo(settings=settings, index=recall.site(model, s.layer, s.site), modules=modules)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedMelo:
    """MELO on one model: `index` is the code book's module, `modules` those of the blocks."""

    settings: Melo
    index: str
    modules: tuple[str, ...]

    def identity(self) -> dict[str, Any]:
        """Name, version and settings."""
        return presets.identity(self.settings, {})

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Any = None) -> Edit:
        """What the requests add to the blocks worn. Raises EditRefused with the reason when one can't be served."""
        s = self.settings
        assert s.radius is not None
        rows = [locate.row(model, q, target=True) for q in requests]
        worn = model.wears(Blocks)
        if worn is not None and (worn.index, worn.modules) != (self.index, list(self.modules)):
            raise EditRefused(f"edit {requests[0].id!r}: the blocks worn stand elsewhere ({worn.index})")
        number = 0 if worn is None else len(worn.downs)
        with model.bare():
            keys = self._keys(model, rows)
            down, up, losses = self._train(model, requests, rows, number)
        book = Book.empty() if worn is None else worn.book
        changes = [
            book.take(k, r.labels, number, s.radius, recall.noise(model, k)) for k, r in zip(keys, rows, strict=True)
        ]
        clusters, points = book.changed()
        step = Blocks.of(self.index, self.modules, clusters, points, down[None], up[None], s.scale, number)
        log = {"passes": len(losses), "loss_before": losses[0], "loss": losses[-1], "what": " ".join(changes)}
        return Edit((step,), log=log | {"block": number})

    def _keys(self, model: Model, rows: Sequence[locate.Row]) -> list[Tensor]:
        """What the code book's module gives at each prompt's last token: (d_out,) float32."""
        ids, mask = model.batch([r.ids[: r.first] for r in rows])
        with torch.no_grad():
            _, out = model.through(self.index, ids, mask)
        return [out[i, r.first - 1].float().cpu() for i, r in enumerate(rows)]

    def _train(
        self, model: Model, requests: Sequence[EditRequest], rows: Sequence[locate.Row], number: int
    ) -> tuple[Tensor, Tensor, list[float]]:
        """Factors of a new block, (layers, r, d_in) and (layers, d_out, r), and the loss of each pass in nats."""
        s = self.settings
        assert s.layers is not None and s.lr is not None
        d_out, d_in = model.matrix(f"{self.modules[0]}.weight").shape
        generator = torch.Generator().manual_seed(s.seed + 7919 * number)
        drawn = torch.rand(len(self.modules), s.rank, d_in, generator=generator) * 2 - 1
        down = (drawn / (s.scale * s.rank) ** 0.5).to(model.device).requires_grad_(True)
        up = torch.zeros(len(self.modules), d_out, s.rank, device=model.device, requires_grad=True)
        adam = torch.optim.Adam([down, up], lr=s.lr)
        schedule = torch.optim.lr_scheduler.StepLR(adam, *HALVED)
        ids, mask = model.batch([r.ids for r in rows])
        at = [(i, r.first - 1 + j) for i, r in enumerate(rows) for j in range(len(r.labels))]
        row, column = (torch.tensor(c, device=model.device) for c in zip(*at, strict=True))
        labels = torch.tensor([label for r in rows for label in r.labels], device=model.device)
        with torch.no_grad():
            trunk = model.trunk(ids, mask, min(s.layers))
        losses: list[float] = []
        for step in range(s.steps):
            with torch.enable_grad(), ExitStack() as stack:
                for i, module in enumerate(self.modules):
                    stack.enter_context(model.watching(module, _adding(down[i], up[i], s.scale)))
                loss = cross_entropy(model.logits(model.upper(trunk)[row, column]).float(), labels)
            losses.append(float(loss.detach()))
            if not torch.isfinite(loss):
                raise EditRefused(f"edit {requests[0].id!r}: the loss of step {step} is not finite: a broken model")
            down.grad, up.grad = torch.autograd.grad(loss, [down, up])
            adam.step()
            schedule.step()
        return down.detach().cpu(), up.detach().cpu(), losses


def _adding(down: Tensor, up: Tensor, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    def add(given: Tensor, out: Tensor) -> Tensor:
        return out + (given.float() @ down.T @ up.T * scale).to(out.dtype)

    return add


@dataclass(frozen=True, kw_only=True, eq=False)
class Blocks:
    """A code book at `index`'s output and the blocks of `modules`: all of them, or what a step adds and changes.

    Clusters numbered `clusters` (c,): centres (c, d_out), radii (c,), `labels` (n,) long of `lengths` (c,) tokens.
    Members numbered `members` (p,): keys (p, d_out), owners (p,) long, the cluster or -1, wakes (p,) long, the block.
    Blocks from number `first` on: downs (b, layers, r, d_in), ups (b, layers, d_out, r). Floats are float32.
    """

    index: str
    modules: list[str]
    scale: float
    first: int
    clusters: Tensor
    centres: Tensor
    radii: Tensor
    labels: Tensor
    lengths: Tensor
    members: Tensor
    keys: Tensor
    owners: Tensor
    wakes: Tensor
    downs: Tensor
    ups: Tensor
    kind: ClassVar[str] = "melo"
    whole: ClassVar[bool] = True
    in_weights: ClassVar[bool] = False

    @classmethod
    def of(
        cls, index: str, modules: Sequence[str], clusters: Mapping[int, Cluster], points: Mapping[int, Point],
        downs: Tensor, ups: Tensor, scale: float, first: int,
    ) -> Blocks:  # fmt: skip
        """From clusters and members by their numbers."""
        labels, lengths = recall.joined([c.labels for c in clusters.values()])
        return cls(
            index=index,
            modules=list(modules),
            scale=scale,
            first=first,
            clusters=torch.tensor(list(clusters)),
            centres=torch.stack([c.centre for c in clusters.values()]),
            radii=torch.tensor([c.radius for c in clusters.values()]),
            labels=labels,
            lengths=lengths,
            members=torch.tensor(list(points)),
            keys=torch.stack([p.key for p in points.values()]),
            owners=torch.tensor([p.owner for p in points.values()]),
            wakes=torch.tensor([p.block for p in points.values()]),
            downs=downs,
            ups=ups,
        )

    def tensors(self) -> dict[str, Tensor]:
        names = "clusters centres radii labels lengths members keys owners wakes downs ups"
        return {name: getattr(self, name) for name in names.split()}

    def fields(self) -> dict[str, Any]:
        return {"index": self.index, "modules": self.modules, "scale": self.scale, "first": self.first}

    @property
    def book(self) -> Book:
        """The code book, to be changed at will."""
        return Book(list(self._clusters.values()), list(self._points.values()))

    @cached_property
    def _clusters(self) -> dict[int, Cluster]:
        rows = zip(self.centres, self.radii.tolist(), recall.parted(self.labels, self.lengths), strict=True)
        return dict(zip(self.clusters.tolist(), (Cluster(*row) for row in rows), strict=True))

    @cached_property
    def _points(self) -> dict[int, Point]:
        rows = zip(self.keys, self.owners.tolist(), self.wakes.tolist(), strict=True)
        return dict(zip(self.members.tolist(), (Point(*row) for row in rows), strict=True))

    def after(self, earlier: Blocks) -> Blocks:
        """`earlier`, all so far, with this step. Raises ValueError when it doesn't belong there."""
        if (earlier.index, earlier.modules, len(earlier.downs)) != (self.index, self.modules, self.first):
            raise ValueError(f"a step that adds block {self.first} at {self.index} does not follow {earlier.index}")
        at = {"clusters": self.clusters, "members": self.members}
        of = {"centres": "clusters", "radii": "clusters", "keys": "members", "owners": "members", "wakes": "members"}
        rows: dict[str, Any] = {n: recall.written(getattr(earlier, n), at[k], getattr(self, n)) for n, k in of.items()}
        labels, lengths = recall.relabelled(earlier.labels, earlier.lengths, self.clusters, self.labels, self.lengths)
        return replace(
            self,
            first=0,
            clusters=torch.arange(len(lengths)),
            labels=labels,
            lengths=lengths,
            members=torch.arange(len(rows["keys"])),
            downs=torch.cat((earlier.downs, self.downs)),
            ups=torch.cat((earlier.ups, self.ups)),
            **rows,
        )

    @contextmanager
    def applied(self, model: Model) -> Iterator[None]:
        """Wear the blocks. Raises ValueError for a step without those before it, or another model's."""
        if self.first or not torch.equal(self.clusters, torch.arange(len(self.clusters))):
            raise ValueError(f"blocks of {self.index}: merge this step with those before it")
        for module in self.modules:
            if tuple(model.matrix(f"{module}.weight").shape) != (self.ups.shape[2], self.downs.shape[3]):
                raise ValueError(f"blocks of {module} don't fit it: made for another model?")
        hooks = {self.index: self._choosing(model.device)}
        hooks |= {name: self._waking(i, model.device) for i, name in enumerate(self.modules)}
        with model.carrying(self, hooks):
            yield

    def _choosing(self, device: torch.device) -> Callable[[Tensor, Tensor, Asking], Tensor | None]:
        book = self.book.to(device)

        def choose(given: Tensor, out: Tensor, asking: Asking) -> None:
            awake: dict[int, int] = asking.notes.setdefault(self.kind, {})  # question -> block
            for row, (question, column) in enumerate(zip(asking.rows.tolist(), asking.last.tolist(), strict=True)):
                block = None if column < 0 else book.block(out[row, column].float())
                if block is not None:
                    awake[question] = block

        return choose

    def _waking(self, layer: int, device: torch.device) -> Callable[[Tensor, Tensor, Asking], Tensor | None]:
        downs, ups = self.downs[:, layer].to(device), self.ups[:, layer].to(device)

        def wake(given: Tensor, out: Tensor, asking: Asking) -> Tensor | None:
            awake = asking.notes.get(self.kind, {})
            rows = [(row, awake[q]) for row, q in enumerate(asking.rows.tolist()) if q in awake]
            if not rows:
                return None
            new = out.clone()
            for row, block in rows:
                new[row] = _adding(downs[block], ups[block], self.scale)(given[row], out[row])
            return new

        return wake
