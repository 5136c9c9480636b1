"""What methods that wrap another one share (RECT, PRUNE): which ones can be wrapped, what they wrote, who they are."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from raysys import names, patch
from raysys.patch import Dense, LowRank
from raysys.types import Patch, PreparedMethod


def writes_weights(wrapper: str, of: str) -> None:
    """Raises ValueError when the method `of` is known to write something else than weights."""
    module = names.method(of).__module__
    beside = {k: v.partition(":")[0] for k, v in patch.KINDS.items() if isinstance(v, str)}
    kind = next((k for k, where in beside.items() if where == module), None)
    if kind is not None or of == wrapper:
        what = f"leaves a patch of kind {kind!r}" if kind else "is that already"
        raise ValueError(f"{wrapper} changes the weights that a method has written, and {of!r} {what}; take another")


def written(wrapper: str, of: str, change: Patch) -> LowRank | Dense:
    """`change` as a change of weights. Raises ValueError when it is none."""
    if not isinstance(change, LowRank | Dense):
        raise ValueError(
            f"{wrapper} changes the weights that a method has written, and {of!r} leaves a patch of kind "
            f"{change.kind!r}; take another"
        )
    return change


def summed(change: LowRank | Dense) -> Tensor:
    """(d_out, d_in) float32, the bits that would be worn."""
    delta = torch.zeros(change.shape)
    change.add_to(delta)
    return delta


def wrapped(settings: Any, inner: PreparedMethod) -> dict[str, Any]:
    """The identity of a method that wraps `inner`: settings and artifacts are those of both."""
    said = inner.identity()
    own = dataclasses.asdict(settings)
    return {
        "name": settings.name,
        "version": settings.version,
        "settings": {**own, "settings": said["settings"]},
        "artifacts": said.get("artifacts", {}),
        "of": said,
    }
