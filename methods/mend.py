"""MEND: a trained network turns the gradient of an edit into a change that generalises and leaves other things alone.

Mitchell, Lin, Bosselut, Finn, Manning, "Fast Model Editing at Scale", ICLR 2022, arXiv:2110.11309: eq. 3 (the change,
W ← W + η Σ δ̃ x̃ᵀ over the edit's tokens), eq. 4 (the network), section 3.2 (its training). The network is trained once
for a model, on the unedited model: `raysys train-editor mend MODEL`.
Where a setting is None, PRESETS (or the rule below it) has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.parts import editors, gradients, presets, training
from methods.parts.gradients import Labels, Trace
from methods.parts.hypernet import HyperNet, shapes
from methods.parts.mend_training import Course, Learner
from methods.parts.training import Note, Training
from raysys.model import Model
from raysys.patch import LowRank
from raysys.types import Edit, EditCase, EditRefused, EditRequest

PRESETS: Mapping[str, presets.Settings] = {  # published for other models: what the rule gives
    "world/small": {"rank": 48},
}


def rule(model: Model) -> presets.Settings:
    """All matrices of the last three blocks' MLPs, rank 1920.

    That is what MEND's authors and EasyEdit (hparams/MEND) publish for gpt2-xl (blocks 45-47), gpt-j-6b (25-27),
    llama-2-7b, mistral-7b and qwen1.5-7b (29-31 each).
    """
    blocks = range(max(0, model.layers - 3), model.layers)
    return {"modules": tuple(m for i in blocks for m in mlp(model, i)), "rank": 1920}


def mlp(model: Model, layer: int) -> tuple[str, ...]:
    """The MLP's matrices in block `layer`, first ones first."""
    return (*(name.format(layer) for name in model.arch.mlp_in), model.mlp_out(layer))


TRAININGS: Mapping[str, presets.Settings] = {  # for other models: the defaults of Training and Course, as published
    "world/small": {
        "steps": 400,
        "cases": 16,
        "accumulate": 1,
        "lr": 1e-3,
        "lr_lr": 3e-5,
        "schedule": "linear",
        "clip": 5.0,
        "validation": 64,
        "every": 40,
        "cedit": 1.0,
        "edit_lr": 1e-3,
        "local": 3,
    },
}


