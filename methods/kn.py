"""KN: find the neurons that express a fact, and write the new answer into what they give out.

Dai, Dong, Hao, Sui, Chang, Wei, "Knowledge Neurons in Pretrained Transformers", ACL 2022, arXiv:2104.08696: eq. 2
and 3 (attribution by integrated gradients), section 5.1 (a fact is updated in the value slots of its neurons).

f = neurons of one layer (the width of a key), L = layers, m = integration points, d = width of the residual stream,
V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from methods.parts import locate, passes, presets
from raysys.model import Model, Trunk, first
from raysys.patch import LowRank
from raysys.types import Edit, EditRefused, EditRequest

ROWS = 512  # rows of one forward pass

# EasyEdit, hparams/KN/*.yaml: `adaptive_threshold`, and the `steps` that its own variant takes
PRESETS: Mapping[str, presets.Settings] = {
    "gpt2-xl": {"threshold": 0.2},
    "gpt-j-6b": {"threshold": 0.1},
    **{name: {"threshold": 0.2} for name in ("llama-2-7b", "mistral-7b", "qwen1.5-7b")},
}
PUBLISHED_STEPS: Mapping[str, int] = {"llama-2-7b": 1, "mistral-7b": 1, "qwen1.5-7b": 1}


@dataclass(frozen=True, kw_only=True)
class Kn:
    """Attribute the old answer to the neurons (entries of the key) at the last token before it, take those above

    `threshold` times the largest, and change their columns of the MLP's output matrix by e(new) - e(old), e being input
    embeddings. The attribution of a neuron is a · ∫ ∂P(old)/∂a dα along α·a, 0 <= α <= 1, taken at the midpoints of
    `steps` equal parts, all neurons of a layer together; for an answer of several tokens the mean over its tokens, each
    after those before it. The old answer is the request's `was`; without one, what the model itself says (greedily, as
    many tokens as the target has).

    The paper's model has neurons that are hardly ever negative. A gated MLP's are as often as not, and what is written
    behind such a neuron comes out with the sign turned: `signed` corrects that. On the built-in world 35 % of
    single edits take without it and 98 % with it, at the cost of nine neighbours in ten.

    `published` gives what EasyEdit computes instead: neurons before the activation function (for Llama's MLP the
    gate alone), integrated at linspace(0, 1, steps), both ends included; answers tokenised alone, without a leading
    blank and with the special tokens that the tokenizer adds; prompts extended by the model's own greedy text, and
    with GPT-2 and GPT-J not at all; the embeddings of greedy tokens taken off, twice where it is one.
    """

    steps: int | None = None  # m: 20, or in the published variant what its files say
    threshold: float | None = None  # share of the largest attribution that a neuron must exceed
    erase: float = 1.0  # λ1, times the old answer's embeddings
    write: float = 1.0  # λ2, times the new answer's
    signed: bool = False  # ours, not the paper's: neurons whose value is negative are written with the sign turned
    published: bool = False

    name: ClassVar[str] = "kn"
    version: ClassVar[str] = "1"

    @property
    def batch(self) -> int:
        """One request at a time."""
        return 1

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedKn:
        """Settle open settings; there is nothing to collect. Raises ValueError for a model without fitting embeddings.

        Embeddings narrower than the residual stream can't be added to what an MLP gives out.
        """
        settings = presets.settled(self, model, PRESETS, lambda _: _rule(model, self.published))
        assert settings.steps is not None
        if settings.steps < 1:
            raise ValueError(f"kn: steps is {settings.steps}, must be at least 1")
        wide = model.net.get_input_embeddings().weight.shape[1]
        if wide != model.width:
            raise ValueError(
                f"kn adds embeddings to what the MLPs give, but in {model.name or 'this model'} those are {wide} wide "
                f"and this {model.width}; use another method"
            )
        return PreparedKn(settings=settings)


def _rule(model: Model, published: bool) -> presets.Settings:
    return {
        "steps": PUBLISHED_STEPS.get(presets.name(model), 20) if published else 20,
        "threshold": 0.2,
    }


@dataclass(frozen=True, kw_only=True)
class PreparedKn:
    """KN with all `settings` settled."""

    settings: Kn

    def identity(self) -> dict[str, Any]:
        """Name, version and settings; there are no artifacts."""
        return presets.identity(self.settings, {})

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Any = None) -> Edit:
        """One rank-one change per layer that has a neuron of the fact. Raises EditRefused with the reason."""
        if len(requests) != 1:
            raise EditRefused(f"kn writes one edit at a time, got {len(requests)}")
        s, request = self.settings, requests[0]
        assert s.threshold is not None
        told = _published(model, request) if s.published else _told(model, request)
        found = self.attribution(model, request, told)
        scores = found.scores
        if not torch.isfinite(scores).all():
            raise EditRefused(f"edit {request.id!r}: the attribution is not finite: a broken model")
        chosen = scores > s.threshold * scores.max()
        if not chosen.any():
            raise EditRefused(
                f"edit {request.id!r}: no neuron speaks for the old answer (the largest attribution is "
                f"{float(scores.max()):.1e}); give `was` as the model says it, or use another method"
            )
        embeddings = model.net.get_input_embeddings().weight
        old = told.old or self._greedy(model, request, len(told.new))
        gone, come = (embeddings[list(ids)].float().sum(0).cpu() for ids in (old, told.new))
        erase = 2 * s.erase if s.published and len(old) == 1 else s.erase
        change = (s.write * come - erase * gone)[:, None]  # (d, 1)
        slots = chosen.float() * found.values.sign() if s.signed and not s.published else chosen.float()  # (L, f)
        patches = tuple(
            LowRank(f"{model.mlp_out(i)}.weight", change, slots[i][None])
            for i in chosen.any(1).nonzero()[:, 0].tolist()
        )
        log = {
            "neurons": int(chosen.sum()),
            "layers": len(patches),
            "attribution": float(scores.max()),
            "probability": found.probability,
            "norm": float(change.norm()) * float(chosen.sum()) ** 0.5,
        }
        return Edit(patches, log=log)

    def attribution(self, model: Model, request: EditRequest, told: Told | None = None) -> Attribution:
        """How much each neuron adds to the probability of the old answer; `told` by default what the request says."""
        s = self.settings
        assert s.steps is not None
        told = told or (_published(model, request) if s.published else _told(model, request))
        if s.published:
            points, names, inward = torch.linspace(0, 1, s.steps), [_gate(model, i) for i in range(model.layers)], False
        else:
            points, names, inward = midpoints(s.steps), [model.mlp_out(i) for i in range(model.layers)], True
        with passes.fused(model):
            parts = [_integrated(model, prefix, answers, points, names, inward) for prefix, answers in told.asked]
        count = sum(len(answers) for _, answers in told.asked)
        scores, values = (torch.stack([getattr(p, name) for p in parts]).sum(0) for name in ("scores", "values"))
        return Attribution(scores / count, values / len(parts), sum(p.probability for p in parts) / count)

    def _greedy(self, model: Model, request: EditRequest, count: int) -> tuple[int, ...]:
        """What the model says now; its text is put behind the prompt and tokenised again, as published."""
        text, said = request.text, []
        for _ in range(count):
            said.append(_next(model, model.encode(text)))
            text += model.tokenizer.decode([said[-1]])
        return tuple(said)


@dataclass(frozen=True, eq=False)
class Attribution:
    """`scores` (L, f), `values` (L, f) of the neurons, `probability` of the old answer: means over its tokens."""

    scores: Tensor
    values: Tensor
    probability: float


@dataclass(frozen=True)
class Told:
    """A request as tokens: `asked` (what is read, the tokens whose probability after it is attributed), `new`, `old`.

    `old` is empty where it is to be found out by generating.
    """

    asked: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    new: tuple[int, ...]
    old: tuple[int, ...]


def _told(model: Model, request: EditRequest) -> Told:
    """The answer as it follows the prompt; its tokens are asked for one after the other."""
    row = locate.row(model, request, target=True)
    prompt = row.ids[: row.first]
    if request.was is not None and request.was.strip():
        before = EditRequest(request.id, request.prompt, request.subject, request.was)
        old = locate.row(model, before, target=True).labels
    else:
        old = ()
        for _ in row.labels:
            old = (*old, _next(model, (*prompt, *old)))
    return Told(tuple(((*prompt, *old[:i]), (old[i],)) for i in range(len(old))), row.labels, old)


def _published(model: Model, request: EditRequest) -> Told:
    """Answers tokenised alone; the families whose names the published code compares are told apart here."""
    locate.row(model, request, target=True)  # refuses what can't be served
    new = tuple(model.tokenizer.encode(request.target))
    was = tuple(model.tokenizer.encode(request.was)) if request.was else ()
    text, asked = request.text, []
    if model.config.model_type in ("gpt2", "gptj"):
        return Told(((tuple(model.encode(text)), was or (_next(model, model.encode(text)),)),), new, ())
    for i in range(len(was) or 1):
        prefix = tuple(model.encode(text))
        said = _next(model, prefix)
        asked.append((prefix, (was[i] if was else said,)))
        text += model.tokenizer.decode([said])
    return Told(tuple(asked), new, ())


@torch.no_grad()
def _next(model: Model, ids: Sequence[int]) -> int:
    """The likeliest token after `ids`."""
    hidden, _ = model.hidden(torch.tensor([list(ids)], device=model.device), use_cache=False)
    return int(model.logits(hidden[0, -1]).argmax())


def _gate(model: Model, layer: int) -> str:
    return model.arch.mlp_in[0].format(layer)


def midpoints(count: int) -> Tensor:
    """The middles of `count` equal parts of [0, 1], (count,) float32."""
    return (torch.arange(count) + 0.5) / count


# --- integrated gradients of all layers at once ----------------------------------------------------------------------


def _integrated(
    model: Model, prefix: Sequence[int], answers: Sequence[int], points: Tensor, names: Sequence[str], inward: bool
) -> Attribution:
    """The attributions of the tokens `answers` after `prefix` and their probabilities, summed; the neurons' values.

    `names` are the modules whose input (`inward`) or output holds the neurons, one per layer. One pass over the last
    token of the prefix carries the row of the model as it is and, from each layer on, a row for every one of `points`
    with that layer's neurons scaled: what lies before the last token or below a layer is never computed twice.
    """
    trunk = _last_token(model, prefix)
    total: list[Tensor] = []
    whole: list[Tensor] = []
    base, wanted = 0.0, list(answers)
    for some in torch.split(points, max(ROWS // model.layers, 1)):
        leaves: list[Tensor] = []
        whole = []
        with torch.enable_grad():
            hidden = trunk.hidden  # (1 + m · layers so far, 1, d); the first row is the model as it is
            for i, (args, kwargs) in enumerate(trunk.calls):
                hidden = torch.cat([hidden, hidden[:1].expand(len(some), -1, -1)])
                with _scaled(model, names[i], some, inward, whole, leaves):
                    hidden = first(model.layer(i)(hidden, *args, **kwargs))
            logits = model.logits(model.upper(trunk, hidden, model.layers)[:, 0]).float()  # (1 + m · L, V)
            p = (logits[:, wanted] - logits.logsumexp(-1, keepdim=True)).exp().sum(1)
            gradients = torch.autograd.grad(p[1:].sum(), leaves)
        base = float(p[0].detach())
        parts = [a * g.sum(0) / len(points) for a, g in zip(whole, gradients, strict=True)]
        total = [t + p for t, p in zip(total, parts, strict=True)] if total else parts
    return Attribution(torch.stack(total).cpu(), torch.stack(whole).cpu(), base)


@contextmanager
def _scaled(
    model: Model, name: str, points: Tensor, inward: bool, whole: list[Tensor], leaves: list[Tensor]
) -> Iterator[None]:
    """Within it, the last rows' neurons at module `name` are the first row's, times `points`.

    Appends the first row's neurons (f,) to `whole` and the scaled ones (m, f), which ask for gradients, to `leaves`.
    """

    def replace(now: Tensor) -> Tensor:  # (rows, 1, f) or, in some families, (rows, f)
        own = now.reshape(len(now), -1)[0].detach().float()
        leaf = (points.to(own.device)[:, None] * own).requires_grad_()
        whole.append(own)
        leaves.append(leaf)
        kept = now[: len(now) - len(points)]
        return torch.cat([kept, leaf.to(now.dtype).reshape(len(points), *now.shape[1:])])

    module: nn.Module = model.module(name)
    if inward:
        handle = module.register_forward_pre_hook(lambda _, args: (replace(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda _, args, out: replace(out))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _last_token(model: Model, ids: Sequence[int]) -> Trunk:
    """The pass over the last of `ids`, after keys and values of those before it: what enters layer 0, (1, 1, d)."""
    row = torch.tensor([list(ids)], device=model.device)
    mask, positions = torch.ones_like(row), torch.arange(len(ids), device=model.device)[None]
    before = len(ids) - 1
    cache = passes.Fixed(config=model.config) if before else None
    if cache is not None:
        model.hidden(row[:, :before], mask[:, :before], cache, positions[:, :before])
        cache.fixed = True
    return model.trunk(row[:, before:], mask, 0, cache, positions[:, before:])
