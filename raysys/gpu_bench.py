"""What edits, snapshots and scoring cost on a GPU: random weights with the shape of Llama-2-7B, made where they run.

Costs depend on shapes and lengths alone, so weights and text are random (raysys/bench_model.py). Second moments come
from a few synthetic documents: an edit costs the same with them, but what it writes means nothing. Neither Ray nor the
network is needed.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from raysys import bench_model, names, steps
from raysys.model import Model
from raysys.patch import Wearer, merge
from raysys.scoring import Engine
from raysys.scoring_bench import blocks, mmlu
from raysys.snapshot import Snapshot
from raysys.types import Patch, PreparedMethod

MMLU = 14042  # questions of the test split, in 57 subjects
RIDGE = 0.01  # share of the mean of C's diagonal: fewer tokens than dimensions would leave C singular
SEARCH = {"lr": 0.05, "weight_decay": 1e-3, "kl": 0.0625}  # so small a step hardly ever ends a search early
Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama; by default those of Llama-2-7B (6.7 billion parameters)."""

    width: int = 4096
    layers: int = 32
    heads: int = 32
    inner: int = 11008
    vocabulary: int = 32000
    context: int = 4096


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured, and where. `batches` of MEMIT; `documents` behind second moments; `batch` of scoring."""

    shape: Shape = field(default_factory=Shape)
    device: str = "cuda"
    dtype: str = "bfloat16"
    rome_layer: int = 5  # layers, steps and contexts as published for Llama-2-7B (methods/rome.py, methods/memit.py)
    memit_layers: tuple[int, ...] = (4, 5, 6, 7, 8)
    steps: int = 25
    edits: int = 10  # of ROME
    batches: tuple[int, ...] = (1, 10)
    runs: int = 3  # of each batch of MEMIT, and of wearing
    documents: int = 200
    questions: int = 246  # a subject of MMLU, on average
    batch: int = 32

    @classmethod
    def quick(cls) -> Size:
        """Few edits and questions."""
        return cls(edits=2, batches=(1,), runs=1, documents=60, questions=64)


def missing(size: Size) -> str:
    """Why nothing can be measured here, in a sentence; empty where it can."""
    if torch.device(size.device).type == "cuda" and not torch.cuda.is_available():
        return "skipped: PyTorch finds no GPU on this machine, so there is nothing to measure"
    return ""


def model(size: Size) -> Model:
    """The network and its tokenizer."""
    return Model(network(size), bench_model.tokenizer(size.shape.context, size.shape.vocabulary), "llama-2-7b-shaped")


def network(size: Size, seed: int = 0) -> Any:
    """Random weights, made on their device in their number type."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = size.shape
    config = LlamaConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=shape.inner,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=0,
    )
    made_of: Any = AutoModelForCausalLM  # untyped
    with torch.random.fork_rng(), torch.device(size.device):
        torch.manual_seed(seed)
        return made_of.from_config(config, dtype=getattr(torch, size.dtype))


def timed(device: torch.device, run: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds by the clock, result); what the device still has to do is waited for before and after."""
    _wait(device)
    start = time.perf_counter()
    result = run()
    _wait(device)
    return time.perf_counter() - start, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(size: Size, note: Note = lambda _: None) -> dict[str, Any]:
    """Every figure, ready for JSON. Raises ValueError where the device's memory does not suffice."""
    try:
        return _measure(size, note)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the memory of {size.device} is not enough for this model and what edits need beside it: end what else "
            f"uses the device, or take a larger one ({str(error).splitlines()[0]})"
        ) from error


def _measure(size: Size, note: Note) -> dict[str, Any]:
    note("making the network ...")
    made = model(size)
    found: dict[str, Any] = {"machine": machine(made.device), "size": asdict(size)}
    peaks: dict[str, int | None] = {}
    with TemporaryDirectory() as folder:
        _reset(made.device)
        found["editing"], patches = editing(made, size, Path(folder), note)
        peaks["editing"] = _peak(made.device)
    note("snapshots ...")
    found["snapshots"] = [snapshot(made, size, what, some) for what, some in patches.items()]
    gc.collect()
    note("scoring ...")
    _reset(made.device)
    found["scoring"] = scoring(made, size)
    peaks["scoring"] = _peak(made.device)
    found["peak_bytes"] = peaks
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """The device and the versions that the figures belong to."""
    import transformers

    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "transformers": transformers.__version__,
    }


