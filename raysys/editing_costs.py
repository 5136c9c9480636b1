"""What an edit costs with every method, and where the time goes: one thread, CPU seconds, the shape of GPT-2 small."""

from __future__ import annotations

import cProfile
import gc
import pstats
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from raysys import bench_model, names, patch
from raysys.editing_bench import RIDGE, Line, Prepared, Setup, Size, timed
from raysys.types import EditCase, EditRequest, Probe

STAGES: Mapping[str, tuple[str, ...]] = {  # functions of methods/ by what they are for
    "keys": ("locate.read", "spread.keys", "spread.outputs", "spread.__init__", "grace.__init__"),
    "search": ("locate.values", "spread.values", "pmet_search.values", "grace._search", "kn.attribution"),
    "solve": ("rome._direction", "metric.answer", "metric.into", "metric.back", "spread.change"),
}
OWN: Mapping[str, Mapping[str, Any]] = {  # nothing is fetched
    "serac": {"classifier": "own", "counterfactual": "own"},
    "ike": {"encoder": "model"},
}


@dataclass(frozen=True)
class Cost:
    """One method: CPU seconds of an edit by stage, of putting it on, or why it wasn't measured."""

    method: str
    seconds: float = 0.0
    stages: Mapping[str, float] = field(default_factory=dict)
    why: str = ""


def costs(size: Size, note: Callable[[str], None] = lambda _: None) -> Iterator[Cost]:
    """Every method's edit on that shape."""
    with Prepared(size, note) as setup:
        for name in names.METHODS:
            if not size.only or name in size.only:
                note(f"{name} ...")
                yield _cost(setup, name)
                gc.collect()


# --- every method ----------------------------------------------------------------------------------------------------

TRAINING = {"steps": 1, "accumulate": 1, "every": 1, "validation": 1}  # only shapes matter


def _cost(setup: Setup, name: str) -> Cost:
    model = setup.model
    cls = names.method(name)
    fields = cls.__dataclass_fields__
    text = {"corpus": setup.corpus.name, "documents": setup.corpus.documents, "ridge": RIDGE}
    facts = bench_model.requests(2, seed=7)
    try:
        settings: dict[str, Any] = {**{k: v for k, v in text.items() if k in fields}, **OWN.get(name, {})}
        if "of" in fields:  # a transform of another method's edits
            inner = names.method(fields["of"].default).__dataclass_fields__
            settings["settings"] = {k: v for k, v in text.items() if k in inner}
        made = names.build(cls, settings, name)
        if hasattr(made, "train"):
            _train(made, setup)
        ready = made.prepare(model, setup.cache)
        ready.edit(model, facts[1:])
        profile = cProfile.Profile(time.process_time)
        seconds, edit = timed(lambda: profile.runcall(ready.edit, model, facts[:1]))
        wearer = patch.Wearer(model)
        worn, _ = timed(lambda: wearer.wear(edit.patches))
        wearer.take_off()
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        return Cost(name, why=str(error).splitlines()[0][:160])
    stats = pstats.Stats(profile)
    watched = max(float(stats.total_tt), seconds, 1e-9)  # type: ignore[attr-defined]
    stages = {stage: spent * seconds / watched for stage, spent in _stages(stats).items()}
    stages["rest"] = max(seconds - sum(stages.values()), 0.0)
    return Cost(name, seconds, {**stages, "wear": worn})


def _train(method: Any, setup: Setup) -> None:
    """As little training as there is: what it makes has the right shapes."""
    try:
        method.train(setup.model, _cases(), setup.cache, settings=TRAINING)
    except ValueError:  # a method that is not trained in steps
        method.train(setup.model, _cases(), setup.cache)


def _cases() -> list[EditCase]:
    facts = bench_model.requests(6, seed=8)
    return [EditCase(f, (Probe("paraphrase", f.text, f.target, f.was), _elsewhere(f))) for f in facts]


def _elsewhere(fact: EditRequest) -> Probe:
    other = bench_model.requests(1, seed=9)[0]
    return Probe("neighbourhood", other.text, fact.was or "", fact.target)


def _stages(stats: pstats.Stats) -> dict[str, float]:
    """Seconds in each stage, with everything it calls; what one function of a stage calls of the same counts once."""
    found = {}
    table: dict[Any, Any] = stats.stats  # type: ignore[attr-defined]
    for stage, functions in STAGES.items():
        own = {key for key in table if f"{Path(key[0]).stem}.{key[2]}" in functions}
        found[stage] = sum(figures[3] for key in own for caller, figures in table[key][4].items() if caller not in own)
    return found


def tree(size: Size, found: Sequence[Line], methods: Sequence[Cost]) -> dict[str, Any]:
    """Everything, for JSON."""
    return {
        "shape": asdict(size.shape),
        "steps": size.steps,
        "torch": torch.__version__,
        "lines": [line.tree() for line in found],
        "methods": [asdict(cost) for cost in methods],
    }
