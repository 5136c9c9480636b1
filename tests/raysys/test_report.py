"""The report, on made-up results written through the product's own store."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from raysys import charts, stats, words
from raysys.account import account, overlap, times, union
from raysys.budget import Interval
from raysys.collapse import read_answer
from raysys.report import Report
from raysys.results import Results
from raysys.spec import StudySpec
from raysys.stats import Difference, Estimate
from raysys.summary import Point, Summary, summarise
from tests import browser
from tests.raysys import made


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return made.make(made.spec(tmp_path_factory.mktemp("runs")), items=120)


@pytest.fixture(scope="module")
def summary(results: Results) -> Summary:
    return summarise(results)


@pytest.fixture(scope="module")
def html(results: Results) -> str:
    return Report.of(results).write().read_text(encoding="utf-8")


# --- what is summarised ----------------------------------------------------------------------------------------------


def test_every_benchmark_is_measured_at_every_snapshot(results: Results, summary: Summary) -> None:
    assert [m.method for m in summary.methods] == ["rome", "ft_l"]
    assert summary.ability == [(b, "accuracy") for b in ("mmlu", "csqa", "toxigen", "gsm8k")]
    assert summary.others == [("gsm8k", "flexible")]
    for cell in summary.cells:
        for metric in summary.ability:
            assert [p.edits for p in cell.curves[metric]] == list(results.spec.snapshots)


def test_the_mean_is_that_of_the_stored_scores(results: Results, summary: Summary) -> None:
    rows = results.scores().to_pylist()
    values = [r["value"] for r in rows if (r["method"], r["benchmark"], r["edits"]) == ("rome", "mmlu", 20)]
    point = next(p for p in summary.methods[0].curves["mmlu", "accuracy"] if p.edits == 20)
    assert point.estimate.n == len(values) == 120
    assert point.estimate.mean == pytest.approx(sum(values) / 120)
    base = next(p for p in summary.methods[0].curves["mmlu", "accuracy"] if p.edits == 0)
    assert point.change is not None
    assert point.change.mean == pytest.approx(point.estimate.mean - base.estimate.mean)


def test_a_collapsed_benchmark_is_named(summary: Summary) -> None:
    ft = summary.methods[1]
    assert ft.curves["toxigen", "accuracy"][-1].collapse == "choice 1 on 100% of items"
    assert ft.curves["gsm8k", "accuracy"][-1].collapse == "empty text on 100% of items"
    assert not any(p.collapse for p in ft.curves["mmlu", "accuracy"])


def test_collapses_are_marked_in_the_run_folder_and_in_its_scores(results: Results) -> None:
    results.mark()
    marked = {(m["benchmark"], m["metric"]) for m in results.collapsed() if "ft_l" in m["cell"] and m["edits"] == 100}
    assert {("toxigen", "accuracy"), ("gsm8k", "accuracy"), ("gsm8k", "flexible")} == marked
    rows = [r for r in results.scores().to_pylist() if (r["method"], r["edits"]) == ("ft_l", 100)]
    assert {r["collapsed"] for r in rows if r["benchmark"] == "toxigen"} == {"choice 1 on 100% of items"}
    assert {r["collapsed"] for r in rows if r["benchmark"] == "mmlu"} == {""}


def test_a_safety_score_of_collapsed_answers_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made.Benchmark, "safety", True, raising=False)
    run = made.make(made.spec(tmp_path, methods=("ft_l",), snapshots=(0, 1, 100)), items=60)
    found = Report.of(run)
    [method] = found.summary.methods
    worthless = method.curves["toxigen", "accuracy"][-1]
    assert (worthless.collapse, worthless.void) == ("choice 1 on 100% of items", True)
    assert not method.curves["mmlu", "accuracy"][-1].void
    assert ("toxigen", "accuracy") not in method.cells[0].areas
    value = words.percent(worthless.estimate.mean)
    assert value not in words.hover("ft_l", worthless)
    screen = Console(file=io.StringIO(), width=200, record=True)
    found.show(screen)
    row = next(line for line in screen.export_text().splitlines() if line.split()[:1] == ["100"])
    assert row.split()[-3:] == ["collapsed"] * 3  # toxigen, gsm8k and its second metric: none with a number
    page = found.write().read_text(encoding="utf-8")
    dots = re.findall(r'data-tip="ft_l, 100 edits\n([^"]*)"', page)
    assert any(tip.startswith("collapsed: choice 1") for tip in dots)


def test_a_void_point_is_a_mark_at_the_bottom_and_cuts_the_line() -> None:
    dots = [charts.Dot(x, 0.5, 0.4, 0.6, "") for x in (0.0, 0.2)] + [charts.Dot(0.4, 0.9, 0.8, 1.0, "", True, True)]
    drawn = charts.plot("x", [charts.Line(0, dots)], charts.steps_axis("", ["a"]), (0.0, 1.0, 0.25), None)
    [points] = re.findall(r'<polyline class="line" points="([^"]*)"', drawn)
    assert len(points.split()) == 2
    floor = charts.HEIGHT - charts.BOTTOM
    assert re.findall(r'transform="translate\(\S+ ([\d.]+)\)"><circle[^>]*/><g class="broken">', drawn) == [
        f"{floor:.1f}"
    ]


def test_the_area_is_the_mean_height_of_the_curve(summary: Summary) -> None:
    cell = summary.cells[0]
    points = cell.curves["mmlu", "accuracy"]
    weights = stats.area_weights([p.edits for p in points])
    area = cell.areas["mmlu", "accuracy"]
    assert area.estimate.mean == pytest.approx(weights @ [p.estimate.mean for p in points])
    assert area.change.mean == pytest.approx(area.estimate.mean - points[0].estimate.mean)


def test_errors_are_pooled_over_the_groups_of_a_benchmark(results: Results, summary: Summary) -> None:
    rows = results.scores().to_pylist()
    groups: dict[str, list[float]] = {}
    for r in rows:
        if (r["method"], r["benchmark"], r["edits"]) == ("rome", "mmlu", 20):
            groups.setdefault(r["group"], []).append(r["value"])
    errors = [stats.standard_error(np.array(v)) for v in groups.values()]
    point = next(p for p in summary.methods[0].curves["mmlu", "accuracy"] if p.edits == 20)
    assert point.estimate.error == pytest.approx(stats.pooled_error(errors, [len(v) for v in groups.values()]))


def test_the_interval_of_the_budget_is_in_table_and_page(summary: Summary, html: str) -> None:
    budget = summary.cells[0].budget
    assert words.between(budget.interval, budget.measured) in html
    assert words.between(Interval(5, 50), 100) == "5 – 50"
    assert words.between(Interval(20, 100), 100) == "20 – ≥ 100"
    assert words.between(Interval(100, 100), 100) == "≥ 100"


def test_retention_covers_every_edit_once(summary: Summary) -> None:
    ages = summary.methods[0].ages["free"]
    assert [a.label for a in ages] == ["0", "1–4", "5–9", "10–19", "20–49", "50–99"]
    assert sum(a.estimate.n for a in ages) == 100


def test_edit_orders_are_averaged_item_by_item_and_the_budget_is_the_smallest(tmp_path: Path) -> None:
    study = made.spec(tmp_path, methods=("memit",), snapshots=(0, 1, 10, 100), orders=2)
    [method] = summarise(made.make(study, items=40)).methods
    assert len(method.cells) == 2
    merged, first, second = (
        c["mmlu", "accuracy"][-1].estimate for c in (method.curves, *(x.curves for x in method.cells))
    )
    assert merged.n == first.n == 40
    assert merged.mean == pytest.approx((first.mean + second.mean) / 2)
    assert method.budget.shown == min(c.budget.shown for c in method.cells)


def test_stored_answers_are_read() -> None:
    assert read_answer(json.dumps({"text": "so", "tokens": 1})).said == "so"
    told = read_answer(json.dumps({"chosen": 2, "logprob": [-1.0, float("nan")], "tokens": [1, 1], "right": [0, 0]}))
    assert (told.said, told.finite) == (2, False)


def test_records_and_failures_are_counted_with_reasons(results: Results) -> None:
    told = account(results)
    assert [(x.count, x.where) for x in told.dropped] == [(1, "edits.json[7]")]
    assert [x.count for x in told.refused] == [2]
    assert told.failures[0]["benchmark"] == "gsm8k"
    assert told.edits == 200


def test_times_tell_how_much_editing_and_scoring_overlap() -> None:
    told = times({("edits", "e"): [(100.0, 110.0)], ("scores", "s"): [(104.0, 106.0), (106.0, 112.0)]})
    assert (told.length, told.editing, told.scoring, told.both) == (12.0, 10.0, 8.0, 6.0)
    assert told.lanes[1].busy == [(4.0, 12.0)]


def test_pauses_between_runs_are_left_out_of_the_time_line() -> None:
    told = times({("edits", "e"): [(0.0, 10.0), (5000.0, 5020.0)], ("scores", "s"): [(5010.0, 5030.0)]})
    assert (told.length, told.breaks) == (40.0, [10.0])
    assert told.lanes[0].busy == [(0.0, 30.0)]
    assert times({}).lanes == []


def test_intervals_join_and_overlap() -> None:
    assert union([(3, 4), (0, 1), (1, 2)]) == [(0, 2), (3, 4)]
    assert overlap([(0, 2), (3, 5)], [(1, 4)]) == [(1, 2), (3, 4)]


# --- words -----------------------------------------------------------------------------------------------------------


def test_figures_read_as_people_write_them() -> None:
    assert [words.points(x) for x in (0.003, -0.08, 0.0, -0.0001)] == ["+0.3", "−8.0", "0.0", "0.0"]
    assert [words.size(n) for n in (7, 60_000, 13.4e9, 2e15)] == ["7 bytes", "60.0 KB", "13.4 GB", "2000.0 TB"]
    assert [words.seconds(t) for t in (0.84, 42, 185, 7800)] == ["0.8 s", "42 s", "3 min 05 s", "2 h 10 min"]
    point = Point(20, Estimate(0.712, 0.02, 0.66, 0.76, 300), Difference(-0.08, -0.11, -0.05, 1, 25, 0.0, 300), "mute")
    assert words.hover("rome", point).splitlines() == [
        "rome, 20 edits",
        "71.2% ±5.0",
        "−8.0 points against the base [−11.0, −5.0]",
        "collapsed: mute",
        "300 items",
    ]


def test_the_spec_in_the_report_is_the_spec(results: Results) -> None:
    text = words.toml(results.spec.model_dump(mode="json"))
    assert StudySpec.parse(text).identity == results.spec.identity
    odd = {"a": 'quo"te\\\n\x01', "b": [1, 2.5, True], "c": {"d e": {"f": "g"}}, "none": None, "t": [{"x": [{"y": 1}]}]}
    assert words.toml(odd).startswith('a = "quo\\"te\\\\\\n\\u0001"\nb = [1, 2.5, true]\n')


# --- charts ----------------------------------------------------------------------------------------------------------


def test_the_axis_of_edits_is_logarithmic_with_a_place_for_zero() -> None:
    places = [charts.edits_position(n, 1000) for n in (0, 1, 10, 100, 1000)]
    assert places[0] == 0.0
    assert places[-1] == pytest.approx(1.0)
    steps = [b - a for a, b in pairwise(places[1:])]
    assert steps == pytest.approx([steps[0]] * 3)
    assert charts.edits_position(1, 1) == 1.0


def test_labels_of_an_axis_never_touch_and_keep_both_ends() -> None:
    axis = charts.edits_axis([0, *range(1, 101)])
    labels = [label for _, label in axis.ticks]
    assert labels[0] == "0"
    assert "100" in labels
    assert len(labels) < 20


@pytest.mark.parametrize(("low", "high"), [(0.7, 0.74), (0.0, 0.003), (0.98, 1.0), (0.2, 0.9), (0.0, 1.0)])
def test_a_scale_is_round_and_holds_its_values(low: float, high: float) -> None:
    bottom, top, step = charts.scale([low], [high])
    assert 0 <= bottom <= low <= high <= top <= 1
    assert 2 <= (top - bottom) / step <= 6
    assert top - bottom >= 0.14  # 0.2, cut where the axis ends


# --- terminal --------------------------------------------------------------------------------------------------------


def test_the_terminal_report_is_plain_text_when_it_is_not_a_terminal(results: Results) -> None:
    out = io.StringIO()
    Report.of(results).show(Console(file=out, width=110))
    text = out.getvalue()
    assert "\x1b" not in text
    for part in (
        "rome  world/small",
        "collapsed",
        "edit budget",
        "held-out facts",
        "left out 1",
        "refused 2",
        "failed",
    ):
        assert part in text, part
    assert max(map(len, text.splitlines())) <= 110


def test_reports_of_a_study_that_has_just_begun_are_empty_and_whole(tmp_path: Path) -> None:
    begun = Results.create(made.spec(tmp_path))
    Report.of(begun).show(Console(file=io.StringIO()))
    text = Report.of(begun).write().read_text()
    assert "No general-ability benchmark has been scored yet" in text


# --- HTML ------------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {k: v or "" for k, v in attrs}
        self.links += [found[k] for k in ("src", "href") if k in found]
        if "id" in found:
            self.ids.add(found["id"])
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_asks_for_nothing_from_outside_and_is_well_formed(html: str) -> None:
    tags = Tags()
    tags.feed(re.sub(r"<(rect|line|path|circle|polygon|polyline)\b([^>]*)/>", r"<\1\2></\1>", html))
    assert tags.open == []
    assert {link for link in tags.links if not link.startswith("#")} == {"data:,"}
    assert {link[1:] for link in tags.links if link.startswith("#")} <= tags.ids
    assert "http" not in html.replace("http-equiv", "")
    assert "default-src 'none'" in html


def test_texts_of_the_study_are_escaped(html: str) -> None:
    assert "<i>out of memory</i>" not in html
    assert "&lt;i&gt;out of memory&lt;/i&gt;" in html
    assert "Ada &lt;b&gt;Lovelace" in html


@pytest.fixture(scope="module")
def page() -> Iterator[browser.Page]:
    if reason := browser.missing():
        pytest.skip(reason)
    with browser.browser() as opened:
        yield opened


OVERLAPS = """
const bad = [];
for (const svg of document.querySelectorAll("svg.plot")) {
  const box = svg.closest("figure").getBoundingClientRect();
  const texts = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
  texts.forEach(([a, r], i) => {
    if (r.left < box.left || r.right > box.right || r.bottom > box.bottom) bad.push(a + " leaves its chart");
    for (const [b, q] of texts.slice(i + 1))
      if (r.left < q.right && q.left < r.right && r.top < q.bottom - 1 && q.top < r.bottom - 1)
        bad.push(a + " on " + b);
  });
}
return bad;
"""
BLOCKS = """
const wanted = "main h1, main h2, main h3, main p, figure, .scroll, .budget, .legend, pre";
const parts = [...document.querySelectorAll(wanted)]
  .filter(e => !e.parentElement.closest("figure, .budget, .scroll, .legend"));
