"""What methods that turn an edit's gradient into a weight change share (MEND, MALMEN, RLEdit, UltraEdit).

For a linear module y = W x + b the gradient of a loss is a sum over tokens, Σ_t δ_t x_tᵀ, with x_t what enters the
module and δ_t = ∂loss/∂y_t: a few vectors instead of a matrix (Mitchell et al., "Fast Model Editing at Scale", ICLR
2022, arXiv:2110.11309, section 3.1).

B = rows of a batch, T = tokens, M = target tokens of all rows, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from methods.parts import locate
from raysys.model import Model, Trunk
from raysys.types import EditRefused, EditRequest

Labels = Literal["suffix", "alone"]
Extra = Callable[[Tensor], Tensor]  # what enters a module (B, T, d_in) -> what is added to its output (B, T, d_out)
SCALES = {torch.float16: 2.0**10}  # of the loss, while gradients are in a type that rounds small ones to zero


@dataclass(frozen=True, eq=False)
class Batch:
    """Texts as tokens and where their targets are scored. Row i of `ids` is text i.

    ids, mask: (B, T); positions: (B, T), or None where they follow from the mask; row, column, label, weight: (M,):
    the logits at (row, column) must give `label`; the loss is Σ weight · (-log p).
    """

    ids: Tensor
    mask: Tensor
    row: Tensor
    column: Tensor
    label: Tensor
    weight: Tensor
    positions: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Trace:
    """One module's part of a loss's gradient: Σ over n tokens of deltaᵀ x.

    x: (n, d_in) what entered the module, delta: (n, d_out) the loss's gradient at its output, both float32; row: (n,)
    which text of the batch the token is of.
    """

    x: Tensor
    delta: Tensor
    row: Tensor

    def nonzero(self) -> Trace:
        """Without tokens that add nothing to the gradient: those where x or delta is all zero."""
        keep = (self.x != 0).any(1) & (self.delta != 0).any(1)
        return Trace(self.x[keep], self.delta[keep], self.row[keep])


@dataclass(frozen=True, eq=False)
class Traces:
    """What `trace` finds: one `Trace` per module, and each text's share of the loss (B,) float32 in nats."""

    modules: dict[str, Trace]
    losses: Tensor


# --- texts -----------------------------------------------------------------------------------------------------------


def row(model: Model, request: EditRequest, labels: Labels = "suffix", last: bool = False) -> locate.Row:
    """The request's prompt and target. `last`: the text ends with its target, not before the target's last token.

    `labels` "suffix": the target's tokens are those that prompt + target has beyond the prompt; "alone": those of the
    target taken by itself with all that the tokenizer adds (a BOS), as in EasyEdit's MEND and UltraEdit; they stand at
    the end of the text. Raises EditRefused as `locate.row` does.
    """
    made = locate.row(model, request, target=True)
    ids, first, wanted = (*made.ids, made.labels[-1]), made.first, made.labels
    if labels == "alone":
        wanted = tuple(model.encode(request.continuation))
        first = len(ids) - len(wanted)
        if first < 1:
            raise EditRefused(f"edit {request.id!r}: the target is longer than prompt and target together; a prompt?")
    if last and len(ids) > model.max_length:
        raise EditRefused(
            f"edit {request.id!r}: {len(ids)} tokens of prompt and target exceed the {model.max_length} that "
            f"{model.name or 'the model'} reads; shorten the prompt"
        )
    return replace(made, ids=ids if last else ids[:-1], first=first, labels=wanted)


def text(model: Model, prompt: str, continuation: str) -> locate.Row:
    """Any prompt and what follows it (without its leading blank), as a row whose labels are the continuation."""
    follows = continuation if continuation[:1].isspace() else f" {continuation}"
    ids, labels = model.pair(prompt, follows)
    if not labels or len(ids) + len(labels) > model.max_length:
        raise ValueError(f"{prompt!r} and {continuation!r}: no tokens to score, or more than {model.max_length} in all")
    return locate.Row((*ids, *labels[:-1]), len(ids) - 1, len(ids), tuple(labels))


def lay(model: Model, rows: Sequence[locate.Row], left: bool = False) -> Batch:
    """A batch in which each row's loss is the mean over its target tokens: rows don't know of each other.

    `left`: padded on that side; positions follow from the mask either way.
    """
    ids, mask = model.batch([r.ids for r in rows])
    shift = [0] * len(rows)
    if left:
        shift = [ids.shape[1] - len(r.ids) for r in rows]
        ids = torch.stack([i.roll(s) for i, s in zip(ids, shift, strict=True)])
        mask = torch.stack([m.roll(s) for m, s in zip(mask, shift, strict=True)])
    table = [
        (i, shift[i] + r.first - 1 + j, label, 1 / len(r.labels))
        for i, r in enumerate(rows)
        for j, label in enumerate(r.labels)
    ]
    where, column, label, weight = (torch.tensor(c, device=ids.device) for c in zip(*table, strict=True))
    return Batch(ids, mask, where, column, label, weight.float())


