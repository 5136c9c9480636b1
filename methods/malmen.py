"""MALMEN: a network turns the gradients of any number of edits into one shift of each edited matrix.

Tan, Zhang, Fu, "Massive Editing for Large Language Models via Meta Learning", ICLR 2024, arXiv:2311.04661: eq. 3 and 4
(the shift), section 3.2 and algorithm 1 (training). Published code: ChenmienTan/malmen.
Where a setting is None, PRESETS (or the rule below it) has it. Editors are trained: `raysys train-editor malmen MODEL`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch

from methods import mend
from methods.parts import editors, gradients, hypernet, meta, presets, training
from methods.parts.hypernet import HyperNet
from methods.parts.meta import Course, Tokens
from methods.parts.training import Training
from raysys.model import Model
from raysys.types import Edit, EditCase, EditRefused, EditRequest

S = TypeVar("S", bound=Any)

PAPER: presets.Settings = {"mlp": "out", "rank": 1920, "blocks": 2, "tokens": "all"}  # EasyEdit, hparams/MALMEN
PRESETS: Mapping[str, presets.Settings] = {
    "world/small": {"layers": (3, 4, 5), "mlp": "all", "rank": 32, "blocks": 2, "tokens": "all"},  # tuned on its facts
    "gpt2-xl": {"layers": (42, 43, 44, 45, 46, 47), **PAPER},
    "gpt-j-6b": {"layers": (22, 23, 24, 25, 26, 27), **PAPER},  # config/model/gpt-j.yaml
}
TRAINING: presets.Settings = {  # EasyEdit, hparams/TRAINING/MALMEN/gpt2-xl
    "steps": 10_000, "accumulate": 1, "lr": 1e-5, "lr_lr": 1e-5, "clip": 1.0, "every": 100, "patience": 1000,
    "edits": 10, "general": 1, "local": 1, "loc_coef": 1.0,
}  # fmt: skip
TRAININGS: Mapping[str, presets.Settings] = {
    "world/small": {
        "steps": 1000, "lr": 3e-4, "lr_lr": 3e-4, "schedule": "linear", "validation": 64, "every": 100,
        "streams": 8, "edits": 1, "general": 2, "local": 3,
    },
}  # fmt: skip


def rule(model: Model) -> presets.Settings:
    """For models without a preset: the last eighth of the blocks, but at least the last three, the paper's network."""
    many = max(min(3, model.layers), round(model.layers / 8))
    return {"layers": tuple(range(model.layers - many, model.layers)), "modules": (), **PAPER}


@dataclass(frozen=True, kw_only=True)
class Malmen:
    """ΔW of each matrix moves the values at all the edits' tokens by what the network says: min |ΔW Kᵀ - Vᵀ|² + λ|ΔW|².

    V = -η (k · k̃) ṽ at a token with key k and gradient v; (k̃, ṽ) = network(k, v); η and λ are learned per matrix. Each
    batch is computed on the model as the batches before have left it. Tokens of the target's end, whose output nothing
    is asked of, are left out, and each edit's loss is its own mean, so that a batch does not depend on how it is split.
    """

    layers: tuple[int, ...] | None = None  # the blocks whose MLP's last matrix is edited ("out")
    mlp: Literal["out", "all"] | None = None  # or all of the MLP's matrices
    modules: tuple[str, ...] | None = None  # instead of these, modules by name
    rank: int | None = None  # of the network's blocks
    blocks: int | None = None  # how many of them
    tokens: Tokens | None = None  # "all" of prompt and target, or those at which the "target" is predicted
    start: float = 1e-6  # η before training
    batch: int = 1  # edits of one shift
    chunk: int = 1024  # tokens that the network takes at once
    editor: str = ""  # which trained editor, where there are several: a file, or the beginning of its digest

    name: ClassVar[str] = "malmen"
    version: ClassVar[str] = "1"

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedMalmen:
        """Find the editor trained for `model`. Raises ValueError that says how to train one."""
        return prepared(self, settled(self, model, PRESETS, rule), model, cache)

    def train(
        self,
        model: Model,
        cases: Sequence[EditCase],
        cache: Path | None = None,
        note: training.Note = training.silent,
        settings: Mapping[str, Any] | None = None,
    ) -> Path:
        """Train an editor for `model` on `cases` and save it; its path. Interrupted, it goes on where it was.

        `settings`: changes to those of `Training` and `Course`. Raises ValueError.
        """
        asked = settled(self, model, PRESETS, rule)
        return taught(
            asked, model, cases, {**TRAINING, **TRAININGS.get(presets.name(model), {})}, settings, cache, note
        )


# --- what MALMEN and RLEdit share ------------------------------------------------------------------------------------


