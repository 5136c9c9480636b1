"""LoRA: a low-rank adapter on some matrices, trained on the facts one after the other.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685, eq. 3; Zhang et al.,
"AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023, arXiv:2303.10512, eqs. 3 and 4
(the factors as P Λ Q, kept orthogonal by a penalty). As an editing method in EasyEdit (Wang et al., arXiv:2308.07269),
which takes AdaLoRA without its allocation of ranks. Adapters are those of the `peft` library.
Where a setting is None, PRESETS (or the rule below it) has it.

r = rank, d_out x d_in = shape of an adapted matrix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from methods.parts import locate, presets
from raysys.model import Model
from raysys.patch import LowRank, Wearer
from raysys.types import Edit, EditRefused, EditRequest

PAPER: presets.Settings = {"type": "adalora", "modules": ("q_proj", "v_proj"), "steps": 70}
PRESETS: Mapping[str, presets.Settings] = {  # EasyEdit, hparams/LoRA
    "world/small": {"type": "lora", "modules": ("up_proj",), "steps": 30, "lr": 2e-3, "layers": (1, 2)},
    "gpt2-xl": {"type": "adalora", "modules": ("c_attn",), "steps": 30},
    "gpt-j-6b": {"type": "adalora", "modules": ("fc_in", "fc_out"), "steps": 50},
    "llama-2-7b": PAPER,
    "llama-2-13b": PAPER,
    "llama-3-8b": PAPER,
    "llama-3.1-8b": PAPER,
    "llama-3.2-3b": PAPER,
    "qwen2.5-7b": {"type": "lora", "modules": ("q_proj", "v_proj"), "steps": 1},
}


def rule(model: Model) -> presets.Settings:
    """For models without a preset: the attention matrices that peft adapts in their family, 50 steps of AdaLoRA."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    modules = tuple(KNOWN.get(model.config.model_type, ("q_proj", "v_proj")))
    return {"type": "adalora", "modules": modules, "steps": 50, "lr": 5e-3, "layers": ()}


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Train W + (alpha / r) B A on "prompt target", with the prompt's tokens masked; a stream trains one adapter on.

    Adam starts anew with each edit. AdaLoRA adds half the mean distance of BᵀB and AAᵀ from the identity to the loss.
    Other than in EasyEdit, `rank` is AdaLoRA's too (there peft's default of 12 holds, whatever the setting says), and
    the target is not followed by an end-of-text mark.
    """

    type: Literal["lora", "adalora"] | None = None
    modules: tuple[str, ...] | None = None  # how the names of adapted modules end
    layers: tuple[int, ...] | None = None  # empty: all
    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.1  # of what enters the adapter, while it is trained
    steps: int | None = None
    lr: float | None = None
    weight_decay: float = 0.0
    batch_size: int = 1  # requests of one call of `edit`
    seed: int = 0  # of the adapter's first weights and of dropout

    name: ClassVar[str] = "lora"
    version: ClassVar[str] = "1"

    @property
    def batch(self) -> int:
        """Requests of one call of `edit`."""
        return self.batch_size

    def prepare(self, model: Model, cache: Path | None = None) -> Lora:
        """These settings with nothing left open; there is nothing to collect. Raises ValueError for unknown modules."""
        settings = presets.settled(self, model, PRESETS, rule)
        with _injected(model, settings, None):  # raises when no module is meant
            pass
        return settings

    def identity(self) -> dict[str, Any]:
        """Name, version and settings."""
        return presets.identity(self, {})

    def edit(self, model: Model, requests: Sequence[EditRequest], memory: Mapping[str, Tensor] | None = None) -> Edit:
        """The adapter after these requests. Raises EditRefused with the reason when a request can't be served."""
        s = presets.settled(self, model, PRESETS, rule)
        assert s.steps is not None and s.lr is not None
        rows = [locate.row(model, q, target=True) for q in requests]
        worn = model.wears(Adapter)
        losses: list[float] = []
        with _silent(worn, model), _own_randomness(model, s.seed, requests), _injected(model, s, worn) as layers:
            factors = [p for layer in layers.values() for p in layer.factors]
            adam = torch.optim.Adam(factors, lr=s.lr, weight_decay=s.weight_decay)
            for step in range(s.steps):
                with torch.enable_grad():
                    loss = _loss(model, rows) + _penalty(s, layers)
                    grads = torch.autograd.grad(loss, factors)
                losses.append(float(loss.detach()))
                if not torch.isfinite(loss):
                    raise EditRefused(f"edit {requests[0].id!r}: the loss of step {step} is not finite: a broken model")
                for factor, grad in zip(factors, grads, strict=True):
                    factor.grad = grad
                adam.step()
            adapter = Adapter.of(layers)
        norm = sum(float(p.left.norm()) ** 2 * float(p.right.norm()) ** 2 for p in adapter.changes) ** 0.5
        return Edit((adapter,), log={"steps": s.steps, "loss_before": losses[0], "loss": losses[-1], "norm": norm})


