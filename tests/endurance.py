"""A thousand edits, one after another: `python -m tests.endurance [--methods rome memit] [--edits N] [--json FILE]`.

For each method a process of its own edits the built-in world N times (its 400 records, then those made for training)
through the editor that studies use, with a snapshot at ten checkpoints. Checked, a line each:

- memory: resident bytes at the end within 5 % of those after the first 50 edits;
- time: the median CPU seconds from one optimiser step to the next in the last hundred edits within 10 % of that in the
  first hundred (seconds of the clock are told too; they need a quiet machine);
- snapshots: all ten are there, and rebuilt from the journal they are the live ones, bit for bit;
- resume: another editor, given the journal up to a random edit, makes the next ones with the same bits.

Last line `N passed, N failed`; exit code 1 on a failure.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

CHECKPOINTS = 10
WARM = 50  # edits after which memory has settled
WINDOW = 100  # edits whose steps are timed, at both ends
MEMORY, TIME = 0.05, 0.10


def main() -> int:
    """Run every method in a process of its own and judge what it reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=["rome", "memit"])
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the moment from which it is resumed")
    parser.add_argument("--set", nargs="*", default=[], help="settings: rome.steps=10")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]), options.edits, options.seed, options.set)
        return 0
    passed = failed = 0
    everything = {}
    for method in options.methods:
        with tempfile.TemporaryDirectory(prefix="raysys-endurance-") as folder:
            command = [sys.executable, "-m", "tests.endurance", "--child", method, folder]
            command += ["--edits", str(options.edits), "--seed", str(options.seed), "--set", *options.set]
            subprocess.run(command, check=True)
            figures = json.loads((Path(folder) / "figures.json").read_text())
        everything[method] = figures
        for good, text in verdicts(figures):
            print(f"{'ok  ' if good else 'FAIL'} {method}: {text}", flush=True)
            passed, failed = passed + good, failed + (not good)
    if options.json:
        options.json.write_text(json.dumps(everything, indent=1))
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


