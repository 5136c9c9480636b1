"""Training of editors (MEND, MALMEN, RLEdit): steps, validation, early stop, and checkpoints that go on exactly.

What is learned is a `Learner`'s business; here is what all of them do alike. Step n looks at the same cases however
often training was interrupted, and a run that was taken up again ends with the same bits as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from methods.parts import editors
from methods.parts.artifacts import folder
from methods.parts.hypernet import HyperNet
from raysys import names
from raysys.types import EditRefused


@dataclass(frozen=True, kw_only=True)
class Training:
    """How an editor is trained. The defaults are MEND's (Mitchell et al., appendix C, and EasyEdit's files)."""

    steps: int = 100_000
    cases: int = 1  # per step
    accumulate: int = 10  # steps per update of the network
    lr: float = 1e-6  # Adam's, of the transforms
    lr_lr: float = 1e-4  # Adam's, of the learned step sizes
    schedule: Literal["constant", "linear"] = "constant"  # linear: both rates fall to zero over `steps`
    clip: float = 100.0  # largest norm of an update's gradient
    validation: int = 100  # how many cases are held back, taken evenly from all
    every: int = 1000  # steps from one validation, and checkpoint, to the next
    patience: int = 20_000  # steps without a better validation after which training ends
    seed: int = 0


@dataclass(frozen=True)
class Progress:
    """Told after each validation: steps done of how many, mean losses of the steps since the last, validation."""

    step: int
    steps: int
    training: Mapping[str, float]
    validation: Mapping[str, float]
    best: float
    skipped: int
    seconds: float
    left_out: int = 0  # cases that can't be learned from (too long, no tokens to score)


Note = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """A `Note` that nobody hears."""


def built(method: str, asked: Mapping[str, Any], *kinds: Any) -> list[Any]:
    """Each of the settings dataclasses `kinds` with those of the settings `asked` that it has.

    Raises ValueError for a setting that none of them has, or of the wrong type.
    """
    owners = {f.name: kind for kind in kinds for f in fields(kind)}
    unknown = next((name for name in asked if name not in owners), None)
    if unknown is not None:
        raise ValueError(f"training of {method}: unknown setting {unknown!r}{names.did_you_mean(unknown, owners)}")
    return [
        names.build(kind, {k: v for k, v in asked.items() if owners[k] is kind}, f"training of {method}")
        for kind in kinds
    ]


class Learner(Protocol):
    """What is trained. `net` is changed by the trainer; cases are known by their numbers."""

    net: HyperNet

    @property
    def count(self) -> int:
        """How many cases there are."""
        ...

    def learn(self, cases: Sequence[int]) -> Mapping[str, float]:
        """Add the gradient of the mean loss of `cases` to the parameters' `grad`; the losses, for the log.

        Raises EditRefused when it is not finite; `judge` too.
        """
        ...

    def judge(self, cases: Sequence[int]) -> Mapping[str, float]:
        """How good `net` is on `cases` that it was not trained on: "loss" decides (lower is better)."""
        ...


@dataclass
class _State:
    step: int = 0
    best: float = math.inf
    best_step: int = 0
    skipped: int = 0
    kept: dict[str, Tensor] = field(default_factory=dict)  # the net at its best


def train(
    learner: Learner,
    settings: Training,
    wanted: Mapping[str, Any],
    data: str,
    cache: Path | None = None,
    note: Note = silent,
    course: Any = None,
) -> Path:
    """Train and save an editor that fits `wanted` (editors.fits) on cases whose hash is `data`; the editor's path.

    `course`: a dataclass of what else training depends on. A checkpoint in the cache folder is taken up where it ended,
    and deleted when training is done. Raises ValueError when there are too few cases, or no validation was finite.
    """
    told = {**asdict(settings), "data": data, **({} if course is None else {"course": asdict(course)})}
    path = folder(cache) / "editors" / f"{editors.name({**wanted, 'training': told})}.checkpoint.safetensors"
    held, used = split(learner.count, settings)
    adam = torch.optim.Adam(
        [
            {"params": learner.net.others(), "lr": settings.lr},
            {"params": learner.net.step_sizes(), "lr": settings.lr_lr},
        ]
    )
    state = _resumed(path, learner.net, adam) or _State()
    _loop(learner, settings, state, adam, held, used, path, note)
    if not state.kept:
        raise ValueError(
            f"training of {wanted['method']} ended without one finite validation in {state.step} steps "
            f"({state.skipped} updates skipped): lower the learning rates"
        )
    learner.net.load_state_dict(state.kept)
    figures = {"steps": state.step, "best_step": state.best_step, "best": state.best, "skipped": state.skipped}
    figures["left_out"] = getattr(learner, "left_out", 0)
    saved = editors.save(wanted, state.kept, {**told, **figures}, cache)
    path.unlink(missing_ok=True)
    return saved


def split(count: int, settings: Training) -> tuple[list[int], list[int]]:
    """Numbers of the cases held back for validation, and of those to train on. Raises ValueError for too few."""
    if count < 2:
        raise ValueError(f"{count} training cases: at least two are needed, one of them to validate with")
    many = min(settings.validation, max(1, count // 5))
    held = sorted({i * count // many for i in range(many)})
    return held, [i for i in range(count) if i not in set(held)]


def _loop(
    learner: Learner, s: Training, state: _State, adam: torch.optim.Adam,
    held: Sequence[int], used: Sequence[int], path: Path, note: Note,
) -> None:  # fmt: skip
    sums: dict[str, float] = {}
    counted, start, broken = 0, time.perf_counter(), False
    left_out = getattr(learner, "left_out", 0)
    every = max(s.accumulate, s.every - s.every % s.accumulate)  # a checkpoint holds no half-made update
    while state.step < s.steps and state.step - state.best_step < s.patience:
        try:
            losses = learner.learn([used[i] for i in order(len(used), state.step, s)])
            counted += 1
        except EditRefused:  # a loss or gradient that is not finite: the update it belongs to is thrown away
            losses, broken = {}, True
        state.step += 1
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value
        if state.step % s.accumulate == 0:
            if broken:
                adam.zero_grad()
            state.skipped += broken or not _update(learner.net, adam, s, state.step)
            broken = False
        if state.step % every == 0 or state.step == s.steps:
            found = _judged(learner, held)
            if found["loss"] < state.best:
                state.best, state.best_step = found["loss"], state.step
                state.kept = {k: t.detach().clone() for k, t in learner.net.state_dict().items()}
            if state.step % every == 0:
                _checkpoint(path, learner.net, adam, state)
            mean = {name: total / counted for name, total in sums.items()}
            took = time.perf_counter() - start
            note(Progress(state.step, s.steps, mean, found, state.best, state.skipped, took, left_out))
            sums, counted = {}, 0


def _judged(learner: Learner, held: Sequence[int]) -> Mapping[str, float]:
    """The validation; worse than any other when an edit of it can't be made."""
    try:
        return learner.judge(held)
    except EditRefused:
        return {"loss": math.inf}


