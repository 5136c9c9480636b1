"""MEMIT and what descends from it: `python -m tests.golden` compares them with recorded vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from methods.alphaedit import AlphaEdit, PreparedAlphaEdit
from methods.emmet import Emmet, PreparedEmmet
from methods.memit import Memit, PreparedMemit
from methods.parts.artifacts import Contexts, Moment
from methods.parts.projectors import NullSpace, cut
from methods.parts.spread import Spread, edit
from methods.pmet import Pmet, PreparedPmet, modules
from raysys.patch import LowRank
from raysys.types import Edit
from tests.golden import searches
from tests.golden.common import Case, Line, all_steps, error


class Recording:
    """A prepared method that keeps what its latest edit was made from."""

    def __init__(self, method: Any) -> None:
        self.method = method
        self.done: Spread
        self.values: Any

    def edit(self, model: Any, requests: Any, memory: Any = None) -> Edit:
        self.done, self.values = self.method.solved(model, requests, memory)
        return edit(self.done, [v[1] if isinstance(v, tuple) else v for v in self.values])

    def remember(self, memory: Any, step: Any) -> Any:
        return self.method.remember(memory, step)


def settings(case: Case) -> dict[str, Any]:
    """What all of them share."""
    h = case.hparams
    return {
        "steps": h["v_num_grad_steps"],
        "lr": h["v_lr"],
        "weight_decay": h["v_weight_decay"],
        "clamp": h["clamp_norm_factor"],
        "kl": h["kl_factor"],
        "ridge": 0.0,
    }


def contexts(case: Case) -> Contexts:
    """The recorded ones: the bare prompt's group and then the sampled group."""
    return Contexts(tuple(text for group in case.contexts["memit"] for text in group), "recorded")


def moments(case: Case, modules: list[str]) -> dict[str, Moment]:
    return {m: Moment(case.common[f"cov.{m}"].double(), 1, "recorded") for m in modules}


def batch(case: Case, number: int, done: Spread, values: Any, found: list[searches.Search]) -> Iterator[Line]:
    """Values, searches, keys, residuals and factors of one batch, as far as they were recorded."""

    def line(name: str, got: Tensor) -> Iterator[Line]:
        name = f"edit{number}.{name}"
        if name in case.vectors:
            yield Line(case.name, name, error(got, case.vectors[name]))

    for j, (value, search) in enumerate(zip(values, found, strict=True)):
        if isinstance(value, tuple):  # PMET's
            for name, one in zip(("z_attn", "z_mlp"), value, strict=True):
                yield from line(f"{name}.{j}", one.wanted)
        else:
            yield from line(f"z.{j}", value.wanted)
        yield from line(f"delta_traj.{j}", search.offsets)
        wanted = case.vectors[f"edit{number}.losses.{j}"]
        yield Line(case.name, f"edit{number}.losses.{j}", searches.losses(search.losses, wanted))
    for module, keys in done.keys.items():
        yield from line(f"ks.{module}.weight", keys.T)
        yield from line(f"cur_z.{module}.weight", done.now[module].T)
    for patch in done.patches:
        assert isinstance(patch, LowRank)
        yield from line(f"adj_k.{patch.weight}", patch.right.T)
        yield from line(f"resid.{patch.weight}", patch.left)


def compared(case: Case, method: Any, names: list[str], steps: list[dict[str, Tensor]] | None = None) -> Iterator[Line]:
    """All lines of a case; `steps` is given what each batch leaves to the method's memory."""
    recording = Recording(method)

    with searches.watched() as found:

        def per_edit(number: int, made: Edit) -> Iterator[Line]:
            if steps is not None and made.memory:
                steps.append(dict(made.memory))
            mine = found[-len(case.batches[number]) :]
            yield from batch(case, number, recording.done, recording.values, mine)

        yield from all_steps(case, recording, [f"{m}.weight" for m in names], per_edit)


def _memit(case: Case) -> Iterator[Line]:
    h = case.hparams
    names = [case.model.mlp_out(layer) for layer in h["layers"]]
    made = Memit(layers=tuple(h["layers"]), weight=h["mom2_update_weight"], **settings(case))
    yield from compared(case, PreparedMemit.of(case.model, made, contexts(case), moments(case, names)), names)


def _emmet(case: Case) -> Iterator[Line]:
    h = case.hparams
    [layer] = h["layers"]
    module = case.model.mlp_out(layer)
    made = Emmet(
        layer=layer,
        weight=h["mom2_update_weight"],
        norm_weight=h["update_norm_lambda"],
        slack=h["emmet_lambda"],
        **settings(case),
    )
    method = PreparedEmmet.of(case.model, made, contexts(case), moments(case, [module])[module])
    yield from compared(case, method, [module])


def _alphaedit(case: Case) -> Iterator[Line]:
    h, model = case.hparams, case.model
    names = [model.mlp_out(layer) for layer in h["layers"]]
    shared = {k: v for k, v in settings(case).items() if k != "ridge"}
    made = AlphaEdit(
        layers=tuple(h["layers"]), threshold=h["nullspace_threshold"], relative=False, l2=h["L2"], **shared
    )
    spaces = {m: NullSpace(*cut(moment.matrix, made.threshold, False, m)) for m, moment in moments(case, names).items()}
    for layer, module in zip(h["layers"], names, strict=True):
        yield Line(case.name, f"P.{layer}", error(spaces[module].matrix(), case.vectors[f"P.{layer}"]))
    steps: list[dict[str, Tensor]] = []
    yield from compared(case, PreparedAlphaEdit(settings=made, contexts=contexts(case), spaces=spaces), names, steps)
    for layer, module in zip(h["layers"], names, strict=True):
        total = sum(step[module] @ step[module].T for step in steps)
        yield Line(case.name, f"cache_c_final.{layer}", error(total, case.vectors[f"cache_c_final.{layer}"]))


def _pmet(case: Case) -> Iterator[Line]:
    h = case.hparams
    attention = len(h["rewrite_module_tmps"]) == 2
    names = [name for layer in h["layers"] for name in modules(case.model, layer, attention)]
    made = Pmet(
        layers=tuple(h["layers"]),
        weight=h["mom2_update_weight"],
        nll=h["nll_loss_factor"],
        attention=attention,
        published=True,  # the reference transposes the change of GPT-2's square attention matrix
        **settings(case),
    )
    method = PreparedPmet.of(case.model, made, contexts(case), moments(case, names))
    yield from compared(case, method, names)


METHODS: dict[str, Callable[[Case], Iterator[Line]]] = {
    "MEMIT": _memit,
    "MEMIT-batch5": _memit,
    "EMMET": _emmet,
    "AlphaEdit": _alphaedit,
    "PMET": _pmet,
    "PMET-2mod": _pmet,
}