# --- the patch -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Adapter:
    """Every matrix of `shapes` (module, d_out, d_in) wears W + scale · B diag(e) A.

    left: all B (d_out, r), right: all A (r, d_in), gains: all e (r,), flattened one after the other, float32. An
    adapter holds all that was trained so far: a later one takes the place of an earlier one.
    """

    shapes: Sequence[tuple[str, int, int]]
    rank: int
    scale: float
    left: Tensor
    right: Tensor
    gains: Tensor
    kind: ClassVar[str] = "adapter"
    whole: ClassVar[bool] = False
    in_weights: ClassVar[bool] = True
    _worn: list[tuple[Model, Wearer]] = field(default_factory=list, init=False, repr=False)

    @classmethod
    def of(cls, layers: Mapping[str, _Layer]) -> Adapter:
        """What has been trained in `layers`, by module."""
        shapes = [(name, layer.b.shape[0], layer.a.shape[1]) for name, layer in layers.items()]
        some = next(iter(layers.values()))
        left, right, gains = (
            torch.cat([t.detach().float().flatten() for t in kind]).cpu()
            for kind in ([x.b for x in layers.values()], [x.a for x in layers.values()], [x.e for x in layers.values()])
        )
        return cls(shapes, some.a.shape[0], some.scale, left, right, gains)

    @property
    def parts(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """(module, B (d_out, r), A (r, d_in), e (r,)) of every adapted matrix."""
        r = self.rank
        lefts = torch.split(self.left, [d_out * r for _, d_out, _ in self.shapes])
        rights = torch.split(self.right, [d_in * r for _, _, d_in in self.shapes])
        gains = torch.split(self.gains, r)
        for (name, d_out, d_in), b, a, e in zip(self.shapes, lefts, rights, gains, strict=True):
            yield name, b.view(d_out, r), a.view(r, d_in), e

    @property
    def changes(self) -> list[LowRank]:
        """The same as changes of weights."""
        return [LowRank(f"{name}.weight", self.scale * b, e[:, None] * a) for name, b, a, e in self.parts]

    @contextmanager
    def applied(self, model: Model) -> Iterator[None]:
        """Wear the adapter; on exit the model is as before, bit for bit. Raises ValueError when it doesn't fit."""
        wearer = Wearer(model)
        wearer.wear(self.changes)
        self._worn.append((model, wearer))
        try:
            with model.carrying(self, {}):
                yield
        finally:
            self._worn.remove((model, wearer))
            wearer.take_off()

    @contextmanager
    def silent(self, model: Model) -> Iterator[None]:
        """Within it, `model`, which wears this adapter, has its matrices without it."""
        [wearer] = [w for m, w in self._worn if m is model]
        wearer.take_off()
        try:
            yield
        finally:
            wearer.wear(self.changes)

    def after(self, earlier: Adapter) -> Adapter:
        """This adapter: it was trained on from the earlier one."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right, "gains": self.gains}

    def fields(self) -> dict[str, Any]:
        return {"shapes": [list(s) for s in self.shapes], "rank": self.rank, "scale": self.scale}


def _silent(worn: Adapter | None, model: Model) -> AbstractContextManager[None]:
    return nullcontext() if worn is None else worn.silent(model)


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """The trained parts of one matrix: b (d_out, r), a (r, d_in), e (r,) or (r, 1); all ones and fixed for LoRA."""

    b: Tensor
    a: Tensor
    e: Tensor
    scale: float
    trained_e: bool

    @property
    def factors(self) -> list[Tensor]:
        return [self.a, self.b, *([self.e] if self.trained_e else [])]


def _loss(model: Model, rows: Sequence[locate.Row]) -> Tensor:
    """Mean cross-entropy of the target tokens (nats)."""
    ids, mask = model.batch([r.ids for r in rows])
    where = [(i, r.first - 1 + j, x) for i, r in enumerate(rows) for j, x in enumerate(r.labels)]
    row, column, label = (torch.tensor(c, device=ids.device) for c in zip(*where, strict=True))
    hidden, _ = model.hidden(ids, mask, use_cache=False)
    return nn.functional.cross_entropy(model.logits(hidden[row, column]).float(), label)


def _penalty(s: Lora, layers: Mapping[str, _Layer]) -> Tensor | float:
    """AdaLoRA's eq. 4 as peft has it: half the mean of |AAᵀ - I| and |BᵀB - I| (Frobenius) over all factors."""
    if s.type != "adalora":
        return 0.0
    squares = [m for x in layers.values() for m in (x.a @ x.a.T, x.b.T @ x.b)]
    eye = torch.eye(s.rank, device=squares[0].device)
    return 0.5 * torch.stack([(m - eye).norm() for m in squares]).mean()


@contextmanager
def _own_randomness(model: Model, seed: int, requests: Sequence[EditRequest]) -> Iterator[None]:
    """Within it, random numbers depend on the seed and the requests; afterwards the generators are as before."""
    what = json.dumps([seed, *([q.prompt, q.subject, q.target] for q in requests)])
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int.from_bytes(hashlib.sha256(what.encode()).digest()[:7], "big"))
        yield


