"""What the smaller commands print."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from raysys import words
from raysys.stats import Estimate

if TYPE_CHECKING:
    from raysys.checks import Single
    from raysys.local import Reply
    from raysys.plan import Plan
    from raysys.preparing import Prepared
    from raysys.runs import Status
    from raysys.scoring_bench import Line
    from raysys.tuning import Trial

Figure = tuple[str, str, Estimate, float | None]  # what, metric, figure, chance
STATES = {"complete": "green", "running": "cyan", "failed": "red", "stopped": "yellow"}


def grid(*columns: str, left: int = 1) -> Table:
    """A plain table; the first `left` columns hold text, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if i < left else "right", overflow="fold")
    return table


def facts(pairs: Mapping[str, str]) -> Table:
    """Names and values."""
    table = Table.grid(padding=(0, 2))
    for name, value in pairs.items():
        table.add_row(Text(name, style="dim"), Text(value))
    return table


def plan_table(plan: Plan) -> RenderableType:
    """What a study would do."""
    parts = grid("model", "benchmark", "queries", "blocks", "tokens", "units", "tokens in all", left=2)
    for p in plan.parts:
        figures = (p.queries, p.blocks, p.tokens, p.units, p.tokens_in_all)
        parts.add_row(Text(p.model), Text(p.benchmark), *(number(n) for n in figures))
    weights = grid("model", "parameters", "one copy", "a rank-one edit", "a dense edit")
    for w in plan.weights:
        sizes = map(words.size, (w.bytes, w.rank_one_bytes, w.dense_bytes))
        weights.add_row(Text(w.model), number(w.parameters), *sizes)
    weights.caption = Text(
        "an edit: what it adds to a snapshot for each matrix it changes, dense the most", style="dim"
    )
    weights.caption_justify = "left"
    actors = f"{words.count(plan.editors, 'editor')}, {words.count(plan.evaluators, 'evaluator')}"
    machines = f"{plan.cpus} CPU threads, {plan.gpus:g} GPUs, {words.size(plan.memory_bytes)} of weights"
    dropped = f" ({plan.dropped} records left out)" if plan.dropped else ""
    about = {
        "results": plan.folder,
        "edits": f"{number(plan.edits)} in {words.count(plan.cells, 'stream')}{dropped}",
        "snapshots": ", ".join(map(str, plan.snapshots)),
        "units": f"{number(plan.units)}, {number(plan.done)} done",
        "tokens": number(plan.tokens),
        "actors": f"{actors}: {machines}",
    } | {f"{model} fits" if len(plan.places) > 1 else "memory": text for model, text in plan.places.items()}
    return Group(Text(plan.name, style="bold"), facts(about), Text(""), parts, Text(""), weights)


def status_table(status: Status) -> RenderableType:
    """How far a run is."""
    about = {"folder": status.folder, "units scored": number(status.units), "failures": str(status.failures)}
    if status.started:
        about["started"] = words.moment(status.started)
    if status.finished and status.state == "complete":
        about["finished"] = words.moment(status.finished)
    if status.report:
        about["report"] = status.report
    if status.state == "stopped":
        about["to continue"] = "run it again"
    table = grid("edit stream", "model", "method", "order", "edits", left=3)
    for s in status.streams:
        table.add_row(Text(s.cell), Text(s.model), Text(s.method), str(s.order), f"{s.edits}/{s.wanted}")
    head = Text.assemble((status.name, "bold"), "  ", (status.state, STATES[status.state]))
    return Group(head, facts(about), Text(""), table)


def runs_table(found: Sequence[Status]) -> RenderableType:
    """All runs."""
    table = grid("folder", "state", "models", "methods", "edits", "units", "failures", "started", left=4)
    for s in found:
        models, methods = ({getattr(x, k) for x in s.streams} for k in ("model", "method"))
        edits = f"{sum(x.edits for x in s.streams)}/{sum(x.wanted for x in s.streams)}"
        started = words.moment(s.started) if s.started else ""
        table.add_row(
            Text(s.folder), Text(s.state, style=STATES[s.state]), Text(", ".join(sorted(models))),
            Text(", ".join(sorted(methods))), edits, str(s.units), str(s.failures), started,
        )  # fmt: skip
    return table


def replies_table(prompt: str, replies: Sequence[Reply]) -> RenderableType:
    """Answers side by side."""
    table = grid("after", prompt, left=2)
    for reply in replies:
        who = f"{reply.cell}, {words.count(reply.edits, 'edit')}" if reply.cell else "base model"
        table.add_row(Text(who), Text(reply.text.strip()) if reply.text.strip() else Text("(empty)", style="dim"))
    return table


def world_table(rows: Sequence[Figure]) -> RenderableType:
    """The figures of the world's model."""
    table = grid("", "metric", "per cent", "±", "items", "chance", left=2)
    for what, metric, figure, chance in rows:
        guessed = "" if chance is None else words.percent(chance)
        width = words.half(figure).removeprefix("±")
        table.add_row(Text(what), Text(metric), words.percent(figure.mean), width, number(figure.n), guessed)
    return table


