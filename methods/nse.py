"""NSE: MEMIT for long streams whose values are what the unedited model would need, written in rounds, into the neurons
that the subject uses most.

Jiang, Fang, Zhang, Zhang, Wang, Liang, Wang, "Neuron-Level Sequential Editing for Large Language Models", ACL 2025,
arXiv:2410.04045: values by rewinding the weights, choice of neurons, rounds over layers; details as in the authors'
repository (jianghoucheng/AlphaEdit, nse). Where a setting is None, PRESETS (or the rule below it) has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from methods import memit
from methods.parts import artifacts, metric, presets, spread
from raysys.corpora import Corpus
from raysys.model import Model
from raysys.types import Edit, EditRefused, EditRequest

Memory = Mapping[str, metric.Earlier]  # by module: the keys of earlier batches
_FIVE: presets.Settings = {"layers": (4, 5, 6, 7, 8)}
_LLAMA3: presets.Settings = {**_FIVE, "lr": 0.1, "near": 2.5, "far": 50.0}
PRESETS: Mapping[str, presets.Settings] = {  # the authors' repository for gpt2-xl, gpt-j-6b, llama-3-8b; others alike
    "world/small": {**memit.WORLD, "layers": (2,), "lr": 2.0, "weight": 10.0, "neurons": 0.8},
    "gpt2-xl": {"layers": (13, 14, 15, 16, 17), "steps": 20, "weight": 10000.0, "near": 35.0, "far": 150.0},
    "gpt-j-6b": {"layers": (3, 4, 5, 6, 7, 8), "near": 15.0, "far": 100.0, "neurons": 0.8},
    "llama-2-7b": _FIVE,
    "llama-2-13b": _FIVE,
    "llama-3-8b": _LLAMA3,
    "llama-3.1-8b": _LLAMA3,
    "llama-3.2-3b": _LLAMA3,
    "mistral-7b": _FIVE,
    "qwen1.5-7b": _FIVE,
    "qwen2.5-7b": _FIVE,
}


def rule(model: Model) -> presets.Settings:
    """For models without a preset: MEMIT's layers, the paper's search, no bounds on what is missing."""
    return {
        "layers": memit.PRESETS.get(presets.name(model), {}).get("layers") or memit.layers(model),
        "steps": 25,
        "lr": 0.5,
        "weight_decay": 0.5,
        "clamp": 0.75,
        "weight": 15000.0,
        "near": 0.0,
        "far": float("1e9"),
        "neurons": 1.0,
        "contexts": ((10, 5),),
        **presets.PAPER_TEXT,
    }


@dataclass(frozen=True, kw_only=True)
class Nse:
    """MEMIT's update with the keys of earlier batches, W' = W + R Aᵀ, A = (λC + S + KKᵀ)⁻¹ K, but:

    values z are searched on the unedited weights; a round writes the requests whose |z - h| lies between `near` and
    `far`, and there are `iterations` - 1 rounds at most; a request that stays beyond `far` is refused. A is solved
    for, and has entries in, the neurons (entries of a key) alone that hold the share `neurons` of Σ|k|.
    """

    batch: int = 1  # requests that one step takes
    layers: tuple[int, ...] | None = None  # edited in this order; values are searched at the last one
    steps: int | None = None  # passes of the search for values; Adam takes one step fewer
    lr: float | None = None
    weight_decay: float | None = None  # pulls values towards the unedited output
    clamp: float | None = None  # |value - unedited| is at most this many times |unedited|
    kl: float = 0.0625  # weight of "<subject> is a" staying as it was
    weight: float | None = None  # λ: how many keys of the corpus a new key weighs against
    near: float | None = None  # |z - h| from which on nothing needs to be written
    far: float | None = None  # |z - h| beyond which nothing is written: too far from where z was found
    iterations: int = 3  # rounds, and one
    neurons: float | None = None  # 1: all of them
    contexts: tuple[tuple[int, int], ...] | None = None  # (tokens, number) of sampled texts put before the prompt
    seed: int = 0  # of the contexts
    corpus: str | None = None  # what C is taken from: "world", a text file or a hub data set
    documents: int | None = None  # how much of it
    ridge: float = 1e-4  # added to C's diagonal, as a share of its mean: keeps few documents from making C singular

    name: ClassVar[str] = "nse"
    version: ClassVar[str] = "1"
    splits: ClassVar[bool] = True  # works on a model that is split over processes

    def __post_init__(self) -> None:
        if self.iterations < 2:
            raise ValueError(f"nse: iterations - 1 rounds are written, so it is 2 or more, got {self.iterations}")
        if self.neurons is not None and not 0 < self.neurons <= 1:
            raise ValueError(f"nse: neurons is a share above 0 and at most 1, got {self.neurons}")

    def prepare(self, model: Model, cache: Path | None = None) -> PreparedNse:
        """Sample contexts, collect and factorise C, keep the unedited matrices. Raises ValueError."""
        s = presets.settled(self, model, PRESETS, rule)
        assert s.layers is not None and s.contexts is not None and s.corpus is not None and s.documents is not None
        spread.check(s.name, s.batch, s.layers, s.steps, weight=s.weight)
        sampled = artifacts.contexts(model, s.contexts, s.seed, cache)
        modules = [model.mlp_out(layer) for layer in s.layers]
        taken = artifacts.second_moments(model, modules, Corpus(s.corpus, s.documents), cache)
        spaces = metric.whitened(model, taken, s.ridge)
        made_from = artifacts.hashes(sampled, taken)
        base = {m: model.matrix(f"{m}.weight").detach().clone() for m in modules}
        return PreparedNse(settings=s, contexts=sampled, spaces=spaces, made_from=made_from, base=base)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedNse:
    """NSE with what it needs of one model; by module `spaces` and `base`, the unedited matrices (d_out, d_in)."""

    settings: Nse
    contexts: artifacts.Contexts
    spaces: Mapping[str, metric.Whitened]
    made_from: Mapping[str, str]
    base: Mapping[str, Tensor]

    def identity(self) -> dict[str, Any]:
        """Name, version, settings and artifact hashes: what an edit depends on beside model and request."""
        return presets.identity(self.settings, self.made_from)

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Memory | None = None) -> Edit:
        """The change for the batch `requests`; its log has |z - h| before each round and how many neurons were written.

        Raises EditRefused with the reason when there is none.
        """
        s, texts = self.settings, self.contexts.texts
        assert s.layers is not None and s.near is not None and s.far is not None
        with self._unedited(model):
            values = spread.values(model, requests, texts, s.layers[-1], memit.search(s))
        aims = spread.wanted(values)  # (d, n)
        rounds: list[list[float]] = []
        used: dict[str, int] = {}
        written: set[int] = set()  # requests, by number
        beyond: list[int] = []  # those too far away in the latest round that no round has written
        with spread.Course(model, requests, texts, s.layers, lambda i: (model.mlp_out(i),)) as course:
            for _ in range(s.iterations - 1):
                away = self._missing(model, course, aims).norm(dim=0)  # (n,)
                rounds.append(away.tolist())
                picked = ((away > s.near) & (away < s.far)).nonzero()[:, 0]
                beyond = [i for i in range(len(requests)) if not away[i] < s.far and i not in written]
                if not len(picked):
                    break
                written |= set(picked.tolist())
                used |= self._round(model, course, aims, picked, memory)
            if beyond:
                raise _too_far(requests[beyond[0]], rounds[-1][beyond[0]], s.far)
            keys = {m: k for layer in s.layers for m, k in course.keys(layer).items()}
            log = {**spread.told(values), **course.log(), "away": rounds, "neurons": used}
            return Edit(course.patches, spread.remembering(keys), log)

    def _missing(self, model: Model, course: spread.Course, aims: Tensor) -> Tensor:
        """z - h, (d, n) float64: what the last layer misses now."""
        assert self.settings.layers is not None
        gauge = spread.gauge(model, self.settings.layers[-1])
        return aims - course.outputs([gauge])[gauge]

    def _round(
        self, model: Model, course: spread.Course, aims: Tensor, picked: Tensor, memory: Memory | None
    ) -> dict[str, int]:
        """Write the requests `picked`, layer by layer; how many neurons of each module that took."""
        s = self.settings
        assert s.layers is not None and s.weight is not None and s.neurons is not None
        used: dict[str, int] = {}
        for number, layer in enumerate(s.layers):
            [(module, keys)] = course.keys(layer).items()
            keys = keys[:, picked]  # (d_in, m)
            share = self._missing(model, course, aims)[:, picked] / (len(s.layers) - number)
            chosen = neurons(keys, s.neurons)
            earlier = memory.get(module) if memory else None
            course.change(module, share, answer(self.spaces[module], keys, s.weight, earlier, chosen).T)
            used[module] = len(chosen)
        return used

    @contextmanager
    def _unedited(self, model: Model) -> Iterator[None]:
        """Within it, the matrices that this method writes are the unedited ones."""
        found = {m: model.matrix(f"{m}.weight").clone() for m in self.base}
        try:
            self._put(model, self.base)
            yield
        finally:
            self._put(model, found)

    @torch.no_grad()
    def _put(self, model: Model, matrices: Mapping[str, Tensor]) -> None:
        for module, matrix in matrices.items():
            model.write(f"{module}.weight", matrix)

    def remember(self, memory: Memory | None, step: Mapping[str, Tensor]) -> Memory:
        """The keys of all steps so far, as the second moments see them, by module."""
        assert self.settings.weight is not None
        return metric.remembered(self.spaces, memory, step, self.settings.weight)


def _too_far(request: EditRequest, away: float, far: float) -> EditRefused:
    return EditRefused(
        f"edit {request.id!r}: the model is {away:.3g} away from the value that its unedited self would need, and "
        f"`far` is {far:.3g}: earlier edits have moved it too much; raise `far` or edit less"
    )


def neurons(keys: Tensor, share: float) -> Tensor:
    """The entries of `keys` (d_in, n) largest in Σ|k| whose sum is at most `share` of all, in order; at least one."""
    if share >= 1:
        return torch.arange(len(keys), device=keys.device)
    size, order = keys.abs().sum(1).sort(descending=True, stable=True)
    number = max(1, int((size.cumsum(0) <= share * size.sum()).sum()))
    return order[:number].sort().values


def answer(
    space: metric.Whitened, keys: Tensor, weight: float, earlier: metric.Earlier | None, chosen: Tensor
) -> Tensor:
    """A (d_in, n): rows `chosen` solve (λC + S + KKᵀ) A = K cut to these rows and columns, the others are zero; NaN if

    singular."""
    if len(chosen) == len(keys):
        return metric.answer(space, keys, weight, earlier)
    root = space.factor[chosen]  # C cut = root rootᵀ
    few = keys.to(root)[chosen]
    whole = weight * (root @ root.T) + few @ few.T
    if earlier is not None:
        before = root @ earlier.seen
        whole += before @ before.T
    factor, singular = torch.linalg.cholesky_ex(whole)
    found = keys.new_zeros(keys.shape)
    found[chosen] = torch.cholesky_solve(few, factor).to(found) if not int(singular) else float("nan")
    return found
