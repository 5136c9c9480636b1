"""What of a study fits on which GPUs: plain arithmetic on a model's configuration; no weights are read, nothing starts.

Bytes are bytes, GiB is 2**30. Weights, keys and values are exact; activations, second moments and optimisers are upper
estimates, and a tenth of every GPU and 1 GiB of it are left to the CUDA context and to fragmentation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from raysys.arch import arch
from raysys.shards import why_not

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
USABLE, CONTEXT = 0.9, GIB  # the share of a GPU that is planned with, and what CUDA takes of that
MORE = (2, 4, 8, 16, 32, 64, 128)  # numbers of GPUs that are proposed
SIZES = (24, 40, 48, 80, 96, 141, 192, 288)  # GiB of GPUs that are made
SHARES = 8  # the most processes that one GPU is shared by
WORKING = 3  # copies of one second moment beside those kept, while it is factorised: itself, ridged, the new factor
SEARCH = (32, 64)  # rows and tokens of a search with gradients
SCORED = 16  # positions of a row whose logits are held at once
RANK = 1920  # of the two factors of MEND's transforms (methods/parts/hypernet.py)


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """What is on offer: `count` GPUs of `gib` GiB each, `per_node` of them in one machine."""

    count: int
    gib: float
    per_node: int

    @classmethod
    def here(cls) -> Gpus | None:
        """Those of this machine, all as large as the smallest; None where there are none."""
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        least = min((torch.cuda.get_device_properties(i).total_memory for i in range(count)), default=0)
        return cls(count=count, gib=round(least / GIB, 1), per_node=count) if count else None

    @classmethod
    def parse(cls, text: str) -> Gpus:
        """From "8x80", or "8x80/4" for four in each machine. Raises ValueError for anything else."""
        found = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)(?:/(\d+))?", text.strip())
        if not found or int(found[1]) < 1 or float(found[2]) <= 0 or found[3] == "0":
            raise ValueError(f"--gpus {text!r}: wants count x GiB, such as 8x80, or 8x80/4 for four in each machine")
        count = int(found[1])
        return cls(count=count, gib=float(found[2]), per_node=min(count, int(found[3] or count)))

    def __str__(self) -> str:
        return f"{self.count} x {self.gib:g} GiB"


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method's editor holds beside the model: how many layers have a second moment (d_ff x d_ff, float64), how
    many have their matrix trained by Adam in float32, and how many a network transforms the gradients of."""

    moments: int = 0
    trained: int = 0
    transformed: int = 0

    def over(self, layers: int) -> Needs:
        """The same for a method that was told to edit so many layers."""
        return Needs(
            moments=layers if self.moments else 0,
            trained=layers if self.trained else 0,
            transformed=layers if self.transformed else 0,
        )


