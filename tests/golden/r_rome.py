"""R-ROME against recorded vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from methods.artifacts import Contexts, Moment
from methods.r_rome import PreparedRRome, RRome
from methods.rome import PreparedRome, Rome
from raysys.types import Edit
from tests.golden.common import Case, Line, all_steps, error


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
    keys = "mean" if h["enable_random_prefix_keys"] else "bare"
    moment = Moment(case.common[f"cov.{case.model.mlp_out(shared['layer'])}"].double(), 1, "recorded")
    rome = PreparedRome(
        settings=Rome(**shared),
        contexts=Contexts(tuple(case.contexts["rome"]), "recorded"),
        moment=moment if h["mom2_adjustment"] else None,
        keys=keys,
    )
    method = PreparedRRome(settings=RRome(**shared, keys=keys), rome=rome)

    def per_edit(number: int, edit: Edit) -> Iterator[Line]:
        [patch] = edit.patches
        wanted = case.vectors
        for got, what in ((patch.right[0], "u"), (patch.left[:, 0], "right_vector")):  # type: ignore[attr-defined]
            yield Line(case.name, f"edit{number}.{what}", error(got, wanted[f"edit{number}.{what}"]))
        passes = len(wanted[f"edit{number}.losses"])
        yield Line(case.name, f"edit{number} passes", abs(edit.log["passes"] - passes))
        last = wanted[f"edit{number}.losses"][-1, 0]
        yield Line(case.name, f"edit{number} last loss", error(torch.tensor(edit.log["loss"]), last))

    yield from all_steps(case, method, [case.weight], per_edit)


METHODS: dict[str, Callable[[Case], Iterator[Line]]] = {"R-ROME": _r_rome}
