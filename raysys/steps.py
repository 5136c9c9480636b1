"""One step of a stream of edits: what a method can make of a batch of requests, and what is refused of it and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raysys.model import Model
from raysys.types import Edit, EditRefused, EditRequest, PreparedMethod


def make(
    method: PreparedMethod, model: Model, requests: Sequence[EditRequest], memory: Any = None
) -> tuple[Edit, dict[str, str]]:
    """The edit for those of `requests` that the method serves, and by request id why others are refused.

    A refused request is taken out of the batch and the rest is made again without it; what is refused as a whole, or
    comes out with NaN or infinite numbers, changes nothing.
    """
    left, refused = list(requests), dict[str, str]()
    while left:
        try:
            edit = method.edit(model, left, memory)
            _finite(edit, left)
        except EditRefused as error:
            bad = [r for r in left if str(error).startswith(f"edit {r.id!r}:")] or left
            refused |= {r.id: str(error) for r in bad}
            left = [r for r in left if r not in bad]
        else:
            return edit, refused
    return Edit(()), refused


def _finite(edit: Edit, requests: Sequence[EditRequest]) -> None:
    kept = [t for patch in edit.patches for t in patch.tensors().values()] + list((edit.memory or {}).values())
    if not all(t.isfinite().all() for t in kept if t.is_floating_point()):
        which = f"edit {requests[0].id!r}" if len(requests) == 1 else f"a batch of {len(requests)} edits"
        raise EditRefused(f"{which}: the update holds NaN or infinite numbers; it was not applied")
