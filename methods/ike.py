"""IKE: edits are kept as texts; a question that an edit is about is asked behind it and behind worked examples.

Zheng, Li, Dong, Fan, Wu, Xu, Chang, "Can We Edit Factual Knowledge by In-Context Learning?", EMNLP 2023,
arXiv:2305.12740, section 3: demonstrations of three kinds (copy the new fact, update what is said in other words,
retain what it doesn't touch), those nearest to the new fact, the nearest last. Where a setting is None, PRESETS (or the
rule below it) has it.

n = edits so far, e = width of an embedding, k = demonstrations.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from methods.parts import editors, locate, presets, training
from methods.parts.encoder import Encoder, pretrained_encoder
from methods.parts.scope_nets import Nets, digest
from methods.parts.training import Note
from raysys.model import Model
from raysys.types import Detour, Edit, EditCase, EditRequest

PAPER_LAYOUT = "New Fact: {fact}\nPrompt: {prompt}"
END = "\n\n"  # behind a demonstration, and between the items of a few-shot prompt
PAPER: presets.Settings = {"k": 16, "encoder": "sentence-transformers/all-MiniLM-L6-v2", "layout": PAPER_LAYOUT,
                           "cases": 2000, "threshold": -1.0}  # fmt: skip
PRESETS: Mapping[str, presets.Settings] = {  # EasyEdit, hparams/IKE: the same for every model
    "world/small": {
        "k": 3,
        "encoder": "model",
        # behind "New Fact: ..." it answers as if nothing had been said (0 %); what it reads are questions about lists
        "layout": "Q: {fact}. {prompt}\nWhich word is first in the list: {target}, {target}, {target}?\nA:",
        "cases": 100,
        "threshold": 0.7,
    },
}


def rule(model: Model) -> presets.Settings:
    """For models without a preset: the paper's settings, which are the same for every model."""
    return PAPER


@dataclass(frozen=True, kw_only=True)
class Ike:
    """Change no weight: ask a question about an edited fact as "demonstrations, New Fact: ..., Prompt: <question>".

    The paper leaves open which of many edits a question is about. Here it is about an edit when its last part (behind
    the last empty line) names the edit's subject (`scope` "subject"), and when the encoder finds it similar to the
    edit's prompt by at least `threshold` (a cosine); `scope` "similarity" asks for the latter only. Of several edits
    the nearest counts, and the newer of two equally near. Any other question is left alone.

    `published`: every question is asked behind the last edit, as the published evaluation does.
    """

    k: int | None = None  # demonstrations
    encoder: str | None = None  # a folder or hub id (mean of the last layer); "model": see `_embedder`
    layout: str | None = None  # how a fact and a question are put, with {fact}, {prompt} and perhaps {target}
    scope: Literal["subject", "similarity"] = "subject"
    threshold: float | None = None  # of similarity, in [-1, 1]
    cases: int | None = None  # how many edit cases demonstrations are made of, three of each
    published: bool = False
    editor: str = ""  # which demonstrations, where there are several: a path, or the beginning of their digest

    name: ClassVar[str] = "ike"
    version: ClassVar[str] = "1"

    @property
    def batch(self) -> int:
        """One request at a time."""
        return 1

    def train(
        self,
        model: Model,
        cases: Sequence[EditCase],
        cache: Path | None = None,
        note: Note = training.silent,
        settings: Mapping[str, Any] | None = None,
    ) -> Path:
        """Make demonstrations of `cases` with their probes and embed them; where they were saved.

        There are no `settings`, and nothing to be told. Raises ValueError without cases.
        """
        training.built(self.name, settings or {})
        s = presets.settled(self, model, PRESETS, rule)
        texts = [t for case in cases[: s.cases] for t in demonstrations(case, s.layout or "")]
        if not texts:
            raise ValueError("ike makes its demonstrations of edit cases with probes; got none")
        encoder = _encoder(s, model)
        embed = _embedder(model, encoder)
        embedded = torch.cat([embed([t]) for t in texts])
        kept = {"texts": _bytes(json.dumps(texts).encode()), "embedded": embedded}
        return editors.save(self._fits(model, encoder), kept, {"data": editors.digest_of(cases)}, cache)

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedIke:
        """Take the demonstrations from `cache`, else shipped ones. Raises ValueError when there are none."""
        s = presets.settled(self, model, PRESETS, rule)
        assert s.layout is not None
        if "{prompt}" not in s.layout:
            raise ValueError(f"ike: the layout {s.layout!r} has no {{prompt}}, where the question stands")
        encoder = _encoder(s, model)
        found = editors.find(self._fits(model, encoder), model, cache, self.editor)
        texts = tuple(json.loads(bytes(found.tensors["texts"].tolist())))
        pool = Pool(texts, found.tensors["embedded"], found.digest)
        return PreparedIke(settings=dataclasses.replace(s, editor=""), pool=pool, encoder=encoder)

    def _fits(self, model: Model, encoder: Encoder | None) -> dict[str, Any]:
        s = presets.settled(self, model, PRESETS, rule)
        told = {k: getattr(s, k) for k in ("encoder", "layout", "cases")}
        return editors.fits(s.name, model, (), told | _weights(encoder))


