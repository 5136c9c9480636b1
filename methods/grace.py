"""GRACE: a code book beside one layer; a prompt whose key lies near a stored one gets the stored output there.

Hartvigsen, Sankaranarayanan, Palangi, Kim, Ghassemi, "Aging with GRACE: Lifelong Model Editing with Discrete Key-Value
Adaptors", NeurIPS 2023, arXiv:2211.11031: section 2.2 (a layer's output is a stored value where its input is within
the radius of the nearest key) and algorithm 1 (a new key, a wider or a split radius).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from methods.parts import locate, passes, presets, recall
from raysys.asking import Asking
from raysys.model import Model
from raysys.types import Edit, EditRefused, EditRequest

SPLIT = 1e-5  # by how much the older of two conflicting keys gets the smaller radius
PRESETS: Mapping[str, presets.Settings] = {  # EasyEdit, hparams/GRACE; "world/small" was tuned on its own facts
    "world/small": {"layer": 5, "site": "in", "steps": 50, "radius": 7.0},
    "gpt2-xl": {"layer": 35, "site": "in", "steps": 200},
    "gpt-j-6b": {"layer": 25, "site": "out", "steps": 200},
    "llama-2-7b": {"layer": 27, "site": "out", "steps": 100},
}


def rule(model: Model) -> presets.Settings:
    """As published for Llama 2, 7 B, at the same relative depth."""
    return {"layer": min(round(27 / 32 * model.layers), model.layers - 1), "site": "out", "steps": 100, "radius": 1.0}


@dataclass(frozen=True, kw_only=True)
class Grace:
    """One key a fact, the layer's input at the prompt's last token, and a value that replaces its output there.

    The prompt's end is where a question is compared with the keys, row by row, in the pass that reads it; tokens
    generated afterwards are left alone, and see the value through attention.

    `published` does what the study's published code does: one position for all rows, that of the last edit's prompt
    end, is compared in every pass (decoding included); labels are compared by the mean of their token numbers, the
    prompt's -100 included, and looked up in reverse order; a radius reaches exactly to the prompt that widened it, so
    that rounding decides; the same prompt with another target splits a radius of zero. By default the same prompt
    with another target rewrites its value.
    """

    layer: int | None = None
    site: recall.Site | None = None  # the MLP's first or last projection
    radius: float | None = None  # of a new key (the paper's ε)
    steps: int | None = None  # passes of the search for a value, a step of Adam after each
    lr: float = 1.0
    start: str = "cold"  # values start uniform in [0, 1); "warm": at what the layer gives today
    stop: float = 0.0  # nats: a loss below it ends the search
    seed: int = 0  # of cold starts
    published: bool = False

    name: ClassVar[str] = "grace"
    version: ClassVar[str] = "1"

    @property
    def batch(self) -> int:
        """One request at a time."""
        return 1

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedGrace:
        """Settle open settings; there is nothing to collect. Raises ValueError for a layer that isn't there."""
        if self.start not in ("cold", "warm"):
            raise ValueError(f'grace: start is "cold" or "warm", not {self.start!r}')
        settings: Grace = presets.settled(self, model, PRESETS, rule)
        assert settings.layer is not None and settings.site is not None
        return PreparedGrace(settings=settings, module=recall.site(model, settings.layer, settings.site))


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedGrace:
    """GRACE on one model. `starts`: first values by number of the key, in place of random ones (for comparisons)."""

    settings: Grace
    module: str
    starts: Sequence[Tensor] | None = None

    def identity(self) -> dict[str, Any]:
        """Name, version and settings."""
        return presets.identity(self.settings, {})

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Any = None) -> Edit:
        """What one request changes in the code book worn. Raises EditRefused with the reason when it can't."""
        if len(requests) != 1:
            raise EditRefused(f"grace writes one edit at a time, got {len(requests)}")
        s, request = self.settings, requests[0]
        assert s.layer is not None and s.steps is not None
        row = locate.row(model, request, target=True)
        book = model.wears(Codebook)
        if book is not None and book.module != self.module:
            raise EditRefused(f"edit {request.id!r}: the code book worn is of {book.module}, not of {self.module}")
        with model.bare():
            tail = Tail(model, row, s.layer, self.module)
            what, entries = self._plan(model, book, tail.key, row)
            number, entry = list(entries.items())[-1]  # the one that gets the value
            start = self._start(tail, number) if entry.value is None else entry.value
            value, losses = self._search(request, tail, start.to(model.device))
        entries[number] = replace(entry, value=value.cpu())
        log = {"passes": len(losses), "loss_before": losses[0], "loss": losses[-1], "what": what, "key": number}
        step = _written(entries, self.module, row.first - 1, s.published)
        return Edit((step,), log=log | {"radius": entry.radius})

    def _start(self, tail: Tail, number: int) -> Tensor:
        """Where the value of key `number` starts, (d_out,)."""
        if self.settings.start == "warm":
            return tail.now
        if self.starts is not None:
            return self.starts[number]
        return torch.rand(len(tail.now), generator=torch.Generator().manual_seed(self.settings.seed + 7919 * number))

    def _search(self, request: EditRequest, tail: Tail, start: Tensor) -> tuple[Tensor, list[float]]:
        """The value (d_out,) that makes the target likely, and the loss of each pass in nats."""
        s = self.settings
        value = start.detach().float().clone().requires_grad_(True)
        adam = torch.optim.Adam([value], lr=s.lr)
        losses: list[float] = []
        for step in range(s.steps or 0):
            with torch.enable_grad():
                loss = tail.loss(value)
            losses.append(float(loss.detach()))
            if not torch.isfinite(loss):
                raise EditRefused(f"edit {request.id!r}: the loss of step {step} is not finite: a broken model")
            if losses[-1] < s.stop:
                break
            (value.grad,) = torch.autograd.grad(loss, [value])
            adam.step()
        return value.detach(), losses

    def _plan(self, model: Model, book: Codebook | None, key: Tensor, row: locate.Row) -> tuple[str, dict[int, _Entry]]:
        """What `key` (d_in,) with the row's target does to the code book, and the keys it writes by their numbers.

        The last of them gets a new value, starting from the one it has.
        """
        s = self.settings
        assert s.radius is not None
        entry = _Entry(key.cpu(), None, s.radius, row.labels, row.first)
        if book is None:
            return "new", {0: entry}
        slack = 0.0 if s.published else recall.noise(model, key)
        near, distance = recall.nearest(book.keys, entry.key)
        known = book.entry(near)
        if distance > s.radius + known.radius:
            return "new", {len(book.keys): entry}
        if distance <= slack and known.labels != row.labels:
            return "rewritten", {near: replace(entry, radius=max(known.radius, slack))}
        if book.same(near, entry):
            radius = distance + slack if distance > known.radius else known.radius
            return "joined", {near: replace(known, radius=radius)}
        split = replace(known, radius=distance / 2 - SPLIT)
        return "split", {near: split, len(book.keys): replace(entry, radius=distance / 2)}


