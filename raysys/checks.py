"""Single edits, each on the untouched model: does a method do what it says? The figures behind a method's presets."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from methods.parts import locate
from raysys.blocks import pack
from raysys.model import Model
from raysys.patch import LowRank, Wearer, wearing
from raysys.scoring import Engine
from raysys.types import (
    Choose,
    Chosen,
    Edit,
    EditCase,
    EditRefused,
    EditRequest,
    Finishes,
    PreparedMethod,
    Probe,
)

Answered = tuple[bool | None, bool]  # likelier, greedy: see Outcome


@dataclass(frozen=True)
class Outcome:
    """One probe of one edit: `likelier` is P(right) > P(wrong), `greedy` whether decoding would give the right answer.

    `was_likelier` and `was_greedy` are the same before the edit. `likelier` is None where the probe has no rival.
    """

    request: str
    kind: str
    likelier: bool | None
    greedy: bool
    was_likelier: bool | None
    was_greedy: bool

    @property
    def unchanged(self) -> bool:
        """Whether both are as before."""
        return (self.likelier, self.greedy) == (self.was_likelier, self.was_greedy)


@dataclass(frozen=True)
class Single:
    """One edit: its probes, seconds, log, why it was refused (or ""), and how far the worn matrix misses its value.

    A refused edit changed nothing: its probes are answered as before. `miss` is |W' k - (W k + left (right k))| / |W'
    k| at the subject's last token, the largest of its patches; 0 for methods that write no low-rank patch.
    """

    request: str
    outcomes: tuple[Outcome, ...]
    seconds: float
    log: Mapping[str, object]
    miss: float = 0.0
    refused: str = ""


def single_edits(model: Model, method: PreparedMethod, cases: Iterable[EditCase]) -> Iterator[Single]:
    """Make, probe and take back each edit of `cases` alone, on the untouched `model`."""
    wearer = Wearer(model)
    for case in cases:
        before = ask(model, case.probes)
        start = time.perf_counter()
        try:
            edit = method.edit(model, [case.request])
        except EditRefused as refusal:
            seconds = time.perf_counter() - start
            yield Single(case.request.id, _outcomes(case, before, before), seconds, {}, refused=str(refusal))
            continue
        seconds = time.perf_counter() - start
        miss = _miss(model, case.request, edit)
        patches = edit.patches
        try:
            wearer.wear(method.finish(model, patches) if isinstance(method, Finishes) else patches)
            after = ask(model, case.probes)
        finally:
            wearer.take_off()
        yield Single(case.request.id, _outcomes(case, after, before), seconds, edit.log, miss)


def _outcomes(case: EditCase, after: Sequence[Answered], before: Sequence[Answered]) -> tuple[Outcome, ...]:
    answers = zip(case.probes, after, before, strict=True)
    return tuple(Outcome(case.request.id, p.kind, *now, *was) for p, now, was in answers)


def shares(singles: Sequence[Single]) -> dict[str, float]:
    """Per kind of probe the mean over edits of the share that holds, in [0, 1]: "kind/likelier", "kind/greedy", and
    "kind/unchanged", the share of probes whose outcome is the one before the edit.

    A refused edit fails all that it should have changed (every kind but neighbourhood), whatever the model said
    before; neighbourhood and "unchanged" are of the edits that were made. Probes without a rival count in "greedy" and
    "unchanged" alone; a kind that has none with a rival has no "likelier".
    """
    found: dict[str, list[float]] = {}
    for single in singles:
        for kind in dict.fromkeys(o.kind for o in single.outcomes):
            of_kind = [o for o in single.outcomes if o.kind == kind]
            told: dict[str, list[bool]] = {
                "likelier": [o.likelier for o in of_kind if o.likelier is not None],
                "greedy": [o.greedy for o in of_kind],
                "unchanged": [o.unchanged for o in of_kind],
            }
            for way, held in told.items():
                if not held or (single.refused and (kind == "neighbourhood" or way == "unchanged")):
                    continue
                found.setdefault(f"{kind}/{way}", []).append(0.0 if single.refused else fmean(held))
    return {name: fmean(values) for name, values in found.items()}


def ask(model: Model, probes: Sequence[Probe]) -> list[Answered]:
    """For each probe: P(right) > P(wrong), None without a rival, and whether greedy decoding gives the right answer."""
    queries = [
        Choose(str(i), p.prompt, tuple(_after(a) for a in (p.right, p.wrong) if a is not None), 0)
        for i, p in enumerate(probes)
    ]
    found: dict[str, Answered] = {}
    engine = Engine(model)
    for block in pack(model.tokens, "checks", {}, queries, batch=64, size=256):
        for item, answer in zip(block.items, engine.answer(block), strict=True):
            assert isinstance(answer, Chosen)
            right, *wrong = answer.choices
            found[item.query.id] = right.logprob > wrong[0].logprob if wrong else None, right.greedy
    return [found[q.id] for q in queries]


def _after(answer: str) -> str:
    return answer if answer[:1].isspace() else f" {answer}"


@torch.no_grad()
def _miss(model: Model, request: EditRequest, edit: Edit) -> float:
    row = locate.row(model, request)
    worst = 0.0
    for patch in edit.patches:
        if isinstance(patch, LowRank):
            module = patch.weight.removesuffix(".weight")
            before = locate.read(model, module, [row])
            change = patch.left.double() @ (patch.right.double() @ before.inputs[0].double().cpu())  # (d_out,)
            wanted = before.outputs[0].double().cpu() + change
            with wearing(model, (patch,)):
                got = locate.read(model, module, [row]).outputs[0].double().cpu()
            worst = max(worst, float((got - wanted).norm() / wanted.norm()))
    return worst
