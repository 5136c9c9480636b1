"""Compare our methods with vectors recorded from reference implementations: `python -m tests.golden FOLDER`.

FOLDER holds `<family>_<METHOD>/{vectors.safetensors,meta.json}`, `<family>_common`, `models/tiny-<family>`. Prints one
line per compared tensor (relative Frobenius error) and, last, "N passed, N failed"; exit code 1 when any failed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from methods.artifacts import Contexts, Moment, second_moment
from methods.ft import FtL, FtM
from methods.rome import PreparedRome, Rome
from raysys.corpora import Corpus
from raysys.model import Model
from raysys.patch import Wearer, merge
from raysys.types import Edit, EditRequest, Patch

TOLERANCE = 1e-4  # relative, float32


@dataclass(frozen=True)
class Line:
    """One comparison: where, what, relative error."""

    case: str
    what: str
    error: float

    @property
    def passed(self) -> bool:
        return self.error <= TOLERANCE


@dataclass(frozen=True)
class Case:
    """One folder of recorded vectors and the model they were recorded on."""

    name: str
    family: str
    method: str
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


def compare(root: Path, only: str = "") -> Iterator[Line | str]:
    """Lines for every supported folder of `root` whose name contains `only`, and the names of the others."""
    for folder in sorted(root.iterdir()):
        family, _, method = folder.name.partition("_")
        if not (folder / "vectors.safetensors").is_file() or only not in folder.name:
            continue
        if method == "common":
            yield from _moments(root, family)
        elif method in METHODS:
            yield from METHODS[method](_case(root, folder, family, method))
        else:
            yield folder.name


def _case(root: Path, folder: Path, family: str, method: str) -> Case:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    requests = [
        EditRequest(str(i), r["prompt"].replace(r["subject"], "{}", 1), r["subject"], r["target_new"])
        for i, r in enumerate(meta["requests"])
    ]
    common = root / f"{family}_common"
    return Case(
        name=folder.name,
        family=family,
        method=method,
        hparams=meta["hparams"],
        requests=requests,
        batches=meta.get("batches", [[i] for i in range(len(requests))]),
        vectors=load_file(folder / "vectors.safetensors"),
        common=load_file(common / "vectors.safetensors"),
        contexts=json.loads((common / "meta.json").read_text(encoding="utf-8"))["context_templates"],
        model=Model.load(str(root / "models" / f"tiny-{family}"), attention="eager"),
    )


def _error(got: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error; infinite when shapes differ."""
    if got.shape != wanted.shape:
        return float("inf")
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def _sequence(case: Case, method: Any) -> Iterator[tuple[int, Edit]]:
    """Each batch's edit, made on the model that wears those before it; it is worn when the edit is handed out."""
    wearer = Wearer(case.model)
    worn: tuple[Patch, ...] = ()
    for number, batch in enumerate(case.batches):
        edit = method.edit(case.model, [case.requests[i] for i in batch])
        worn = merge(worn, edit.patches)
        wearer.wear(worn)
        yield number, edit
    wearer.take_off()


def _logits(case: Case) -> Tensor:
    """(requests, V) at the end of every edit prompt, each run alone."""
    rows = []
    for request in case.requests:
        hidden, _ = case.model.hidden(torch.tensor([case.model.encode(request.text)]), use_cache=False)
        rows.append(case.model.logits(hidden[0, -1]))
    return torch.stack(rows)


def _stored(case: Case, name: str) -> Tensor:
    """A copy of parameter `name` in its own layout."""
    return case.model.parameter(name).detach().clone()


def _all_steps(
    case: Case, method: Any, names: list[str], per_edit: Callable[[int, Edit], Iterator[Line]]
) -> Iterator[Line]:
    """Logits and weight differences before, after the first and after the last batch, and `per_edit` in between."""
    before = {n: _stored(case, n) for n in names}
    last = len(case.batches)
    yield Line(case.name, "logits.pre", _error(_logits(case), case.vectors["logits.pre"]))
    for number, edit in _sequence(case, method):
        yield from per_edit(number, edit)
        for n in names:
            recorded = {
                *((f"edit0.weight_delta{end}" for end in ("", f".{n}")) if number == 0 else ()),
                *((f"weight_delta_total{end}" for end in (last, f".{n}", f"{last}.{n}")) if number + 1 == last else ()),
            }
            for what in sorted(recorded & case.vectors.keys()):
                yield Line(case.name, what, _error(_stored(case, n) - before[n], case.vectors[what]))
        what = f"logits.after{number + 1}"
        if what in case.vectors:
            yield Line(case.name, what, _error(_logits(case), case.vectors[what]))