@contextmanager
def _injected(model: Model, s: Lora, start: Adapter | None) -> Iterator[dict[str, _Layer]]:
    """Within it, peft's layers stand in the places of the adapted modules; they begin with the weights of `start`.

    Afterwards the modules themselves stand there again. Raises ValueError when no module has such a name.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    assert s.modules is not None and s.layers is not None
    before = dict(model.net.named_modules())
    state = torch.get_rng_state()
    torch.manual_seed(s.seed)  # the first weights are the same whatever the request
    try:
        _inject(model, s, _transposed(before, s))
        torch.set_rng_state(state)
        tuned = {n: m for n, m in model.net.named_modules() if isinstance(m, BaseTunerLayer)}
        layers = {name: _layer(module) for name, module in tuned.items()}
        for name, b, a, e in start.parts if start else ():
            if name not in layers:
                raise ValueError(f"the worn adapter has {name}, which these settings don't adapt")
            with torch.no_grad():
                layers[name].b.copy_(b)
                layers[name].a.copy_(a)
                layers[name].e.copy_(e.reshape(layers[name].e.shape))
        yield layers
    finally:
        torch.set_rng_state(state)
        for name, module in before.items():
            parent, _, leaf = name.rpartition(".")
            if leaf and before[parent]._modules[leaf] is not module:
                before[parent]._modules[leaf] = module
        model.net.__dict__.pop("peft_config", None)
        model.net.eval().requires_grad_(False)


def _transposed(modules: Mapping[str, nn.Module], s: Lora) -> bool:
    """Whether the adapted matrices are stored as (d_in, d_out)."""
    from transformers.pytorch_utils import Conv1D

    assert s.modules is not None
    return any(isinstance(m, Conv1D) for n, m in modules.items() if n.split(".")[-1] in s.modules)


def _inject(model: Model, s: Lora, transposed: bool) -> None:
    import peft

    adalora: Any = peft.AdaLoraModel
    assert s.modules is not None
    common: dict[str, Any] = {
        "target_modules": list(s.modules),
        "layers_to_transform": list(s.layers) if s.layers else None,
        "lora_alpha": s.alpha,
        "lora_dropout": s.dropout,
        "fan_in_fan_out": transposed,
    }
    if s.type == "adalora":
        never = 10**9  # when ranks would be allocated anew
        config: Any = peft.AdaLoraConfig(init_r=s.rank, target_r=s.rank, total_step=2 * never, tinit=never, **common)
        adalora(model.net, {"default": config}, "default")
    else:
        peft.LoraModel(model.net, {"default": peft.LoraConfig(r=s.rank, **common)}, "default")


def _layer(module: Any) -> _Layer:
    for kind in (module.lora_A, module.lora_B, *([module.lora_E] if hasattr(module, "lora_E") else [])):
        for factor in kind.parameters():
            factor.data = factor.data.float()  # whatever the model's type
    a, b = module.lora_A["default"], module.lora_B["default"]
    if hasattr(module, "lora_E"):
        e = module.lora_E["default"]
        scale = float(module.scaling["default"] / (module.ranknum["default"] + 1e-5))
        return _Layer(b, a, e, scale, True)
    return _Layer(b.weight, a.weight, torch.ones(a.weight.shape[0]), float(module.scaling["default"]), False)