def _reset(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    """Bytes that tensors took at the most since `_reset`, weights included; None where it is not counted."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


# --- edits -----------------------------------------------------------------------------------------------------------


def editing(
    model: Model, size: Size, folder: Path, note: Note
) -> tuple[list[dict[str, Any]], dict[str, tuple[Patch, ...]]]:
    """A line per method and batch, and by its title all that its edits changed, as one snapshot holds it."""
    text = folder / "text.txt"
    text.write_text("\n\n".join(bench_model.documents(size.documents)) + "\n\n", encoding="utf-8")
    given = {**SEARCH, "steps": size.steps, "corpus": str(text), "documents": size.documents, "ridge": RIDGE}
    memit = {**given, "layers": size.memit_layers, "clamp": 4.0, "weight": 15000.0, "contexts": ((10, 5),)}
    rome = {**given, "layer": size.rome_layer, "contexts": ((5, 10), (10, 10))}
    todo: list[tuple[str, str, dict[str, Any], int, int]] = [
        (f"MEMIT, {n} at once", "memit", {**memit, "batch": n}, n, size.runs) for n in size.batches
    ]
    todo.append(("ROME", "rome", rome, 1, size.edits))
    lines, changed = [], {}
    for what, method, settings, batch, runs in todo:
        note(f"{what} ...")
        built = names.build(names.method(method), settings, method)
        seconds, prepared = timed(model.device, lambda built=built: built.prepare(model, folder))  # type: ignore[misc]
        line, changed[what] = _edits(model, prepared, batch, runs)
        lines.append({"what": what, "prepare_seconds": seconds, **line})
        del prepared
        gc.collect()
    return lines, changed


def _edits(model: Model, method: PreparedMethod, batch: int, runs: int) -> tuple[dict[str, Any], tuple[Patch, ...]]:
    """Seconds per edit of each run, and what all runs changed; a first run, not counted, factorises C."""
    facts = bench_model.requests(batch * (runs + 1), seed=batch)
    seconds: list[float] = []
    passes: list[int] = []
    refused: dict[str, str] = {}
    merged: tuple[Patch, ...] = ()
    for run in range(runs + 1):
        some = facts[run * batch : (run + 1) * batch]
        took, (edit, why) = timed(model.device, lambda some=some: steps.make(method, model, some))  # type: ignore[misc]
        refused |= why
        if run > 0:
            seconds.append(took / batch)
            merged = merge(merged, edit.patches)
            said = edit.log.get("passes", 0)
            passes += said if isinstance(said, list | tuple) else [said]
    if refused:
        raise ValueError(f"edits of random weights were refused, so their cost says nothing: {refused}")
    line = {
        "edits": batch * runs,
        "seconds_per_edit": statistics.median(seconds),
        "runs": seconds,
        "passes": statistics.mean(passes),
    }
    return line, merged


# --- snapshots and scoring -------------------------------------------------------------------------------------------


def snapshot(model: Model, size: Size, what: str, patches: tuple[Patch, ...]) -> dict[str, Any]:
    """Bytes of a snapshot, and median seconds to put it on the untouched model and to take it off."""
    on, off = [], []
    for _ in range(size.runs + 1):
        wearer = Wearer(model)
        on.append(timed(model.device, lambda w=wearer: w.wear(patches))[0])  # type: ignore[misc]
        off.append(timed(model.device, wearer.take_off)[0])
    return {
        "what": what,
        "weights": len(patches),
        "bytes": Snapshot("bench", None, 0, patches, model.digest).bytes,
        "wear_seconds": statistics.median(on[1:]),
        "take_off_seconds": statistics.median(off[1:]),
    }


def scoring(model: Model, size: Size) -> dict[str, Any]:
    """Five-shot questions of one subject, about as long as real ones, and what all of MMLU would take."""
    warm = blocks(model, mmlu(5, min(size.questions, size.batch), seed=1), size.batch)
    _answer(model, warm)
    todo = blocks(model, mmlu(5, size.questions), size.batch)
    seconds, _ = timed(model.device, lambda: _answer(model, todo))
    computed = sum(len(b.prefix) + sum(len(i.tokens) for i in b.items) for b in todo)
    asked = sum(len(b.prefix) + len(i.tokens) for b in todo for i in b.items)
    return {
        "questions": size.questions,
        "prefix_tokens": len(todo[0].prefix),
        "question_tokens": sum(len(i.tokens) for b in todo for i in b.items) / size.questions,
        "seconds": seconds,
        "computed_tokens": computed,
        "computed_tokens_per_second": computed / seconds,
        "prompt_tokens": asked,
        "prompt_tokens_per_second": asked / seconds,
        "mmlu_questions": MMLU,
        "mmlu_minutes": seconds / size.questions * MMLU / 60,
    }


def _answer(model: Model, todo: Sequence[Any]) -> None:
    engine = Engine(model)
    for block in todo:
        engine.answer(block)


def table(found: dict[str, Any]) -> Any:
    """The figures as a table of rich."""
    from rich.table import Table

    made = Table("what", "figure", title=f"Llama-2-7B-shaped, random weights, on {found['machine']['device']}")
    for line in found["editing"]:
        made.add_row(f"{line['what']}: seconds per edit", f"{line['seconds_per_edit']:.3f}")
        made.add_row(f"{line['what']}: seconds to prepare", f"{line['prepare_seconds']:.1f}")
    for line in found["snapshots"]:
        made.add_row(f"snapshot, {line['what']}: MB", f"{line['bytes'] / 1e6:.2f}")
        made.add_row(f"snapshot, {line['what']}: ms to wear", f"{1000 * line['wear_seconds']:.1f}")
        made.add_row(f"snapshot, {line['what']}: ms to take off", f"{1000 * line['take_off_seconds']:.1f}")
    score = found["scoring"]
    made.add_row("scoring: computed tokens/s", f"{score['computed_tokens_per_second']:.0f}")
    made.add_row("scoring: prompt tokens/s", f"{score['prompt_tokens_per_second']:.0f}")
    lengths = f"{score['prefix_tokens']} and {score['question_tokens']:.0f}"
    made.add_row("scoring: tokens of the shared prefix, and of a question on average", lengths)
    made.add_row(f"5-shot MMLU: minutes, from {score['questions']} questions", f"{score['mmlu_minutes']:.1f}")
    for what, peak in found["peak_bytes"].items():
        made.add_row(f"peak memory, {what}: GB", "not counted" if peak is None else f"{peak / 1e9:.1f}")
    return made