def _rome(case: Case) -> Iterator[Line]:
    h = case.hparams
    layer = h["layers"][0]
    settings = Rome(
        layer=layer,
        steps=h["v_num_grad_steps"],
        lr=h["v_lr"],
        weight_decay=h["v_weight_decay"],
        clamp=h["clamp_norm_factor"],
        kl=h["kl_factor"],
        second_moment=h["mom2_adjustment"],
        ridge=0.0,
    )
    moment = Moment(case.common[f"cov.{case.model.mlp_out(layer)}"].double(), 1, "recorded")
    contexts = Contexts(tuple(case.contexts["rome"]), "recorded")
    method = PreparedRome(settings=settings, contexts=contexts, moment=moment if h["mom2_adjustment"] else None)

    def per_edit(number: int, edit: Edit) -> Iterator[Line]:
        [patch] = edit.patches
        wanted = case.vectors
        for got, what in ((patch.right[0], "u"), (patch.left[:, 0], "right_vector")):  # type: ignore[attr-defined]
            yield Line(case.name, f"edit{number}.{what}", _error(got, wanted[f"edit{number}.{what}"]))
        passes = len(wanted[f"edit{number}.losses"])
        yield Line(case.name, f"edit{number} passes", abs(edit.log["passes"] - passes))
        last = wanted[f"edit{number}.losses"][-1, 0]
        yield Line(case.name, f"edit{number} last loss", _error(torch.tensor(edit.log["loss"]), last))

    yield from _all_steps(case, method, [case.weight], per_edit)


def _ft(case: Case) -> Iterator[Line]:
    h = case.hparams
    shared = {"layers": tuple(h["layers"]), "steps": h["num_steps"], "lr": h["lr"], "bias": True}
    ball = h["norm_constraint"] or 0.0
    kinds = {"prompt_last": FtL, "target_new": FtM}
    method = kinds[h["objective_optimization"]](norm_constraint=ball, **shared)

    def per_edit(number: int, edit: Edit) -> Iterator[Line]:
        losses = case.vectors[f"edit{number}.losses"]
        yield Line(case.name, f"edit{number} steps", abs(edit.log["steps"] - len(losses)))
        yield Line(case.name, f"edit{number} last loss", _error(torch.tensor(edit.log["loss"]), losses[-1]))

    yield from _all_steps(case, method, [case.weight, case.weight.replace(".weight", ".bias")], per_edit)


def _moments(root: Path, family: str) -> Iterator[Line]:
    """Second moments from the recorded documents, at those MLP outputs whose moments were recorded."""
    model = Model.load(str(root / "models" / f"tiny-{family}"), attention="eager")
    common = root / f"{family}_common"
    counts = json.loads((common / "meta.json").read_text(encoding="utf-8"))["counts"]
    documents = json.loads((root / "cov_docs.json").read_text(encoding="utf-8"))
    with TemporaryDirectory() as folder:
        text = Path(folder) / "documents.txt"
        text.write_text("\n\n".join(documents) + "\n\n", encoding="utf-8")
        corpus = Corpus(str(text), len(documents))
        for name, wanted in sorted(load_file(common / "vectors.safetensors").items()):
            module = name.removeprefix("cov.")
            if module not in {model.mlp_out(i) for i in range(model.layers)}:
                continue
            moment = second_moment(model, module, corpus, Path(folder))
            yield Line(f"{family}_common", name, _error(moment.matrix, wanted))
            yield Line(f"{family}_common", f"tokens at {module}", abs(moment.count - counts[module]))


METHODS: dict[str, Callable[[Case], Iterator[Line]]] = {
    "ROME": _rome,
    "ROME-nomom2": _rome,
    "FT-L": _ft,
    "FT-M": _ft,
}


def main(argv: list[str]) -> int:
    """Print the comparison of argv[0]; 0 when everything passed."""
    root = Path(argv[0])
    missing = []
    passed = failed = 0
    for line in compare(root, argv[1] if len(argv) > 1 else ""):
        if isinstance(line, str):
            missing.append(line)
            continue
        passed, failed = passed + line.passed, failed + (not line.passed)
        print(f"{'ok  ' if line.passed else 'FAIL'}  {line.error:8.1e}  {line.case:20} {line.what}")
    if missing:
        print(f"not yet supported: {', '.join(missing)}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
