"""The report as one HTML file that needs nothing else: no network, no library, no script to be read.

Every text that comes from a study (names, prompts, reasons, paths) is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

from raysys import charts, words
from raysys.account import Account, Left, Times
from raysys.budget import Budget
from raysys.charts import Axis, Dot, Line
from raysys.frame import Metric
from raysys.meaning import KEY
from raysys.report_tables import ability_table, edits_table, matrix
from raysys.summary import KINDS, PROTOCOLS, MethodView, Point, Summary

Facts = Mapping[str, object]


def page(
    name: str, summary: Summary, account: Account, chance: Mapping[Metric, float], spec_toml: str, manifest: Facts
) -> str:
    """The whole page. `manifest` is shown as it is; `spec_toml` is what a user would run again."""
    folder = files("raysys")
    css, script = ((folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    sections = [
        _budgets(summary),
        *_ability(summary, chance),
        *_edits(summary),
        _numbers(summary),
        _records(account),
        _time(account),
        _repeat(spec_toml, manifest, account),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(name)} – raysys</title>
<link rel="icon" href="data:,">
<style>
{css}</style>
</head>
<body>
<main>
{_head(name, summary, account, manifest)}
{"".join(sections)}
</main>
<script>
{script}</script>
</body>
</html>
"""


def _head(name: str, summary: Summary, account: Account, manifest: Facts) -> str:
    about = [
        words.count(len(summary.models), "model"),
        words.count(len({m.method for m in summary.methods}), "method"),
        words.count(max((len(m.cells) for m in summary.methods), default=0), "edit order"),
        words.count(len(summary.ability), "ability benchmark"),
        words.count(account.edits, "edit"),
        words.count(account.units, "scored unit"),
    ]
    ended = manifest.get("finished")
    when = f"Finished {words.moment(ended)}." if isinstance(ended, int | float) and ended else "Not finished yet."
    jumps = [("budget", "Edit budget"), ("ability", "General ability"), ("edits", "Edits"), ("numbers", "Numbers"),
             ("records", "Records"), ("time", "Time"), ("repeat", "To repeat this run")]  # fmt: skip
    question = (
        f"How many edits can {' / '.join(summary.models) or 'the model'} take before it stops being a good model?"
    )
    published = "".join(f'<p class="note">{escape(text)}</p>\n' for text in account.published)
    warning = ""
    if account.failures:
        parts = words.count(len(account.failures), "part")
        reasons = '<a href="#records">Reasons</a>'
        warning = f'<p class="warn">{parts} of this study failed; the figures are without that. {reasons}</p>'
    return f"""<header>
<p class="brand">raysys</p>
<h1>{escape(name)}</h1>
<p class="lead">{escape(question)}</p>
<p class="note">{escape(", ".join(about))}. {when}</p>
{published}{warning}
<nav class="jump" aria-label="Sections">{"".join(f'<a href="#{a}">{t}</a>' for a, t in jumps)}</nav>
</header>"""


def _section(name: str, heading: str, body: str, note: str = "") -> str:
    lead = f'<p class="note">{note}</p>' if note else ""
    return f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{heading}</h2>{lead}{body}</section>\n'


def _by_model(summary: Summary, show: Callable[[str, list[MethodView]], str]) -> str:
    """`show` for each model, with the model's name above where there are several."""
    named = len(summary.models) > 1
    return "".join((f"<h3>{escape(m)}</h3>" if named else "") + show(m, summary.of(m)) for m in summary.models)


# --- edit budget -----------------------------------------------------------------------------------------------------


def _budgets(summary: Summary) -> str:
    if not summary.ability:
        return _section("budget", "Edit budget", "", "No general-ability benchmark has been scored yet.")
    delta = f"{summary.delta * 100:g}"
    note = (
        f"The largest number of edits up to which every snapshot is shown, at 95 %, to have lost less than {delta} "
        "points on every general-ability benchmark (paired with the base model item by item, one-sided, Holm-corrected "
        "over the benchmarks). Few items give a small budget, not a large one. Beside it what was merely observed."
    )

    def show(_: str, methods: list[MethodView]) -> str:
        cards = "".join(_card(m, i, summary.delta) for i, m in enumerate(methods))
        key = [("kept", f"shown to have lost less than {delta}"), ("lost", f"lost more than {delta}"),
               ("open", "neither is sure"), ("collapsed", "collapsed: answers are worth nothing")]  # fmt: skip
        legend = "".join(f'<li><span class="{s}">{words.SIGNS[s]}</span>{text}</li>' for s, text in key)
        tables = "".join(matrix(m, i) for i, m in enumerate(methods))
        return f'<div class="budgets">{cards}</div><ul class="legend">{legend}</ul>{tables}'

    return _section("budget", "Edit budget", _by_model(summary, show), note)


