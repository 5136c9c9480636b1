"""SERAC: edits are kept as texts; a question in the scope of one is answered by a small model that reads that text.

Mitchell, Lin, Bosselut, Manning, Finn, "Memory-Based Model Editing at Scale", ICML 2022, arXiv:2206.06520, section 3.1
(eq. 4: the scope classifier chooses) and appendix (the classifier as exp(-|e(edit) - e(question)|²)); its training is
in methods/parts/serac_training.py. Where a setting is None, PRESETS (or the rule below it) has it.

n = edits so far, e = width of the classifier's embeddings, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods.parts import editors, locate, presets, training
from methods.parts.scope_nets import Nets, digest
from methods.parts.serac_training import Course, Learner, loaded, untrained
from methods.parts.training import Note, Training
from raysys.model import Model
from raysys.tokens import Tokens
from raysys.types import Detour, Edit, EditCase, EditRefused, EditRequest

PAPER: presets.Settings = {  # EasyEdit, hparams/SERAC
    "classifier": "distilbert/distilbert-base-cased",
    "counterfactual": "base",
    "width": 64,
}
PRESETS: Mapping[str, presets.Settings] = {
    "world/small": {"classifier": "own", "counterfactual": "own", "width": 48},
    "gpt2-xl": {"counterfactual": "openai-community/gpt2"},
    "llama-2-7b": {"counterfactual": "JackFram/llama-160m"},
    # not published: the smallest relative with the same tokens
    "gpt-j-6b": {"counterfactual": "openai-community/gpt2"},
    "llama-2-13b": {"counterfactual": "JackFram/llama-160m"},
    "llama-3-8b": {"counterfactual": "meta-llama/Llama-3.2-1B"},
    "llama-3.1-8b": {"counterfactual": "meta-llama/Llama-3.2-1B"},
    "llama-3.2-3b": {"counterfactual": "meta-llama/Llama-3.2-1B"},
    "qwen1.5-7b": {"counterfactual": "Qwen/Qwen1.5-0.5B"},
    "qwen2.5-7b": {"counterfactual": "Qwen/Qwen2.5-0.5B"},
    **{f"pythia-{size}": {"counterfactual": "EleutherAI/pythia-70m"}
       for size in ("160m", "410m", "1b", "2.8b", "6.9b", "12b")},
}  # fmt: skip
TRAINING: presets.Settings = {"cases": 10, "lr": 1e-5, "patience": 40_000}  # EasyEdit, hparams/TRAINING/SERAC
TRAININGS: Mapping[str, presets.Settings] = {
    "world/small": {
        "steps": 1500,
        "cases": 32,
        "accumulate": 1,
        "lr": 2e-3,
        "schedule": "linear",
        "clip": 1.0,
        "every": 250,
        "patience": 1000,
        "swap": 0.8,
    },
    "llama-2-7b": {"patience": 30_000},
}


def rule(model: Model) -> presets.Settings:
    """For models without a preset: the paper's settings, and the edited model's own weights answer."""
    return PAPER


@dataclass(frozen=True, kw_only=True)
class Serac:
    """Keep "prompt target" of every edit. A question whose nearest edit has a scope score above `threshold` is answered
    by the counterfactual model after that text; any other question by the untouched model. The newer of two equally
    near edits counts.

    `published`: as the published code does it, only the last edit is kept, and the classifier sees the text without its
    last word (which is not the whole target where that has two) and with a separator.
    """

    classifier: str | None = None  # an encoder: folder or hub id; "own": a small one with the model's tokens
    counterfactual: str | None = None  # a causal model: folder or hub id; "own": a small one; "base": the edited model
    threshold: float = 0.5
    published: bool = False
    batch_size: int = 1  # requests of one call of `edit`
    width: int | None = None  # of an own classifier; an own counterfactual model is half as wide again
    editor: str = ""  # which trained networks, where there are several: a path, or the beginning of its digest

    name: ClassVar[str] = "serac"
    version: ClassVar[str] = "1"

    @property
    def batch(self) -> int:
        """Requests of one call of `edit`."""
        return self.batch_size

    def train(
        self,
        model: Model,
        cases: Sequence[EditCase],
        cache: Path | None = None,
        note: Note = training.silent,
        settings: Mapping[str, Any] | None = None,
    ) -> Path:
        """Train classifier and counterfactual model for `model` on `cases` with their probes; where they were saved.

        `settings`: changes to those of `training.Training` and `Course`. Interrupted, it goes on where it was. Raises
        ValueError when the networks don't fit the model.
        """
        asked = {**TRAINING, **TRAININGS.get(presets.name(model), {}), **(settings or {})}
        how, course = training.built(self.name, asked, Training, Course)
        nets = untrained(presets.settled(self, model, PRESETS, rule), model, how.seed)
        used = training.split(len(cases), how)[1]
        learner: Any = Learner(model, nets, cases, used, course.swap, how.seed)
        return training.train(learner, how, self._fits(model), editors.digest_of(cases), cache, note, course)

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedSerac:
        """Take the networks trained for `model` from `cache`, else shipped ones. Raises ValueError without any."""
        settled = presets.settled(self, model, PRESETS, rule)
        found = editors.find(self._fits(model), model, cache, self.editor)
        block = loaded(untrained(settled, model), found.tensors).packed()
        return PreparedSerac(settings=replace(settled, editor=""), block=block, model=model)

    def _fits(self, model: Model) -> dict[str, Any]:
        s = presets.settled(self, model, PRESETS, rule)
        return editors.fits(s.name, model, (), {k: getattr(s, k) for k in ("classifier", "counterfactual", "width")})


class PreparedSerac:
    """SERAC with its trained networks (`block`, see methods/parts/scope_nets.py)."""

    def __init__(self, *, settings: Serac, block: bytes, model: Model) -> None:
        self.settings = settings
        self.block = torch.frombuffer(bytearray(block), dtype=torch.uint8)
        self.nets = Nets.of(block, model)
        self._digest = digest(block)
        small = self.nets.counterfactual
        read = model.max_length if small is None else Tokens.of(model.tokenizer, small.config).max_length
        self._room = read // 2  # tokens of an edit's text: the other half is the question's

    def identity(self) -> dict[str, Any]:
        """Name, version, settings and the hash of the networks."""
        return presets.identity(self.settings, {"networks": self._digest})

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Any = None) -> Edit:
        """The texts that these requests add. Raises EditRefused with the reason when a request can't be served."""
        texts = []
        for request in requests:
            locate.row(model, request, target=True)  # raises when it can't be served
            texts.append(request.text + request.continuation)
            if len(model.encode(texts[-1])) > self._room:
                raise EditRefused(
                    f"edit {request.id!r}: its text takes more than half of the {2 * self._room} tokens that "
                    "the counterfactual model reads; shorten the prompt"
                )
        keys = [self._key(q, t) for q, t in zip(requests, texts, strict=True)]
        entries = torch.cat([self.nets.encoder.embed([k]) for k in keys])  # one by one: the same bits in any batch
        worn = model.wears(Scope)
        scores = torch.zeros(1) if worn is None else similarity(worn.entries, entries[:1]).max(1).values
        nets = self.block if worn is None else self.block[:0]
        scope = Scope(texts, self.settings.threshold, self.settings.published, entries, nets)
        return Edit((scope,), log={"edits": len(worn.texts if worn else ()) + len(texts), "nearest": float(scores)})

    def _key(self, request: EditRequest, text: str) -> str:
        """What the classifier knows an edit by."""
        if not self.settings.published:
            return request.text
        return text.rsplit(" ", 1)[0] + (self.nets.encoder.tokenizer.sep_token or "")


