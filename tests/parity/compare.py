"""One form on one model, by both: what agrees, and what does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from raysys.blocks import by_prefix, pack
from raysys.chat import Chat
from raysys.model import Model
from raysys.scoring import Engine
from raysys.stats import pooled_error, standard_error
from raysys.types import Answer, Choose, Chosen, Generate, Generated, Query
from tests.parity.forms import Form

CLOSE = 1e-4  # of likelihoods in nats, and of the two best logits
RELATIVE = 1e-6  # of a likelihood beyond 100 nats: a float32 of 500 nats is itself no finer than 3e-5
EXCEPTED = 0.01  # share of near-ties at most
BATCH = 8


@dataclass(kw_only=True)
class Found:
    """`faults`: what differs, in words; `ties`: ids of the excepted items; `gap`: largest difference of likelihoods."""

    items: int = 0
    gap: float = 0.0
    ties: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    values: dict[str, tuple[float, float]] = field(default_factory=dict)  # metric -> aggregate, standard error


def compare(model: Model, peer: Any, form: Form, data: str, limit: int | None, chat: Chat | None = None) -> Found:
    """Ask both the same items, as plain prompts or through the model's chat template, and compare everything."""
    benchmark = form.ours(data, limit)
    queries = list(benchmark.queries())
    found = Found(items=len(queries))
    tasks = form.parts(form, data, limit)
    for task in tasks.values():
        task.build_all_requests(limit=limit or form.limit, **templated(peer, chat))
    asked = [
        (group, i) for group, task in tasks.items() for i in sorted(task.instances, key=lambda i: (i.doc_id, i.idx))
    ]
    said = replies(peer, [i for _, i in asked])
    mine = answers(model, queries, chat)
    place = 0
    items: list[tuple[Query, str, Any, list[Any]]] = []
    for query in queries:
        width = len(query.choices) if isinstance(query, Choose) else 1
        group, instance = asked[place]
        theirs = said[place : place + width]
        posed = chat.asked(model.tokenizer, query) if chat else query
        if posed.prompt != instance.args[0] or query.group not in (group, ""):
            found.faults.append(f"{query.id}: another prompt")
            return found
        if isinstance(posed, Choose) and posed.choices != tuple(i.args[1] for _, i in asked[place : place + width]):
            found.faults.append(f"{query.id}: other choices")
            return found
        agree(model, posed, mine[query.id], theirs, found)
        items.append((query, group, instance, [asked[place + k][1] for k in range(width)]))
        place += width
    if place != len(asked):
        found.faults.append(f"{len(asked)} requests of the harness, {place} of ours")
        return found
    for (_, instance), value in zip(asked, said, strict=True):
        instance.resps, instance.filtered_resps = [value], {}
    for task in tasks.values():
        task.apply_filters()
    scored = {q.id: {s.metric: s.value for s in benchmark.score(q, mine[q.id])} for q, *_ in items}
    judged: dict[tuple[str, str], Any] = {}  # the harness' scores of an item behind a filter: costly, so only once
    for query, group, instance, instances in items:
        for chain in {chain for chain, _ in form.metrics.values()}:
            given = [i.filtered_resps[chain] for i in instances]
            judged[query.id, chain] = tasks[group].process_results(instance.doc, given)
    for metric, (chain, name) in form.metrics.items():
        totals(tasks, items, scored, judged, metric, chain, name, found)
    if len(found.ties) > EXCEPTED * found.items:
        found.faults.append(f"{len(found.ties)} near-ties: more than 1 %")
    return found


def templated(peer: Any, chat: Chat | None) -> dict[str, Any]:
    """What the harness' tasks are told of a chat."""
    if chat is None:
        return {}
    return {
        "apply_chat_template": True,
        "chat_template": peer.apply_chat_template,
        "fewshot_as_multiturn": chat.multiturn,
        "system_instruction": chat.system or None,
    }


def answers(model: Model, queries: Sequence[Query], chat: Chat | None = None) -> dict[str, Answer]:
    """Our answer to every query."""
    engine, how = Engine(model), {"batch": BATCH, "size": 256}
    blocks = [b for g in by_prefix(queries) for b in pack(model.tokens, "parity", {}, g, chat=chat, **how)]
    return {i.query.id: a for b in blocks for i, a in zip(b.items, engine.answer(b), strict=True)}