_SPREAD = Needs(moments=5)
NEEDS: dict[str, Needs] = {  # by name in raysys/names.py; a method that is not here needs the model alone
    "rome": Needs(moments=1), "r_rome": Needs(moments=1), "emmet": Needs(moments=1),
    "memit": _SPREAD, "pmet": _SPREAD, "alphaedit": _SPREAD, "encore": _SPREAD, "nse": _SPREAD, "sphere": _SPREAD,
    "rect": _SPREAD, "prune": _SPREAD,  # of another method, which may be any of these
    "ft_l": Needs(trained=1), "ft_m": Needs(trained=1), "wise": Needs(trained=1),
    "mend": Needs(transformed=3), "malmen": Needs(transformed=3), "rledit": Needs(transformed=3),
    "lora": Needs(trained=1), "melo": Needs(trained=1),  # low rank: less than one matrix
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model that the arithmetic needs. `windows` holds one entry a layer: the tokens whose keys and
    values it keeps at most, None for all."""

    parameters: int
    layers: int
    d: int
    d_ff: int
    vocabulary: int
    heads: int  # of keys and values
    d_head: int
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a transformers config; parameters are counted on the meta device (tied ones once)."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            net: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        d, d_ff = _out_shape(net, arch(config).mlp_out.format(0))
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        return cls(
            parameters=sum(p.numel() for p in net.parameters()),
            layers=layers,
            d=d,
            d_ff=d_ff,
            vocabulary=config.vocab_size,
            heads=getattr(config, "num_key_value_heads", None) or heads,
            d_head=getattr(config, "head_dim", None) or config.hidden_size // heads,
            windows=_windows(config, layers),
        )

    def weights(self, dtype: str) -> int:
        """Bytes of one copy."""
        return self.parameters * BYTES[dtype]

    def keys_values(self, dtype: str, rows: int, tokens: int, windowed: bool = True) -> int:
        """Bytes of keys and values of `rows` texts of `tokens` tokens; `windowed`: layers forget what none sees."""
        kept = sum(min(tokens, w) if windowed and w is not None else tokens for w in self.windows)
        return 2 * kept * rows * self.heads * self.d_head * BYTES[dtype]

    def activations(self, dtype: str, rows: int, tokens: int, gradients: bool = False) -> int:
        """Bytes that a pass holds: of one layer, or of all where gradients are wanted, and logits in float32."""
        layer = rows * tokens * (8 * self.d + 3 * self.d_ff) * BYTES[dtype]
        return layer * (self.layers if gradients else 1) + rows * SCORED * self.vocabulary * 4

    def beside(self, needs: Needs, dtype: str) -> int:
        """Bytes that a method's editor holds beside model and activations; each rank of a group holds all of it."""
        moment, matrix = 8 * self.d_ff**2, self.d * self.d_ff
        moments = moment * (needs.moments + WORKING) if needs.moments else 0
        # beside the weight: as found, and float32: trained, as it began, gradient, two averages of Adam
        trained = needs.trained * matrix * (BYTES[dtype] + 5 * 4)
        # two shapes (into and out of the MLP), each two layers of two factors; a gradient of each matrix
        network = 2 * 2 * 2 * (self.d + self.d_ff) * RANK * 4 + needs.transformed * 2 * matrix * 4
        return moments + trained + (network if needs.transformed else 0)


@dataclass(frozen=True, kw_only=True)
class Load:
    """Bytes on each GPU of one evaluator and one editor, split over `ranks`."""

    ranks: int
    evaluator: int
    editor: int


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The answer: how many copies of the model, split over how many GPUs each, and which share of a GPU a rank takes.

    `why` is empty when it fits; else it says why not and what would, and there are no evaluators and no editors.
    """

    ranks: int = 1
    evaluators: int = 0
    editors: int = 0
    gpus_per_evaluator: float = 0.0
    gpus_per_editor: float = 0.0
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return self.why
        return (
            f"evaluators = {self.evaluators}, gpus_per_evaluator = {self.gpus_per_evaluator:g}, editors = "
            f"{self.editors}, gpus_per_editor = {self.gpus_per_editor:g}, tensor_parallel = {self.ranks}"
        )


def load(shape: Shape, dtype: str, needs: Sequence[Needs], ranks: int, rows: int, tokens: int, trunks: int = 0) -> Load:
    """What each GPU holds. Splitting divides weights, keys and values and activations, not what a method keeps, nor the
    `trunks` bytes that an evaluator may keep of what edits don't change."""
    split = -(-shape.weights(dtype) // ranks)
    # scoring keeps whole prefixes, whatever the windows: raysys/passes.py
    scoring = shape.keys_values(dtype, rows, tokens, windowed=False) + shape.activations(dtype, rows, tokens)
    search = shape.activations(dtype, *SEARCH, gradients=True)
    kept = max((shape.beside(n, dtype) for n in needs), default=0)
    return Load(ranks=ranks, evaluator=split + scoring // ranks + trunks, editor=split + search // ranks + kept)


def place(
    config: Any,
    dtype: str,
    methods: Mapping[str, Any],
    gpus: Gpus,
    *,
    needs: Sequence[Needs] = (),
    editors: int = 1,
    evaluators: int | None = None,
    rows: int = 16,
    tokens: int = 1024,
    trunks: int = 0,
    ranks: int | None = None,
) -> Placement:
    """Where a study of one model can run on `gpus`: the smallest split that fits, then as many evaluators as do.

    `methods`: classes by title; `needs`: of the same methods. `evaluators`: the number wanted (None: all that fit);
    `trunks`: see `load`; `ranks`: the only split to try.
    """
    shape = Shape.of(config)
    for tried in [ranks] if ranks else _splits(gpus.per_node):
        if tried > 1 and why_not(config, tried, methods):
            break
        loads = load(shape, dtype, needs, tried, rows, tokens, trunks)
        found = _fill(loads, gpus, editors, evaluators)
        if found is not None:
            return found
    asked = (editors, evaluators or 1, (rows, tokens, trunks), ranks)
    return Placement(why=_why(config, shape, dtype, methods, needs, gpus, asked))


def _fill(loads: Load, gpus: Gpus, editors: int, evaluators: int | None) -> Placement | None:
    """Editors first, then evaluators; None unless all that are wanted (at least one of each) have a place."""
    usable = USABLE * gpus.gib * GIB - CONTEXT
    if max(loads.evaluator, loads.editor) > usable:
        return None
    nodes = gpus.count // gpus.per_node
    left = gpus.count - nodes * gpus.per_node
    groups = nodes * (gpus.per_node // loads.ranks) + left // loads.ranks
    mine, theirs = 1, 1  # processes that share a GPU
    if loads.ranks == 1:
        room = USABLE * gpus.gib * GIB
        mine, theirs = (_sharing(room, used + CONTEXT) for used in (loads.editor, loads.evaluator))
    taken = -(-editors // mine)  # whole GPUs (or groups) of editors; the rest of the last one takes evaluators
    spare = int((taken - editors / mine) * theirs + 1e-9) if loads.ranks == 1 else 0
    most = (groups - taken) * theirs + spare
    if taken > groups or most < (evaluators or 1):
        return None
    return Placement(
        ranks=loads.ranks,
        evaluators=most if evaluators is None else evaluators,
        editors=editors,
        gpus_per_evaluator=loads.ranks / theirs,
        gpus_per_editor=loads.ranks / mine,
    )


def _sharing(room: float, used: int) -> int:
    """How many processes that hold `used` bytes share a GPU: a power of two, so that shares add up to whole GPUs."""
    number = 1
    while number * 2 <= SHARES and number * 2 * used <= room:
        number *= 2
    return number


def _why(
    config: Any, shape: Shape, dtype: str, methods: Mapping[str, Any], needs: Sequence[Needs], gpus: Gpus,
    asked: tuple[int, int, tuple[int, int, int], int | None],
) -> str:  # fmt: skip
    """Why it can't fit, and every single thing that would make it fit."""
    editors, evaluators, sizes, ranks = asked

    def fits(tried: Gpus, kind: str, wanted: int, split: int) -> bool:
        return _fill(load(shape, kind, needs, split, *sizes), tried, editors, wanted) is not None

    one = ranks or 1
    refused = why_not(config, max(2, one), methods)
    splits = [1] if refused else [s for s in _splits(64) if s == 1 or not why_not(config, s, methods)]
    here = load(shape, dtype, needs, one, *sizes)
    what = f"an evaluator takes {here.evaluator / GIB:.1f} GiB, an editor {here.editor / GIB:.1f} GiB"
    reason = f"{gpus}: {what} on each GPU (tensor_parallel = {one}, {dtype}) for {editors} and {evaluators} of them"
    if refused:
        reason += f"; splitting does not help: {'; '.join(refused)}"
    ways = []
    if dtype == "float32" and any(fits(gpus, "bfloat16", evaluators, s) for s in splits if s <= gpus.per_node):
        ways.append('dtype = "bfloat16"')
    if evaluators > 1 and any(fits(gpus, dtype, 1, s) for s in splits if s <= gpus.per_node):
        ways.append("fewer evaluators")
    near = [s for s in splits if s != one and s <= gpus.per_node and fits(gpus, dtype, evaluators, s)]
    ways += [f"tensor_parallel = {s}" for s in near[:1]]
    if not ways:
        ways = _larger(gpus, splits, lambda tried, split: fits(tried, dtype, evaluators, split))
    return f"{reason}; what would do: {' or '.join(ways) or 'a smaller model'}"


def _larger(gpus: Gpus, splits: Sequence[int], fits: Callable[[Gpus, int], bool]) -> list[str]:
    """The fewest more GPUs of this size that would do, and the smallest larger GPUs, as many as there are."""
    more = [replace(gpus, count=n, per_node=min(n, max(8, gpus.per_node))) for n in MORE if n > gpus.count]
    larger = [replace(gpus, gib=gib) for gib in SIZES if gib > gpus.gib]
    ways = []
    for offers in (more, larger):
        found = ((o, s) for o in offers for s in splits if s <= o.per_node and fits(o, s))
        ways += [f"{offer} with tensor_parallel = {split}" for offer, split in islice(found, 1)]
    return ways


def _splits(most: int) -> list[int]:
    return [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= most]


def _out_shape(net: Any, name: str) -> tuple[int, int]:
    """(d_out, d_in) of a linear module, or of a Conv1D, which keeps its weight the other way round."""
    module = net.get_submodule(name)
    rows, columns = module.weight.shape
    return (columns, rows) if hasattr(module, "nf") else (rows, columns)


def _windows(config: Any, layers: int) -> tuple[int | None, ...]:
    """By layer what a cache keeps: one token fewer than the window, for the newest is always in front of it."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    return tuple(window - 1 if window and kind == "sliding_attention" else None for kind in kinds)
