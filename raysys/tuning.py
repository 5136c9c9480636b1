"""`raysys tune`: a method's main settings for a model that nobody has published any for, searched on held-out edits.

One setting after the other is tried at a few values with the others at their best so far; rounds go on until nothing
gets better or the trials are used up. The *score* of a trial is the mean over efficacy, paraphrase and neighbourhood
of single edits, each the mean of two shares: the right answer is likelier than its rival, and greedy text gives it.
Refused edits count as failed. Trials are kept in a file, so that an interrupted search goes on; those that broke
down are not, as it may have been the machine that failed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from raysys import checks, names
from raysys.files import content_hash
from raysys.model import Model
from raysys.types import EditCase

KINDS = ("rewrite", "paraphrase", "neighbourhood")
DEPTHS = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8)  # of layers, as shares of the model's depth
FACTORS: Mapping[str, tuple[float, ...]] = {  # times the value there is, in this order; steps stay whole
    "lr": (0.25, 0.5, 2.0, 4.0),
    "radius": (0.25, 0.5, 2.0, 4.0),
    "weight_decay": (0.1, 10.0),
    "steps": (0.5, 2.0),
}
BETTER = 1e-9  # by which a score must be higher


@dataclass(frozen=True)
class Trial:
    """Some settings (those that differ from the method's own), what they score, and why nothing was found."""

    changes: Mapping[str, Any]
    score: float
    shares: Mapping[str, float]
    seconds: float
    fault: str = ""


def candidates(method: Any, settled: Mapping[str, Any], model: Model) -> dict[str, list[Any]]:
    """What to try, by setting: the method's own `TUNE` (name -> values), else layers by depth, then FACTORS.

    `settled` holds the settings with none left open.
    """
    own: Mapping[str, Sequence[Any]] | None = getattr(type(method), "TUNE", None)
    if own is not None:
        return {name: list(values) for name, values in own.items()}
    found: dict[str, list[Any]] = {}
    have = {f.name for f in fields(method)}
    last = model.layers - 1
    depths = list(dict.fromkeys(round(d * last) for d in DEPTHS))
    if "layer" in have and isinstance(settled.get("layer"), int):
        found["layer"] = depths
    if "layers" in have and settled.get("layers"):
        width = len(settled["layers"])
        ends = dict.fromkeys(min(max(d, width - 1), last) for d in depths)
        found["layers"] = [list(range(end - width + 1, end + 1)) for end in ends]
    for name, factors in FACTORS.items():
        value = settled.get(name)
        if name in have and isinstance(value, int | float) and value:
            scaled = [value * f for f in factors]
            found[name] = [max(2, round(v)) for v in scaled] if name == "steps" else scaled
    return found


def search(
    model: Model,
    name: str,
    settings: Mapping[str, Any],
    cases: Sequence[EditCase],
    trials: int,
    *,
    cache: Path | None = None,
    tell: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Iterator[Trial]:
    """Every trial as it is done, the first with the method's own settings. Raises ValueError when that one fails."""
    names.method(name)
    try:
        run = _Run(model, name, dict(settings), cases, trials, cache, tell)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"method {name} can't be tuned: {error}") from error
    first = run.trial({})
    assert first is not None
    yield first
    if first.fault:
        raise ValueError(f"method {name} can't be tuned: {first.fault}")
    settled = json.loads(json.dumps(run.identity["settings"]))  # as in a file: lists, no tuples
    top, before = first, None
    grid = json.loads(json.dumps(candidates(run.method, settled, model)))
    while top is not before:
        before = top
        for setting, values in grid.items():
            for value in values:
                if value == top.changes.get(setting, settled.get(setting)):
                    continue
                found = run.trial({**top.changes, setting: value})
                if found is None:
                    if run.left == 0:
                        return
                    continue  # tried before
                yield found
                top = found if found.score > top.score + BETTER else top


class _Run:
    """Trials of one search, each made once: here, or by an earlier search that was interrupted."""

    def __init__(
        self, model: Model, name: str, settings: dict[str, Any], cases: Sequence[EditCase], trials: int,
        cache: Path | None, tell: Callable[[str, int, int], None],
    ) -> None:  # fmt: skip
        self.model, self.name, self.settings, self.cases, self.left = model, name, settings, cases, trials
        self.cache, self.tell, self.number = cache, tell, 0
        from methods.parts import artifacts

        self.method, ready = self.built({})
        self.identity = ready.identity()
        requests = [[c.request.prompt, c.request.subject, c.request.target] for c in cases]
        version = getattr(names.method(name), "version", "")
        made_of = dict(self.identity.get("artifacts", {}))  # an editor trained anew, other second moments
        key = content_hash([2, model.digest, name, version, settings, requests, made_of])[:24]
        self.file = artifacts.folder(cache) / "tune" / f"{key}.jsonl"
        self.known = dict(self._read())
        self.seen: set[str] = set()

    def _read(self) -> Iterator[tuple[str, Trial]]:
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else []
        for line in lines:
            try:
                trial = Trial(**json.loads(line))
            except (json.JSONDecodeError, TypeError):  # cut short
                continue
            yield _key(trial.changes), trial

    def built(self, changes: Mapping[str, Any]) -> tuple[Any, Any]:
        """The method with `changes`, and the same prepared. Raises ValueError."""
        method = names.build(names.method(self.name), {**self.settings, **changes}, f"method {self.name}")
        return method, method.prepare(self.model, self.cache)

    def trial(self, changes: Mapping[str, Any]) -> Trial | None:
        """None when these were tried in this search already, or no trial is left."""
        key = _key(changes)
        if key in self.seen or not self.left:
            return None
        self.seen.add(key)
        self.left -= 1
        self.number += 1
        found = self.known.get(key) or self._made(changes)
        if key not in self.known and (found.shares or not found.fault):  # refusals are kept, breakdowns tried again
            self.known[key] = found
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(vars(found)) + "\n")
        return found

    def _made(self, changes: Mapping[str, Any]) -> Trial:
        said = f"trial {self.number}: " + (", ".join(f"{k} = {v}" for k, v in changes.items()) or "its own settings")
        try:
            _, ready = self.built(changes)
            singles = []
            for single in checks.single_edits(self.model, ready, self.cases):
                singles.append(single)
                self.tell(said, len(singles), len(self.cases))
        except (ValueError, RuntimeError) as error:
            return Trial(dict(changes), 0.0, {}, 0.0, str(error))
        taken = sum(not s.refused for s in singles) / len(singles)
        shares = {k: v * taken if k.startswith("neighbourhood") else v for k, v in checks.shares(singles).items()}
        ways = [[shares[f"{k}/{way}"] for way in ("likelier", "greedy") if f"{k}/{way}" in shares] for k in KINDS]
        kinds = [fmean(found) for found in ways if found]
        fault = next((s.refused for s in singles if s.refused), "") if not taken else ""
        return Trial(dict(changes), fmean(kinds) if kinds else 0.0, shares, fmean(s.seconds for s in singles), fault)


def best(trials: Sequence[Trial]) -> Trial:
    """The one that scores most; the earlier of two."""
    return max(trials, key=lambda t: t.score)


def snippet(name: str, settings: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    """What to put into a study: TOML."""
    from raysys.words import toml

    return toml({"methods": [{"name": name, **settings, **changes}]})


def _key(changes: Mapping[str, Any]) -> str:
    return json.dumps(dict(changes), sort_keys=True)
