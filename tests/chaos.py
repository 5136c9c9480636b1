"""Kill whatever a study runs on: `python -m tests.chaos [--kills N] [--seed S] [--tensor-parallel N ...]`.

A study runs on a cluster of three nodes, undisturbed first; then again and again while, at random moments, something
gets SIGKILL: an evaluator, the editor, a rank of a model that is spread over several, a whole worker node (another is
started for it), the driver (the same command is given again); until there were N kills, half of them with a whole
model and half with one over two ranks. Every run must end with the same scores and the same edits, bit for bit,
nothing missing, nothing double.

Prints what was killed and what each kill has cost; last line `N passed, N failed`; exit code 1 on a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raysys.results import Results
from raysys.spec import StudySpec
from tests import heads, processes
from tests.actors import small
from tests.kills import Outcome, outcome

LIMIT = 900  # seconds a run may take
AT_ONCE = 6  # kills in one run
RERUNS = 12  # times that the command is given again at most
ACTORS = {"evaluator": "Evaluator", "editor": "Editor", "rank": "Rank", "leading rank": "First"}


class Nodes:
    """Worker nodes of a cluster, each a process with all that it started."""

    def __init__(self, address: str, folder: Path) -> None:
        self.address, self.folder = address, folder
        self.made: list[subprocess.Popen[bytes]] = []
        self.number = 0

    def start(self) -> None:
        """One more node with two CPUs; returns once it is there, since two that start at the same time can block."""
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={self.address}", "--block",
            "--num-cpus=2", f"--dashboard-agent-listen-port={heads.free_port()}", "--disable-usage-stats",
        ]  # fmt: skip
        self.number += 1
        path, deadline = self.folder / f"node-{self.number}.log", time.monotonic() + 60
        with path.open("wb") as log:
            self.made.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
        while b"Ray runtime started" not in path.read_bytes() and self.made[-1].poll() is None:
            assert time.monotonic() < deadline, path.read_text()[-2000:]
            time.sleep(0.1)

    def mend(self) -> None:
        """A node that could not start is started again."""
        for node in [n for n in self.made if n.poll() is not None]:
            self.made.remove(node)
            self.start()

    def kill(self, dice: random.Random) -> bool:
        """All processes of one node at once, as if its machine were switched off."""
        node = self.made.pop(dice.randrange(len(self.made)))
        for pid in [node.pid, *processes.below(node.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait()
        self.start()
        return True

    def close(self) -> None:
        """End all nodes."""
        for node in self.made:
            heads.end(node)


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[heads.Head, Nodes]]:
    """A head and two worker nodes."""
    with heads.head(cpus=2) as head:
        nodes = Nodes(head.address, folder)
        try:
            for _ in range(2):
                nodes.start()
            yield head, nodes
        finally:
            nodes.close()


def main() -> int:
    """Run everything; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="kills in all (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of victims and moments")
    parser.add_argument(
        "--tensor-parallel", type=int, nargs="+", default=[1, 2], metavar="N",
        help="ranks of each model; a study for every number, which share the kills (default 1 2)",
    )  # fmt: skip
    options = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = os.environ.get("RAY_AUTH_MODE", "disabled")  # on loopback, for minutes
    dice, passed, failed, left = random.Random(options.seed), 0, 0, options.kills
    for number, ranks in enumerate(options.tensor_parallel):
        share = left // (len(options.tensor_parallel) - number)
        left -= share
        with tempfile.TemporaryDirectory(prefix="raysys-chaos-") as made:
            for good in _disturbed(Path(made), ranks, share, dice):
                passed, failed = passed + good, failed + (not good)
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0)


