"""SERAC against recorded vectors: scope scores, nearest entries, and the mixed logits of base and counterfactual."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from methods.parts.encoder import Encoder
from methods.parts.scope_nets import Nets
from methods.serac import PreparedSerac, Scope, Serac, mixture
from raysys.model import Model
from raysys.patch import Wearer, merge
from tests.golden.common import Case, Line, error, logits


def _nets(case: Case) -> Nets:
    """The networks whose weights were recorded, built as the folders of the recorded names say."""
    root = Path(case.model.name).parents[1]
    folder, small = root / case.hparams["cls_name"], root / case.hparams["small_name"]
    classifier = AutoModel.from_pretrained(folder)
    counterfactual = AutoModelForCausalLM.from_pretrained(small, attn_implementation="eager")
    for part, net in (("classifier", classifier), ("replacement", counterfactual)):
        prefix = f"hyper.{part}."
        recorded = {k.removeprefix(prefix): v for k, v in case.vectors.items() if k.startswith(prefix)}
        unknown = net.load_state_dict(recorded, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"the {part} has no {', '.join(unknown)}")
    return Nets(Encoder(classifier.eval(), AutoTokenizer.from_pretrained(folder), "first"), counterfactual.eval())


@torch.no_grad()
def _serac(case: Case) -> Iterator[Line]:
    yield Line(
        case.name, "hyper.scale (the paper's classifier has none)", float((case.vectors["hyper.scale"] - 1).abs())
    )
    settings = Serac(published=True, classifier=case.hparams["cls_name"], counterfactual=case.hparams["small_name"])
    prepared = PreparedSerac(settings=settings, block=_nets(case).packed(), model=case.model)
    yield Line(case.name, "logits.pre", error(logits(case), case.vectors["logits.pre"]))
    before = logits(case)
    for mode in ("reference", "chained"):  # only the last edit kept, all kept
        wearer, worn = Wearer(case.model), ()  # type: tuple[Wearer, tuple[Patch, ...]]
        for number, batch in enumerate(case.batches, 1):
            edit = prepared.edit(case.model, [case.requests[i] for i in batch])
            patches = [dataclasses.replace(p, last_only=mode == "reference") for p in edit.patches]  # type: ignore[type-var]
            worn = merge(worn, patches)
            wearer.wear(worn)
            scope = case.model.wears(Scope)
            assert scope is not None
            texts = [q.text for q in case.requests]
            scores, entry = scope.scores(case.model, texts)
            wanted = case.vectors[f"{mode}.sims.after{number}"]
            yield Line(case.name, f"{mode}.sims.after{number}", error(scores, wanted[:, 0]))
            yield Line(case.name, f"{mode} nearest after{number}", float((entry != wanted[:, 1]).sum()))
            what = f"{mode}.logits.after{number}"
            mixed = mixture(before, _small(case, scope, scores), scores)
            yield Line(case.name, what, error(mixed, case.vectors[what]))
        wearer.take_off()


def _small(case: Case, scope: Scope, scores: Tensor) -> Tensor:
    """The counterfactual model's logits at the end of each edit prompt, whatever its score: (requests, V)."""
    every = dataclasses.replace(scope, threshold=-1.0)
    rows = []
    with every.applied(case.model):
        for detour in every.reroute(case.model, [tuple(case.model.encode(q.text)) for q in case.requests]):
            assert detour is not None
            small: Model = detour.model
            hidden, _ = small.hidden(torch.tensor([detour.prompt]), use_cache=False)
            rows.append(small.logits(hidden[0, -1]))
    return torch.stack(rows)


INPUTS = {"SERAC": ("hyper.classifier.*", "hyper.replacement.*")}  # the trained networks, which must fit

METHODS: dict[str, Callable[[Case], Iterator[Line]]] = {"SERAC": _serac}
