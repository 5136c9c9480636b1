"""Plain float64 computations that tests compare methods with: one prompt at a time, no padding, whole matrices."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from raysys import types
from raysys.corpora import Corpus
from raysys.model import Model
from raysys.patch import merge, wearing
from raysys.types import Edit, EditRequest

FACTS = [
    EditRequest("anna", "{} was born in the city of", "Anna", "Rome", "Paris"),
    EditRequest("tower", "The Eiffel {} is in", "tower", "Peru", "Paris"),
    EditRequest("oslo", "{} is the capital of", "Oslo", "Italy", "Norway"),
]


class Twin:
    """A model's network in float64, with matrices (d_out, d_in) that can be read and changed."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.net: Any = copy.deepcopy(model.net).double()

    def matrix(self, module: str) -> Tensor:
        data = self.net.get_parameter(f"{module}.weight").data
        return data.T if self.model.transposed(f"{module}.weight") else data

    def _at(self, module: str, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        seen: list[tuple[Tensor, Tensor]] = []

        def keep(_: Any, given: tuple[Tensor, ...], out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            seen.append((given[0].reshape(len(ids), -1), out.reshape(len(ids), -1)))

        handle = self.net.get_submodule(module).register_forward_hook(keep)
        with torch.no_grad():
            self.net(input_ids=torch.tensor([list(ids)]))
        handle.remove()
        return seen[0]

    def _subject(self, request: EditRequest, context: str) -> list[int]:
        text = context.replace("{}", request.prompt.partition("{}")[0] + request.subject)
        return self.model.encode(text)

    def keys(self, module: str, requests: Sequence[EditRequest], contexts: Sequence[str]) -> Tensor:
        """(d_in, n): half the bare prompt's, half the mean over sampled contexts."""
        columns = []
        for request in requests:
            read = [self._at(module, self._subject(request, c))[0][-1] for c in contexts]
            columns.append((read[0] + torch.stack(read[1:]).mean(0)) / 2)
        return torch.stack(columns, 1)

    def hidden(self, layer: int, requests: Sequence[EditRequest]) -> Tensor:
        """What block `layer` gives at the bare prompts' subjects, (d, n)."""
        block = self.model.arch.block.format(layer)
        return torch.stack([self._at(block, self._subject(q, "{}"))[1][-1] for q in requests], 1)

    def moment(self, module: str, corpus: str, documents: int) -> Tensor:
        """Second moment of what enters `module`, (d_in, d_in)."""
        read = [self._at(module, self.model.encode(text))[0] for text in Corpus(corpus, documents).texts()]
        rows = torch.cat(read)
        return rows.T @ rows / len(rows)


def stream(
    model: Model, ready: Any, batches: Sequence[Sequence[EditRequest]]
) -> Iterator[tuple[Edit, dict[str, Tensor]]]:
    """Every batch's edit, made on the model that wears those before it, and its changes by module."""
    worn: tuple[Any, ...] = ()
    memory: Any = None
    for batch in batches:
        with wearing(model, worn):
            edit = ready.edit(model, batch, memory)
        memory = types.remembered(ready, memory, edit.memory)
        worn = merge(worn, edit.patches)
        yield edit, summed(edit.patches)


def summed(patches: Sequence[Any]) -> dict[str, Tensor]:
    """The change of each matrix, (d_out, d_in) float64, by module."""
    found: dict[str, Tensor] = {}
    for p in patches:
        delta = found.setdefault(p.weight.removesuffix(".weight"), torch.zeros(p.shape, dtype=torch.float64))
        delta += p.delta.double() if hasattr(p, "delta") else p.left.double() @ p.right.double()
    return found


def close(got: Tensor, wanted: Tensor, error: float = 1e-4) -> None:
    """Relative Frobenius error within `error`."""
    assert float((got - wanted).norm()) <= error * float(wanted.norm())
