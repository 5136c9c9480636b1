"""RECT: of another method's update, write only the entries that change their weight most.

Gu, Xu, Ma, Lu, Ling, Chang, Peng, "Model Editing Harms General Abilities of Large Language Models: Regularization to
the Rescue", EMNLP 2024, arXiv:2401.04700, section 5: of the entries of ΔW those with the largest |ΔW / W| are kept, the
others become zero. 20 % are kept in the authors' repository, 40 % in AlphaEdit's comparison (arXiv:2410.02355), which
is `keep = 0.4`.

What is left has no low rank, so that each step writes every matrix it touches to the journal whole, 4 bytes an entry
whatever `keep`: with MEMIT on five layers of Llama 3 8B (4096 x 14336) 1.2 GB a step, where MEMIT alone writes 0.4 MB
for one edit. Snapshots hold one such matrix for each that was touched, however many steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.parts.wrapping import summed, wrapped, writes_weights, written
from raysys import names
from raysys.model import Model
from raysys.patch import Dense
from raysys.types import Edit, EditRequest, Finishes, Patch, PreparedMethod, remembered

TINY = 1e-8  # added to |W|, as AlphaEdit's comparison does: an entry that is zero counts as very small


@dataclass(frozen=True, kw_only=True)
class Rect:
    """The method `of`, with `settings`, whose update keeps the share `keep` of its entries, matrix by matrix."""

    of: str = "rome"
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the method `of`
    keep: float = 0.2

    name: ClassVar[str] = "rect"
    version: ClassVar[str] = "1"

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"rect: keep is a share of entries above 0 and at most 1, got {self.keep}")
        writes_weights("rect", self.of)
        if self.of == "prune":
            raise ValueError("rect: prune changes snapshots, not steps; wrap rect in it, not it in rect")
        self.inner()

    @property
    def batch(self) -> int:
        """What the wrapped method takes."""
        batch: int = self.inner().batch
        return batch

    def inner(self) -> Any:
        """The wrapped method. Raises ValueError when its name or settings are wrong."""
        return names.build(names.method(self.of), self.settings, f"rect of {self.of}")

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedRect:
        """Prepare the wrapped method. Raises ValueError."""
        inner = self.inner().prepare(model, cache)
        if isinstance(inner, Finishes):
            raise ValueError(f"rect: {self.of} changes snapshots, not steps; wrap rect in it, not it in rect")
        return PreparedRect(settings=self, inner=inner)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedRect:
    """The wrapped method, prepared."""

    settings: Rect
    inner: PreparedMethod

    def identity(self) -> dict[str, Any]:
        """Name, version and settings, and the same of the wrapped method with its artifacts."""
        return wrapped(self.settings, self.inner)

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Any = None) -> Edit:
        """The wrapped method's edit, every matrix of it thinned against the weights as they are now.

        Raises EditRefused as the wrapped method does, ValueError when it writes something else than weights.
        """
        made = self.inner.edit(model, requests, memory)
        kept = tuple(self._thinned(model, p) for p in made.patches)
        shares = {p.weight: float((p.delta != 0).float().mean()) for p in kept}
        return dataclasses.replace(made, patches=kept, log={**made.log, "kept": shares})

    def _thinned(self, model: Model, change: Patch) -> Dense:
        weight = written("rect", self.settings.of, change)
        now = model.matrix(weight.weight).float()
        return Dense(weight.weight, thinned(summed(weight).to(now.device), now, self.settings.keep).cpu().contiguous())

    def remember(self, memory: Any, step: Mapping[str, Tensor]) -> Any:
        """The wrapped method's memory."""
        return remembered(self.inner, memory, step)


def thinned(delta: Tensor, weight: Tensor, keep: float) -> Tensor:
    """`delta` (d_out, d_in) with zeros where |delta / weight| is not among the largest, a share `keep` of all entries.

    Entries equal to the smallest one that stays, stay: the result does not depend on the order of entries.
    """
    number = max(1, round(keep * delta.numel()))
    ratio = delta.abs() / (weight.abs() + TINY)
    limit = ratio.flatten().kthvalue(delta.numel() - number + 1).values
    return torch.where(ratio >= limit, delta, torch.zeros_like(delta))