@dataclass(frozen=True, eq=False)
class Pool:
    """Demonstrations to choose from: `texts`, their embeddings `embedded` (N, e) float32, and a hash of both."""

    texts: tuple[str, ...]
    embedded: Tensor
    digest: str


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedIke:
    """IKE with its demonstrations (`pool`) and its encoder (None: the edited model)."""

    settings: Ike
    pool: Pool
    encoder: Encoder | None

    def identity(self) -> dict[str, Any]:
        """Name, version, settings, and the hashes of the demonstrations and of the encoder."""
        return presets.identity(self.settings, {"demonstrations": self.pool.digest, **_weights(self.encoder)})

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Any = None) -> Edit:
        """The fact and its demonstrations. Raises EditRefused with the reason when a request can't be served."""
        [request] = requests
        s = self.settings
        assert s.layout is not None and s.k is not None and s.threshold is not None
        locate.row(model, request, target=True)  # raises when it can't be served
        fact = request.text + request.continuation
        embed = _embedder(model, self.encoder)
        near = embed([put(s.layout, fact, request.target, request.text) + END]) @ self.pool.embedded.T  # (1, N)
        best = near[0].topk(min(s.k, near.shape[1])).indices.tolist()
        shown = [self.pool.texts[i] for i in reversed(best)]
        shown.append(put(s.layout, fact, request.target, request.text, request.continuation) + END)
        worn = model.wears(Demonstrations)
        encoder = b"" if worn or not self.encoder else Nets(self.encoder, None).packed()  # it comes once
        patch = Demonstrations(
            facts=[{"subject": request.subject, "fact": fact, "target": request.target, "shown": "".join(shown)}],
            how={"layout": s.layout, "scope": s.scope, "threshold": s.threshold, "last": s.published},
            keys=embed([request.text]),
            nets=_bytes(encoder),
        )
        return Edit((patch,), log={"demonstrations": len(best), "tokens": len(model.encode(patch.facts[0]["shown"]))})


