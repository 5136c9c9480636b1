"""Sequential edits without a study: does each edit take at once, do all of them still hold at the end?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raysys import steps
from raysys.checks import Answered, Outcome, Single, ask, shares
from raysys.model import Model
from raysys.patch import Wearer, merge
from raysys.types import EditCase, Finishes, Patch, PreparedMethod, Probe, remembered

Tell = Callable[[int], None]  # how many edits are made


@dataclass(frozen=True)
class Sequential:
    """A stream of edits on one model. `at_once`: the probes of each edit right after its step; `at_end`: those of all
    edits after the last (shares by "kind/way", see `checks.shares`; a refused edit fails `at_once`, and is asked like
    the others in `at_end`). `facts`: of the facts that nobody edited and greedy text told right before, the share it
    still tells right at the end (None: there are none). `seconds` each edit took; `bytes` of the last snapshot.
    """

    edits: int
    refused: tuple[str, ...]
    seconds: tuple[float, ...]
    at_once: Mapping[str, float]
    at_end: Mapping[str, float]
    facts: float | None
    bytes: int


def sequential_edits(
    model: Model,
    method: PreparedMethod,
    cases: Sequence[EditCase],
    batch: int = 1,
    facts: Sequence[Probe] = (),
    tell: Tell = lambda made: None,
) -> Sequential:
    """Make all edits one step after another, `batch` a step, each on the model as the earlier ones left it.

    The model is the base again afterwards. What is refused changes nothing and the stream goes on.
    """
    cases = _without_changed(cases)
    wearer = Wearer(model)
    before = {case.request.id: ask(model, case.probes) for case in cases}
    known = ask(model, facts)
    patches: tuple[Patch, ...] = ()
    memory: Any = None
    refused: list[str] = []
    seconds: list[float] = []
    at_once: list[Single] = []
    try:
        for start in range(0, len(cases), batch):
            step = cases[start : start + batch]
            began = time.perf_counter()
            edit, bad = steps.make(method, model, [c.request for c in step], memory)
            seconds += [(time.perf_counter() - began) / len(step)] * len(step)
            refused += bad.values()
            patches, memory = merge(patches, edit.patches), remembered(method, memory, edit.memory)
            wearer.wear(patches)
            at_once += [_single(model, case, before, bad.get(case.request.id, "")) for case in step]
            tell(start + len(step))
        if isinstance(method, Finishes):
            wearer.take_off()
            patches = method.finish(model, patches)
            wearer.wear(patches)
        at_end = [_single(model, case, before) for case in cases]
        still = ask(model, facts)
    finally:
        wearer.take_off()
    kept = [now[1] for now, was in zip(still, known, strict=True) if was[1]]
    weight = sum(t.numel() * t.element_size() for p in patches for t in p.tensors().values())
    held = sum(kept) / len(kept) if kept else None
    return Sequential(len(cases), tuple(refused), tuple(seconds), shares(at_once), shares(at_end), held, weight)


def _without_changed(cases: Sequence[EditCase]) -> list[EditCase]:
    """The cases without neighbourhood probes that another edit changes: their old answer is no longer right."""
    changed = {p.prompt for c in cases for p in c.probes if p.kind in ("rewrite", "paraphrase")}
    return [
        replace(c, probes=tuple(p for p in c.probes if p.kind != "neighbourhood" or p.prompt not in changed))
        for c in cases
    ]


def _single(model: Model, case: EditCase, before: Mapping[str, Sequence[Answered]], refused: str = "") -> Single:
    id_ = case.request.id
    pairs = zip(case.probes, ask(model, case.probes), before[id_], strict=True)
    return Single(id_, tuple(Outcome(id_, p.kind, *now, *was) for p, now, was in pairs), 0.0, {}, refused=refused)
