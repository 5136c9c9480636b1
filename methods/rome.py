"""ROME: write one fact as a rank-one change to one MLP output matrix.

Meng, Bau, Andonian, Belinkov, "Locating and Editing Factual Associations in GPT", NeurIPS 2022, arXiv:2202.05262:
eq. 2 (the update), eq. 3 (the key, averaged over sampled contexts), eq. 4 (the search for the value).
Where a setting is None, PRESETS (or the rule below it) has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from methods.parts import artifacts, locate, presets
from raysys.corpora import Corpus
from raysys.model import Model
from raysys.patch import LowRank
from raysys.types import Edit, EditRefused, EditRequest

PAPER: presets.Settings = {"lr": 0.5, "contexts": ((5, 10), (10, 10)), **presets.PAPER_TEXT}  # whatever the model
PRESETS: Mapping[str, presets.Settings] = {  # EasyEdit, hparams/ROME, and kmeng01/rome 0874014, which agree
    "world/small": {  # tuned on its own facts
        "layer": 2,  # the last one at which later tokens do not see the subject yet
        "steps": 20,
        "lr": 4.0,  # the offsets that are needed are some 30 long: steps of 0.5 don't get there in time
        "weight_decay": 0.1,
        "contexts": ((10, 5),),
        "corpus": "world",
        "documents": 1000,
    },
    "gpt2-xl": {"layer": 17},
    "gpt-j-6b": {"layer": 5},
    "llama-2-7b": {"layer": 5, "steps": 25, "weight_decay": 1e-3},
    "llama-2-13b": {"layer": 5, "steps": 25, "weight_decay": 1e-3},
    "llama-3-8b": {"layer": 5, "steps": 25, "weight_decay": 1e-3},
    "llama-3.1-8b": {"layer": 5, "steps": 25, "weight_decay": 1e-3},
    "llama-3.2-3b": {"layer": 5, "steps": 25, "weight_decay": 1e-3},
    "mistral-7b": {"layer": 5, "steps": 25, "weight_decay": 1e-3},
    "qwen1.5-7b": {"layer": 5},
    "qwen2.5-7b": {"layer": 5, "steps": 25, "weight_decay": 1e-3},
    "pythia-160m": {"layer": 3},
    "pythia-410m": {"layer": 7},
    "pythia-1b": {"layer": 7},
    "pythia-2.8b": {"layer": 5},
    "pythia-6.9b": {"layer": 5},
    "pythia-12b": {"layer": 5},
}


def rule(model: Model) -> presets.Settings:
    """For models without a preset: a layer a fifth of the way up, the paper's settings."""
    return {"layer": max(1, round(model.layers / 5)), "steps": 20, "weight_decay": 0.5, **PAPER}


@dataclass(frozen=True, kw_only=True)
class Rome:
    """Insert (key, value) into a linear memory W so that W' k = v, moving other keys least: u = C⁻¹ k̄,

    W' = W + (v - W k) uᵀ / (uᵀ k), with k̄ the key averaged over contexts, k that of the bare prompt and C the second
    moment of keys.

    `published`: as the study's published settings have it, without C (u = k̄), which moves other keys more.
    """

    layer: int | None = None
    steps: int | None = None  # passes of the search for v; Adam takes one step fewer
    lr: float | None = None
    weight_decay: float | None = None  # pulls v towards today's output
    clamp: float = 4.0  # |v - now| is at most this many times |now|
    kl: float = 0.0625  # weight of "<subject> is a" staying as it was
    contexts: tuple[tuple[int, int], ...] | None = None  # (tokens, number) of sampled texts put before the prompt
    seed: int = 0  # of the contexts
    second_moment: bool = True  # False: u = k̄
    published: bool = False  # as in the study's published code: no second moment, so more damage to other keys
    corpus: str | None = None  # what C is taken from: "world", a text file or a hub data set
    documents: int | None = None  # how much of it
    ridge: float = 1e-4  # added to C's diagonal, as a share of its mean: keeps few documents from making C singular
    double: bool = True  # False: C is inverted in 32 bits, as the authors' code does (some 1e-4 off, as C is)

    name: ClassVar[str] = "rome"
    version: ClassVar[str] = "1"
    splits: ClassVar[bool] = True  # works on a model that is split over processes

    @property
    def batch(self) -> int:
        """One request at a time."""
        return 1

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedRome:
        """Sample contexts and collect C on the unedited model, or take them from `cache`. Raises ValueError."""
        settings = presets.settled(self, model, PRESETS, rule)
        locate.check_steps(settings.name, settings.steps)
        settings = replace(settings, second_moment=settings.second_moment and not settings.published)
        assert settings.layer is not None and settings.contexts is not None
        assert settings.corpus is not None and settings.documents is not None
        module = model.mlp_out(settings.layer)
        sampled = artifacts.contexts(model, settings.contexts, settings.seed, cache)
        moment = None
        if settings.second_moment:
            corpus = Corpus(settings.corpus, settings.documents)
            moment = artifacts.second_moment(model, module, corpus, cache)
        return PreparedRome(settings=settings, contexts=sampled, moment=moment)


