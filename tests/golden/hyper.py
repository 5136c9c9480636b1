"""Methods that transform an edit's gradient, MEND and UltraEdit, against recorded vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from methods.mend import Mend, PreparedMend
from methods.parts import gradients
from methods.parts.hypernet import HyperNet, Stats, shapes
from methods.ultraedit import PreparedUltraEdit, UltraEdit
from raysys.model import Model
from raysys.patch import Dense, LowRank, Wearer, merge
from raysys.types import Edit, EditRequest, Patch
from tests.golden.common import OLD_PADDING, Case, Line, all_steps, error, logits


def _mend(case: Case) -> Iterator[Line]:
    v, weights = case.vectors, case.hparams["inner_params"]
    modules = tuple(w.removesuffix(".weight") for w in weights)
    settings = Mend(modules=modules, rank=case.hparams["rank"], labels="alone")  # a BOS in targets, where there is one
    net = _recorded(case, modules)
    method = PreparedMend.of(settings, case.model, net, "recorded")
    traces: dict[int, gradients.Traces] = {}
    real = method.edit

    def edit(model: Model, requests: list, memory: object = None) -> Edit:
        rows = [gradients.row(model, q, "alone", last=True) for q in requests]
        traces[len(traces)] = gradients.trace(model, gradients.lay(model, rows), modules)
        return real(model, requests, memory)

    object.__setattr__(method, "edit", edit)

    def per_edit(number: int, made: Edit) -> Iterator[Line]:
        for name, patch in zip(weights, made.patches, strict=True):
            trace = traces[number].modules[name.removesuffix(".weight")]
            found = {
                "x": trace.x[None],
                "delta": trace.delta[None],
                "u": patch.right,
                "v": patch.left.T / net.lr(name.removesuffix(".weight")),
            }
            for what, got in found.items():
                if (key := f"edit{number}.{what}.{name}") in v:
                    yield Line(case.name, key, error(got, v[key]))

    for name, (d_in, d_out) in net.shapes.items():
        old = _named(v, d_in, d_out)
        std = torch.cat((v[f"{old}.u_std"], v[f"{old}.v_std"]))
        yield Line(case.name, f"{old}.std for {name}", error(net._of(name).stats.std, std))
    yield from all_steps(case, method, weights, per_edit)


def _recorded(case: Case, modules: tuple[str, ...]) -> HyperNet:
    """The recorded network: EasyEdit shares it among weights of one shape."""
    v = case.vectors
    net = HyperNet(shapes(case.model, modules), rank=case.hparams["rank"])
    tensors = {"lrs": v["hyper.edit_lrs"]}
    for name in modules:
        d_in, d_out = net.shapes[name]
        old = _named(v, d_in, d_out)
        new = f"transforms.{d_in}x{d_out}"
        tensors[f"{new}.n"] = v[f"{old}.k"][0]
        for ours, theirs in (("mean", "mean"), ("m2", "s")):
            tensors[f"{new}.{ours}"] = torch.cat((v[f"{old}.u_{theirs}"], v[f"{old}.v_{theirs}"]))
        parts = {"u": "u", "v": "v", "b": "bias", "scale": "mode_scale.weight", "shift": "mode_shift.weight"}
        for ours, theirs in parts.items():
            for block in range(2):
                tensors[f"{new}.{ours}.{block}"] = v[f"{old}.mlp.layers.{block}.{theirs}"]
    net.load_state_dict(tensors)
    return net


def _named(v: Mapping[str, Tensor], d_in: int, d_out: int) -> str:
    """Where the tensors of a shape's network are: EasyEdit names it as the family stores the matrix."""
    for name in (f"hyper.mend.{shape}" for shape in ((d_in, d_out), (d_out, d_in))):
        if f"{name}.k" in v and (len(v[f"{name}.u_mean"]), len(v[f"{name}.v_mean"])) == (d_in, d_out):
            return name
    raise ValueError(f"no network for matrices from {d_in} to {d_out} was recorded")


