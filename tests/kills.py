"""Kill a running study and run it again: `python -m tests.kills [--kills N] [--seed S] [--study STUDY.toml]`.

Runs one study undisturbed with one evaluator and once with two; then, for each kind of victim (evaluator, editor,
driver), N times more, each in a folder of its own: at a random moment the victim gets SIGKILL, and where the driver
was the victim the same command is given again. Every run must end with the same scores and the same edits, bit for
bit, nothing missing, nothing double. Prints a line per run, last line `N passed, N failed`; exit code 1 on a failure.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysys.journal import load_all
from raysys.results import Results
from raysys.snapshot import digest
from raysys.spec import StudySpec
from tests import processes
from tests.actors.small import contents

STUDY = """
name = "kills"
models = ["world/small"]
snapshots = [0, 1, 5, 10, 20]
[edits]
dataset = "world"
count = 20
[[methods]]
name = "rome"
[[methods]]
name = "ft_l"
[[benchmarks]]
name = "mmlu"
data = "world"
limit = 30
[[benchmarks]]
name = "probes"
[cluster]
dashboard = false
"""
LIMIT = 600  # seconds a run may take


@dataclass(frozen=True)
class Outcome:
    """What a run ended with, and what it took."""

    scores: str  # hash of every score
    edits: str  # hash of every patch
    units: int
    killed: int
    seconds: float
    complete: bool


def main() -> int:
    """Run everything; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="runs for each kind of victim (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which they are killed")
    parser.add_argument("--study", type=Path, help="another study than the built-in one")
    options = parser.parse_args()
    passed = failed = 0
    with tempfile.TemporaryDirectory(prefix="raysys-kills-") as folder:
        study = options.study or Path(folder) / "kills.toml"
        if not options.study:
            study.write_text(STUDY)
        dice = random.Random(options.seed)
        first = _run(study, Path(folder) / "first", evaluators=1)
        print(f"undisturbed, 1 evaluator: {first.seconds:.0f} s", flush=True)
        plan = [("nobody", 2)] + [(who, 2) for who in ("Evaluator", "Editor", "driver") for _ in range(options.kills)]
        for number, (who, evaluators) in enumerate(plan):
            outcome = _run(study, Path(folder) / str(number), evaluators, who, dice.random(), first.units)
            same = (outcome.scores, outcome.edits) == (first.scores, first.edits)
            good = same and outcome.complete and (who == "nobody" or outcome.killed > 0)
            passed, failed = passed + good, failed + (not good)
            verdict = "the same" if same else "DIFFERENT"
            lost = outcome.seconds - first.seconds
            print(
                f"killed {outcome.killed} {who}, {evaluators} evaluators: {verdict}, complete: {outcome.complete}, "
                f"{outcome.seconds:.0f} s ({lost:+.0f} s)",
                flush=True,
            )
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


def _run(study: Path, root: Path, evaluators: int, who: str = "nobody", moment: float = 0.0, units: int = 0) -> Outcome:
    """One run, in which `who` is killed when a share `moment` of the work is done; `units` there are in all."""
    overrides = [f"root={json.dumps(str(root))}", f"cluster.evaluators={evaluators}"]
    folder = StudySpec.load(study, overrides).folder
    started, killed = time.monotonic(), 0
    while True:
        driver = _start(study, overrides, root)
        if who != "nobody" and not killed:
            killed = _kill(driver, folder, who, moment, units)
        driver.wait(timeout=LIMIT)
        if driver.returncode != -signal.SIGKILL:
            break
    seconds = time.monotonic() - started
    if driver.returncode != 0:
        print((root / "log").read_text()[-3000:], file=sys.stderr)
    return outcome(Results.open(folder), killed, seconds)


def _start(study: Path, overrides: list[str], root: Path) -> subprocess.Popen[bytes]:
    root.mkdir(parents=True, exist_ok=True)
    with (root / "log").open("ab") as log:
        command = [sys.executable, "-m", "raysys", "run", str(study), *overrides]
        return subprocess.Popen(command, stdout=log, stderr=log)


def _kill(driver: subprocess.Popen[bytes], folder: Path, who: str, moment: float, units: int) -> int:
    """Wait until a share `moment` of the work that victims can be killed in is done, then kill. Returns how many."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline and driver.poll() is None:
        if _progress(folder, who, units) >= moment * 0.9:
            victims = [driver.pid] if who == "driver" else processes.actors(driver.pid, who)
            for victim in victims[:1]:
                os.kill(victim, signal.SIGKILL)
                return 1
        time.sleep(0.01)
    return 0


def _progress(folder: Path, who: str, units: int) -> float:
    """Share of the edits that are made (for an editor) or of the units that are scored; -1 before anything is."""
    spec = StudySpec.check(json.loads((folder / "spec.json").read_text())) if (folder / "spec.json").exists() else None
    if spec is None:
        return -1.0
    steps = len(list(folder.glob("cells/*/journal/*.safetensors")))
    scored = len(list(folder.glob("units/*.parquet")))
    if who == "Editor":
        return steps / (spec.edits.count * len(spec.grid())) if steps else -1.0
    return scored / units if scored else -1.0


def outcome(results: Results, killed: int, seconds: float) -> Outcome:
    def named(tree: Any) -> str:
        return hashlib.sha256(repr(tree).encode()).hexdigest()

    edits = [
        (cell.id, [(e.first, e.last, e.refused, digest("", e.patches)) for e in load_all(journal)])
        for cell in results.cells()
        for journal in [results.cell_folder(cell.id) / "journal"]
    ]
    complete = bool(results.manifest.get("complete")) and not results.failures()
    return Outcome(named(contents(results)), named(edits), len(results.done()), killed, seconds, complete)


if __name__ == "__main__":
    sys.exit(main())