def world_row(row: Figure) -> dict[str, Any]:
    """One of them as plain data."""
    what, metric, figure, chance = row
    return {"what": what, "metric": metric, "mean": figure.mean, "n": figure.n, "chance": chance}


def singles_tree(found: Sequence[Single], shares: Mapping[str, float]) -> dict[str, Any]:
    """Single edits as plain data."""
    refused = Counter(s.refused for s in found if s.refused)
    return {
        "edits": len(found),
        "refused": dict(refused),
        "seconds_per_edit": fmean(s.seconds for s in found) if found else None,
        "largest_miss": max((s.miss for s in found), default=None),
        "shares": dict(shares),
    }


def singles_table(title: str, tree: Mapping[str, Any]) -> RenderableType:
    """Single edits for people."""
    shares = tree["shares"]
    table = grid("probe", "P(right) > P(wrong)", "greedy answer")
    for kind in dict.fromkeys(name.partition("/")[0] for name in shares):
        table.add_row(kind, *(words.percent(shares.get(f"{kind}/{way}", math.nan)) for way in ("likelier", "greedy")))
    about = {"edits": str(tree["edits"]), "seconds an edit": f"{tree['seconds_per_edit'] or 0:.2f}"}
    about["largest miss"] = f"{tree['largest_miss'] or 0:.1e} (worn matrix against the value it should give)"
    about |= {f"refused {n}": reason for reason, n in tree["refused"].items()}
    if tree["refused"]:
        table.caption, table.caption_justify = Text(refusals(sum(tree["refused"].values())), style="dim"), "left"
    return Group(Text(title, style="bold"), facts(about), Text(""), table)


def refusals(count: int) -> str:
    """How refused edits are counted, below a table of single edits."""
    return f"{words.count(count, 'refused edit')}: failed, whatever the model said before; not asked for neighbourhood"


def prepared_tree(found: Sequence[Prepared]) -> list[dict[str, Any]]:
    """What was prepared, as plain data."""
    return [
        {"model": p.model, "method": p.method, "artifacts": dict(p.artifacts), "fault": p.fault or None} for p in found
    ]


def prepared_table(found: Sequence[Prepared]) -> RenderableType:
    """What was prepared: names of artifacts with the beginnings of their hashes."""
    table = grid("model", "method", "artifacts", left=3)
    for p in found:
        made = ", ".join(f"{name} {digest[:8]}" for name, digest in p.artifacts.items())
        text = Text(p.fault, style="red") if p.fault else Text(made or "it needs none", style="" if made else "dim")
        table.add_row(Text(p.model), Text(p.method), text)
    return table


def trials_table(title: str, trials: Sequence[Trial], best: Trial) -> RenderableType:
    """Every trial of a search, the best first."""
    kinds = list(dict.fromkeys(name.partition("/")[0] for t in trials for name in t.shares))
    table = grid("settings", "score", *kinds, "s/edit")
    for trial in sorted(trials, key=lambda t: -t.score):
        said = ", ".join(f"{k} = {v}" for k, v in trial.changes.items()) or "its own settings"
        shares = (
            "/".join(words.percent(trial.shares.get(f"{k}/{way}", math.nan), 0) for way in ("likelier", "greedy"))
            if f"{k}/greedy" in trial.shares
            else "–"
            for k in kinds
        )
        text = Text(said, style="bold" if trial is best else "red" if trial.fault else "")
        table.add_row(text, words.percent(trial.score), *shares, f"{trial.seconds:.2f}")
    about = "per cent: likelier than its rival / greedy; refused edits count as failed"
    table.caption, table.caption_justify = Text(about, style="dim"), "left"
    faults = [Text(f"{t.fault}", style="red") for t in trials if t.fault]
    return Group(Text(title, style="bold"), table, *faults)


def scoring_table(found: Mapping[str, Line], memory: tuple[int, int]) -> RenderableType:
    """What scoring costs, line by line: CPU seconds of both sides, how many times faster, and whether they agree."""
    table = grid("", "ours, s", "other, s", "times faster", "share", "same answers")
    for line in found.values():
        mine, other = (f"{median(side):.2f}" for side in (line.ours, line.other))
        table.add_row(line.what, mine, other, f"{line.ratio:.2f}", f"{line.share:.0%}", "yes" if line.same else "NO")
    ours, theirs = memory
    table.add_row("peak memory, MMLU, 5 shots", words.size(ours), words.size(theirs), "", f"{ours / theirs:.0%}", "")
    about = (
        "other: lm-evaluation-harness for a first snapshot, our own first snapshot or plain generation for a later one"
    )
    table.caption, table.caption_justify = Text(about, style="dim"), "left"
    return table


def number(n: int) -> str:
    """With thin blanks between thousands."""
    return f"{n:,}".replace(",", "\u202f")
