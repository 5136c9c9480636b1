"""What a study tells a real Prometheus that scrapes it, what its alerts say, and what Ray's dashboard shows of it."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from actors import metrics
from raysys.results import Results
from tests import browser, heads
from tests.actors import small

CLUSTER = Path(__file__).parents[2] / "cluster"
RULES = CLUSTER / "prometheus" / "rules.yml"
DASHBOARD = CLUSTER / "grafana" / "dashboard.json"
DRIVER = """
import sys
from pathlib import Path
import ray
from raysys.study import run
from tests.actors import small
benchmarks = [{"name": "tests.actors.small:Words", "label": "words", "seconds": 0.2}]
ray.init(address=sys.argv[2], log_to_driver=False)
run(small.spec(Path(sys.argv[1]), benchmarks=benchmarks, cluster={"evaluators": 2, "snapshots_in_flight": 1}))
sys.stdin.read()  # connected until told: what it counted last may not be reported once it has gone
"""
NAMES = ("Editor(", "Evaluator(evaluator-0)", "Evaluator(evaluator-1)")
MISSING = "no Prometheus with promtool (Debian: apt-get install prometheus)"
BIN = (
    f"{os.environ['PATH']}:{CLUSTER.parent / '.venv' / 'prometheus' / 'usr' / 'bin'}"  # where `make prometheus` puts it
)
SERVER, TOOL = (shutil.which(name, path=BIN) or "" for name in ("prometheus", "promtool"))
needs_prometheus = pytest.mark.skipif(not (SERVER and TOOL), reason=MISSING)
pytestmark = pytest.mark.timeout(280)


def promtool(*arguments: str) -> str:
    done = subprocess.run([TOOL, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def until(true: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while True:
        if found := true():
            return found
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.3)


def get(url: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as reply:
        return json.load(reply)


@dataclass(frozen=True)
class Watched:
    """A Prometheus that scrapes the cluster of a study, and what the study left."""

    address: str
    results: Results
    picture: Path
    rows: list[str]  # of the dashboard's page of actors, during the study

    def ask(self, expr: str) -> dict[tuple[str, ...], float]:
        """Values by labels that are not Ray's own."""
        found = get(f"{self.address}/api/v1/query?{urllib.parse.urlencode({'query': expr})}")
        assert found["status"] == "success", found
        tags = ("study", "model", "method", "cell", "benchmark", "evaluator", "actor")
        rows = found["data"]["result"]
        return {tuple(r["metric"][t] for t in tags if t in r["metric"]): float(r["value"][1]) for r in rows}

    def total(self, expr: str) -> float:
        return sum(self.ask(expr).values())


@contextmanager
def prometheus(folder: Path, targets: Path) -> Iterator[str]:
    """Our configuration, faster, and with the targets of this test's cluster."""
    config = (CLUSTER / "prometheus" / "prometheus.yml").read_text()
    assert "/tmp/ray/prom_metrics_service_discovery.json" in config
    config = config.replace("/tmp/ray/prom_metrics_service_discovery.json", str(targets)).replace("15s", "1s")
    (folder / "prometheus.yml").write_text(config)
    shutil.copy(RULES, folder)
    port = heads.free_port()
    command = [
        SERVER, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def actors_page(dashboard: str, token: str) -> Iterator[browser.Page]:
    """The dashboard's page of actors, once a person has logged in."""
    with browser.browser() as page:
        page.visit(f"{dashboard}/#/actors", 1900)
        login = f"""return fetch('/api/authenticate',
            {{method: 'POST', headers: {{Authorization: 'Bearer {token}'}}}}).then(reply => reply.status)"""
        assert page.run(login) == 200
        page.run("location.reload()")
        yield page


def at_work(page: browser.Page) -> list[str]:
    """The page's rows of living actors that are the study's, once editor and evaluators are there."""
    script = "return Array.from(document.querySelectorAll('tbody tr')).map(row => row.innerText)"

    def rows() -> list[str]:
        alive = [str(row) for row in page.run(script) if "ALIVE" in row]
        return alive if all(any(name in row for row in alive) for name in NAMES) else []

    return list(until(rows, "the page of actors names editor and evaluators", 50))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    here = tmp_path_factory.mktemp("watched")
    small.folder(here)
    token, port = here / "token", heads.free_port()
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    env = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_metrics_report_interval_ms": "1000",
        "RAYSYS_CACHE": str(here / "cache"),
        "PYTHONPATH": str(CLUSTER.parent),
    }
    options = ("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}")
    (here / "prometheus").mkdir()
    with heads.head(*options, cpus=6, env=env) as head:
        targets = head.folder / "t" / "prom_metrics_service_discovery.json"
        until(targets.exists, "the list of targets")
        with ExitStack() as stack:
            address = stack.enter_context(prometheus(here / "prometheus", targets))
            log = stack.enter_context((here / "log").open("wb"))
            page = None
            if not browser.missing():
                page = stack.enter_context(actors_page(f"http://127.0.0.1:{port}", token.read_text()))
            command = [sys.executable, "-c", DRIVER, str(here), head.address]
            driver = subprocess.Popen(command, env=os.environ | env, stdin=subprocess.PIPE, stdout=log, stderr=log)
            stack.callback(driver.communicate, b"")
            rows = []
            if page is not None:
                try:
                    rows = at_work(page)
                finally:
                    page.shoot(here / "actors.png")
            until(lambda: driver.poll() is not None or _complete(here / "runs"), "the end of the study", 120)
            assert driver.poll() is None, (here / "log").read_text()
            found = Watched(address, Results(next((here / "runs").iterdir())), here / "actors.png", rows)
            last = len({u["unit"] for u in found.results.units().to_pylist()})  # the base's are in each cell
            until(lambda: found.total("ray_raysys_units_done_total") >= last, "the last unit, at Prometheus", 60)
            time.sleep(4)  # whatever was counted with it: a report and a scrape
            yield found