def verdicts(figures: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """(as it should be, what was found)."""
    early, late = figures["resident_warm"], figures["resident_end"]
    grown = late / early - 1
    warm = min(WARM, figures["edits"] // 2)
    yield (
        abs(grown) <= MEMORY,
        f"memory {early / 2**20:.0f} MiB after {warm} edits, {late / 2**20:.0f} at the end ({grown:+.1%})",
    )
    (clock_first, first), (clock_last, last) = figures["step_first"], figures["step_last"]
    slower = last / first - 1
    told = f"a step {first * 1e3:.1f} CPU ms at first, {last * 1e3:.1f} at last ({slower:+.1%})"
    yield abs(slower) <= TIME, f"{told}; by the clock {clock_first * 1e3:.1f} and {clock_last * 1e3:.1f}"
    edits, refused = figures["edits"], figures["refused"]
    yield figures["snapshots"] == CHECKPOINTS, f"{figures['snapshots']} snapshots, {edits} edits, {refused} refused"
    yield figures["rebuilt"], "snapshots rebuilt from the journal are the live ones"
    yield figures["resumed"], f"interrupted after {figures['interrupted']} edits and resumed: the same bits"
    yield True, f"{figures['seconds']:.0f} s, {figures['journal'] / 2**20:.1f} MiB of journal"


# --- one method ------------------------------------------------------------------------------------------------------


def child(method: str, folder: Path, edits: int, seed: int, settings: Sequence[str]) -> None:
    """Make the edits, measure, and leave figures.json in `folder`."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from actors.editor import Editor
    from raysys.journal import Journal, load_all
    from raysys.spec import set_key

    given: dict[str, Any] = {}
    for setting in settings:
        if setting.startswith(f"{method}."):
            set_key(given, setting.removeprefix(f"{method}."))
    editor = Editor("world/small", "float32", "cpu", 1)
    job = ordered(method, given, folder / "first" / "journal", edits)
    stream = editor.open(job)
    began = time.time()
    checkpoints = [edits * (i + 1) // CHECKPOINTS for i in range(CHECKPOINTS)]
    digests, resident = {}, {}
    timed: list[list[tuple[float, float]]] = []  # by edit: clock and CPU seconds from one optimiser step to the next
    watch = register_optimizer_step_post_hook(lambda *_: moments.append((time.perf_counter(), time.process_time())))
    moments: list[tuple[float, float]] = []
    for n in range(1, edits + 1):
        moments.clear()
        if n in checkpoints:
            digests[n] = editor.advance(n).digest
        else:
            step(editor, n)
        timed.append([(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(moments)])
        if n in (min(WARM, edits // 2), edits):
            resident[n] = resident_bytes()
    watch.remove()
    seconds = time.time() - began
    window = min(WINDOW, edits // 2)
    journal = Journal(folder / "first" / "journal", stream)
    rebuilt = all(journal.snapshot(n).digest == d for n, d in digests.items())
    interrupted = random.Random(seed).randrange(1, edits - 1)
    figures = {
        "method": method,
        "edits": edits,
        "refused": sum(len(e.refused) for e in load_all(folder / "first" / "journal", tensors=False)),
        "resident_warm": resident[min(WARM, edits // 2)],
        "resident_end": resident[edits],
        "step_first": medians(timed[:window]),
        "step_last": medians(timed[-window:]),
        "snapshots": len(digests),
        "rebuilt": rebuilt,
        "interrupted": interrupted,
        "resumed": resumed(method, given, folder, edits, interrupted),
        "seconds": seconds,
        "journal": sum(p.stat().st_size for p in (folder / "first" / "journal").rglob("*.safetensors")),
    }
    (folder / "figures.json").write_text(json.dumps(figures, indent=1))


def ordered(method: str, settings: dict[str, Any], journal: Path, edits: int) -> Any:
    """The stream: the world's own records, then those made for training, each fact once."""
    from actors.editor import Job
    from benchmarks.edits import World

    cases = {}
    for part in ("edits", "training"):
        for case in World(part=part).cases():
            cases.setdefault(case.request.text, case.request)
    requests = tuple(cases.values())[:edits]
    if len(requests) < edits:
        raise ValueError(f"the world has {len(requests)} edits, {edits} are wanted")
    return Job(method, method, settings, requests, str(journal), None, 0, "skip")


def step(editor: Any, n: int) -> None:
    """One more edit without a snapshot; methods that edit in batches take it when the batch is full."""
    if n % editor.batch == 0:
        editor.advance(n)


def medians(timed: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float]:
    """Of clock and CPU seconds of a step."""
    every = [step for edit in timed for step in edit]
    return statistics.median(s[0] for s in every), statistics.median(s[1] for s in every)


def resumed(method: str, settings: dict[str, Any], folder: Path, edits: int, interrupted: int) -> bool:
    """Whether an editor that has nothing but the journal up to `interrupted` edits goes on with the same bits."""
    from actors.editor import Editor
    from raysys.journal import load_all
    from raysys.snapshot import digest

    first, second = (folder / name / "journal" for name in ("first", "second"))
    second.mkdir(parents=True)
    for path in first.glob("[0-9]*.safetensors"):
        if int(path.stem) <= interrupted:
            shutil.copy(path, second)
    other = Editor("world/small", "float32", "cpu", 1)
    other.open(ordered(method, settings, second, edits))
    until = min(edits, interrupted + WARM)
    other.advance(until - until % other.batch)
    again = list(load_all(second))
    same = [
        digest("", a.patches) == digest("", b.patches) and all((a.memory[k] == b.memory[k]).all() for k in a.memory)
        for a, b in zip(load_all(first), again, strict=False)
    ]
    return again[-1].last > interrupted and all(same)


def resident_bytes() -> int:
    """Resident memory of this process, after what is garbage has gone."""
    import gc

    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    import resource

    return pages * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main())
