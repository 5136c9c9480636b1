"""R-ROME against recorded vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from methods.parts.artifacts import Contexts, Moment
from methods.r_rome import PreparedRRome, RRome
from methods.rome import PreparedRome, Rome
from raysys.types import Edit
from tests.golden import searches
from tests.golden.common import Case, Line, all_steps


def _r_rome(case: Case) -> Iterator[Line]:
    h = case.hparams
    shared = {
        "layer": h["layers"][0],
        "steps": h["v_num_grad_steps"],
        "lr": h["v_lr"],
        "weight_decay": h["v_weight_decay"],
        "clamp": h["clamp_norm_factor"],
        "kl": h["kl_factor"],
        "second_moment": h["mom2_adjustment"],
        "ridge": 0.0,
        "double": False,  # the reference's inverse is; ours in double differs from it by up to cond(C) * 6e-8
    }
    keys: Literal["mean", "bare"] = "mean" if h["enable_random_prefix_keys"] else "bare"
    moment = Moment(case.common[f"cov.{case.model.mlp_out(shared['layer'])}"].double(), 1, "recorded")
    rome = PreparedRome(
        settings=Rome(**shared),
        contexts=Contexts(tuple(case.contexts["rome"]), "recorded"),
        moment=moment if h["mom2_adjustment"] else None,
        keys=keys,
    )
    method = PreparedRRome(settings=RRome(**shared, keys=keys), rome=rome)

    with searches.watched() as found:

        def per_edit(number: int, edit: Edit) -> Iterator[Line]:
            yield from searches.rome(case, number, found[-1], edit.patches[0], keys)

        yield from all_steps(case, method, [case.weight], per_edit)


METHODS: dict[str, Callable[[Case], Iterator[Line]]] = {"R-ROME": _r_rome}