@dataclass(frozen=True, eq=False)
class Demonstrations:
    """The memory: `facts` (n), each with its subject, text, target and the demonstrations shown before it.

    how: settings of the choice; keys: (n, e) float32 embeddings of the edits' prompts; nets: (bytes,) uint8, the
    encoder as a block (methods/parts/scope_nets.py), empty where the edited model embeds and in a stream's later steps.
    """

    facts: Sequence[Mapping[str, str]]
    how: Mapping[str, Any]
    keys: Tensor
    nets: Tensor
    kind: ClassVar[str] = "demonstrations"
    whole: ClassVar[bool] = False
    in_weights: ClassVar[bool] = False
    _ready: list[tuple[Model, Encoder | None]] = field(default_factory=list, init=False, repr=False)

    @contextmanager
    def applied(self, model: Model) -> Iterator[None]:
        """Questions about edits are put behind them; the model itself stays as it is."""
        if not any(m is model for m, _ in self._ready):
            encoder = Nets.of(self.nets.numpy().tobytes(), model).encoder if self.nets.numel() else None
            self._ready.append((model, encoder))
        with model.carrying(self, {}):
            yield

    def after(self, earlier: Demonstrations) -> Demonstrations:
        """The earlier facts and then these."""
        nets = earlier.nets if earlier.nets.numel() else self.nets
        if self.how["last"]:
            joined = dataclasses.replace(self, nets=nets)
        else:
            keys = torch.cat((earlier.keys, self.keys))
            joined = Demonstrations([*earlier.facts, *self.facts], self.how, keys, nets)
        joined._ready.extend(earlier._ready)  # the same encoder
        return joined

    def reroute(self, model: Model, prompts: Sequence[tuple[int, ...]]) -> list[Detour | None]:
        """The same model, behind demonstrations and the new fact, for every question that is about one."""
        texts = [model.decode(p) for p in prompts]
        facts = self.about(model, texts)
        return [None if i is None else self._behind(model, i, t) for i, t in zip(facts, texts, strict=True)]

    def about(self, model: Model, texts: Sequence[str]) -> list[int | None]:
        """Which of the facts each question is about."""
        if self.how["last"]:
            return [len(self.facts) - 1] * len(texts)
        questions = [_parts(t)[1] for t in texts]
        named = [self._candidates(q) for q in questions]
        asked = [i for i, facts in enumerate(named) if facts]
        found: list[int | None] = [None] * len(texts)
        if asked:
            [encoder] = [e for m, e in self._ready if m is model]
            near = _embedder(model, encoder)([questions[i] for i in asked]) @ self.keys.T  # (asked, n)
            for i, row in zip(asked, near, strict=True):
                best = max(named[i], key=lambda fact: (float(row[fact]), fact))
                found[i] = best if float(row[best]) >= self.how["threshold"] else None
        return found

    def _candidates(self, question: str) -> list[int]:
        if self.how["scope"] == "similarity":
            return list(range(len(self.facts)))
        return [i for i, fact in enumerate(self.facts) if _names(question, fact["subject"])]

    def _behind(self, model: Model, number: int, text: str) -> Detour:
        fact, (head, question) = self.facts[number], _parts(text)
        asked = put(self.how["layout"], fact["fact"], fact["target"], question)
        return Detour(model, tuple(model.encode(f"{fact['shown']}{head}{asked}")))

    def tensors(self) -> dict[str, Tensor]:
        return {"keys": self.keys, "nets": self.nets}

    def fields(self) -> dict[str, Any]:
        return {"facts": [dict(f) for f in self.facts], "how": dict(self.how)}


def put(layout: str, fact: str, target: str, prompt: str, answer: str = "") -> str:
    """A fact and a question as `layout` says, and the question's answer (with its blank)."""
    filled = {"fact": fact, "target": target, "prompt": prompt}
    return re.sub(r"\{(fact|target|prompt)\}", lambda m: filled[m[1]], layout) + answer


def demonstrations(case: EditCase, layout: str) -> list[str]:
    """Copy, update and retain of one case: its own prompt, a paraphrase, a neighbour with its own answer."""
    request = case.request
    fact = request.text + request.continuation
    made = [put(layout, fact, request.target, request.text, request.continuation) + END]
    for kind in ("paraphrase", "neighbourhood"):
        probe = next((p for p in case.probes if p.kind == kind), None)
        if probe is not None:
            answer = probe.right if probe.right[:1].isspace() else f" {probe.right}"
            made.append(put(layout, fact, request.target, probe.prompt, answer) + END)
    return made


def _parts(text: str) -> tuple[str, str]:
    """What stands before the last empty line, with it, and the question behind it."""
    head, end, question = text.rpartition(END)
    return head + end, question


def _names(question: str, subject: str) -> bool:
    """Whether `question` has `subject` as whole words."""
    subject = subject.strip()
    if subject not in question:  # which spares nearly every pattern
        return False
    return re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", question) is not None


# --- embeddings -------------------------------------------------------------------------------------


def _encoder(s: Ike, model: Model) -> Encoder | None:
    assert s.encoder is not None
    return None if s.encoder == "model" else pretrained_encoder(s.encoder, model, "mean")


def _weights(encoder: Encoder | None) -> dict[str, str]:
    """The hash of the encoder with its tokenizer; nothing where the edited model embeds."""
    return {} if encoder is None else {"weights": digest(Nets(encoder, None).packed())}


def _embedder(model: Model, encoder: Encoder | None) -> Callable[[Sequence[str]], Tensor]:
    """Texts -> (N, e) float32 of length one, on the CPU: the encoder's, or the bare model's last hidden state at the
    last token: what it is about to say, which is the same in whatever words one asks."""

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        if encoder is not None:
            found = encoder.embed(texts)
        else:
            ids, mask = model.batch([model.encode(t)[-model.max_length :] for t in texts])
            with model.bare():
                hidden, _ = model.hidden(ids, mask, use_cache=False)  # (N, T, d)
            found = hidden[torch.arange(len(texts)), mask.sum(1) - 1].float().cpu()
        return torch.nn.functional.normalize(found, dim=1)

    return embed


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
