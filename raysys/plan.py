"""What a study would do, counted before anything is started."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cluster.placement import GIB, NEEDS, Gpus, Needs, Shape, load, place
from raysys import names, words
from raysys.arch import arch
from raysys.blocks import Block, by_prefix, pack
from raysys.model import Model
from raysys.results import Results
from raysys.shards import splittable
from raysys.spec import ComponentSpec, StudySpec
from raysys.tokens import Tokens

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ROWS, TOKENS = 16, 2048  # of a pass, as memory is planned: rows where the study says none, and the longest texts
WRAPPERS = ("rect", "prune")  # need what the method needs that they are told to wrap
LOW_RANK = ("lora", "melo")  # need no more for many layers than a method that trains one matrix


@dataclass(frozen=True)
class Part:
    """One benchmark on one model: blocks, queries and tokens that the base model reads, and all snapshots together."""

    model: str
    benchmark: str
    blocks: int
    queries: int
    tokens: int
    units: int
    tokens_in_all: int


@dataclass(frozen=True)
class Weights:
    """One base model: parameters, bytes of one copy, and what an edit of one MLP projection adds to a snapshot."""

    model: str
    parameters: int
    bytes: int
    rank_one_bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class Plan:
    """Everything `raysys plan` says. `done` of `units` are on disk; `memory_bytes` is of all actors' weights.
    `places` says for each model what fits on the GPUs on offer, or what a study takes of a machine without."""

    name: str
    folder: str
    cells: int
    edits: int
    dropped: int
    snapshots: tuple[int, ...]
    parts: list[Part]
    weights: list[Weights]
    units: int
    done: int
    tokens: int
    editors: int
    evaluators: int
    cpus: int
    gpus: float
    memory_bytes: int
    places: dict[str, str]

    def tree(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def plan(spec: StudySpec, note: Callable[[str], None] = lambda text: None, gpus: Gpus | None = None) -> Plan:
    """Read the data, tokenise every prompt, count; `gpus` are those on offer (None: this machine's).

    Raises ValueError for whatever would stop the study at once.
    """
    from raysys.study import select_edits

    selected = {order: select_edits(spec, order) for order in range(spec.orders)}
    parts, weights = [], []
    for model in spec.models:
        tokens = Tokens.load(model)
        if spec.scoring.chat is not None:
            spec.scoring.chat.check(tokens.tokenizer, model)
        splittable(model, spec.cluster.tensor_parallel, spec.methods)
        for benchmark in spec.benchmarks:
            note(f"tokenising {benchmark.title} for {model}")
            parts.append(_part(spec, model, tokens, benchmark, selected))
        weights.append(_weights(model, spec.dtype))
    c = spec.cluster
    copies = c.editors + c.most
    on_disk = Results(spec.folder).done() if (spec.folder / "spec.json").is_file() else set()
    return Plan(
        name=spec.name,
        folder=str(spec.folder),
        cells=len(spec.grid()),
        edits=spec.edits.count * len(spec.grid()),
        dropped=len(selected[0].dropped),
        snapshots=spec.snapshots,
        parts=parts,
        weights=weights,
        units=sum(p.units for p in parts),
        done=len(on_disk),
        tokens=sum(p.tokens_in_all for p in parts),
        editors=c.editors,
        evaluators=c.most,
        cpus=copies * c.threads * c.tensor_parallel,
        gpus=c.editors * c.gpus_per_editor + c.most * c.gpus_per_evaluator,
        memory_bytes=copies * max(w.bytes for w in weights),
        places={model: _place(spec, model, gpus or Gpus.here()) for model in spec.models},
    )


def _place(spec: StudySpec, model: str, gpus: Gpus | None) -> str:
    """Where copies of the model fit on `gpus`, or the memory that they take without."""
    from transformers import AutoConfig

    from raysys.loading import locate

    config = AutoConfig.from_pretrained(locate(model), trust_remote_code=False)
    outline = Outline(config)
    needs = [needs_of(m.name, m.settings, outline, spec.edits.count) for m in spec.methods]
    rows, tokens = spec.scoring.rows or ROWS, min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
    c = spec.cluster
    trunks = int(c.trunk_memory * GIB)
    if gpus is None:
        one = load(Shape.of(config), spec.dtype, needs, c.tensor_parallel, rows, tokens, trunks)
        each = [n * c.tensor_parallel for n in (one.evaluator, one.editor)]
        in_all = words.size(c.most * each[0] + c.editors * each[1])
        return f"on CPUs at most: {words.size(each[0])} an evaluator, {words.size(each[1])} an editor, {in_all} in all"
    wanted = c.evaluators if isinstance(c.evaluators, int) else None
    methods = {m.title: names.method(m.name) for m in spec.methods}
    sizes: dict[str, Any] = {
        "rows": rows,
        "tokens": tokens,
        "trunks": trunks,
        "editors": c.editors,
        "evaluators": wanted,
    }
    return f"{gpus}: {place(config, spec.dtype, methods, gpus, needs=needs, **sizes)}"


class Outline(Model):
    """A model without weights and without tokenizer: what presets and their rules ask of one."""

    def __init__(self, config: Any) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            self.net = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        self.name, self.config, self.arch = "", config, arch(config)


def needs_of(name: str, settings: Mapping[str, Any], model: Model, edits: int) -> Needs:
    """What the method `name` holds, on as many layers as its settings say, else as its presets for this model do."""
    if name in WRAPPERS:
        return needs_of(settings.get("of", "rome"), settings.get("settings", {}), model, edits)
    if name not in NEEDS:
        return Needs()
    if name in LOW_RANK:
        return NEEDS[name]
    cls = names.method(name)
    asked = names.build(cls, settings, f"method {name}")
    kept = edits if getattr(asked, "earlier_keys", True) else 0  # of those that keep any, MEMIT alone has the choice
    return NEEDS[name].over(_edited(asked, sys.modules[cls.__module__], model), kept)


def _edited(asked: Any, home: Any, model: Model) -> int:
    """How many layers a method of the module `home` edits, those with a network: how many matrices."""
    from methods import malmen
    from methods.parts import presets

    if hasattr(asked, "mlp"):  # MALMEN and RLEdit
        return len(malmen.modules(malmen.settled(asked, model, home.PRESETS, home.rule), model))
    settled = presets.settled(asked, model, home.PRESETS, home.rule)
    several = getattr(settled, "layers", None) or getattr(settled, "modules", None)
    return len(several) if several else 1


def _part(spec: StudySpec, model: str, tokens: Tokens, part: ComponentSpec, selected: dict[int, Any]) -> Part:
    """As the study: the base is asked everything once, a later snapshot what is due by then, in every cell."""
    blocks = [(order, block) for order, built in _built(part, selected) for block in _blocks(spec, tokens, part, built)]
    units, in_all = len(blocks), sum(b.tokens for _, b in blocks)
    for order in range(spec.orders):
        for edits in (n for n in spec.snapshots if n):
            due = [b for o, b in blocks if o in (-1, order) and b.edits[1] <= edits]
            units += len(due) * len(spec.methods)
            in_all += sum(b.tokens for b in due) * len(spec.methods)
    queries = sum(len(b.items) for _, b in blocks)
    return Part(model, part.title, len(blocks), queries, sum(b.tokens for _, b in blocks), units, in_all)


def _built(part: ComponentSpec, selected: dict[int, Any]) -> Iterator[tuple[int, Any]]:
    """(edit order or -1, benchmark given what it is about)."""
    cls = names.benchmark(part.name)
    built = names.build(cls, part.settings, f"benchmark {part.title}")
    about = getattr(cls, "about", None)
    if about == "edits":
        yield from ((order, built.over(chosen.cases)) for order, chosen in selected.items())
    else:
        yield -1, built.over(selected[0].held_out) if about == "held_out" else built


def _blocks(spec: StudySpec, tokens: Tokens, part: ComponentSpec, built: Any) -> Iterator[Block]:
    for group in by_prefix(built.queries(), spec.snapshots):
        options: dict[str, Any] = {"batch": spec.scoring.rows, "size": spec.scoring.block, "cuts": spec.snapshots}
        yield from pack(tokens, part.title, {}, group, **options, chat=spec.scoring.chat_of(built))


def _weights(model: str, dtype: str) -> Weights:
    """Counted on the configuration; no weights are read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from raysys.loading import locate

    config = AutoConfig.from_pretrained(locate(model), trust_remote_code=False)
    with torch.device("meta"):
        net: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    count = sum(p.numel() for p in net.parameters())
    d_out, d_in = net.get_submodule(arch(config).mlp_out.format(0)).weight.shape
    return Weights(model, count, count * BYTES[dtype], 4 * (d_out + d_in), 4 * d_out * d_in)
