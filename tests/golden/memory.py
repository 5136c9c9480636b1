"""Methods that keep edits beside the weights, GRACE and WISE, against recorded vectors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from methods.grace import Codebook, Grace, PreparedGrace, Tail
from methods.parts import gradients
from methods.parts.artifacts import Contexts
from methods.parts.sides import Memory
from methods.wise import Lesson, PreparedWise, SideMemory, Wise
from raysys.asking import Asking
from raysys.types import Edit
from tests.golden.common import OLD_PADDING, Case, Line, all_steps, error, largest, stored

ROUNDED = 1.2e-3  # WISE's losses are recorded as the rounded sum of rounded parts

UNSET = 1e8  # WISE's floor before the first edit


def _place(case: Case) -> tuple[int, str]:
    """The module that is wrapped, and the number of its block."""
    [name] = case.hparams["inner_params"]
    module = name.replace("[", ".").replace("]", "").removesuffix(".weight").removesuffix(".bias")
    return gradients.lowest(case.model, [module]), module


@dataclass(frozen=True, kw_only=True, eq=False)
class _Traced(PreparedGrace):
    """As published, with each search's losses; worn, it compares at each prompt's end, as the vectors' logits do."""

    losses: list[list[float]] = field(default_factory=list)

    def _start(self, tail: Tail, number: int) -> Tensor:
        assert self.starts is not None
        return self.starts[len(self.losses)]  # recorded by edit, whether or not it made a key

    def _search(self, *args: Any) -> tuple[Tensor, list[float]]:
        value, losses = super()._search(*args)
        self.losses.append(losses)
        return value, losses

    def edit(self, *args: Any) -> Edit:
        edit = super().edit(*args)
        return replace(edit, patches=tuple(replace(p, position=-1) for p in edit.patches))  # type: ignore[type-var]


def _grace(case: Case) -> Iterator[Line]:
    h, v = case.hparams, case.vectors
    layer, module = _place(case)
    wanted = Grace(layer=layer, radius=h["eps"], steps=h["n_iter"], lr=h["edit_lr"], published=True)
    ready = wanted.prepare(case.model)
    starts = [v[f"edit{i}.cold_init"][0] for i in range(len(case.batches))]
    method = _Traced(settings=ready.settings, module=module, starts=starts)

    def per_edit(number: int, edit: Edit) -> Iterator[Line]:
        book = case.model.wears(Codebook)
        assert book is not None
        for got, what in ((book.keys, "keys"), (book.radii, "epsilons")):
            yield Line(case.name, f"edit{number}.{what}", error(got, v[f"edit{number}.{what}"]))
        values = f"edit{number}.values"
        yield Line(case.name, f"{values} (largest difference)", largest(book.values, v[values]), 5e-3)
        losses = v[f"edit{number}.losses"]
        yield Line(case.name, f"edit{number}.losses", error(torch.tensor(method.losses[number]), losses))

    yield from all_steps(case, method, [], per_edit)


def _old_mask(mask: Tensor, family: str) -> Tensor:
    """The additive (R, 1, T, T) mask of transformers 4.46, which the vectors were made with.

    It differs where a padding position looks: in GPT-2 not at later padding, but at everything else alike; in GPT-NeoX
    at nothing later.
    """
    least = torch.finfo(torch.float32).min
    size = mask.shape[1]
    causal = torch.full((size, size), least if family == "gpt2" else -torch.inf).triu(1)
    return causal + (1 - mask[:, None, None, :].float()) * least


@contextmanager
def _as_recorded(case: Case) -> Iterator[None]:
    """Within it, WISE sees padding as the reference did."""
    ours, family = Lesson._prepare, case.model.config.model_type

    def prepare(self: Lesson, ids: Tensor, mask: Tensor, positions: Tensor | None, layer: int) -> None:
        with self.model.asking(Asking.whole(ids, mask)):
            ours(self, ids, _old_mask(mask, family), positions, layer)

    with mock.patch.object(Lesson, "_prepare", prepare) if family in OLD_PADDING else nullcontext():
        yield