@dataclass(frozen=True)
class _Entry:
    """One key (d_in,) with its value (d_out,), both float32, its radius, the target's tokens, the prompt's length."""

    key: Tensor
    value: Tensor | None
    radius: float
    labels: tuple[int, ...]
    prompt: int


def _written(entries: Mapping[int, _Entry], module: str, position: int, published: bool) -> Codebook:
    """`entries` by their numbers as a code book, or as a step of one."""
    rows = list(entries.values())
    labels, lengths = recall.joined([e.labels for e in rows])
    return Codebook(
        module=module,
        at=torch.tensor(list(entries)),
        keys=torch.stack([e.key for e in rows]),
        values=torch.stack([e.value for e in rows if e.value is not None]),
        radii=torch.tensor([e.radius for e in rows]),
        labels=labels,
        lengths=lengths,
        prompts=torch.tensor([e.prompt for e in rows]),
        position=position,
        published=published,
    )


class Tail:
    """A prompt's last token and the target behind it, from block `layer` upwards: what a value can change.

    Everything before and below is computed once. `key` (d_in,) and `now` (d_out,), float32, are what enters and leaves
    `module` at the prompt's last token.
    """

    def __init__(self, model: Model, row: locate.Row, layer: int, module: str) -> None:
        self.model, self.module = model, module
        before = row.first - 1
        ids = torch.tensor([row.ids], device=model.device)
        self.labels = torch.tensor(row.labels, device=model.device)
        cache = passes.Fixed(config=model.config) if before else None
        seen: list[tuple[Tensor, Tensor]] = []

        def look(given: Tensor, out: Tensor) -> None:
            seen.append((given.reshape(len(row.labels), -1)[0].float(), out.reshape(len(row.labels), -1)[0].float()))

        mask = torch.ones_like(ids)
        with torch.no_grad():
            if cache is not None:
                model.hidden(ids[:, :before], mask[:, :before], cache)
                cache.fixed = True
            with model.watching(module, look):
                self.trunk = model.trunk(ids[:, before:], mask, layer, cache)
        [(self.key, self.now)] = seen

    def loss(self, value: Tensor) -> Tensor:
        """Mean nats of the target's tokens when `value` (d_out,) leaves the module at the prompt's last token."""

        def put(_: Tensor, out: Tensor) -> Tensor:
            rows = out.reshape(len(self.labels), -1)
            return torch.cat((value.to(out.dtype)[None], rows[1:])).reshape(out.shape)

        with self.model.watching(self.module, put):
            hidden = self.model.upper(self.trunk)  # (1, target tokens, d)
        return cross_entropy(passes.logits(self.model, hidden[0]).float(), self.labels)


