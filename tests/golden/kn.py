"""KN, as published, against recorded vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from methods.kn import Kn, PreparedKn
from raysys.patch import LowRank, Wearer, merge
from raysys.types import Edit, Patch
from tests.golden.common import Case, Line, all_steps, error


def _kn(case: Case) -> Iterator[Line]:
    h = case.hparams
    settings = Kn(steps=h["steps"], threshold=h["adaptive_threshold"], published=True)
    method = PreparedKn(settings=settings)
    yield from _scores(case, method)

    def per_edit(number: int, edit: Edit) -> Iterator[Line]:
        layers = {case.model.mlp_out(i) + ".weight": i for i in range(case.model.layers)}
        found = [
            (layers[p.weight], j)
            for p in edit.patches
            if isinstance(p, LowRank)
            for j in p.right[0].nonzero()[:, 0].tolist()
        ]
        wanted = {tuple(pair) for pair in case.vectors[f"edit{number}.neurons"].tolist()}
        yield Line(case.name, f"edit{number}.neurons", len(set(found) ^ wanted))

    names = [f"{case.model.mlp_out(i)}.weight" for i in range(case.model.layers)]
    yield from all_steps(case, method, names, per_edit)


def _scores(case: Case, method: PreparedKn) -> Iterator[Line]:
    """Attributions before each edit, on the model that wears those before it."""
    wearer = Wearer(case.model)
    worn: tuple[Patch, ...] = ()
    for number, [i] in enumerate(case.batches):
        scores = method.attribution(case.model, case.requests[i]).scores
        yield Line(case.name, f"edit{number}.scores", error(scores, case.vectors[f"edit{number}.scores"]))
        worn = merge(worn, method.edit(case.model, [case.requests[i]]).patches)
        wearer.wear(worn)
    wearer.take_off()


METHODS: dict[str, Callable[[Case], Iterator[Line]]] = {"KN": _kn}
