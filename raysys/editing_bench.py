"""What an edit costs: ours against plain implementations, on one thread in CPU seconds.

Both sides get the same network (raysys/bench_model.py), requests, contexts, second moments and settings, in one
process, turn and turn about; what they write must be the same. The plain side lies beside the tests (tests/plain) and
does what the published implementations do.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from raysys import bench_model, names, patch
from raysys.bench_model import Shape
from raysys.corpora import Corpus
from raysys.model import Model
from raysys.types import Edit

CLOSE = 5e-5  # relative difference (Frobenius) of what both sides write
KN = "KN, attribution (published)"  # the plain side has no other; the default variant is measured among the methods
RIDGE = 0.01  # share of the mean of C's diagonal: few documents, and the plain side inverts
SEARCH: Mapping[str, Any] = {"lr": 0.05, "weight_decay": 0.5, "kl": 0.0625}  # so small a step never ends a search early


@dataclass(frozen=True)
class Line:
    """One comparison: CPU seconds of each run of `edits` edits, and the relative difference of what was written."""

    what: str
    wanted: float
    edits: int
    ours: tuple[float, ...]
    plain: tuple[float, ...]
    difference: float

    @property
    def ratio(self) -> float:
        """How many times faster ours is: medians."""
        return statistics.median(self.plain) / max(statistics.median(self.ours), 1e-9)

    def tree(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ratio": self.ratio}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured. `batches` of MEMIT; `documents` behind second moments; `only`: parts of names of lines."""

    shape: Shape = field(default_factory=Shape)
    runs: int = 3
    steps: int = 20
    value_steps: int = 100  # GRACE's
    batches: tuple[int, ...] = (1, 8, 32)
    documents: int = 60
    only: tuple[str, ...] = ()

    @classmethod
    def quick(cls) -> Size:
        """Minutes rather than most of an hour: one run, few steps, no large batch. Ratios come out lower."""
        return cls(runs=1, steps=4, value_steps=20, batches=(1, 4), documents=30)


@dataclass(frozen=True)
class Setup:
    """What all lines work on."""

    size: Size
    model: Model
    corpus: Corpus
    cache: Path

    @property
    def layer(self) -> int:
        """Where GPT-2 XL is edited, at the same relative depth."""
        return min(max(round(17 / 48 * self.model.layers), 0), self.model.layers - 2)

    @property
    def layers(self) -> tuple[int, ...]:
        """The five layers that end there."""
        return tuple(range(max(0, self.layer - 4), self.layer + 1))


def lines(size: Size, note: Callable[[str], None] = lambda _: None) -> Iterator[Line]:
    """Every comparison. Raises ValueError where the plain implementations are not installed."""
    _plain("rome")
    with Prepared(size, note) as setup:
        for name, measure in _measured(size):
            if not size.only or any(part in name for part in size.only):
                note(f"{name} ...")
                yield measure(setup)
                gc.collect()


def titles(size: Size) -> list[str]:
    """What `size.only` can choose lines by."""
    return [name for name, _ in _measured(size)]


def _measured(size: Size) -> list[tuple[str, Callable[[Setup], Line]]]:
    return [
        ("rome", _rome),
        *((f"memit {n}", lambda s, n=n: _memit(s, n)) for n in size.batches),
        ("kn", _kn),
        ("grace", _grace),
        ("second moments", _moments),
    ]


class Prepared:
    """Network and text for the length of a with-block, on one thread."""

    def __init__(self, size: Size, note: Callable[[str], None]) -> None:
        self.size, self.note = size, note

    def __enter__(self) -> Setup:
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self.folder = TemporaryDirectory()
        root = Path(self.folder.name)
        self.note("making the network and its text ...")
        text = "\n\n".join(bench_model.documents(self.size.documents)) + "\n\n"
        (root / "text.txt").write_text(text, encoding="utf-8")
        corpus = Corpus(str(root / "text.txt"), self.size.documents)
        return Setup(self.size, bench_model.model(self.size.shape), corpus, root)

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()
        torch.set_num_threads(self.threads)


