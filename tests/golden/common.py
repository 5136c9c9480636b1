"""What every comparison with recorded vectors needs: a folder as a `Case`, a comparison as a `Line`."""

from __future__ import annotations

import json
import re
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
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
OLD_PADDING = ("gpt2", "gpt_neox")  # families in which transformers 4.46, of the vectors, treats padding in its own way


@dataclass(frozen=True)
class Line:
    """One comparison: where, what, relative error, and how large that may be."""

    case: str
    what: str
    error: float
    tolerance: float = TOLERANCE

    @property
    def tensor(self) -> str:
        """The recorded tensor that was compared, where it is one: what stands before any remark in brackets."""
        return self.what.partition(" (")[0]

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


class Recorded(UserDict[str, Tensor]):
    """The tensors of a folder by name; `read` has the names of those that were looked at."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.read: set[str] = set()
        super().__init__(tensors)

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


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
    vectors: Recorded
    common: dict[str, Tensor]
    contexts: dict[str, Any]
    model: Model

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Names of the model's parameters."""
        return frozenset(name for name, _ in self.model.net.named_parameters())

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
        vectors=Recorded(load_file(folder / "vectors.safetensors")),
        common=load_file(common / "vectors.safetensors"),
        contexts=json.loads((common / "meta.json").read_text(encoding="utf-8"))["context_templates"],
        model=Model.load(str(root / "models" / f"tiny-{family}"), attention="eager"),
    )


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error; infinite when shapes differ."""
    if got.shape != wanted.shape:
        return float("inf")
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def largest(got: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference; infinite when shapes differ."""
    if got.shape != wanted.shape:
        return float("inf")
    return float((got.double() - wanted.double()).abs().max())


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
    """Logits and weight differences before, after the first and after the last batch, and `per_edit` in between.

    `names`: the parameters that the method may change.
    """
    deltas = _deltas(case, names)
    every = {*names, *(name for name, _ in deltas.values())}
    before = {n: stored(case, n) for n in every if n in case.parameters}
    yield Line(case.name, "logits.pre", error(logits(case), case.vectors["logits.pre"]))
    for number, edit in sequence(case, method):
        yield from per_edit(number, edit)
        for what, (name, made) in deltas.items():
            if made == number + 1 and name in before:
                yield Line(case.name, what, error(stored(case, name) - before[name], case.vectors[what]))
        if number + 1 == len(case.batches):
            total = {name for name, made in deltas.values() if made == number + 1}
            for n in names if total else ():
                if n not in total and not torch.equal(stored(case, n), before[n]):
                    yield Line(case.name, f"changed by us, not recorded: {n}", float("inf"))
        what = f"logits.after{number + 1}"
        if what in case.vectors:
            yield Line(case.name, what, error(logits(case), case.vectors[what]))


def _deltas(case: Case, names: list[str]) -> dict[str, tuple[str, int]]:
    """Recorded weight differences: whose they are, and after how many batches."""
    found = {}
    for what in sorted(case.vectors):
        total = re.fullmatch(r"weight_delta_total(\d*)(?:\.(.+))?", what)
        first = re.fullmatch(r"edit0\.weight_delta(?:\.(.+))?", what)
        if total:
            found[what] = total[2], int(total[1] or len(case.batches))
        elif first:
            found[what] = first[1], 1
    return {what: (name or names[0], made) for what, (name, made) in found.items() if name or names}


def unseen(case: Case, lines: Sequence[Line], inputs: Sequence[str]) -> Iterator[Line]:
    """What is wrong with the comparisons of a case as a whole: tensors left out, neither weights nor logits compared.

    `inputs`: patterns of the names of tensors that are given to the method or say again what others do.
    """
    compared = {line.tensor for line in lines} & case.vectors.keys()
    for name in sorted(case.vectors.keys() - compared):
        if not any(fnmatchcase(name, pattern) for pattern in inputs):
            how = "read" if name in case.vectors.read else "recorded"
            yield Line(case.name, f"{how}, not compared: {name}", float("inf"))
    if not any("weight_delta" in name or "logits.after" in name for name in compared):
        yield Line(case.name, "neither changed weights nor logits were compared", float("inf"))
