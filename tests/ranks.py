"""One of two processes that hold a model between them: split models beside whole ones, every family in turn.

`python -m tests.ranks RANK PORT FOLDER` leaves FOLDER/RANK.json: for each family how far the split model is from the
whole one. Both ranks look at everything.
"""

from __future__ import annotations

import json
import random
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from methods.parts import locate, moments
from raysys import names
from raysys.model import Model
from raysys.patch import Dense, LowRank, Wearer
from raysys.shards import Columns, Ranks, Rows, Sharded
from raysys.types import EditRequest
from tests import families

FAMILIES: dict[str, dict[str, Any]] = {  # with heads and widths that do not divide by two among them
    "llama": {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 49},
    "mistral": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 51},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt_neox": {"hidden_size": 48, "num_attention_heads": 3},
    "gptj": {},
    "opt": {},
    "gemma2": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "phi": {},
}
_SEARCH = {"steps": 5}
_SPREAD = {**_SEARCH, "layers": (0, 1), "batch": 3}
METHODS: dict[str, dict[str, Any]] = {
    "rome": {**_SEARCH, "layer": 1},
    "memit": {**_SPREAD, "weight": 20.0},
    "r_rome": {**_SEARCH, "layer": 1},
    "emmet": {**_SEARCH, "layer": 1, "batch": 3},
    "pmet": {**_SPREAD, "weight": 20.0},
    "alphaedit": {**_SPREAD, "threshold": 0.5},
    "encore": {**_SPREAD, "weight": 20.0},
    "nse": {**_SPREAD, "weight": 20.0},
    "sphere": {**_SPREAD, "threshold": 0.5},
}
EVERY_METHOD = ("llama", "gpt_neox")
REQUESTS = tuple(
    EditRequest(f"e{i}", "{} was born in", subject, target, None)
    for i, (subject, target) in enumerate((("Anna", "Rome"), ("Bert", "Oslo"), ("Carla", "Lima")))
)
TEXTS = ["Anna was born in Rome . The Eiffel tower is in Paris .", "Bert works as a pilot in Oslo"]


def apart(a: Tensor, b: Tensor) -> float:
    """|a - b| over |b|."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def corpus() -> str:
    """Enough text for second moments that are far from singular: 200 lines of ten random words."""
    draw = random.Random(0)
    return "\n".join(" ".join(draw.choices(families.WORDS + families.NAMES, k=10)) for _ in range(200))


def gradient(model: Model) -> Tensor:
    """Of an edit's loss, by what is added to the first block's MLP at the subject: (d,)."""
    row = locate.row(model, REQUESTS[0], target=True)
    ids, mask = model.batch([row.ids])
    offset = torch.zeros(model.width, requires_grad=True)
    at = torch.arange(ids.shape[1]) == row.at

    def add(_: Tensor, out: Tensor) -> Tensor:
        return (out.reshape(*ids.shape, -1) + at[:, None] * offset).reshape(out.shape)

    with model.watching(model.mlp_out(0), add):
        hidden, _ = model.hidden(ids, mask, use_cache=False)
    logprobs = model.logits(hidden[0, row.first - 1 :]).log_softmax(-1)
    (-logprobs.gather(1, torch.tensor(row.labels)[:, None]).mean()).backward()
    assert offset.grad is not None
    return offset.grad


def watched_gradient(model: Model, name: str) -> Tensor:
    """What enters `name`, and the gradient of an edit's loss at its output, whole: one row of numbers."""
    seen: list[Tensor] = []

    def keep(given: Tensor, out: Tensor) -> Tensor:
        out = out.detach().requires_grad_(True) if not out.requires_grad else out
        out.retain_grad()
        seen.extend((given, out))
        return out

    ids, mask = model.batch([model.encode(TEXTS[0])])
    with model.watching(name, keep):
        hidden, _ = model.hidden(ids, mask, use_cache=False)
    model.logits(hidden)[..., 7].sum().backward()
    assert seen[1].grad is not None
    return torch.cat([seen[0].detach().flatten(), seen[1].grad.flatten()])


