"""What every comparison with recorded vectors needs: a folder as a `Case`, a comparison as a `Line`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from raysys import types
from raysys.model import Model
from raysys.patch import Wearer, merge
from raysys.types import Edit, EditRequest, Patch

TOLERANCE = 1e-4  # relative, float32


@dataclass(frozen=True)
class Line:
    """One comparison: where, what, relative error, and how large that may be."""

    case: str
    what: str
    error: float
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Case:
    """One folder of recorded vectors and the model they were recorded on."""

    name: str
    family: str
    method: str
    meta: dict[str, Any]
    hparams: dict[str, Any]
    requests: list[EditRequest]
    batches: list[list[int]]
    vectors: dict[str, Tensor]
    common: dict[str, Tensor]
    contexts: dict[str, Any]
    model: Model

    @property
    def weight(self) -> str:
        return f"{self.model.mlp_out(self.hparams['layers'][0])}.weight"


def load(root: Path, folder: Path, family: str, method: str) -> Case:
    """The case in `folder`. Raises ValueError when it can't be read."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    requests = [
        EditRequest(
            str(i), r["prompt"].replace(r["subject"], "{}", 1), r["subject"], r["target_new"], r.get("ground_truth")
        )
        for i, r in enumerate(meta["requests"])
    ]
    common = root / f"{family}_common"
    return Case(
        name=folder.name,
        family=family,
        method=method,
        meta=meta,
        hparams=meta["hparams"],
        requests=requests,
        batches=meta.get("batches", [[i] for i in range(len(requests))]),
        vectors=load_file(folder / "vectors.safetensors"),
        common=load_file(common / "vectors.safetensors"),
        contexts=json.loads((common / "meta.json").read_text(encoding="utf-8"))["context_templates"],
        model=Model.load(str(root / "models" / f"tiny-{family}"), attention="eager"),
    )


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error; infinite when shapes differ."""
    if got.shape != wanted.shape:
        return float("inf")
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def sequence(case: Case, method: Any) -> Iterator[tuple[int, Edit]]:
    """Each batch's edit, made on the model that wears those before it; it is worn when the edit is handed out."""
    wearer = Wearer(case.model)
    worn: tuple[Patch, ...] = ()
    memory: Any = None
    for number, batch in enumerate(case.batches):
        edit = method.edit(case.model, [case.requests[i] for i in batch], memory)
        memory = types.remembered(method, memory, edit.memory)
        worn = merge(worn, edit.patches)
        wearer.wear(worn)
        yield number, edit
    wearer.take_off()


def logits(case: Case) -> Tensor:
    """(requests, V) at the end of every edit prompt, each run alone."""
    rows = []
    for request in case.requests:
        hidden, _ = case.model.hidden(torch.tensor([case.model.encode(request.text)]), use_cache=False)
        rows.append(case.model.logits(hidden[0, -1]))
    return torch.stack(rows)


def stored(case: Case, name: str) -> Tensor:
    """A copy of parameter `name` in its own layout."""
    return case.model.parameter(name).detach().clone()


def all_steps(
    case: Case, method: Any, names: list[str], per_edit: Callable[[int, Edit], Iterator[Line]]
) -> Iterator[Line]:
    """Logits and weight differences before, after the first and after the last batch, and `per_edit` in between."""
    before = {n: stored(case, n) for n in names}
    last = len(case.batches)
    yield Line(case.name, "logits.pre", error(logits(case), case.vectors["logits.pre"]))
    for number, edit in sequence(case, method):
        yield from per_edit(number, edit)
        for n in names:
            recorded = {
                *((f"edit0.weight_delta{end}" for end in ("", f".{n}")) if number == 0 else ()),
                *((f"weight_delta_total{end}" for end in (last, f".{n}", f"{last}.{n}")) if number + 1 == last else ()),
            }
            for what in sorted(recorded & case.vectors.keys()):
                yield Line(case.name, what, error(stored(case, n) - before[n], case.vectors[what]))
        what = f"logits.after{number + 1}"
        if what in case.vectors:
            yield Line(case.name, what, error(logits(case), case.vectors[what]))