Keys = Literal["mixed", "mean", "bare"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedRome:
    """ROME with what it needs of one model: `settings` without None, sampled `contexts`, the `moment` C (or None).

    `keys` says where key and output are taken from (methods/r_rome.py): "mixed" is ROME's, the direction from the mean
    over the contexts and the rest from the bare prompt; "mean" and "bare" take all of it from one of them.
    """

    settings: Rome
    contexts: artifacts.Contexts
    moment: artifacts.Moment | None
    keys: Keys = "mixed"

    @cached_property
    def _factor(self) -> Tensor | None:  # (d_in, d_in), once for all edits: float64, or C's inverse in float32
        if self.moment is None or self.settings.double:
            return None if self.moment is None else cholesky(self.moment.matrix, self.settings.ridge)
        inverse: Tensor = torch.linalg.inv(ridged(self.moment.matrix, self.settings.ridge).float())
        return inverse

    def identity(self) -> dict[str, Any]:
        """Name, version, settings and artifact hashes: what an edit depends on beside model and request."""
        made_from = {"contexts": self.contexts.digest}
        if self.moment is not None:
            made_from["second_moment"] = self.moment.digest
        return presets.identity(self.settings, made_from)

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Mapping[str, Tensor] | None = None) -> Edit:
        """The rank-one change for exactly one request. Raises EditRefused with the reason when there is none."""
        if len(requests) != 1:
            raise EditRefused(f"rome writes one edit at a time, got {len(requests)}")
        s, request = self.settings, requests[0]
        assert s.layer is not None and s.steps is not None and s.lr is not None and s.weight_decay is not None
        module = model.mlp_out(s.layer)
        search = locate.Search(steps=s.steps, lr=s.lr, weight_decay=s.weight_decay, clamp=s.clamp, kl=s.kl)
        [value] = locate.values(model, requests, self.contexts.texts, s.layer, search, "mlp")
        assert value.keys is not None
        bare, mean = value.keys[0], value.keys.mean(0)  # (d_in,) each
        key, out = bare, value.now
        if self.keys == "mean":
            key, out = mean, value.now + model.matrix(f"{module}.weight").float() @ (mean - bare)  # of the mean key

        u = self._direction(bare if self.keys == "bare" else mean)  # (d_in,)
        reach = float(u.double() @ key.double())  # |k| times the cosine between u and k
        if not abs(reach) > 1e-6 * float(key.norm()):
            raise EditRefused(
                f"edit {request.id!r}: the update direction is orthogonal to the subject's key (u·k = {reach:.1e}) at "
                f"{module}, and the edit would explode; try another layer, or a second moment from more documents"
            )
        left = (value.wanted - out) / reach  # (d_out,)
        change = LowRank(f"{module}.weight", left[:, None].cpu(), u[None, :].cpu())
        return Edit((change,), log=_log(value, reach, float(left.norm())))

    def _direction(self, mean_key: Tensor) -> Tensor:
        """u = C⁻¹ k̄, or k̄ without C, at length one: (d_in,) float32."""
        u = mean_key.double()
        if self._factor is not None and not self.settings.double:
            return torch.nn.functional.normalize(self._factor.to(mean_key.device) @ mean_key, dim=0)
        if self._factor is not None:
            u = torch.cholesky_solve(u[:, None].to(self._factor.device), self._factor)[:, 0].to(mean_key.device)
        return torch.nn.functional.normalize(u, dim=0).float()


def _log(value: locate.Value, reach: float, norm: float) -> dict[str, Any]:
    first, last = value.losses[0].tolist(), value.losses[-1].tolist()
    return {
        "passes": len(value.losses),
        "loss_before": first[0],
        "loss": last[0],
        "nll": last[1],
        "value_shift": float(value.offset.norm() / value.now.norm()),
        "reach": reach,
        "norm": norm,  # of the change (Frobenius; u has length one)
    }


def ridged(matrix: Tensor, ridge: float) -> Tensor:
    """C + ridge · mean(diag C) · I: (d, d) float64."""
    wide = matrix.double()
    return wide + ridge * wide.diagonal().mean() * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)


def cholesky(matrix: Tensor, ridge: float, remedy: str = "raise `documents` or `ridge`") -> Tensor:
    """Lower factor (d, d) float64 of C + ridge · mean(diag C) · I.

    Raises ValueError when that is singular, with `remedy` as what to do, or not finite.
    """
    artifacts.finite(matrix, f"the second moment ({len(matrix)} x {len(matrix)})")
    wide = ridged(matrix, ridge)
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(wide)
    if int(info):
        raise ValueError(
            f"the second moment ({len(wide)} x {len(wide)}) is singular: it was taken from too little text; {remedy}"
        )
    return factor