def _card(method: MethodView, style: int, delta: float) -> str:
    budget = method.budget
    least = "≥\u202f" if budget.measured and not budget.stops else ""
    seen = "≥\u202f" if budget.measured and budget.observed == budget.measured else ""
    orders = ""
    if len(method.cells) > 1:
        each = ", ".join(f"{c.budget.shown} (observed {c.budget.observed})" for c in method.cells)
        orders = f'<p class="note">The smallest of {len(method.cells)} edit orders: {each}.</p>'
    over = "items and edit orders" if len(method.cells) > 1 else "items"
    within = ""
    if budget.measured:
        span = words.between(method.interval, budget.measured)
        within = f'<p class="note">The true number, at 95 %, over {over}: <strong>{span}</strong>.</p>'
    limit, unit = f"{delta * 100:g}\u00a0points", "edit" if budget.shown == 1 else "edits"
    return f"""<article class="budget s{style % charts.STYLES}"><h3>{charts.key(style)}{escape(method.method)}</h3>
<div class="row"><span class="big">{least}{budget.shown}</span><span class="unit">{unit}</span></div>
<p>shown to cost every benchmark less than {limit}</p>
<p class="note"><strong>{seen}{budget.observed}</strong> observed to cost no more than {limit};
{words.count(budget.measured, "edit")} measured.</p>{within}{_stops(budget)}{orders}</article>"""


def _stops(budget: Budget) -> str:
    if not budget.measured:
        return '<p class="note">No snapshot after the base was scored yet.</p>'
    if not budget.stops:
        return '<p class="note">Every measured snapshot passed.</p>'
    items = [f'<li class="{s}">{words.SIGNS[s]} {escape(text)}</li>' for s, text in words.stops(budget)]
    at = words.count(budget.stops[0].edits, "edit")
    return f'<p class="note">Ended at {at}:</p><ul class="stops">{"".join(items)}</ul>'


# --- charts ----------------------------------------------------------------------------------------------------------


def _legend(methods: Sequence[MethodView], collapsed: bool) -> str:
    items = [f"<li>{charts.key(i)}{escape(m.method)}</li>" for i, m in enumerate(methods)]
    if collapsed:
        items.append(f"<li>{charts.key(None)}collapsed: the answers no longer depend on the question</li>")
    return f'<ul class="legend">{"".join(items)}<li class="note">bands: 95 % intervals</li></ul>'


def _lines(methods: Sequence[MethodView], metric: Metric, last: int) -> list[Line]:
    def dot(method: MethodView, point: Point) -> Dot:
        e = point.estimate
        where = charts.edits_position(point.edits, last)
        return Dot(where, e.mean, e.low, e.high, words.hover(method.method, point), bool(point.collapse), point.void)

    curves = [(i, m, m.curves.get(metric, [])) for i, m in enumerate(methods)]
    return [Line(i, [dot(m, p) for p in curve]) for i, m, curve in curves if curve]


def _snapshots(methods: Iterable[MethodView]) -> list[int]:
    return sorted({p.edits for m in methods for curve in m.curves.values() for p in curve})


def _figure(caption: str, small: str, plot: str) -> str:
    aside = f"<small>{escape(small)}</small>" if small else ""
    return f"<figure><figcaption>{escape(caption)}{aside}</figcaption>{plot}</figure>"


def _curve(
    methods: Sequence[MethodView],
    metric: Metric,
    name: str,
    small: str = "",
    chance: float | None = None,
    whole: bool = True,
) -> str:
    """A figure of one metric over the number of edits, "" where it was never measured; `whole`: from 0 to 100 %."""
    snapshots = _snapshots(methods)
    lines = _lines(methods, metric, max(snapshots, default=0))
    if not lines:
        return ""
    dots = [d for line in lines for d in line.dots if not d.void]
    bounds = (0.0, 1.0, 0.25)
    if not whole:
        known = [] if chance is None else [chance]
        bounds = charts.scale([*known, *(d.low for d in dots)], [*known, *(d.high for d in dots)])
    label = f"{name} {small} over the number of edits; the figures are in the section Numbers"
    return _figure(name, small, charts.plot(label, lines, charts.edits_axis(snapshots), bounds, chance))


