"""What scoring costs: ours against lm-evaluation-harness, and later snapshots against the first.

Both sides hold the same resident network (random weights, the shape of GPT-2 small), get the same items, one thread,
float32, batches of eight, turn and turn about in one process; CPU seconds, medians. Items are made of the words of
`raysys.bench_model`, as long as real ones: a five-shot MMLU prefix of 511 tokens and questions of 99 on average, BBH
prompts behind three worked examples.
"""

from __future__ import annotations

import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from raysys import bench_model
from raysys.bench_model import Shape
from raysys.blocks import Block, by_prefix, pack
from raysys.model import Model
from raysys.patch import LowRank, Wearer
from raysys.scoring import Engine
from raysys.types import Answer, Choose, Chosen, Generate, Generated, Patch, Query, Scored

EVERY = 20  # one answer in so many changes from one snapshot to the next
LETTERS = (" A", " B", " C", " D")
Run = Callable[[], Any]
Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured: questions of a subject, questions to generate for and how long, runs of each side."""

    shape: Shape = field(default_factory=lambda: Shape(context=1024))
    questions: int = 60
    prompts: int = 20
    answer: int = 128  # tokens generated; longer than the longest question, 80
    depths: tuple[int, ...] = (3, 6, 11)
    runs: int = 3
    batch: int = 8

    @classmethod
    def quick(cls) -> Size:
        """Minutes: few questions and one run."""
        return cls(questions=24, prompts=20, answer=80, depths=(6,), runs=1)


@dataclass(frozen=True)
class Line:
    """One comparison: CPU seconds of each run of both sides, and whether what they answered is the same."""

    what: str
    ours: tuple[float, ...]
    other: tuple[float, ...]
    same: bool
    note: str = ""

    @property
    def ratio(self) -> float:
        """Median of the other side over ours."""
        return statistics.median(self.other) / max(statistics.median(self.ours), 1e-9)

    @property
    def share(self) -> float:
        """Ours as a share of the other side."""
        return 1 / self.ratio


# --- items -----------------------------------------------------------------------------------------------------------


def mmlu(shots: int, count: int, seed: int = 0) -> list[Choose]:
    """Questions of 40 to 300 words, 99 on average, behind a header and `shots` examples: 511 words for five."""
    drawn = random.Random(f"mmlu {seed}")
    made = bench_model.words()

    def some(length: int) -> str:
        return " ".join(drawn.choices(made, k=length))

    shared = "".join(f"{drawn.choice(made[:300])} {some(100)} A\n\n" for _ in range(shots))
    shared = f"{drawn.choice(made[:300])} {some(9)}\n\n{shared}"
    lengths = [int(40 * (300 / 40) ** (drawn.random() ** 2)) for _ in range(count)]
    return [
        Choose(f"mmlu/{n}", f"{shared}{drawn.choice(made[:300])} {some(length)}", LETTERS, 0, shared=shared)
        for n, length in enumerate(lengths)
    ]


def worked(count: int, answer: int, seed: int = 0) -> list[Generate]:
    """Questions of 20 to 80 words behind three worked examples of 200 words each."""
    drawn = random.Random(f"worked {seed}")
    made = bench_model.words()
    shared = "".join(f"{drawn.choice(made[:300])} {' '.join(drawn.choices(made, k=200))}\n\n" for _ in range(3))
    return [
        Generate(
            f"worked/{n}",
            f"{shared}{drawn.choice(made[:300])} {' '.join(drawn.choices(made, k=drawn.randrange(20, 80)))}",
            ("Q", "\n\n"),
            "",
            answer,
            shared=shared,
        )
        for n in range(count)
    ]


def blocks(model: Model, queries: Sequence[Query], batch: int) -> list[Block]:
    """The queries, tokenised and packed."""
    groups = by_prefix(queries)
    return [b for g in groups for b in pack(model.tokens, "bench", {}, g, batch=batch, size=max(64, len(queries)))]


def edit(model: Model, layer: int, size: float, seed: int = 0) -> tuple[Patch, ...]:
    """A change of rank one to the MLP's output matrix of block `layer`."""
    weight = f"{model.mlp_out(layer)}.weight"
    d_out, d_in = model.matrix(weight).shape
    made = torch.Generator().manual_seed(seed)
    return (LowRank(weight, size * torch.randn(d_out, 1, generator=made), torch.randn(1, d_in, generator=made)),)


# --- measuring -------------------------------------------------------------------------------------------------------


def cpu(run: Run) -> tuple[float, Any]:
    """CPU seconds of this process, and what was returned."""
    started = time.process_time()
    found = run()
    return time.process_time() - started, found


def ours(model: Model, todo: Sequence[Block]) -> dict[str, Answer]:
    """Every answer by its query, from an engine that knows nothing yet."""
    engine = Engine(model)
    return {i.query.id: a for b in todo for i, a in zip(b.items, engine.answer(b), strict=True)}