@dataclass(frozen=True, kw_only=True)
class Mend:
    """W ← W + η Σ_t δ̃_t x̃_tᵀ for each edited matrix; the next edit's gradient is that of the changed model.

    `published`: as the study's published code behaves. Every edit starts again from the untouched model and replaces
    the one before, so that after n edits the weights are base + the last edit: its curve shows one edit, whatever n.
    The default keeps all edits: that is what a model that was edited n times is. (That code also takes a target's
    tokens from the target alone, in training and editing: `labels` = "alone", which needs an editor trained so.)
    """

    modules: tuple[str, ...] | None = None  # names of the linear modules that are edited
    rank: int | None = None  # of the network's blocks
    blocks: int = 2
    batch: int = 1  # requests of one call of `edit`: their gradients are added
    labels: Labels = "suffix"  # where a target's tokens come from, see gradients.row
    published: bool = False
    editor: str = ""  # which trained network, where there are several: a path, or the beginning of its digest

    name: ClassVar[str] = "mend"
    version: ClassVar[str] = "1"

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedMend:
        """Take the network trained for `model` from `cache`, else a shipped one. Raises ValueError without one."""
        settled = self._settled(model)
        found = editors.find(self._fits(model), model, cache, self.editor)
        net = settled.network(model)
        net.load_state_dict(found.tensors)
        return PreparedMend.of(settled, model, net, found.digest)

    def train(
        self,
        model: Model,
        cases: Sequence[EditCase],
        cache: Path | None = None,
        note: Note = training.silent,
        settings: Mapping[str, Any] | None = None,
    ) -> Path:
        """Train the network for `model`, which wears nothing, on `cases`; where it was saved.

        Each case's paraphrases should follow from the edit, its neighbourhood should not change. `settings`: changes
        to those of `Training` and `Course`. Interrupted, it goes on where it was. Raises ValueError.
        """
        asked = {**TRAININGS.get(presets.name(model), {}), **(settings or {})}
        how, course = training.built(self.name, asked, Training, Course)
        net = self._settled(model).network(model, course.edit_lr, how.seed)
        learner = Learner(model, net, cases, course, self.labels)
        return training.train(learner, how, self._fits(model), editors.digest_of(cases), cache, note, course)

    def _settled(self, model: Model) -> Mend:
        return replace(presets.settled(self, model, PRESETS, rule), editor="")

    def _fits(self, model: Model) -> dict[str, Any]:
        s = self._settled(model)
        assert s.modules is not None
        usual = s.labels == "suffix"
        structure = {"rank": s.rank, "blocks": s.blocks, **({} if usual else {"labels": s.labels})}
        return editors.fits(s.name, model, s.modules, structure)

    def network(self, model: Model, edit_lr: float = 1e-4, seed: int = 0) -> HyperNet:
        """An untrained network; step sizes point down the gradient."""
        assert self.modules is not None and self.rank is not None
        made = shapes(model, self.modules)
        return HyperNet(made, rank=self.rank, blocks=self.blocks, lr=-edit_lr, seed=seed)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedMend:
    """MEND with its trained network: `settings` without None, `net`, and `digest` of what it was read from.

    `base`: the edited weights as the model came, where every edit starts from them (published).
    """

    settings: Mend
    net: HyperNet
    digest: str
    base: Mapping[str, Tensor]

    @classmethod
    def of(cls, settings: Mend, model: Model, net: HyperNet, digest: str) -> PreparedMend:
        """For `model`, which wears nothing."""
        names = settings.modules or ()
        base = {n: model.matrix(f"{n}.weight").clone() for n in names} if settings.published else {}
        net = net.requires_grad_(False).to(model.device)
        return cls(settings=settings, net=net, digest=digest, base=base)

    def identity(self) -> dict[str, Any]:
        """Name, version, settings and the network's digest."""
        return presets.identity(self.settings, {"editor": self.digest})

    @torch.no_grad()
    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Mapping[str, Tensor] | None = None) -> Edit:
        """The change of every edited matrix, one rank per token. Raises EditRefused when a request can't be served.

        Published: patches also take the edit before back; `memory` holds its factors.
        """
        s = self.settings
        rows = [gradients.row(model, q, s.labels) for q in requests]
        with _having(model, self.base):
            traces = gradients.trace(model, gradients.lay(model, rows), self.net.names, requests)
        patches: list[LowRank] = []
        kept: dict[str, Tensor] = {}
        squares = 0.0
        for name in self.net.names:
            x, delta = self.factors(name, traces.modules[name])
            change = LowRank(f"{name}.weight", delta.T.contiguous().cpu(), x.contiguous().cpu())
            if not (change.left.isfinite().all() and change.right.isfinite().all()):
                raise EditRefused(f"edit {requests[0].id!r}: MEND's change of {name} is not finite: a broken model")
            squares += float(((change.left.T @ change.left) * (change.right @ change.right.T)).sum())
            if s.published:
                kept |= {f"left.{name}": change.left, f"right.{name}": change.right}
                change = _instead(change, name, memory)
            patches.append(change)
        log = {
            "nll": float(traces.losses.mean()),
            "norm": max(squares, 0.0) ** 0.5,
            "tokens": sum(len(r.ids) for r in rows),
        }
        return Edit(tuple(patches), kept or None, log)

    def factors(self, name: str, trace: Trace) -> tuple[Tensor, Tensor]:
        """x̃ (n, d_in) and η δ̃ (n, d_out) of one module: its change is Σ_t (η δ̃_t) x̃_tᵀ."""
        x, delta = self.net.transformed(name, trace.nonzero())
        return x, delta * self.net.lr(name)


def _instead(change: LowRank, name: str, memory: Mapping[str, Tensor] | None) -> LowRank:
    """`change` and the opposite of the edit before it."""
    if memory is None:
        return change
    left = torch.cat((-memory[f"left.{name}"], change.left), 1)
    return LowRank(change.weight, left, torch.cat((memory[f"right.{name}"], change.right)))


@contextmanager
def _having(model: Model, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, the model has the given weights (module -> (d_out, d_in)); after it, those that it had."""
    found = {n: model.matrix(f"{n}.weight").clone() for n in weights}
    try:
        for name, weight in weights.items():
            model.write(f"{name}.weight", weight)
        yield
    finally:
        for name, weight in found.items():
            model.write(f"{name}.weight", weight)