def _ability(summary: Summary, chance: Mapping[Metric, float]) -> Iterable[str]:
    if not summary.ability:
        return

    def show(_: str, methods: list[MethodView]) -> str:
        broken = any(p.collapse for m in methods for k in summary.ability for p in m.curves.get(k, ()))
        n = {k: max((p.estimate.n for m in methods for p in m.curves.get(k, ())), default=0) for k in summary.ability}
        figures = (
            _curve(methods, k, words.title(k), words.count(n[k], "item"), chance.get(k), False) for k in summary.ability
        )
        wide = " wide" if len(summary.ability) in (1, 2, 4) else ""
        return _legend(methods, broken) + f'<div class="charts{wide}">{"".join(figures)}</div>'

    note = "Score over the number of edits, on a logarithmic axis that starts with the untouched base model at 0."
    yield _section("ability", "General ability", _by_model(summary, show), note)


def _edits(summary: Summary) -> Iterable[str]:
    if not summary.probes and not summary.locality:
        return

    def show(_: str, methods: list[MethodView]) -> str:
        parts = [_legend(methods, False)]
        for kind in KINDS:
            figures = [
                _curve(methods, k, PROTOCOLS[p]) for p in PROTOCOLS for k in summary.probes if k[1] == f"{kind}/{p}"
            ]
            if any(figures):
                parts.append(f'<h3>{words.kind(kind)}</h3><p class="note">{words.ABOUT[kind]}</p>')
                parts.append(f'<div class="charts">{"".join(figures)}</div>')
        groups = [
            ("Retention by age", "At the last snapshot: do edits still hold, by how many edits came after them?",
             [_ages(methods, p) for p in PROTOCOLS]),
            ("Retention by age, multi-hop questions", "By how many edits came after the last one needed.",
             [_ages(methods, f"multi_hop/{p}") for p in PROTOCOLS]),
            ("Held-out facts", "Facts that were never edited: does the model still know them?",
             [_curve(methods, k, _protocol(k)) for k in summary.locality]),
        ]  # fmt: skip
        for heading, about, figures in groups:
            if any(figures):
                parts.append(f'<h3>{heading}</h3><p class="note">{about}</p>')
                parts.append(f'<div class="charts">{"".join(figures)}</div>')
        return "".join(parts)

    note = (
        "All edits made so far are asked again at every snapshot, three ways side by side: is the right answer "
        "likelier than the wrong one, is each of its tokens the likeliest when the ones before are given, and does the "
        "model say it when it writes freely."
    )
    yield _section("edits", "Edits: success, retention, locality", _by_model(summary, show), note)


def _protocol(metric: Metric) -> str:
    name = metric[1].partition("/")[2]
    return PROTOCOLS.get(name, name)


def _ages(methods: Sequence[MethodView], protocol: str) -> str:
    labels = max(([a.label for a in m.ages.get(protocol, ())] for m in methods), key=len, default=[])
    if not labels:
        return ""
    lines = []
    for i, m in enumerate(methods):
        ages = [a for a in m.ages.get(protocol, ()) if a.label in labels]
        dots = []
        for a in ages:
            e = a.estimate
            tip = f"{m.method}, {a.label} edits later\n{words.share(e)}\n{words.count(e.n, 'edit')}"
            place = charts.step_position(labels.index(a.label), len(labels))
            dots.append(Dot(place, e.mean, e.low, e.high, tip))
        lines.append(Line(i, dots))
    axis: Axis = charts.steps_axis("edits since", labels)
    way = PROTOCOLS[protocol.rpartition("/")[2]]
    name = f"Retention by age, {'multi-hop questions, ' if '/' in protocol else ''}{way}"
    return _figure(way, "", charts.plot(name, lines, axis, (0.0, 1.0, 0.25), None))


# --- tables and facts ------------------------------------------------------------------------------------------------


def _numbers(summary: Summary) -> str:
    body = "".join(
        f"<h3>{escape(cell.method)} · {escape(cell.model)} · order {cell.order}</h3>"
        + ability_table(cell, [*summary.ability, *summary.others])
        + edits_table(cell, summary.probes, summary.locality)
        for cell in summary.cells
    )
    note = (
        "Per cent (or the unit that a heading names), with half the 95 % interval; below it the change against the "
        "base on the same items, in points (or that unit). "
        "Area: the mean height of a curve over the logarithm of 1 + edits. "
        "Edits: P is how often the right answer is likelier than the wrong one, forced its share of tokens given the "
        "ones before, free whether the model says it by itself."
    )
    return _section("numbers", "Numbers", body or '<p class="note">No scores yet.</p>', note)