def _disturbed(folder: Path, ranks: int, kills: int, dice: random.Random) -> Iterator[bool]:
    """One study, undisturbed and then until `kills` were done; whether each run was as it should be."""
    small.folder(folder, "gpt_neox" if ranks > 1 else "llama")  # heads enough to be split
    os.environ["RAYSYS_CACHE"] = str(folder / "cache")
    with cluster(folder) as (head, nodes):
        study = Study(folder, head, nodes, ranks)
        first, _ = study.run("first", [], dice)
        of = f"a model over {ranks} ranks" if ranks > 1 else "a whole model"
        print(f"{of}, undisturbed: {first.units} units, {first.seconds:.0f} s, complete: {first.complete}", flush=True)
        yield first.complete
        done = 0
        while done < kills:
            moments = sorted(dice.uniform(0.02, 0.95) for _ in range(min(AT_ONCE, kills - done)))
            found, killed = study.run(f"run-{done}", moments, dice)
            same = (found.scores, found.edits) == (first.scores, first.edits)
            done += len(killed)
            told = ", ".join(f"{n} {who}" for who, n in Counter(killed).items())
            lost = (found.seconds - first.seconds) / max(len(killed), 1)
            print(
                f"killed {told or 'nobody'}: {'the same' if same else 'DIFFERENT'}, complete: {found.complete}, "
                f"{found.seconds:.0f} s, {lost:.1f} s lost a kill",
                flush=True,
            )
            yield same and found.complete and found.units == first.units
            if not killed:
                break


class Study:
    """One study, run by its command as often as it takes."""

    def __init__(self, folder: Path, head: heads.Head, nodes: Nodes, ranks: int) -> None:
        self.folder, self.head, self.nodes, self.ranks = folder, head, nodes, ranks
        self.units = 0

    def tree(self, root: str) -> dict[str, Any]:
        """The study as plain data: slow units, so that there is something to interrupt."""
        words = {"name": "tests.actors.small:Words", "label": "words", "items": 96, "seconds": 0.08}
        pool: dict[str, Any] = {
            "evaluators": 2, "retries": 20, "snapshots_in_flight": 1, "address": self.head.address, "wait": 120,
        }  # fmt: skip
        if self.ranks > 1:
            pool |= {"tensor_parallel": self.ranks, "evaluators": 1}
        made = small.tree(self.folder, root=str(self.folder / root), cluster=pool)
        if self.ranks > 1:
            made["methods"] = made["methods"][:1]  # the other one trains matrices that are split
        return made | {"benchmarks": [words, {"name": "probes", "max_tokens": 4}]}

    def run(self, root: str, moments: list[float], dice: random.Random) -> tuple[Outcome, list[str]]:
        """The study in a folder of its own, with a kill at each of `moments` (shares of the units)."""
        tree = self.tree(root)
        path = self.folder / f"{root}.json"
        path.write_text(json.dumps(tree))
        folder = StudySpec.check(tree).folder
        started, killed, left = time.monotonic(), list[str](), list(moments)
        for _ in range(RERUNS):
            driver = self._driver(path)
            while driver.poll() is None:
                assert time.monotonic() - started < LIMIT, (self.folder / "log").read_text()[-3000:]
                self.nodes.mend()
                done = len(list(folder.glob("units/*.parquet")))
                if left and self.units and done >= left[0] * self.units:
                    left.pop(0)
                    killed += self._kill(driver, dice)
                    time.sleep(dice.uniform(0, 3))
                time.sleep(0.05)
            if driver.returncode == 0:
                break
            if driver.returncode != -signal.SIGKILL:
                print((self.folder / "log").read_text()[-2000:], file=sys.stderr)
        found = outcome(Results.open(folder), len(killed), time.monotonic() - started)
        self.units = self.units or found.units
        return found, killed

    def _driver(self, path: Path) -> subprocess.Popen[bytes]:
        code = (
            "import json, sys; from raysys.spec import StudySpec; from raysys.study import run; "
            "results = run(StudySpec.check(json.load(open(sys.argv[1])))); sys.exit(bool(results.failures()))"
        )
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=log, stderr=log)

    def _kill(self, driver: subprocess.Popen[bytes], dice: random.Random) -> list[str]:
        """Kill somebody, of those that live; returns whom."""
        roots = [self.head.pid, *(n.pid for n in self.nodes.made)]
        living = {who: [p for r in roots for p in processes.actors(r, cls)] for who, cls in ACTORS.items()}
        kinds = [who for who, pids in living.items() if pids] + ["node", "driver"]
        who = dice.choice(kinds)
        if who == "node":
            self.nodes.kill(dice)
            return [who]
        pid = driver.pid if who == "driver" else dice.choice(living[who])
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it ended meanwhile
            return []
        return [who]


if __name__ == "__main__":
    sys.exit(main())