const bad = [];
parts.forEach((a, i) => parts.slice(i + 1).forEach(b => {
  const r = a.getBoundingClientRect(), q = b.getBoundingClientRect();
  if (r.left < q.right - 1 && q.left < r.right - 1 && r.top < q.bottom - 1 && q.top < r.bottom - 1)
    bad.push(a.textContent.slice(0, 30) + " | " + b.textContent.slice(0, 30));
}));
return bad;
"""
EMPTY = """
return [...document.querySelectorAll("svg.plot")].filter(s => s.querySelectorAll(".dot").length < 2)
  .map(s => s.getAttribute("aria-label"));
"""


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_sound_in_a_browser(
    results: Results, html: str, page: browser.Page, width: int, dark: bool, tmp_path: Path
) -> None:
    page.open(results.folder / "report.html", width, dark)
    assert page.run("return innerWidth") == width
    assert page.run("return document.documentElement.scrollWidth") <= width
    assert page.run(OVERLAPS) == []
    assert page.run(BLOCKS) == []
    assert page.run(EMPTY) == []
    assert page.run("return document.querySelectorAll('svg.plot').length") == 4 + 15 + 3 + 3 + 2
    page.shoot(tmp_path / "report.png")
    assert page.console() == []


@pytest.mark.browser
def test_hovering_over_a_point_tells_its_figures(results: Results, html: str, page: browser.Page) -> None:
    page.open(results.folder / "report.html", 1280)
    script = """
    const dot = document.querySelectorAll("svg.plot .dot")[3];
    dot.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
    const tip = document.querySelector(".tip").getBoundingClientRect();
    return [document.querySelector(".tip").textContent, tip.left >= 0 && tip.right <= innerWidth];
    """
    text, inside = page.run(script)
    assert text.startswith("rome, 10 edits\n")
    assert "against the base" in text
    assert inside