def _ultraedit(case: Case) -> Iterator[Line]:
    """Both turns; the second asks for the old targets again, in the order of its log."""
    h, v = case.hparams, case.vectors
    modules = tuple(h["inner_params"])
    settings = UltraEdit(modules=modules, lr=h["lr"], at_once=h["batch_size_once"], tokens="all", published=True)
    method = settings.prepare(case.model)
    if case.model.config.model_type in OLD_PADDING:
        _as_recorded(case.model)
    wearer = Wearer(case.model)
    worn: tuple[Patch, ...] = ()
    memory = None
    yield Line(case.name, "logits.pre", error(logits(case), v["logits.pre"]))
    for turn, log in enumerate(case.meta["log"]):
        requests = [case.requests[said["req"]] for said in log]
        if turn:
            requests = [replace(q, target=q.was or "") for q in requests]
        yield from _turn(case, method, turn, requests)
        edit = method.edit(case.model, requests, memory)
        memory = method.remember(memory, edit.memory or {})
        yield from _normaliser(case, turn, memory)
        for name, patch in zip(modules, edit.patches, strict=True):
            assert isinstance(patch, LowRank | Dense)
            delta = torch.zeros(patch.shape)
            patch.add_to(delta)
            yield Line(case.name, f"turn{turn}.shift.{name}", error(delta.T, v[f"turn{turn}.shift.{name}"]))
        worn = merge(worn, edit.patches)
        wearer.wear(worn)
        yield Line(case.name, f"logits.after{turn + 1}", error(logits(case), v[f"logits.after{turn + 1}"]))
    wearer.take_off()


def _as_recorded(model: Model) -> None:
    """Attention as transformers 4.46 computes it: in GPT-2 a token in the padding looks alike at the padding it may see
    and at what comes later, in GPT-NeoX at that padding alone, and no gradient flows to the scores of what comes later.
    It matters where padding is asked for a target."""
    everywhere = model.config.model_type == "gpt2"

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **_: Any) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, heads, T, T)
        seen = torch.ones(scores.shape[-2:]).tril() > 0
        scores = torch.where(seen, scores, torch.finfo(scores.dtype).min)
        if mask is not None:
            scores = scores + (mask[:, :, -1:] if everywhere else mask)  # the last row masks padding alone
        weights = scores.softmax(-1)
        return (weights @ v).transpose(1, 2), weights

    AttentionInterface.register("recorded", attention)
    AttentionMaskInterface.register("recorded", eager_mask)
    model.net.config._attn_implementation = "recorded"


def _turn(case: Case, method: PreparedUltraEdit, turn: int, requests: list[EditRequest]) -> Iterator[Line]:
    v, names = case.vectors, list(method.shapes)
    parts = [gradients.trace(case.model, batch, names).modules for batch, _ in method.batches(case.model, requests)]
    if method.settings.at_once == 1:
        parts.sort(key=lambda part: -len(part[names[0]].x))  # the order in which they were recorded
    lengths = torch.tensor([len(part[names[0]].x) for part in parts])
    yield Line(case.name, f"turn{turn}.n_tokens", error(lengths, v[f"turn{turn}.n_tokens"]))
    for name in names:
        keys, grads = (torch.cat([getattr(p[name], what) for p in parts]) for what in ("x", "delta"))
        yield Line(case.name, f"turn{turn}.keys.{name}", error(keys, v[f"turn{turn}.keys.{name}"]))
        yield Line(case.name, f"turn{turn}.values_grad.{name}", error(grads, v[f"turn{turn}.values_grad.{name}"]))


def _normaliser(case: Case, turn: int, memory: Mapping[str, Tensor]) -> Iterator[Line]:
    v = case.vectors
    for key in dict.fromkeys(k.partition(".")[0] for k in memory):
        d_in, d_out = map(int, key.split("x"))
        before = f"turn{turn}.norm."
        names = [f"{before}{s}" for s in ((d_in, d_out), (d_out, d_in)) if f"{before}{s}.n" in v]
        stats = Stats(*(memory[f"{key}.{what}"] for what in ("n", "mean", "m2")))
        got = {"n": stats.n[None], "mean": stats.mean, "var": stats.m2, "std": stats.std}  # "var" is a sum of squares
        for what, tensor in got.items():
            yield Line(case.name, f"{names[0]}.{what}", error(tensor, v[f"{names[0]}.{what}"]))


INPUTS = {"MEND": ("hyper.*",)}  # the trained network; its deviations are compared

METHODS: dict[str, Callable[[Case], Iterator[Line]]] = {
    "MEND": _mend,
    "UltraEdit": _ultraedit,
    "UltraEdit-batched": _ultraedit,
}