def _complete(runs: Path) -> bool:
    return any(json.loads(path.read_text()).get("complete") for path in runs.glob("*/manifest.json"))


def panels() -> list[tuple[str, str]]:
    """(title, expression) of every panel, with every study chosen."""
    board = json.loads(DASHBOARD.read_text())
    return [(p["title"], t["expr"].replace("$study", ".*")) for p in board["panels"] for t in p["targets"]]


@needs_prometheus
def test_a_prometheus_holds_what_a_study_did(watched: Watched) -> None:
    units = list({u["unit"]: u for u in watched.results.units().to_pylist()}.values())  # the base's are in each cell
    assert len(units) == 21  # (the base and 3 snapshots in each of 2 cells) x 3 blocks
    done = watched.ask("sum by (study, model, benchmark) (ray_raysys_units_done_total)")
    assert done == {("small", "model", "words"): len(units)}
    assert watched.total("ray_raysys_items_total") == sum(u["items"] for u in units)
    assert watched.total("ray_raysys_tokens_total") == sum(u["tokens"] for u in units)
    by = {key[-1] for key in watched.ask("ray_raysys_items_total")}
    assert by == {u["evaluator"] for u in units}
    edits = watched.ask("sum by (study, model, method) (ray_raysys_edits_applied_total)")
    assert edits == {("small", "model", "rome"): 6, ("small", "model", "ft_m"): 6}
    assert watched.total("ray_raysys_edit_seconds_count") == 12
    assert watched.total("ray_raysys_edit_seconds_sum") > 0
    assert watched.total("ray_raysys_switch_seconds_count") == len(units)
    assert watched.total("max_over_time(ray_raysys_queue_depth[1h])") > 0
    assert watched.total("max_over_time(ray_raysys_snapshots_in_flight[1h])") > 0
    assert watched.total("max_over_time(ray_raysys_evaluators_running[1h])") == 2
    assert all(v > 0 for v in watched.ask("max_over_time(ray_raysys_snapshot_bytes[1h])").values())
    assert ("model", "editor") in watched.ask("last_over_time(ray_raysys_gpu_memory_bytes[1h])")
    assert watched.ask("ray_raysys_units_failed_total") == {}


@needs_prometheus
def test_every_panel_of_the_dashboard_and_every_alert_can_be_asked_of_it(watched: Watched) -> None:
    for title, expr in panels():
        watched.ask(expr)
        assert title
    rules = [r for g in get(f"{watched.address}/api/v1/rules")["data"]["groups"] for r in g["rules"]]
    assert len(rules) == 4
    assert all(r["health"] == "ok" for r in rules), rules
    assert [r["name"] for r in rules if r["state"] != "inactive"] == []


@pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())
@needs_prometheus
def test_the_page_of_actors_names_editor_and_evaluators(watched: Watched) -> None:
    assert [sum(name in row for row in watched.rows) for name in NAMES] == [1, 1, 1]
    assert watched.picture.stat().st_size > 10_000


def test_every_metric_is_in_a_panel_and_every_panel_asks_for_metrics_that_there_are() -> None:
    asked = {name for _, expr in panels() for name in re.findall(r"ray_raysys_(\w+)", expr)}
    there = {f"{n}_total" for n in metrics.COUNTERS} | set(metrics.GAUGES)
    histograms = {f"{n}_{part}" for n in metrics.TIMES for part in ("sum", "count", "bucket")}
    assert there <= asked
    assert asked <= there | histograms
    assert all(any(a.startswith(n) for a in asked) for n in metrics.TIMES)
    board = json.loads(DASHBOARD.read_text())
    assert {p["datasource"]["uid"] for p in board["panels"]} == {"${datasource}"}


@needs_prometheus
def test_alerts_go_off_when_they_should_and_only_then() -> None:
    promtool("check", "config", str(CLUSTER / "prometheus" / "prometheus.yml"))
    assert "SUCCESS" in promtool("test", "rules", str(CLUSTER / "prometheus" / "rules_test.yml"))


def test_outside_a_cluster_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_made", {})
    noted: list[str] = []
    watch = metrics.Watch("s", "folder/m", lambda what, **_: noted.append(what))
    watch.note("node lost", evaluator="evaluator-0")
    metrics.edited({"model": "m", "method": "rome", "cell": "c"}, 2, 1, 0.5)
    assert noted == ["node lost"]
    assert metrics._made == {}
