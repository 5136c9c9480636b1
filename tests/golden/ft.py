"""Fine-tuning, FT-L and FT-M, against recorded vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from methods import ft
from methods.ft import FtL, FtM
from raysys.types import Edit
from tests.golden.common import Case, Line, all_steps, error


def _ft(case: Case) -> Iterator[Line]:
    h = case.hparams
    shared = {"layers": tuple(h["layers"]), "steps": h["num_steps"], "lr": h["lr"], "bias": True}
    ball = h["norm_constraint"] or 0.0
    if h["objective_optimization"] == "prompt_last":
        method = FtL(norm_constraint=ball, published=True, **shared)  # differs where the tokenizer adds a BOS
    else:
        method = FtM(norm_constraint=ball, **shared)

    modules = [case.model.mlp_out(layer) for layer in h["layers"]]
    trained = [f"{m}.{name}" for m in modules for name, _ in case.model.module(m).named_parameters()]
    losses: list[float] = []
    real = ft._step

    def step(*args: Any) -> Any:
        loss, slopes = real(*args)
        losses.append(float(loss))
        return loss, slopes

    def per_edit(number: int, edit: Edit) -> Iterator[Line]:
        name, mine = f"edit{number}.losses", losses[-edit.log["steps"] :]
        yield Line(case.name, name, error(torch.tensor(mine), case.vectors[name]))

    with mock.patch.object(ft, "_step", step):
        yield from all_steps(case, method, trained, per_edit)


METHODS: dict[str, Callable[[Case], Iterator[Line]]] = {"FT-L": _ft, "FT-M": _ft}
