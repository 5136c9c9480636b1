"""Fine-tuning, FT-L and FT-M, against recorded vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

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

    def per_edit(number: int, edit: Edit) -> Iterator[Line]:
        losses = case.vectors[f"edit{number}.losses"]
        yield Line(case.name, f"edit{number} steps", abs(edit.log["steps"] - len(losses)))
        yield Line(case.name, f"edit{number} last loss", error(torch.tensor(edit.log["loss"]), losses[-1]))

    module = case.weight.removesuffix(".weight")
    trained = [f"{module}.{name}" for name, _ in case.model.module(module).named_parameters()]
    yield from all_steps(case, method, trained, per_edit)


METHODS: dict[str, Callable[[Case], Iterator[Line]]] = {"FT-L": _ft, "FT-M": _ft}