def harness(model: Model, batch: int) -> Any:
    """lm-evaluation-harness around the same network. Raises ValueError where it is not installed."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ValueError("to compare with lm-evaluation-harness: pip install 'raysys[harness]'") from error
    return HFLM(pretrained=model.net, tokenizer=model.tokenizer, batch_size=batch, max_length=model.max_length)


def theirs(peer: Any, queries: Sequence[Query]) -> dict[str, Answer]:
    """The same queries, asked as the harness asks them."""
    from lm_eval.api.instance import Instance

    if isinstance(queries[0], Generate):
        kwargs = {"until": list(queries[0].stops), "max_gen_toks": queries[0].max_tokens, "do_sample": False}
        asked = [Instance("generate_until", {}, (q.prompt, kwargs), n) for n, q in enumerate(queries)]
        said = peer.generate_until(asked, disable_tqdm=True)
        return {q.id: Generated(text, 0) for q, text in zip(queries, said, strict=True)}
    chooses = [q for q in queries if isinstance(q, Choose)]
    asked = [
        Instance("loglikelihood", {}, (q.prompt, c), n * len(q.choices) + k)
        for n, q in enumerate(chooses)
        for k, c in enumerate(q.choices)
    ]
    values = iter(peer.loglikelihood(asked, disable_tqdm=True))
    found: dict[str, Answer] = {}
    for q in chooses:
        found[q.id] = Chosen(tuple(_scored(next(values)) for _ in q.choices))
    return found


def _scored(value: tuple[float, bool]) -> Scored:
    return Scored(float(value[0]), 1, int(value[1]))


def agree(one: dict[str, Answer], other: dict[str, Answer]) -> bool:
    """The same choice and likelihoods within 1e-4 of every query, or the same text."""
    for key, mine in one.items():
        yours = other[key]
        if isinstance(mine, Generated) and isinstance(yours, Generated):
            if mine.text != yours.text:
                return False
        elif isinstance(mine, Chosen) and isinstance(yours, Chosen):
            pairs = zip(mine.choices, yours.choices, strict=True)
            if mine.best != yours.best or any(abs(a.logprob - b.logprob) > 1e-4 for a, b in pairs):
                return False
    return True


# --- lines -----------------------------------------------------------------------------------------------------------


def against(model: Model, peer: Any, size: Size, what: str, queries: Sequence[Query]) -> Line:
    """First snapshot: ours and theirs in turn."""
    mine: list[float] = []
    other: list[float] = []
    same = True
    for _ in range(size.runs):
        seconds, yours = cpu(lambda: theirs(peer, queries))
        other.append(seconds)
        seconds, found = cpu(lambda: ours(model, blocks(model, queries, size.batch)))
        mine.append(seconds)
        same = same and agree(found, yours)
    return Line(what, tuple(mine), tuple(other), same)


def trunk(model: Model, size: Size, layer: int) -> Line:
    """A later snapshot with a change in block `layer`, as a share of the first one's cost; the head not counted."""
    todo = blocks(model, mmlu(5, size.questions), size.batch)
    engine, plain = Engine(model), Engine(model, trunk_memory=0)
    engine.passes.expect(layer)
    wearer = Wearer(model)
    first: list[float] = []
    later: list[float] = []
    same = True
    head = _head_seconds(model, todo)
    for block in todo:
        engine.answer(block)
    for run in range(size.runs):
        patches = edit(model, layer, 0.01, run)
        wearer.wear(patches)
        plain.wears(patches)
        engine.wears(patches)
        seconds, whole = cpu(lambda: [plain.answer(b) for b in todo])
        first.append(seconds - head)
        seconds, found = cpu(lambda: [engine.answer(b) for b in todo])
        later.append(seconds - head)
        same = same and found == whole
    wearer.take_off()
    return Line(f"later snapshot, edit in block {layer}", tuple(later), tuple(first), same)


def _head_seconds(model: Model, todo: Sequence[Block]) -> float:
    """What the output head costs for the scored positions of `todo`."""
    rows = sum(len(b.items) for b in todo)
    hidden = torch.randn(rows, model.width)
    with torch.inference_mode():
        model.logits(hidden)
        return statistics.median(cpu(lambda: model.logits(hidden).log_softmax(-1))[0] for _ in range(3))