def order(count: int, step: int, s: Training) -> list[int]:
    """Which cases step number `step` (from 0) takes: every case once before any comes again."""
    epoch, first = -1, step * s.cases
    shuffled: list[int] = []
    found = []
    for i in range(first, first + s.cases):
        if i // count != epoch:
            epoch = i // count
            generator = torch.Generator().manual_seed(s.seed * 1_000_003 + epoch)
            shuffled = torch.randperm(count, generator=generator).tolist()
        found.append(shuffled[i % count])
    return found


def _update(net: nn.Module, adam: torch.optim.Adam, s: Training, step: int) -> bool:
    """One step of Adam with the mean of the gradients gathered; False: not finite, so thrown away."""
    params = [p for p in net.parameters() if p.grad is not None]
    for p in params:
        assert p.grad is not None
        p.grad /= s.accumulate
    finite = bool(torch.nn.utils.clip_grad_norm_(params, s.clip).isfinite())
    if finite:
        left = max(0.0, 1 - (step - s.accumulate) / s.steps) if s.schedule == "linear" else 1.0
        for group, lr in zip(adam.param_groups, (s.lr, s.lr_lr), strict=True):
            group["lr"] = lr * left
        adam.step()
    adam.zero_grad()
    return finite


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _checkpoint(path: Path, net: nn.Module, adam: torch.optim.Adam, state: _State) -> None:
    tensors = {f"net/{k}": t for k, t in net.state_dict().items()}
    tensors |= {f"best/{k}": t for k, t in state.kept.items()}
    for number, of in adam.state_dict()["state"].items():
        tensors |= {f"adam/{number}/{k}": t for k, t in of.items()}
    said = {"step": state.step, "best": repr(state.best), "best_step": state.best_step, "skipped": state.skipped}
    kept = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
    editors.write(path, kept, {"state": json.dumps(said)})


def _resumed(path: Path, net: nn.Module, adam: torch.optim.Adam) -> _State | None:
    """Put net and optimiser back to where the checkpoint left them; None where there is none."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            said = json.loads((file.metadata() or {})["state"])
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"checkpoint {path} can't be read ({error}); delete it to train from the start") from error
    parts: dict[str, dict[str, Tensor]] = {"net": {}, "best": {}, "adam": {}}
    for key, tensor in tensors.items():
        part, _, rest = key.partition("/")
        parts[part][rest] = tensor
    net.load_state_dict(parts["net"])
    moments: dict[int, dict[str, Tensor]] = {}
    for key, tensor in parts["adam"].items():
        number, _, what = key.partition("/")
        moments.setdefault(int(number), {})[what] = tensor
    adam.load_state_dict({"state": moments, "param_groups": adam.state_dict()["param_groups"]})
    return _State(said["step"], float(said["best"]), said["best_step"], said["skipped"], parts["best"])
