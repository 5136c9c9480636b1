"""What a search for a value passes through, noted while methods run: the offset at the start of each pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from methods.parts import locate, passes, pmet_search
from methods.rome import Keys
from tests.golden.common import Case, Line, error

QUIET = 0.01  # nats: smaller losses count as this; a KL of 1e-4 is made of logarithms of some 10, right to 3e-7


@dataclass(frozen=True)
class Search:
    """One request's: `value` as found (PMET: the MLP's), `losses` (passes, 4), `offsets` (passes, d or 2 d)."""

    value: locate.Value
    offsets: Tensor

    @property
    def losses(self) -> Tensor:
        return self.value.losses.double()


@contextmanager
def watched() -> Iterator[list[Search]]:
    """Within it, every search that ends is appended to the list, in the order of the requests."""
    found: list[Search] = []
    seen: list[Tensor] = []
    values, logprobs = locate.values, passes.Batch.logprobs
    pairs, forward = pmet_search._values, pmet_search._Bundle.forward

    def noting(real: Callable[..., Any]) -> Callable[..., Any]:
        def note(self: Any, offset: Tensor) -> Any:
            seen.append(offset.detach().clone())
            return real(self, offset)

        return note

    def searched(*args: Any) -> list[locate.Value]:
        seen.clear()
        made = values(*args)
        for i, value in enumerate(made):
            found.append(Search(value, torch.stack([o[i] for o in seen[: len(value.losses)]])))
        return made

    def searched_pairs(model: Any, requests: Any, contexts: Sequence[str], *rest: Any) -> list[pmet_search.Pair]:
        seen.clear()
        made = pairs(model, requests, contexts, *rest)
        for i, (_, mlp) in enumerate(made):
            at = i * (len(contexts) + 1)  # offsets (2, rows, d): attention's and the MLP's
            found.append(Search(mlp, torch.stack([torch.cat((o[1, at], o[0, at])) for o in seen[: len(mlp.losses)]])))
        return made

    with ExitStack() as stack:
        for owner, name, new in (
            (locate, "values", searched),
            (passes.Batch, "logprobs", noting(logprobs)),
            (pmet_search, "_values", searched_pairs),
            (pmet_search._Bundle, "forward", noting(forward)),
        ):
            stack.enter_context(mock.patch.object(owner, name, new))
        yield found


def losses(got: Tensor, wanted: Tensor) -> float:
    """The largest error of the columns of losses (passes, columns): none hides behind another that is larger."""
    if got.shape != wanted.shape:
        return float("inf")
    away = (got.double() - wanted.double()).norm(dim=0)
    return float((away / wanted.double().norm(dim=0).clamp(min=QUIET * len(wanted) ** 0.5)).max())


def rome(case: Case, number: int, found: Search, patch: Any, keys: Keys) -> Iterator[Line]:
    """All that was recorded of one ROME edit; `keys`: whose key and output count as the old ones."""
    value = found.value
    assert value.keys is not None and value.outputs is not None
    mean = keys == "mean"
    got = {
        "k_ctx": value.keys,
        "k_clean": value.keys.mean(0) if mean else value.keys[0],
        "v_old": value.outputs.mean(0) if mean else value.now,
        "v_star": value.wanted,
        "delta_traj": found.offsets,
        "u": patch.right[0],
        "right_vector": patch.left[:, 0],
    }
    for what, tensor in got.items():
        yield Line(case.name, f"edit{number}.{what}", error(tensor, case.vectors[f"edit{number}.{what}"]))
    name = f"edit{number}.losses"
    yield Line(case.name, name, losses(found.losses, case.vectors[name]))