def drafts(model: Model, size: Size) -> Line:
    """Generation at a snapshot where one answer in twenty changes, as a share of plain generation."""
    queries = worked(max(size.prompts, EVERY), size.answer)
    todo = blocks(model, queries, size.batch)
    engine, plain = Engine(model), Engine(model, trunk_memory=0, drafts=False)
    engine.passes.expect(model.layers // 2)
    mine: list[float] = []
    other: list[float] = []
    same = True
    for _ in range(2):  # the base; then a snapshot like it, at which the trunks of the drafts are kept
        base = [a for b in todo for a in engine.answer(b)]
        engine.wears(())
    for _ in range(size.runs):
        _spoil(engine, todo)
        for one in (engine, plain):
            one.wears(())
        seconds, whole = cpu(lambda: [a for b in todo for a in plain.answer(b)])
        other.append(seconds)
        seconds, found = cpu(lambda: [a for b in todo for a in engine.answer(b)])
        mine.append(seconds)
        same = same and found == whole == base
    return Line("later snapshot, generation with drafts", tuple(mine), tuple(other), same)


def prefill(model: Model, size: Size) -> Line:
    """Checking drafts that all hold, no trunk kept, against one plain pass over prompts and drafts.

    The pass gives logits where a token of a draft is chosen, and runs the shared prefix once: a lower bound.
    """
    todo = blocks(model, worked(size.prompts, size.answer), size.batch)
    engine = Engine(model, trunk_memory=0)
    base = [a for b in todo for a in engine.answer(b)]
    mine: list[float] = []
    other: list[float] = []
    same = True
    for _ in range(size.runs):
        engine.wears(())
        other.append(cpu(lambda: [_pass(engine, b, size.batch) for b in todo])[0])
        engine.wears(())
        seconds, found = cpu(lambda: [a for b in todo for a in engine.answer(b)])
        mine.append(seconds)
        same = same and found == base
    return Line("checking drafts that hold, against a prefill", tuple(mine), tuple(other), same)


@torch.inference_mode()
def _pass(engine: Engine, block: Block, batch: int) -> None:
    """Prompts and drafts of a block through the network, longest first; the likeliest token at every draft's place."""
    drafts = engine.writer.drafts_of(block)
    rows = [(i.tokens, i.tokens + d[:-1]) for i, d in zip(block.items, drafts, strict=True)]
    rows.sort(key=lambda r: -len(r[1]))
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        ids = torch.zeros(len(some), max(len(fed) for _, fed in some), dtype=torch.long)
        for n, (_, fed) in enumerate(some):
            ids[n, : len(fed)] = torch.tensor(fed)
        hidden = engine.passes.final((), block.prefix, ids)
        for n, (asked, fed) in enumerate(some):
            engine.model.logits(hidden[n, len(asked) - 1 : len(fed)]).argmax(-1)


def _spoil(engine: Engine, todo: Sequence[Block]) -> None:
    """Let one draft in twenty differ from its second token on, as if the answer had been another before."""
    for block in todo:
        old = engine.writer.drafts_of(block)
        engine.writer.suppose(
            block, [(*d[:1], *(t ^ 1 for t in d[1:])) if n % EVERY == 0 else d for n, d in enumerate(old)]
        )


def lines(size: Size, note: Note) -> Iterator[tuple[str, Line]]:
    """(key, line) of every comparison of CPU seconds."""
    torch.set_num_threads(1)
    model = bench_model.model(size.shape)
    peer = harness(model, size.batch)
    for key, what, queries in (
        ("mmlu_5shot_ratio", "MMLU, 5 shots, first snapshot", mmlu(5, size.questions)),
        ("mmlu_0shot_ratio", "MMLU, 0 shots, first snapshot", mmlu(0, size.questions)),
        ("generation_ratio", "BBH-shaped generation, first snapshot", worked(size.prompts, size.answer)),
        ("gsm8k_ratio", "GSM8K-shaped generation, nothing shared", unshared(size.prompts, size.answer)),
    ):
        note(what)
        yield key, against(model, peer, size, what, queries)
    for layer in size.depths:
        note(f"trunk reuse, block {layer}")
        yield f"trunk_reuse_cost.{layer}", trunk(model, size, layer)
    note("drafts")
    yield "draft_generation_cost", drafts(model, size)
    note("prefill")
    yield "draft_prefill_cost", prefill(model, size)


def unshared(count: int, answer: int) -> list[Generate]:
    """As `worked`, but every question has examples of its own."""
    return [replace(worked(1, answer, seed)[0], id=f"unshared/{seed}", shared="") for seed in range(count)]


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_memory(side: str, size: Size) -> int:
    """Bytes at the most of a fresh process that scores five-shot MMLU, "ours" or "theirs", its model included."""
    code = f"from raysys.scoring_bench import main; main({side!r}, {size.questions}, {size.batch})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def main(side: str, questions: int, batch: int) -> None:
    """Score in this process and say its peak memory in bytes."""
    torch.set_num_threads(1)
    model = bench_model.model()
    queries = mmlu(5, questions)
    if side == "ours":
        ours(model, blocks(model, queries, batch))
    else:
        theirs(harness(model, batch), queries)
    sys.stdout.write(f"{_peak()}\n")


def _peak() -> int:
    """Bytes of memory that this process has held at the most."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would also count the process that started this one, up to the start
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def tree(found: dict[str, Line], memory: tuple[int, int]) -> dict[str, Any]:
    """For JSON: ratios (theirs over ours), later snapshots as shares of the first, and whether answers agreed."""
    told: dict[str, Any] = {key: line.ratio for key, line in found.items() if key.endswith("_ratio")}
    told["peak_memory_ratio"] = memory[0] / memory[1]
    told["trunk_reuse_cost"] = {k.partition(".")[2]: v.share for k, v in found.items() if k.startswith("trunk")}
    told["draft_generation_cost"] = found["draft_generation_cost"].share
    told["draft_prefill_cost"] = found["draft_prefill_cost"].share
    told["agree"] = all(line.same for line in found.values())
    told["seconds"] = {key: {"ours": line.ours, "other": line.other} for key, line in found.items()}
    told["peak_memory_bytes"] = {"ours": memory[0], "theirs": memory[1]}
    return told