def replies(peer: Any, instances: Sequence[Any]) -> list[Any]:
    """What the harness' own model says to its requests."""
    kinds = {i.request_type for i in instances}
    assert len(kinds) == 1, kinds
    return list(getattr(peer, kinds.pop())(list(instances), disable_tqdm=True))


def agree(model: Model, query: Query, ours: Answer, theirs: Sequence[Any], found: Found) -> None:
    """Likelihoods and prediction, or the generated text, of one item."""
    if isinstance(ours, Chosen):
        values = [float(v) for v, _ in theirs]
        gaps = [abs(c.logprob - v) for c, v in zip(ours.choices, values, strict=True)]
        gap = max(gaps)
        found.gap = max(found.gap, gap)
        if not all(g <= max(CLOSE, RELATIVE * abs(v)) for g, v in zip(gaps, values, strict=True)):
            found.faults.append(f"{query.id}: likelihoods differ by {gap:.2g}")
        if ours.best != int(np.argmax(values)):
            top = sorted(values)[-2:]
            if top[1] - top[0] <= CLOSE:
                found.ties.append(query.id)
            else:
                found.faults.append(f"{query.id}: another choice")
        return
    assert isinstance(query, Generate) and isinstance(ours, Generated)
    if ours.text != theirs[0]:
        if nearest(model, query, ours.text, theirs[0]) <= CLOSE:
            found.ties.append(query.id)
        else:
            found.faults.append(f"{query.id}: {ours.text[:60]!r} is not {theirs[0][:60]!r}")


def nearest(model: Model, query: Generate, one: str, other: str) -> float:
    """Gap of the two best logits where the texts part (a character may take four tokens: the least of those)."""
    shared = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    ids = model.tokens.encode(query.prompt, generation=True)[-(model.max_length - query.max_tokens) :]
    start, gaps = len(ids), []
    with torch.inference_mode():
        for _ in range(query.max_tokens):
            logits = model.logits(model.hidden(torch.tensor([ids]), use_cache=False)[0][:, -1])[0]
            best = logits.topk(2)
            gaps.append(float(best.values[0] - best.values[1]))
            ids.append(int(best.indices[0]))
            if len(model.decode(ids[start:])) > shared:
                break
    return min(gaps[-4:])


def totals(tasks: Any, items: Any, scored: Any, judged: Any, metric: str, chain: str, name: str, found: Found) -> None:
    """Score of every item, aggregate and standard error of one metric; near-ties are left out of both."""
    from lm_eval.api.metrics import pooled_sample_stderr, stderr_for_metric

    yours: dict[str, list[float]] = {}
    ours: dict[str, list[float]] = {}
    scale = 1.0
    for query, group, *_ in items:
        if query.id in found.ties:
            continue
        their, own = float(judged[query.id, chain][name]), scored[query.id][metric]
        scale = 100.0 if metric.endswith(("_max", "_diff")) else 1.0
        if not math.isclose(scale * own, their, abs_tol=CLOSE):
            found.faults.append(f"{query.id}: {metric} {scale * own:.6g} is not {their:.6g}")
        yours.setdefault(group, []).append(their)
        ours.setdefault(group, []).append(scale * own)
    sizes = [len(v) for v in ours.values()]
    whole = [v for values in ours.values() for v in values]
    mean, error = float(np.mean(whole)), pooled_error([standard_error(np.array(v)) for v in ours.values()], sizes)
    means, errors = [], []
    for group, values in yours.items():
        aggregate = tasks[group].aggregation()[name]
        means.append(float(aggregate(values)) * len(values))
        errors.append(stderr_for_metric(aggregate, bootstrap_iters=1000)(values) if len(values) > 1 else math.nan)
    pooled = pooled_sample_stderr(errors, sizes) if len(errors) > 1 else errors[0]
    found.values[metric] = (mean, error)
    for what, a, b in (("mean", mean, sum(means) / sum(sizes)), ("standard error", error, float(pooled))):
        if round(a, 6) != round(b, 6) and abs(a - b) > 1e-6:
            found.faults.append(f"{metric}: {what} {a:.7f} is not {b:.7f}")
