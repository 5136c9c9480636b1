"""What MEND's network learns from: edits it has never made, judged by what follows from them and what should not.

Mitchell et al., "Fast Model Editing at Scale", ICLR 2022, arXiv:2110.11309, section 3.2: per edit
L = c_edit · NLL(edited model; the edit said otherwise) + c_loc · KL(before ‖ after; unrelated text), on the model as it
came. EasyEdit takes the edit's own text for the first term; here both count, each text alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from methods.parts import gradients, locate
from methods.parts.gradients import Batch, Extra, Labels, Trace
from methods.parts.hypernet import HyperNet
from raysys.model import Model
from raysys.types import EditCase, EditRefused, EditRequest

JUDGED = 16  # cases of one pass in validation


@dataclass(frozen=True, kw_only=True)
class Course:
    """What counts (c_edit, c_loc), how many texts of a case are looked at, and how large steps are at first."""

    cedit: float = 0.1
    cloc: float = 1.0
    general: int = 2  # of the edit's own text and its paraphrases, in that order
    local: int = 2
    edit_lr: float = 1e-4


@dataclass(frozen=True, eq=False)
class _Lesson:
    request: EditRequest
    text: locate.Row
    general: tuple[locate.Row, ...]
    local: tuple[locate.Row, ...]


class Learner:
    """MEND's network on training cases, for methods/parts/training.py; each case is an edit of the model as it came."""

    def __init__(
        self, model: Model, net: HyperNet, cases: Sequence[EditCase], course: Course, labels: Labels = "suffix"
    ) -> None:
        self.model, self.course = model, course
        self.net = net.to(model.device)
        self.lessons: list[_Lesson] = []
        error: ValueError | None = None
        for case in cases:
            try:
                self.lessons.append(_lesson(model, case, labels))
            except ValueError as unusable:
                error = error or unusable
        self.left_out = len(cases) - len(self.lessons)
        if error is not None and not self.lessons:
            raise error

    @property
    def count(self) -> int:
        """How many cases there are."""
        return len(self.lessons)

    def learn(self, cases: Sequence[int]) -> Mapping[str, float]:
        """Add the gradient of the cases' mean loss; the statistics of what comes in grow by their tokens."""
        lessons = [self.lessons[i] for i in cases]
        with torch.enable_grad():
            loss, said = self._loss(lessons, number=cases[0], grow=True)
            loss.backward()  # type: ignore[no-untyped-call]
        return said

    @torch.no_grad()
    def judge(self, cases: Sequence[int]) -> Mapping[str, float]:
        """Mean losses, and the shares of texts that follow from the edit and of others that stay, greedily."""
        sums: dict[str, float] = {}
        for start in range(0, len(cases), JUDGED):
            part = cases[start : start + JUDGED]
            _, said = self._loss([self.lessons[i] for i in part], number=0, grow=False)
            for name, value in said.items():
                sums[name] = sums.get(name, 0.0) + value * len(part)
        return {name: total / len(cases) for name, total in sums.items()}

    def _loss(self, lessons: Sequence[_Lesson], number: int, grow: bool) -> tuple[Tensor, dict[str, float]]:
        batch = gradients.lay(self.model, [x.text for x in lessons])
        traces = gradients.trace(self.model, batch, self.net.names, [x.request for x in lessons])
        kept = {name: trace.nonzero() for name, trace in traces.modules.items()}
        if grow:
            for name, trace in kept.items():
                self.net.observe(name, trace)
        said = {"kl": 0.0, "stays": 1.0}
        rows, who = _texts([_some(x.general, self.course.general, number) for x in lessons])
        asked, after, _ = self._asked(rows, who, kept, len(lessons))
        nll = gradients.nll(asked, after).mean()
        loss = self.course.cedit * nll
        said["nll"], said["follows"] = float(nll.detach()), _share(asked, after, asked.label)
        rows, who = _texts([_some(x.local, self.course.local, number) for x in lessons])
        if rows:
            asked, after, before = self._asked(rows, who, kept, len(lessons), before=True)
            kl = gradients.divergence(asked, before, after).mean()
            loss = loss + self.course.cloc * kl
            said["kl"], said["stays"] = float(kl.detach()), _share(asked, after, before.argmax(-1))
        return loss, {"loss": float(loss.detach()), **said}

    def _asked(
        self,
        rows: Sequence[locate.Row],
        who: Sequence[int],
        kept: Mapping[str, Trace],
        lessons: int,
        before: bool = False,
    ) -> tuple[Batch, Tensor, Tensor]:
        """The texts `rows` of lessons `who` as a batch, their log-probabilities after the edits and, if so, before."""
        batch = gradients.lay(self.model, rows)
        base = gradients.trunk(self.model, batch, self.net.names)
        with torch.no_grad():
            was = gradients.logprobs(self.model, batch, base) if before else torch.empty(0)
        edits = self._edits(kept, lessons, batch, torch.tensor(who, device=batch.ids.device))
        return batch, gradients.logprobs(self.model, batch, base, edits), was

    def _edits(self, kept: Mapping[str, Trace], lessons: int, asked: Batch, who: Tensor) -> dict[str, Extra]:
        """Each text's own edit, added to what the edited modules give: texts (B,) belong to lessons `who`."""

        def made(name: str) -> Extra:
            x, delta = self.net.transformed(name, kept[name])
            lengths = torch.bincount(kept[name].row, minlength=lessons).tolist()
            xs = pad_sequence(list(torch.split(x, lengths)), batch_first=True)[who]  # (B, n, d_in)
            deltas = pad_sequence(list(torch.split(delta * self.net.lr(name), lengths)), batch_first=True)[who]

            def extra(given: Tensor) -> Tensor:
                wide = given.reshape(*asked.ids.shape, -1)  # some families flatten B and T
                out = torch.bmm(torch.bmm(wide, xs.transpose(1, 2)), deltas)
                return out.reshape(*given.shape[:-1], -1)

            return extra

        return {name: made(name) for name in self.net.names}


def _lesson(model: Model, case: EditCase, labels: Labels) -> _Lesson:
    """Raises ValueError, naming the case, when it has nothing to learn from."""
    try:
        own, edited = gradients.row(model, case.request), gradients.row(model, case.request, labels)
        general = [gradients.text(model, p.prompt, p.right) for p in case.probes if p.kind == "paraphrase"]
        local = [gradients.text(model, p.prompt, p.right) for p in case.probes if p.kind == "neighbourhood"]
    except (EditRefused, ValueError) as error:
        raise ValueError(f"training case {case.source or case.request.id}: {error}") from error
    return _Lesson(case.request, edited, (own, *general), tuple(local))


def _some(rows: tuple[locate.Row, ...], many: int, number: int) -> tuple[locate.Row, ...]:
    """The first of `rows` and others in turn, `many` in all."""
    if len(rows) <= many:
        return rows
    rest = rows[1:]
    return (rows[0], *(rest[(number + i) % len(rest)] for i in range(many - 1)))


def _texts(parts: Sequence[tuple[locate.Row, ...]]) -> tuple[list[locate.Row], list[int]]:
    return [r for part in parts for r in part], [i for i, part in enumerate(parts) for _ in part]


def _share(asked: Batch, given: Tensor, wanted: Tensor) -> float:
    """Of the texts those at which every token that is scored has its argmax in `wanted` (M,)."""
    wrong = torch.zeros(len(asked.ids), device=given.device)
    return float((wrong.index_add(0, asked.row, (given.argmax(-1) != wanted).float()) == 0).float().mean())
