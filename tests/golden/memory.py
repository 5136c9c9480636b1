"""Methods that keep edits beside the weights, GRACE and WISE, against recorded vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from methods import recall
from methods.artifacts import Contexts
from methods.grace import Codebook, Grace, PreparedGrace, Tail
from methods.wise import Lesson, PreparedWise, SideMemory, Wise
from raysys.asking import Asking
from raysys.types import Edit
from tests.golden.common import Case, Line, all_steps, error, stored

ROUNDED = 1.2e-3  # WISE's losses are recorded as the rounded sum of rounded parts

UNSET = 1e8  # WISE's floor before the first edit


def _place(case: Case) -> tuple[int, recall.Site]:
    """Block and end of the MLP that the recorded parameter belongs to."""
    [name] = case.hparams["inner_params"]
    module = name.replace("[", ".").replace("]", "").removesuffix(".weight")
    for layer in range(case.model.layers):
        for where in ("in", "out"):
            if recall.site(case.model, layer, where) == module:
                return layer, where
    raise ValueError(f"{name}: neither the first nor the last projection of an MLP")


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
    layer, where = _place(case)
    wanted = Grace(layer=layer, site=where, radius=h["eps"], steps=h["n_iter"], lr=h["edit_lr"], published=True)
    ready = wanted.prepare(case.model)
    starts = [v[f"edit{i}.cold_init"][0] for i in range(len(case.batches))]
    method = _Traced(settings=ready.settings, module=ready.module, starts=starts)

    def per_edit(number: int, edit: Edit) -> Iterator[Line]:
        book = case.model.wears(Codebook)
        assert book is not None
        for got, what in ((book.keys, "keys"), (book.radii, "epsilons")):
            yield Line(case.name, f"edit{number}.{what}", error(got, v[f"edit{number}.{what}"]))
        worst = float((book.values - v[f"edit{number}.values"]).abs().max())
        yield Line(case.name, f"edit{number}.values (largest difference)", worst, 5e-3)
        losses = v[f"edit{number}.losses"]
        yield Line(case.name, f"edit{number}.losses", error(torch.tensor(method.losses[number]), losses))

    yield from all_steps(case, method, [], per_edit)


def _old_mask(mask: Tensor) -> Tensor:
    """The additive (R, 1, T, T) mask of GPT-2 in transformers 4.46, which the vectors were made with.

    It differs where a padding position looks: not at later padding, but at everything else alike.
    """
    least = torch.finfo(torch.float32).min
    size = mask.shape[1]
    causal = torch.full((size, size), least).triu(1)
    return causal + (1 - mask[:, None, None, :].float()) * least


@contextmanager
def _as_recorded(case: Case) -> Iterator[None]:
    """Within it, WISE sees padding as the reference did."""
    ours = Lesson._prepare

    def prepare(self: Lesson, ids: Tensor, mask: Tensor, positions: Tensor | None, layer: int) -> None:
        with self.model.asking(Asking.whole(ids, mask)):
            ours(self, ids, _old_mask(mask), positions, layer)

    with mock.patch.object(Lesson, "_prepare", prepare) if case.family == "gpt2" else nullcontext():
        yield


def _wise(case: Case) -> Iterator[Line]:
    h, v = case.hparams, case.vectors
    layer, where = _place(case)
    settings = Wise(
        layer=layer,
        site=where,
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
    module = recall.site(case.model, layer, where)
    masks = [v[f"edit{i}.mask"].bool() for i in range(0, len(case.batches), h["save_freq"])]
    contexts = Contexts(tuple(case.meta["context_templates"]), "recorded")
    method = PreparedWise(settings=settings, module=module, contexts=contexts, masks=masks)
    weight = stored(case, f"{module}.weight")

    def per_edit(number: int, edit: Edit) -> Iterator[Line]:
        worn = case.model.wears(SideMemory)
        assert worn is not None
        losses = v[f"edit{number}.losses"]
        yield Line(case.name, f"edit{number} steps", abs(edit.log["passes"] - len(losses)))
        for got, row, what in ((edit.log["loss_before"], losses[0], "first"), (edit.log["loss"], losses[-1], "last")):
            yield Line(case.name, f"edit{number}.losses ({what}, rounded)", abs(got - float(row[0])), ROUNDED)
        changes = [m.change(weight) for m in worn.memories]
        live = changes.pop() if worn.live else torch.zeros_like(weight)
        if (what := f"edit{number}.new_weight_delta") in v:
            yield Line(case.name, what, error(live, v[what]))
        floors = worn.floors.tolist()
        for i, change in enumerate(changes):
            for what in (f"memory{i}.weight_delta", f"edit{number}.memory{i}.weight_delta"):
                if what in v and (what[0] == "e" or number == len(case.batches) - 1):
                    yield Line(case.name, what, error(change, v[what]))
        recorded = [act for act in v[f"edit{number}.min_acts"].tolist() if act < UNSET]
        away = max((min(abs(floor - act) for floor in floors) / act for act in recorded), default=0.0)
        yield Line(case.name, f"edit{number}.min_acts", away)

    with _as_recorded(case):
        yield from all_steps(case, method, [], per_edit)


METHODS: dict[str, Callable[[Case], Iterator[Line]]] = {"GRACE": _grace, "WISE": _wise}
