"""MALMEN's shifts and RLEdit's streams the plain way, to compare with: dense float64 solutions in one graph with the
network, one text at a time, no hooks of ours."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from methods.parts import meta
from methods.parts.hypernet import HyperNet
from methods.parts.meta import Course
from raysys.model import Model
from raysys.types import EditCase, EditRequest


def module_names(model: Model) -> tuple[str, ...]:
    return model.mlp_out(1), model.mlp_out(2)


def mean_nll(model: Model, prompt: str, target: str, deltas: dict[str, Tensor]) -> Tensor:
    return -logprobs(model, prompt, target, deltas)[1].mean()


def logprobs(model: Model, prompt: str, target: str, deltas: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(tokens, V) log-probabilities where `target` is predicted, and those of its tokens, with W + Δ in place of W."""
    head, tail = model.pair(prompt, f" {target}")
    ids = torch.tensor([[*head, *tail[:-1]]])
    with ExitStack() as stack:
        for name, delta in deltas.items():
            module = model.module(name)

            def more(_: Any, given: Any, out: Tensor, delta: Tensor = delta) -> Tensor:
                return out + given[0] @ delta.T.to(out.dtype)

            handle = module.register_forward_hook(more)
            stack.callback(handle.remove)
        out = model.net(input_ids=ids).logits[0, len(head) - 1 :].log_softmax(-1)
    return out, out[torch.arange(len(tail)), torch.tensor(tail)]


def keys_and_gradients(
    model: Model, request: EditRequest, deltas: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    head, tail = model.pair(request.text, request.continuation)
    ids = torch.tensor([[*head, *tail[:-1]]])
    given: dict[str, Tensor] = {}
    probes: dict[str, Tensor] = {}
    with ExitStack() as stack, torch.enable_grad():
        for name in module_names(model):

            def watch(_: Any, args: Any, out: Tensor, name: str = name) -> Tensor:
                given[name] = args[0][0].detach()
                probes[name] = torch.zeros_like(out, requires_grad=True)
                extra = args[0] @ deltas[name].T.to(out.dtype) if name in deltas else 0
                return out + extra + probes[name]

            handle = model.module(name).register_forward_hook(watch)
            stack.callback(handle.remove)
        out = model.net(input_ids=ids).logits[0, len(head) - 1 :].log_softmax(-1)
        loss = -out[torch.arange(len(tail)), torch.tensor(tail)].mean()
        grads = torch.autograd.grad(loss, list(probes.values()))
    return {n: (given[n], g[0]) for n, g in zip(probes, grads, strict=True)}


def plain_shift(
    model: Model, net: HyperNet, requests: Sequence[EditRequest], worn: dict[str, Tensor]
) -> dict[str, Tensor]:
    """ΔW (d_out, d_in) of each module in one graph with `net`: the normal equation, dense and in float64."""
    assert net.lamdas is not None
    found = [keys_and_gradients(model, r, worn) for r in requests]
    made = {}
    for i, name in enumerate(module_names(model)):
        keys = torch.cat([f[name][0] for f in found])
        grads = torch.cat([f[name][1] for f in found])
        key, value = net.transformed(name, meta.Trace(keys, grads, torch.zeros(len(keys))))
        values = -net.lrs[i] * (keys * key).sum(1, keepdim=True) * value
        wide = keys.double()
        system = wide.T @ wide + net.lamdas[i].double().exp() * torch.eye(wide.shape[1], dtype=torch.float64)
        made[name] = torch.linalg.solve(system, wide.T @ values.double()).T.float()
    return made


def paid(
    model: Model, cases: Sequence[EditCase], deltas: dict[str, Tensor], since: dict[str, Tensor], course: Course
) -> Tensor:
    """Mean over edits of: NLL of its own text and paraphrase, and loc_coef times KL at its neighbour."""
    total = torch.zeros(())
    for one in cases:
        asked = [(one.request.text, one.request.target)] + [
            (p.prompt, p.right) for p in one.probes if p.kind == "paraphrase"
        ]
        nll = torch.stack([mean_nll(model, *a, deltas) for a in asked]).mean()
        near = next(p for p in one.probes if p.kind == "neighbourhood")
        with torch.no_grad():
            before, _ = logprobs(model, near.prompt, near.right, since)
        after, _ = logprobs(model, near.prompt, near.right, deltas)
        total = total + nll + course.loc_coef * (before.exp() * (before - after)).sum(-1).mean()
    return total / len(cases)


def plain_stream(model: Model, net: HyperNet, steps: Sequence[Sequence[EditCase]], course: Course) -> Tensor:
    """The mean over a stream's shifts of what each pays; a shift is not asked to answer for those after it."""
    worn: dict[str, Tensor] = {}
    total = torch.zeros(())
    for t in range(len(steps)):
        made = plain_shift(model, net, [c.request for c in steps[t]], worn)
        now = {n: d + worn[n] if n in worn else d for n, d in made.items()}
        since = worn if course.since == "before" else {}
        for ago in range(min(course.depth, t + 1)):
            total = total + course.decay**ago * paid(model, steps[t - ago], now, since, course)
        total = total + course.reg * torch.stack([d.square().sum() for d in made.values()]).sum()
        worn = {n: d.detach() for n, d in now.items()}
    return total / len(steps)