def edited(model: Model, method: str, cache: Path, requests: Any, **settings: Any) -> dict[str, Tensor]:
    """The sum of a method's changes by weight: (d_out, d_in)."""
    common = {"corpus": str(cache.parent / "corpus.txt"), "documents": 200, "contexts": ((4, 2),)} | settings
    prepared = names.build(names.method(method), common, method).prepare(model, cache)
    found = {}
    for patch in prepared.edit(model, requests).patches:
        found[patch.weight] = torch.zeros(patch.shape)
        patch.add_to(found[patch.weight])
    return found


def snapshot(model: Model) -> list[Any]:
    """Changes of a row module, of a column module and of a bias, where there is one."""
    torch.manual_seed(3)
    patches: list[Any] = []
    for name, low in ((model.mlp_out(1), True), (model.arch.mlp_in[0].format(1), True), (model.mlp_out(0), False)):
        d_out, d_in = model.shape(f"{name}.weight")
        if low:
            patches.append(LowRank(f"{name}.weight", torch.randn(d_out, 5), torch.randn(5, d_in)))
        else:
            patches.append(Dense(f"{name}.weight", torch.randn(d_out, d_in)))
        if getattr(model.module(name), "bias", None) is not None:
            patches.append(Dense(f"{name}.bias", torch.randn(d_out, 1)))
    return patches


def compared(family: str, ranks: Ranks, cache: Path) -> dict[str, float]:
    """How far the split model of `family` is from the whole one, by what is compared."""
    from actors.group import split

    bos = list(families.SIZES).index(family) % 2 == 1
    whole, part = (
        Model(families.network(family, **FAMILIES[family]), families.tokenizer(bos), family) for _ in range(2)
    )
    digest = part.digest
    part = split(part, ranks)
    assert isinstance(part, Sharded) and part.digest == digest
    kinds = {type(m) for m in part.net.modules()}
    assert Columns in kinds and Rows in kinds
    shares = {m.sizes for m in part.net.modules() if isinstance(m, Columns | Rows)}
    found = {"uneven": float(any(len(set(s)) > 1 for s in shares))}
    ids, mask = whole.batch([whole.encode(t) for t in TEXTS])
    with torch.no_grad():
        logits = [m.logits(m.hidden(ids, mask)[0]) for m in (part, whole)]
    found["logits"] = float((logits[0] - logits[1])[mask.bool()].abs().max())
    found["gradient"] = apart(gradient(part), gradient(whole))
    for name in (whole.mlp_out(1), whole.arch.mlp_in[0].format(1), whole.arch.attn_out.format(1)):
        found[f"watched {name}"] = apart(watched_gradient(part, name), watched_gradient(whole, name))
    moment = [moments.collect(m, [m.mlp_out(1)], TEXTS)[m.mlp_out(1)].total for m in (part, whole)]
    found["second moment"] = apart(moment[0], moment[1])
    methods = METHODS if family in EVERY_METHOD else {k: METHODS[k] for k in ("rome", "memit")}
    for method, own in methods.items():
        requests = REQUESTS[: own.get("batch", 1)]  # artifacts are the split model's: the digest is the same
        here, there = (edited(m, method, cache, requests, **own) for m in (part, whole))
        found[method] = max(apart(here[n], there[n]) for n in there)
    found["worn"] = worn(part, whole, snapshot(whole))
    return found


def worn(part: Model, whole: Model, patches: list[Any]) -> float:
    """How many weights differ in a bit while both wear `patches`, and once they are taken off."""
    wearers = [Wearer(m) for m in (part, whole)]
    differ = 0.0
    for change in (patches[:1], patches, []):
        for wearer in wearers:
            wearer.wear(change)
        differ += sum(not torch.equal(part.matrix(n), whole.matrix(n)) for n, _ in whole.net.named_parameters())
    return differ


def main() -> None:
    rank, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=limit)
    ranks = Ranks(rank, 2)
    found: dict[str, Any] = {}
    for family in FAMILIES:
        started = time.perf_counter()
        found[family] = compared(family, ranks, folder / f"cache-{rank}")
        found[family]["seconds"] = time.perf_counter() - started
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