def _records(account: Account) -> str:
    def table(heading: str, found: Sequence[Left], none: str) -> str:
        if not found:
            return f"<h3>{heading}</h3><p>{none}</p>"
        rows = "".join(
            f'<tr><td class="text">{escape(x.reason)}</td><td>{x.count}</td>'
            f'<td class="text">{escape(x.where)}</td></tr>'
            for x in found
        )
        top = '<thead><tr><th class="text">Reason</th><th>Count</th><th class="text">First</th></tr></thead>'
        return f'<h3>{heading}</h3><div class="scroll" tabindex="0"><table>{top}<tbody>{rows}</tbody></table></div>'

    failed = "".join(
        f'<tr><td class="text">{escape(words.failure(f))}</td>'
        f'<td class="text">{escape(str(f.get("reason", "")))}</td></tr>'
        for f in account.failures
    )
    failures = "<p>None: everything was scored.</p>"
    if failed:
        top = '<thead><tr><th class="text">Given up</th><th class="text">Reason</th></tr></thead>'
        failures = f'<div class="scroll" tabindex="0"><table>{top}<tbody>{failed}</tbody></table></div>'
    body = (
        table("Records left out", account.dropped, "None: every record was used.")
        + table("Edits refused", account.refused, "None: every edit was made.")
        + f"<h3>Failures</h3>{failures}"
    )
    return _section("records", "Records", body)


def _time(account: Account) -> str:
    times: Times = account.times
    if not times.length:
        return _section("time", "Time", '<p class="note">Nothing has run yet.</p>')
    rows = []
    for lane in times.lanes:
        spans = [(a / times.length, b / times.length) for a, b in lane.busy]
        rows.append(f'<span class="who">{escape(lane.who)}</span>{charts.lane(spans, lane.does)}'
                    f'<span class="secs">{words.seconds(lane.seconds)}</span>')  # fmt: skip
    marks = "".join(f"<span>{t}</span>" for t in ("0", words.seconds(times.length / 2), words.seconds(times.length)))
    ruler = f'<span class="skip"></span><span class="ruler">{marks}</span><span class="skip"></span>'
    pauses = f" {words.count(len(times.breaks), 'pause')} between runs left out." if times.breaks else ""
    note = (
        f"Busy for {words.seconds(times.length)}: editing {words.seconds(times.editing)}, scoring "
        f"{words.seconds(times.scoring)}, both at once {words.seconds(times.both)} "
        f"({times.both / max(min(times.editing, times.scoring), 1e-9):.0%} of the shorter).{pauses} "
        f"{words.count(account.tokens, 'token')} scored."
    )
    return _section("time", "Time", f'<div class="lanes">{"".join(rows)}{ruler}</div>', note)


def _repeat(spec_toml: str, manifest: Facts, account: Account) -> str:
    about = {k: v for k, v in manifest.items() if k != KEY}
    about |= {"hardware": account.hardware} if account.hardware else {}
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in words.flat(about))
    streams = "".join(
        f"<dt>{escape(i.cell)}</dt>"
        f"<dd>model {i.model[:16]}; {escape(_settings(i.method))}; snapshot {i.snapshot[:16]}</dd>"
        for i in account.streams
    )
    body = f"""<p>Save this as <code>study.toml</code>, then <code>raysys run study.toml</code>.
<button type="button" data-copy="spec" hidden>Copy</button></p>
<pre id="spec" tabindex="0">{escape(spec_toml)}</pre>
<h3>What decided the edits</h3><p class="note">Of every edit stream: digest of the base model, the method with all its
settings and the hashes of its artifacts, and the last snapshot's id. Of hashes the first 16 digits.</p>
<dl class="facts">{streams or "<dt>nothing was edited yet</dt>"}</dl>
<h3>What it ran on</h3><dl class="facts">{facts or "<dt>nothing recorded yet</dt>"}</dl>"""
    return _section("repeat", "To repeat this run", body)


def _settings(method: Mapping[str, object]) -> str:
    named = ((name.split(".", 1)[-1], value) for name, value in words.flat(method))
    return ", ".join(f"{name} {value[:16] if len(value) == 64 else value}" for name, value in named)