# --- passes ----------------------------------------------------------------------------------------------------------


def lowest(model: Model, modules: Sequence[str]) -> int:
    """The lowest decoder block that one of `modules` lies in. Raises ValueError when one lies in none."""
    found = []
    for name in modules:
        inside = [i for i in range(model.layers) if name.startswith(f"{model.arch.block.format(i)}.")]
        model.module(name)  # says so when there is none
        if not inside:
            raise ValueError(f"module {name!r} lies in none of the decoder blocks {model.arch.block.format('...')}")
        found += inside
    return min(found)


@torch.no_grad()
def trunk(model: Model, batch: Batch, modules: Sequence[str]) -> Trunk:
    """What lies below the lowest of `modules`, computed once: edits of them don't change it."""
    return model.trunk(batch.ids, batch.mask, lowest(model, modules), position_ids=batch.positions)


@contextmanager
def adding(model: Model, extra: Mapping[str, Extra]) -> Iterator[None]:
    """Within it, each module named in `extra` gives that much more: an edit that gradients flow through.

    A function gets the module's input as it is passed around, float32, and gives something of the output's shape.
    """
    with ExitStack() as stack:
        for name, more in extra.items():
            stack.enter_context(model.watching(name, lambda x, out, more=more: out + more(x.float()).to(out.dtype)))  # type: ignore[misc]
        yield


def logprobs(model: Model, batch: Batch, base: Trunk, extra: Mapping[str, Extra] | None = None) -> Tensor:
    """(M, V) float32 log-probabilities where the targets are scored; gradients flow to what `extra` is made of."""
    with adding(model, extra or {}):
        hidden = model.upper(base)
    return model.logits(hidden[batch.row, batch.column]).float().log_softmax(-1)


def nll(batch: Batch, given: Tensor) -> Tensor:
    """Each row's loss (B,): Σ weight · (-log p) over its target tokens, from log-probabilities `given` (M, V)."""
    picked = -given.gather(1, batch.label[:, None])[:, 0] * batch.weight
    return torch.zeros(len(batch.ids), device=given.device).index_add(0, batch.row, picked)


def divergence(batch: Batch, before: Tensor, after: Tensor) -> Tensor:
    """Each row's KL(before ‖ after) (B,), weighted as its loss, from log-probabilities (M, V) each."""
    each = (before.exp() * (before - after)).sum(-1) * batch.weight
    return torch.zeros(len(batch.ids), device=after.device).index_add(0, batch.row, each)


def trace(model: Model, batch: Batch, modules: Sequence[str], requests: Sequence[EditRequest] = ()) -> Traces:
    """Inputs and output gradients of `modules` at every token of `batch`: one pass forward and one back.

    Both passes stay above the lowest of `modules`; the model is left as it was. `requests`, one per row, name the
    edit when its loss is not finite. Raises EditRefused then.
    """
    base = trunk(model, batch, modules)
    given: dict[str, Tensor] = {}
    gave: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        def keep(x: Tensor, out: Tensor) -> Tensor:
            out = out if out.requires_grad else out.detach().requires_grad_()  # the graph starts at the lowest module
            given[name], gave[name] = x.detach(), out
            return out

        return keep

    with torch.enable_grad(), ExitStack() as stack:
        for name in modules:
            stack.enter_context(model.watching(name, watch(name)))
        losses = nll(batch, logprobs(model, batch, base))
        scale = SCALES.get(model.dtype, 1.0)
        grads = torch.autograd.grad(losses.sum() * scale, [gave[n] for n in modules])
    shape, real = batch.ids.shape, batch.mask.bool()
    row = real.nonzero()[:, 0]
    found = {}
    for name, grad in zip(modules, grads, strict=True):
        x = given[name].reshape(*shape, -1)[real].float()  # some families flatten B and T
        found[name] = Trace(x, grad.reshape(*shape, -1)[real].float() / scale, row)
    _finite(losses.detach(), found, requests)
    return Traces(found, losses.detach())


def _finite(losses: Tensor, found: Mapping[str, Trace], requests: Sequence[EditRequest]) -> None:
    bad = {int(i) for i in (~losses.isfinite()).nonzero()[:, 0]}
    for t in found.values():
        bad |= {int(i) for i in t.row[~(t.x.isfinite().all(1) & t.delta.isfinite().all(1))]}
    if bad:
        which = requests[min(bad)].id if requests else str(min(bad))
        raise EditRefused(f"edit {which!r}: its loss or gradient is not finite: a broken model")
