"""ROME and its like: `python -m tests.golden` compares them with recorded vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from methods.parts.artifacts import Contexts, Moment
from methods.rome import PreparedRome, Rome
from raysys.types import Edit
from tests.golden import searches
from tests.golden.common import Case, Line, all_steps


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
        double=False,  # the reference inverts C in 32 bits, which moves u by up to cond(C) * 6e-8
    )
    moment = Moment(case.common[f"cov.{case.model.mlp_out(layer)}"].double(), 1, "recorded")
    contexts = Contexts(tuple(case.contexts["rome"]), "recorded")
    method = PreparedRome(settings=settings, contexts=contexts, moment=moment if h["mom2_adjustment"] else None)

    with searches.watched() as found:

        def per_edit(number: int, edit: Edit) -> Iterator[Line]:
            yield from searches.rome(case, number, found[-1], edit.patches[0], "mixed")

        yield from all_steps(case, method, [case.weight], per_edit)


METHODS: dict[str, Callable[[Case], Iterator[Line]]] = {"ROME": _rome, "ROME-nomom2": _rome}