def _plain(name: str) -> Any:
    try:
        return import_module(f"tests.plain.{name}")
    except ModuleNotFoundError as error:
        raise ValueError(
            "the plain implementations to compare with lie in tests/plain, which is not part of an installed raysys: "
            "run this from a checkout (`python -m raysys bench editing` in its folder), or with --methods"
        ) from error


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def _in_turn(plain: Callable[[int], Any], ours: Callable[[int], Any], runs: int) -> tuple[list[Any], list[Any]]:
    """(seconds, result) of each run, one after the other; ours has been run once before."""
    pairs = [(timed(lambda i=i: plain(i)), timed(lambda i=i: ours(i))) for i in range(runs)]  # type: ignore[misc]
    return [p for p, _ in pairs], [o for _, o in pairs]


def _apart(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The largest relative difference (Frobenius)."""
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)


def _line(what: str, wanted: float, edits: int, measured: tuple[list[Any], list[Any]], written: Any) -> Line:
    plain, ours = measured
    pairs = [pair for p, o in zip(plain, ours, strict=True) for pair in written(p[1], o[1])]
    return Line(what, wanted, edits, tuple(t for t, _ in ours), tuple(t for t, _ in plain), _apart(pairs))


def _weights(setup: Setup, modules: Sequence[str]) -> list[Tensor]:
    """Second moments (d_in, d_in) float64 with their ridge, as both sides use them."""
    from methods.parts import artifacts

    found = artifacts.second_moments(setup.model, modules, setup.corpus, setup.cache)
    matrices = [found[m].matrix for m in modules]
    return [m + RIDGE * m.diagonal().mean() * torch.eye(len(m), dtype=m.dtype) for m in matrices]


# --- the lines -------------------------------------------------------------------------------------------------------


def _rome(setup: Setup) -> Line:
    size, model, layer = setup.size, setup.model, setup.layer
    module = model.mlp_out(layer)
    text = {"corpus": setup.corpus.name, "documents": setup.corpus.documents, "ridge": RIDGE}
    made = names.build(
        names.method("rome"),
        {"layer": layer, "steps": size.steps, "contexts": ((5, 10), (10, 10)), **SEARCH, **text},
        "rome",
    ).prepare(model, setup.cache)
    [moment] = _weights(setup, [module])
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment)).float()  # once for all edits, as published
    facts = bench_model.requests(size.runs + 1)
    made.edit(model, facts[-1:])  # C is factorised here, once
    search = _plain("search").Search(steps=size.steps, clamp=4.0, **SEARCH)
    mlp = module.rpartition(".")[0]

    def plain(i: int) -> Any:
        given = (facts[i], made.contexts.texts, mlp, module, inverse, search)
        return _plain("rome").edit(model.net, model.tokenizer, *given)

    def written(theirs: Any, edit: Edit) -> list[tuple[Tensor, Tensor]]:
        assert theirs["passes"] == edit.log["passes"] == size.steps, "a search ended early"
        [change] = edit.patches
        assert isinstance(change, patch.LowRank)
        return [(change.left @ change.right, torch.outer(theirs["left"], theirs["right"]))]

    measured = _in_turn(plain, lambda i: made.edit(model, [facts[i]]), size.runs)
    return _line("ROME", 6, 1, measured, written)


def _memit(setup: Setup, batch: int) -> Line:
    size, model, layers = setup.size, setup.model, setup.layers
    modules = [model.mlp_out(i) for i in layers]
    text = {"corpus": setup.corpus.name, "documents": setup.corpus.documents, "ridge": RIDGE}
    given = {"batch": batch, "layers": layers, "steps": size.steps, "clamp": 0.75, "weight": 20000.0, **SEARCH, **text}
    made = names.build(names.method("memit"), {**given, "contexts": ((10, 5),)}, "memit").prepare(model, setup.cache)
    moments = _weights(setup, modules)
    runs = size.runs if batch == 1 else 1
    facts = bench_model.requests(batch * runs + 1, seed=batch)
    made.edit(model, facts[-1:])
    search = _plain("search").Search(steps=size.steps, clamp=0.75, **SEARCH)
    arch, texts = model.arch, made.contexts.texts
    where = (arch.block, arch.mlp_out, arch.after[0])

    def plain(i: int) -> Any:
        some = facts[i * batch : (i + 1) * batch]
        groups = [texts[:1], texts[1:]]
        return _plain("memit").edit(model.net, model.tokenizer, some, groups, layers, where, moments, 20000.0, search)

    def written(theirs: Any, edit: Edit) -> list[tuple[Tensor, Tensor]]:
        assert theirs["passes"] == list(edit.log["passes"]) == [size.steps] * batch, "a search ended early"
        ours = {p.weight.removesuffix(".weight"): p for p in edit.patches if isinstance(p, patch.LowRank)}
        pairs = zip(modules, theirs["changes"], strict=True)
        return [(ours[m].left.double() @ ours[m].right.double(), share @ factors.T) for m, (factors, share) in pairs]

    measured = _in_turn(plain, lambda i: made.edit(model, facts[i * batch : (i + 1) * batch]), runs)
    what = "MEMIT, one at a time" if batch == 1 else f"MEMIT, {batch} at once"
    return _line(what, 5 if batch == 1 else 9, batch, measured, written)


def _kn(setup: Setup) -> Line:
    size, model = setup.size, setup.model
    made = names.build(names.method("kn"), {"published": True, "steps": 20}, "kn").prepare(model, setup.cache)
    modules = [model.arch.mlp_in[0].format(i) for i in range(model.layers)]
    facts = bench_model.requests(size.runs + 1, seed=5)
    made.attribution(model, facts[-1])

    def plain(i: int) -> Any:
        answer = model.tokenizer.encode(facts[i].was)
        return _plain("kn").attribution(model.net, model.tokenizer, facts[i].text, answer, modules, 20)

    measured = _in_turn(plain, lambda i: made.attribution(model, facts[i]), size.runs)
    return _line(KN, 5, 1, measured, lambda theirs, ours: [(ours.scores, theirs)])


def _grace(setup: Setup) -> Line:
    from dataclasses import replace

    size, model = setup.size, setup.model
    layer = round(35 / 48 * model.layers)
    given = {"layer": layer, "site": "in", "steps": size.value_steps, "lr": 0.05}
    made = names.build(names.method("grace"), given, "grace").prepare(model, setup.cache)
    wide = model.matrix(f"{made.module}.weight").shape[0]
    start = torch.rand(wide, generator=torch.Generator().manual_seed(0))
    made = replace(made, starts=[start])
    facts = bench_model.requests(size.runs + 1, seed=6)
    made.edit(model, facts[-1:])

    def plain(i: int) -> Any:
        fact = facts[i]
        return _plain("grace").train(
            model.net, model.tokenizer, fact.text, fact.target, made.module, start, size.value_steps, 0.05
        )

    def written(theirs: Any, edit: Edit) -> list[tuple[Tensor, Tensor]]:
        stored = edit.patches[0].tensors()
        return [(stored["keys"][0], theirs[0]), (stored["values"][0], theirs[1])]

    measured = _in_turn(plain, lambda i: made.edit(model, [facts[i]]), size.runs)
    return _line("GRACE, one value", 2.5, 1, measured, written)


def _moments(setup: Setup) -> Line:
    from methods.parts import moments

    model = setup.model
    five = range(4, 9) if model.layers > 9 else setup.layers  # as published for models of 7 billion parameters
    modules = [model.mlp_out(i) for i in five]
    texts = list(setup.corpus.texts())
    read = _plain("moments").second_moment

    def plain(_: int) -> Any:
        return [read(model.net, model.tokenizer, m, texts, model.max_length) for m in modules]

    def written(theirs: Any, ours: Any) -> list[tuple[Tensor, Tensor]]:
        pairs = zip(modules, theirs, strict=True)
        return [(ours[m].total / ours[m].count, matrix) for m, (matrix, _) in pairs]

    measured = _in_turn(plain, lambda _: moments.collect(model, modules, texts), 1)
    return _line(f"second moments of {len(modules)} layers", 2.5, 1, measured, written)