@dataclass(frozen=True, eq=False)
class Scope:
    """The memory: `texts` (n) with their embeddings `entries` (n, e) float32, and the networks.

    nets: (bytes,) uint8, a block of methods/parts/scope_nets.py; empty in all but a stream's first step.
    `last_only`: an edit takes the place of those before it.
    """

    texts: Sequence[str]
    threshold: float
    last_only: bool
    entries: Tensor
    nets: Tensor
    kind: ClassVar[str] = "scope"
    whole: ClassVar[bool] = False
    in_weights: ClassVar[bool] = False
    _ready: list[tuple[Model, Nets, Model]] = field(default_factory=list, init=False, repr=False)

    @contextmanager
    def applied(self, model: Model) -> Iterator[None]:
        """Questions in scope are sent elsewhere; the model itself stays as it is."""
        if not any(m is model for m, *_ in self._ready):
            if not self.nets.numel():
                raise ValueError("this scope is a step of a stream without the step that brought the networks")
            nets = Nets.of(self.nets.numpy().tobytes(), model)
            net = nets.counterfactual
            small = model if net is None else Model(net, model.tokenizer, "counterfactual")
            self._ready.append((model, nets, small))
        with model.carrying(self, {}):
            yield

    def after(self, earlier: Scope) -> Scope:
        """The earlier entries and then these."""
        nets = earlier.nets if earlier.nets.numel() else self.nets
        texts, entries = list(self.texts), self.entries
        if not self.last_only:
            texts, entries = [*earlier.texts, *texts], torch.cat((earlier.entries, entries))
        joined = Scope(texts, self.threshold, self.last_only, entries, nets)
        joined._ready.extend(earlier._ready)  # the same networks
        return joined

    def scores(self, model: Model, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Score of each text's nearest entry (N,), and which that is (N,); the newest of equals."""
        [encoder] = [nets.encoder for m, nets, _ in self._ready if m is model]
        found = similarity(self.entries, encoder.embed(texts)).flip(1)
        best, at = found.max(1)
        return best, len(self.texts) - 1 - at

    def reroute(self, model: Model, prompts: Sequence[tuple[int, ...]]) -> list[Detour | None]:
        """To the counterfactual model for every question whose score is above the threshold."""
        [small] = [small for m, _, small in self._ready if m is model]
        asked = [model.decode(p) for p in prompts]
        scores, entry = self.scores(model, asked)
        found: list[Detour | None] = []
        for score, i, question in zip(scores.tolist(), entry.tolist(), asked, strict=True):
            text = self.texts[i]
            whole = tuple(model.encode(f"{text} {question}"))
            found.append(Detour(small, whole, len(model.encode(text))) if score > self.threshold else None)
        return found

    def tensors(self) -> dict[str, Tensor]:
        return {"entries": self.entries, "nets": self.nets}

    def fields(self) -> dict[str, Any]:
        return {"texts": list(self.texts), "threshold": self.threshold, "last_only": self.last_only}


def similarity(entries: Tensor, embedded: Tensor) -> Tensor:
    """Scope scores exp(-|e - e'|²) of `embedded` (N, e) with every one of `entries` (n, e): (N, n) float32."""
    wide = entries.double()
    apart = [(wide - row).square().sum(-1) for row in embedded.double()]  # row by row: (N, n, e) may not fit
    return torch.stack(apart).neg().exp().float()


def mixture(base: Tensor, small: Tensor, score: Tensor) -> Tensor:
    """log((1 - s) p_base + s p_small + ε), (B, V): how the published code scores in training and in evaluation.

    `base`, `small`: logits (B, V); `score`: (B,); ε is float32's. The product decides instead (s above a threshold), as
    the paper's eq. 4 and the published generation do.
    """
    s = score[:, None]
    mixed: Tensor = (1 - s) * base.float().softmax(-1) + s * small.float().softmax(-1)
    return (mixed + torch.finfo(torch.float32).eps).log()