def settled(
    asked: S, model: Model, known: Mapping[str, presets.Settings], rule: Callable[[Model], presets.Settings]
) -> S:
    """`asked` without None; layers that were asked for count more than a preset's modules."""
    layers_asked = asked.layers is not None or asked.mlp is not None
    if layers_asked and asked.modules is None:
        asked = replace(asked, modules=())
    return presets.settled(asked, model, known, rule)


def structure(settings: Any) -> dict[str, Any]:
    """What the shape of a trained network depends on, and what its inputs mean."""
    published = {"published": True} if getattr(settings, "published", False) else {}
    return {"rank": settings.rank, "blocks": settings.blocks, "tokens": settings.tokens, **published}


def modules(settings: Any, model: Model) -> tuple[str, ...]:
    """The names of the edited modules. Raises ValueError for one that isn't there."""
    if settings.modules:
        return tuple(settings.modules)
    if settings.mlp == "all":
        return tuple(name for layer in settings.layers for name in mend.mlp(model, layer))
    return tuple(model.mlp_out(layer) for layer in settings.layers)


def network(settings: Any, model: Model, seed: int = 0) -> HyperNet:
    """An untrained network for `model`."""
    shapes = hypernet.shapes(model, modules(settings, model))
    return HyperNet(shapes, rank=settings.rank, blocks=settings.blocks, lr=settings.start, seed=seed, lamda=0.0)


def taught(
    settings: Any,
    model: Model,
    cases: Sequence[EditCase],
    usual: Mapping[str, Any],
    changes: Mapping[str, Any] | None,
    cache: Path | None,
    note: training.Note,
) -> Path:
    """Train `settings`' editor by `usual` settings with `changes`. Raises ValueError, for unknown ones too."""
    if changes and "cases" in changes:
        raise ValueError(f"training of {settings.name}: cases per update are streams * length * edits; set these")
    asked = {"tokens": settings.tokens, "chunk": settings.chunk, **usual, **(changes or {})}
    how, course = training.built(settings.name, asked, Training, Course)
    how = replace(how, cases=course.streams * course.length * course.edits)
    net = network(settings, model, how.seed).to(model.device)
    if course.begin:
        usual_net = {k: v for k, v in structure(settings).items() if k != "published"}  # there is one MALMEN
        begun = editors.find(editors.fits(Malmen.name, model, net.names, usual_net), model, cache)
        net.load_state_dict(begun.tensors)
    lessons = meta.lessons(model, cases)
    learner = meta.Learner(model, net, lessons, course, how.seed, left_out=len(cases) - len(lessons))
    wanted = editors.fits(settings.name, model, net.names, structure(settings))
    return training.train(learner, how, wanted, editors.digest_of(cases), cache, note, course)


def prepared(asked: Any, settings: Any, model: Model, cache: Path | None) -> PreparedMalmen:
    """`settings`, complete, with the editor that was trained for them."""
    net = network(settings, model)
    wanted = editors.fits(settings.name, model, net.names, structure(settings))
    found = editors.find(wanted, model, cache, asked.editor)
    net.load_state_dict(found.tensors)
    return PreparedMalmen(settings=settings, net=net.to(model.device).requires_grad_(False), editor=found.digest)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedMalmen:
    """MALMEN or RLEdit with a trained network; `editor` is the digest of its file."""

    settings: Any
    net: HyperNet
    editor: str

    def identity(self) -> dict[str, Any]:
        """Name, version, settings and the editor's digest: what an edit depends on beside model and request."""
        return presets.identity(replace(self.settings, editor=""), {"editor": self.editor})

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Any = None) -> Edit:
        """One shift of each module for all `requests`. Raises EditRefused with the reason when there is none."""
        s = self.settings
        if not requests or len(requests) > s.batch:
            raise EditRefused(f"{s.name}: a shift is made of 1 to {s.batch} edits (batch), not of {len(requests)}")
        rows = [gradients.row(model, request) for request in requests]
        traces, losses = meta.traced(model, rows, self.net.names, s.tokens, requests)
        patches, log = [], {"loss_before": float(losses.mean()), "tokens": len(next(iter(traces.values())).x)}
        size = torch.zeros((), dtype=torch.float64)
        for name, trace in traces.items():
            try:
                made = meta.shift(self.net, name, trace, s.chunk)
            except ValueError as error:
                raise EditRefused(f"edit {requests[0].id!r}: {name}: {error}; the model may be broken") from error
            patch = made.patch(f"{name}.weight")
            size += float(made.square())
            patches.append(patch)
        if not bool(size.isfinite()):
            raise EditRefused(f"edit {requests[0].id!r}: the shift is not finite; the model may be broken")
        return Edit(tuple(patches), log={**log, "norm": float(size.sqrt())})
