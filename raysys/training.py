"""Training of editors for `raysys train-editor`: which cases, which settings, and what is said on the way."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.edits import readable
from raysys import names, progress, words
from raysys.model import Model
from raysys.types import EditCase

Say = Callable[[str], None]
SKIP = 1000  # records of a data set without a part for training: what studies edit


def cases(found: Iterable[EditCase], skip: int, count: int | None, say: Say) -> list[EditCase]:
    """The cases to train on: `count` good ones (None: all) after the first `skip` records; says what was left out.

    Raises ValueError when none is left.
    """
    good: list[EditCase] = []
    bad: list[str] = []
    for case in islice(readable(found), skip, None):
        if count is not None and len(good) >= count:
            break
        if isinstance(case, EditCase):
            good.append(case)
        else:
            bad.append(str(case))
    if bad:
        say(f"{words.count(len(bad), 'record')} left out; the first: {bad[0]}")
    if not good:
        raise ValueError(
            f"no cases to train on after the first {skip} records, which are left out because studies edit them; take "
            "more data, or lower --skip (0 for a file that no study edits)"
        )
    return good


def check(name: str, method: Any, changes: Mapping[str, Any]) -> None:
    """Raises ValueError when `method` is not one that is trained, or can't take `changes` to its training."""
    if not hasattr(method, "train"):
        trained = ", ".join(n for n in names.METHODS if hasattr(names.method(n), "train"))
        raise ValueError(f"{name} needs no trained editor; methods that do: {trained}")
    if changes and "settings" not in inspect.signature(method.train).parameters:
        raise ValueError(f"{name} has no settings of training apart from its own: write them without 'training.'")


def train(
    method: Any, model: Model, chosen: list[EditCase], changes: Mapping[str, Any], cache: Path | None, console: Console
) -> tuple[Path, str]:
    """Train `method`'s editor for `model`; its file and a line about how it went.

    A bar in a terminal, else plain lines, and a line for each validation. Interrupted, the same call goes on.
    """
    last = ""

    with progress.counted("steps", console) as tell:

        def note(told: Any) -> None:
            nonlocal last
            if isinstance(told, str):
                last = told
                console.print(told, markup=False, highlight=False, soft_wrap=True)
                return
            tell("training", told.step, told.steps)
            last = f"{told.step} steps, best validation loss {told.best:.4f}"
            parts = (f"training {_figures(told.training)}", f"validation {_figures(told.validation)}")
            skipped = f" | {words.count(told.skipped, 'update')} skipped, not finite" if told.skipped else ""
            left_out = f" | {words.count(told.left_out, 'case')} left out, too long" if told.left_out else ""
            line = f"step {told.step}: {' | '.join(parts)}{skipped}{left_out}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)

        settings = {"settings": dict(changes)} if changes else {}
        path: Path = method.train(model, chosen, cache, note, **settings)
    return path, last


def _figures(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