@dataclass(frozen=True, kw_only=True, eq=False)
class Codebook:
    """Keys numbered `at` of the code book beside `module`: all of them, or those that a step writes.

    at: (K,) long; keys: (K, d_in), values: (K, d_out), radii: (K,) float32; labels: (n,) long, the targets' tokens one
    after another, `lengths` (K,) of each; prompts: (K,) long, tokens of each key's prompt; position: column of the
    newest edit's key in its prompt (`published` looks there; -1: at the last column).
    """

    module: str
    at: Tensor
    keys: Tensor
    values: Tensor
    radii: Tensor
    labels: Tensor
    lengths: Tensor
    prompts: Tensor
    position: int
    published: bool = False
    kind: ClassVar[str] = "codebook"
    in_weights: ClassVar[bool] = False

    @property
    def whole(self) -> bool:
        """Only a position counted from the prompt's first token needs all of it."""
        return self.published

    def tensors(self) -> dict[str, Tensor]:
        names = ("at", "keys", "values", "radii", "labels", "lengths", "prompts")
        return {name: getattr(self, name) for name in names}

    def fields(self) -> dict[str, Any]:
        return {"module": self.module, "position": self.position, "published": self.published}

    def entry(self, number: int) -> _Entry:
        """Key `number` of a whole code book."""
        key, value, radius = self.keys[number], self.values[number], float(self.radii[number])
        return _Entry(key, value, radius, self._target(number), int(self.prompts[number]))

    def _target(self, number: int) -> tuple[int, ...]:
        start = int(self.lengths[:number].sum())
        return tuple(self.labels[start : start + int(self.lengths[number])].tolist())

    def same(self, number: int, entry: _Entry) -> bool:
        """Whether key `number` has the target of `entry`; as the published code finds out, if so wanted."""
        if not self.published:
            return self._target(number) == entry.labels
        return _mean(self.entry(len(self.keys) - 1 - number)) == _mean(entry)

    def after(self, earlier: Codebook) -> Codebook:
        """`earlier`, a whole code book, with this step's keys written. Raises ValueError when they don't belong."""
        if earlier.module != self.module or int(self.at.max()) > len(earlier.keys):
            raise ValueError(f"a step of the code book of {self.module} does not follow that of {earlier.module}")
        labels, lengths = recall.relabelled(earlier.labels, earlier.lengths, self.at, self.labels, self.lengths)
        rows = {name: getattr(self, name) for name in ("keys", "values", "radii", "prompts")}
        rows = {name: recall.written(getattr(earlier, name), self.at, new) for name, new in rows.items()}
        return replace(self, at=torch.arange(len(lengths)), labels=labels, lengths=lengths, **rows)

    @contextmanager
    def applied(self, model: Model) -> Iterator[None]:
        """Wear the code book. Raises ValueError for a step without those before it, or another model's."""
        if not torch.equal(self.at, torch.arange(len(self.at))):
            raise ValueError(f"the code book of {self.module} lacks its first keys: merge this step with those before")
        shape = tuple(model.matrix(f"{self.module}.weight").shape)
        if (self.values.shape[1], self.keys.shape[1]) != shape:
            raise ValueError(f"the code book of {self.module} does not fit {shape}: made for another model?")
        with model.carrying(self, {self.module: self._hook(model.device)}):
            yield

    def _hook(self, device: torch.device) -> Callable[[Tensor, Tensor, Asking], Tensor | None]:
        keys, values = self.keys.to(device), self.values.to(device)
        radii = self.radii.tolist()

        def look(given: Tensor, out: Tensor, asking: Asking) -> Tensor | None:
            last = asking.last.tolist()
            if self.published:
                last = [min(self.position, given.shape[1] - 1) % given.shape[1]] * len(given)
            hits: list[tuple[int, int, int]] = []
            for number, column in enumerate(last):
                if column >= 0:
                    near, distance = recall.nearest(keys, given[number, column].float())
                    if distance <= radii[near]:
                        hits.append((number, column, near))
            if not hits:
                return None
            at, columns, chosen = (list(c) for c in zip(*hits, strict=True))
            new = out.clone()
            new[at, columns] = values[chosen].to(out.dtype)
            return new

        return look


def _mean(entry: _Entry) -> float:
    """Mean token number of a target as the published code takes it: the prompt's tokens count as -100 each."""
    return float(torch.tensor((-100,) * entry.prompt + entry.labels).float().mean())