def _wise(case: Case) -> Iterator[Line]:
    h, v = case.hparams, case.vectors
    if h["merge_alg"] != "ties":
        raise ValueError(f"side memories are merged by ties here, not by {h['merge_alg']}")
    layer, module = _place(case)
    settings = Wise(
        layer=layer,
        steps=h["n_iter"],
        lr=h["edit_lr"],
        margins=(h["alpha"], h["beta"], h["gamma"]),
        reach=h["act_ratio"],
        share=h["mask_ratio"],
        norm_constraint=h["norm_constraint"],
        save=h["save_freq"],
        merge=h["merge_freq"],
        density=h["densities"],
        published=True,
    )
    masks = [v[f"edit{i}.mask"].bool() for i in range(0, len(case.batches), h["save_freq"])]
    contexts = Contexts(tuple(case.meta["context_templates"]), "recorded")
    method = _TracedWise(settings=settings, module=module, contexts=contexts, masks=masks)
    weight = stored(case, f"{module}.weight")

    def per_edit(number: int, edit: Edit) -> Iterator[Line]:
        worn = case.model.wears(SideMemory)
        assert worn is not None
        losses = f"edit{number}.losses"
        away = largest(torch.tensor(method.losses[number]), v[losses])
        yield Line(case.name, f"{losses} (largest difference, rounded)", away, ROUNDED)
        yield from _memories(case, number, worn, method.earlier[number], method.made[number], weight)
        yield from _floors(case, number, worn)

    with _as_recorded(case):
        yield from all_steps(case, method, [], per_edit)


@dataclass(frozen=True, kw_only=True, eq=False)
class _TracedWise(PreparedWise):
    """With each search's losses (total, target, activations), the side memory it gave, and those finished before."""

    losses: list[list[list[float]]] = field(default_factory=list)
    made: list[Memory] = field(default_factory=list)
    earlier: list[tuple[Memory, ...]] = field(default_factory=list)

    def _search(self, *args: Any) -> Any:
        found = super()._search(*args)
        self.losses.append(found.losses)
        return found

    def _step(self, worn: SideMemory | None, new: Memory, weight: Tensor, edits: int) -> SideMemory:
        self.made.append(new)
        self.earlier.append(() if worn is None else worn.finished)
        return super()._step(worn, new, weight, edits)


def _memories(
    case: Case, number: int, worn: SideMemory, earlier: Sequence[Memory], made: Memory, weight: Tensor
) -> Iterator[Line]:
    """Side memories after an edit; where that is what was recorded, `made` before it was saved or merged.

    `earlier`: the finished ones before the edit.
    """
    v = case.vectors
    finished = [m.change(weight) for m in worn.finished]
    live = worn.memories[-1].change(weight) if worn.live else torch.zeros_like(weight)
    what = f"edit{number}.new_weight_delta"
    if what in v:
        unsaved = not worn.live and bool(v[what].any())
        yield Line(case.name, what, error(made.change(weight) if unsaved else live, v[what]))
    unmerged = [*(m.change(weight) for m in earlier), made.change(weight)]
    last = number + 1 == len(case.batches)
    for start in (f"edit{number}.", *(("",) if last else ())):
        pattern = rf"{re.escape(start)}memory\d+\.weight_delta"
        names = sorted((name for name in v if re.fullmatch(pattern, name)), key=lambda name: (len(name), name))
        ours = unmerged if start and len(names) == len(unmerged) != len(finished) else finished
        if names and len(names) != len(ours):
            yield Line(case.name, f"{start}memory*: {len(ours)} of ours, {len(names)} recorded", float("inf"))
        for name, change in zip(names, ours, strict=False):
            yield Line(case.name, name, error(change, v[name]))


def _floors(case: Case, number: int, worn: SideMemory) -> Iterator[Line]:
    """The floors of the finished side memories and of the live one, as many of them as were recorded."""
    name = f"edit{number}.min_acts"
    recorded = case.vectors[name].double().flatten()
    floors = worn.floors.double()
    finished, live = (floors[:-1], floors[-1:]) if worn.live else (floors, torch.zeros(0).double())
    wanted = recorded[recorded < UNSET].sort().values  # one without an edit has none
    whole = len(recorded) == len(finished) + 1
    ours = torch.cat((finished, live)) if whole else live if len(recorded) == 1 else finished
    yield Line(case.name, name, error(ours.sort().values, wanted))


INPUTS = {
    "GRACE": ("edit*.cold_init",),  # where the search starts: random
    "WISE": ("edit*.mask",),  # which entries are trained: random
}

METHODS: dict[str, Callable[[Case], Iterator[Line]]] = {"GRACE": _grace, "WISE": _wise}
