"""What of a study fits on which GPUs: plain arithmetic on a model's configuration; no weights are read, nothing starts.

Bytes are bytes, GiB is 2**30, and GB is a vendor's word for a size of GPU, which holds less than so many GiB (SIZES).
Weights, keys and values are exact; activations, second moments and optimisers are upper estimates, and a tenth of every
GPU and 1 GiB of it are left to the CUDA context and to fragmentation.
"""

from __future__ import annotations

import math
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
SIZES: Mapping[float, float] = {  # GB as vendors say it: GiB that a program finds on the smallest GPU called so
    24: 22.0,  # L4, A10G (a GeForce has 23.5)
    40: 39.3,  # A100
    48: 44.3,  # A40, L40S
    80: 79.1,  # A100, H100
    96: 94.5,  # GH200, H20, RTX PRO 6000
    141: 139.7,  # H200
    192: 178.3,  # B200
    288: 267.6,  # B300
}
SHARES = 8  # the most processes that one GPU is shared by
PARTS, LEAST = 20, 3  # of a GPU: shares are multiples of a twentieth, and no smaller than three
WORKING = 3  # copies of one second moment beside those kept, while it is factorised: itself, ridged, the new factor
ROOM = 16  # earlier keys that there is room for at least (methods/parts/metric.py)
SEARCH = (32, 64)  # rows and tokens of a search with gradients
SCORED = 16  # positions of a row whose logits are held at once
RANK = 1920  # of the two factors of MEND's transforms (methods/parts/hypernet.py)


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """What is on offer: `count` GPUs of `gib` GiB each, `per_node` of them in one machine.

    `gb`: a vendor's word for their size, 0 where they have been measured or are of no known size.
    """

    count: int
    gib: float
    per_node: int
    gb: float = 0

    @classmethod
    def here(cls) -> Gpus | None:
        """Those of this machine, all as large as the smallest; None where there are none."""
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        least = min((torch.cuda.get_device_properties(i).total_memory for i in range(count)), default=0)
        return cls(count=count, gib=round(least / GIB, 1), per_node=count) if count else None

    @classmethod
    def parse(cls, text: str) -> Gpus:
        """From "8x80", or "8x80/4" for four in each machine; a size that is none of SIZES is taken for GiB.

        Raises ValueError for anything else.
        """
        found = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)(?:/(\d+))?", text.strip())
        if not found or int(found[1]) < 1 or float(found[2]) <= 0 or found[3] == "0":
            raise ValueError(
                f"--gpus {text!r}: wants count x GiB, or count x GB as vendors say it ({', '.join(map(str, SIZES))}), "
                "such as 8x80, or 8x80/4 for four in each machine"
            )
        count, size = int(found[1]), float(found[2])
        per_node = min(count, int(found[3] or count))
        return cls(count=count, gib=SIZES.get(size, size), per_node=per_node, gb=size if size in SIZES else 0)

    def __str__(self) -> str:
        named = f"{self.count} x {self.gb:g} GB ({self.gib:g} GiB each)"
        return named if self.gb else f"{self.count} x {self.gib:g} GiB"


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method's editor holds beside the model: how many layers have a second moment (d_ff x d_ff, float64), how
    many have their matrix trained by Adam in float32, and how many matrices a network transforms the gradients of.
    `keys`: earlier edits whose keys are kept for each second moment."""

    moments: int = 0
    trained: int = 0
    transformed: int = 0
    keys: int = 0

    def over(self, layers: int, edits: int = 0) -> Needs:
        """The needs of one layer for so many (a network's: matrices), after so many edits."""
        return Needs(
            moments=layers * self.moments,
            trained=layers * self.trained,
            transformed=layers * self.transformed,
            keys=edits * self.keys,
        )


_MOMENT, _KEYS, _TRAINED, _NETWORK = Needs(moments=1), Needs(moments=1, keys=1), Needs(trained=1), Needs(transformed=1)
NEEDS: dict[str, Needs] = {  # of one layer, by name in raysys/names.py; a method not named here needs the model alone
    "rome": _MOMENT, "r_rome": _MOMENT, "emmet": _MOMENT, "pmet": _MOMENT,
    "memit": _KEYS,  # with `earlier_keys`
    "alphaedit": _KEYS, "encore": _KEYS, "nse": _KEYS, "sphere": _KEYS,
    "ft_l": _TRAINED, "ft_m": _TRAINED, "wise": _TRAINED,
    "lora": _TRAINED, "melo": _TRAINED,  # low rank: all of it is less than one matrix
    "mend": _NETWORK, "malmen": _NETWORK, "rledit": _NETWORK,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model that the arithmetic needs. `windows` holds one entry a layer: the tokens whose keys and
    values it keeps at most, None for all."""

    parameters: int
    whole: int  # of them embeddings and head, which every rank keeps as they are (actors/group.py)
    layers: int
    d: int
    d_ff: int
    vocabulary: int
    heads: int  # of keys and values
    queries: int  # heads of queries
    d_head: int
    windows: tuple[int | None, ...]
    eager: bool  # attention that holds every head's scores, tokens x tokens, as transformers does for some families

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a transformers config; parameters are counted on the meta device (tied ones once)."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            net: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        d, d_ff = _out_shape(net, arch(config).mlp_out.format(0))
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        ends = [m for m in net.modules() if isinstance(m, torch.nn.Embedding)] + [net.get_output_embeddings()]
        return cls(
            parameters=sum(p.numel() for p in net.parameters()),
            whole=sum(p.numel() for p in {p for m in ends for p in m.parameters()}),
            layers=layers,
            d=d,
            d_ff=d_ff,
            vocabulary=config.vocab_size,
            heads=getattr(config, "num_key_value_heads", None) or heads,
            queries=heads,
            d_head=getattr(config, "head_dim", None) or config.hidden_size // heads,
            windows=_windows(config, layers),
            eager=net.config._attn_implementation == "eager",
        )

    def weights(self, dtype: str, ranks: int = 1) -> int:
        """Bytes of one copy, or of what each of several ranks has of it."""
        return (self.whole + -(-(self.parameters - self.whole) // ranks)) * BYTES[dtype]

    def keys_values(self, dtype: str, rows: int, tokens: int, windowed: bool = True) -> int:
        """Bytes of keys and values of `rows` texts of `tokens` tokens; `windowed`: layers forget what none sees."""
        kept = sum(min(tokens, w) if windowed and w is not None else tokens for w in self.windows)
        return 2 * kept * rows * self.heads * self.d_head * BYTES[dtype]

    def activations(self, dtype: str, rows: int, tokens: int, ranks: int = 1, gradients: bool = False) -> int:
        """Bytes that a pass holds: of one layer, or of all where gradients are wanted, and logits in float32.

        Ranks share what lies inside attention and MLP; the residual stream, its norms and logits are whole on each.
        """
        size = BYTES[dtype]
        stream = attention = rows * tokens * 4 * self.d * size  # the norms' float32 copies; queries, keys, values, out
        mlp = rows * tokens * 3 * self.d_ff * size
        # as they are and after the softmax in float32; in the model's type these, and those of the block before
        scores = rows * self.queries * tokens**2 * (2 * 4 + 2 * size) if self.eager else 0
        inner = attention + (mlp + scores if gradients else max(mlp, scores))  # without gradients one after the other
        return (stream + -(-inner // ranks)) * (self.layers if gradients else 1) + rows * SCORED * self.vocabulary * 4

    def beside(self, needs: Needs, dtype: str) -> int:
        """Bytes that a method's editor holds beside model and activations; each rank of a group holds all of it."""
        matrix = self.d * self.d_ff
        moments = needs.moments * (self._moment + self._keys(needs.keys))
        # beside the weight: as found, and float32: trained, as it began, gradient, two averages of Adam
        trained = needs.trained * matrix * (BYTES[dtype] + 5 * 4)
        # two shapes (into and out of the MLP), each two layers of two factors; a gradient of each matrix
        network = 2 * 2 * 2 * (self.d + self.d_ff) * RANK * 4 + needs.transformed * matrix * 4
        return moments + trained + (network if needs.transformed else 0)

    def making(self, needs: Needs) -> int:
        """Bytes that it takes besides while it factorises second moments, before it searches or after."""
        return WORKING * self._moment if needs.moments else 0

    @property
    def _moment(self) -> int:
        return 8 * self.d_ff**2

    def _keys(self, number: int) -> int:
        """Bytes of so many earlier keys of one layer and of their factor, in float64: there is room for a power of two,
        and a room half as large until all has been moved."""
        room = max(ROOM, 1 << (number - 1).bit_length()) if number else 0
        return sum(8 * n * (self.d_ff + n) for n in (room, room // 2))


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
    """What each GPU holds. Splitting divides what lies between embeddings and head, not what a method keeps, nor the
    `trunks` bytes that an evaluator may keep of what edits don't change."""
    weights = shape.weights(dtype, ranks)
    # scoring keeps whole prefixes, whatever the windows: raysys/passes.py
    prefixes = -(-shape.keys_values(dtype, rows, tokens, windowed=False) // ranks)
    scoring = prefixes + shape.activations(dtype, rows, tokens, ranks)
    search = shape.activations(dtype, *SEARCH, ranks, gradients=True)
    editing = max((shape.beside(n, dtype) + max(search, shape.making(n)) for n in needs), default=search)
    return Load(ranks=ranks, evaluator=weights + scoring + trunks, editor=weights + editing)


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
    room = USABLE * gpus.gib * GIB
    if max(loads.evaluator, loads.editor) + CONTEXT > room:
        return None
    ways = [_halves(loads, gpus, editors, room)]
    if loads.ranks == 1:
        ways.append(_parts(loads, gpus, editors, room))
    most, mine, theirs = max(ways, key=lambda way: min(way[0], evaluators or way[0]))
    if most < (evaluators or 1):
        return None
    return Placement(
        ranks=loads.ranks,
        evaluators=most if evaluators is None else evaluators,
        editors=editors,
        gpus_per_evaluator=theirs,
        gpus_per_editor=mine,
    )


def _halves(loads: Load, gpus: Gpus, editors: int, room: float) -> tuple[int, float, float]:
    """Evaluators that have a place beside the editors, and GPUs of an editor and of an evaluator: whole ones (or groups
    of them), or halves, quarters, eighths."""
    nodes = gpus.count // gpus.per_node
    left = gpus.count - nodes * gpus.per_node
    groups = nodes * (gpus.per_node // loads.ranks) + left // loads.ranks
    mine, theirs = 1, 1  # processes that share a GPU
    if loads.ranks == 1:
        mine, theirs = (_sharing(room, used + CONTEXT) for used in (loads.editor, loads.evaluator))
    taken = -(-editors // mine)  # whole GPUs (or groups) of editors; the rest of the last one takes evaluators
    spare = int((taken - editors / mine) * theirs + 1e-9) if loads.ranks == 1 else 0
    most = (groups - taken) * theirs + spare if taken <= groups else 0
    return most, loads.ranks / mine, loads.ranks / theirs


def _parts(loads: Load, gpus: Gpus, editors: int, room: float) -> tuple[int, float, float]:
    """The same with shares as large as what is held, in twentieths of a GPU.

    Ray gives each actor, in whatever order they come, any GPU that has its share left: with no more evaluators than
    this, an editor that comes last finds one, and so does an evaluator.
    """
    mine, theirs = (max(LEAST, math.ceil(PARTS * (n + CONTEXT) / room)) for n in (loads.editor, loads.evaluator))
    beside, alone = (PARTS - mine) // theirs, PARTS // theirs  # evaluators on a GPU with an editor, and on one without
    most = (gpus.count - editors) * min(alone, beside + 1) + beside if editors <= gpus.count else 0
    return most, mine / PARTS, theirs / PARTS


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
    larger = [replace(gpus, gib=gib, gb=gb) for gb, gib in SIZES.items() if gib > gpus.gib]
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
