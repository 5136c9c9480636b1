"""A study on real data: `python -m tests.real [--records N] [--items N] [--out FOLDER]`.

Real CounterFact, MMLU (5 subjects) and GSM8K from the folder of shared data, on a small real Llama-architecture model
(stories260K, converted) and on a random GPT-2-shaped one with GPT-2's real tokenizer. Neither knows anything, so a
right run has chance-level figures before the edits: that is checked. Last line `N passed, N failed`; exit code 1 on a
failure.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.compute as pc

from raysys import convert
from raysys.progress import shown
from raysys.results import Results
from raysys.spec import StudySpec
from raysys.study import run

SHARED = Path(os.environ.get("RAYSYS_SHARED", Path(__file__).resolve().parents[2] / "shared"))
SUBJECTS = ["anatomy", "astronomy", "business_ethics", "marketing", "virology"]


def main() -> int:
    """Convert, run, check; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=50, help="edits (default 50)")
    parser.add_argument("--items", type=int, default=100, help="GSM8K items (default 100)")
    parser.add_argument("--out", type=Path, help="keep models and results here")
    options = parser.parse_args()
    if not SHARED.is_dir():
        print(f"no folder {SHARED}: set RAYSYS_SHARED to the folder of shared data", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="raysys-real-") as temporary:
        folder = options.out or Path(temporary)
        results = run(study(folder, options.records, options.items), shown())
        verdicts = list(check(results, options.records))
    for good, text in verdicts:
        print(f"{'ok  ' if good else 'FAIL'} {text}")
    passed = sum(good for good, _ in verdicts)
    print(f"{passed} passed, {len(verdicts) - passed} failed")
    return 0 if passed == len(verdicts) else 1


def study(folder: Path, records: int, items: int) -> StudySpec:
    """The study on models written into `folder`."""
    data = SHARED / "data"
    stories, gpt2 = folder / "stories260K", folder / "random-gpt2"
    if not stories.exists():
        source = data / "stories260K"
        convert.llama2c(source / "stories260K.bin", source / "tok512.model", stories)
    if not gpt2.exists():
        convert.random_gpt2(data / "tokenizers" / "gpt2", gpt2)
    corpus = str(data / "wikitext" / "wikitext2_train_5k.txt")
    return StudySpec.check(
        {
            "name": "real",
            "root": str(folder / "runs"),
            "models": [str(stories), str(gpt2)],
            "snapshots": [0, 1, min(10, records), records],
            "edits": {"dataset": "counterfact", "path": str(data / "counterfact" / "counterfact-edit.json")}
            | {"count": records},
            "methods": [
                {"name": "rome", "layer": 1, "corpus": corpus, "documents": 1000},
                {"name": "ft_m", "layers": [1]},
            ],
            "benchmarks": [
                {"name": "mmlu", "data": str(data / "mmlu"), "subjects": SUBJECTS},
                {"name": "gsm8k", "data": str(data / "gsm8k"), "limit": items},
                {"name": "probes"},
                {"name": "locality", "limit": 50},
            ],
        }
    )


def check(results: Results, records: int) -> Iterator[tuple[bool, str]]:
    """(as expected, what was found) for every figure that is known beforehand."""
    yield results.failures() == [], f"units that failed: {len(results.failures())}"
    edits = results.edits()
    scores = results.scores()
    for cell in results.cells():
        made = edits.filter(pc.field("cell") == cell.id)
        refused = sum(bool(r) for r in made["refused"].to_pylist())
        yield made.num_rows == records, f"{cell.id}: {made.num_rows} edits on record, {refused} refused"
        for benchmark, metric, low, high in (
            ("mmlu", "accuracy", 0.18, 0.32),
            ("gsm8k", "accuracy", 0.0, 0.03),
            ("probes", "efficacy/probability", 0.25, 0.75),
        ):
            wanted = (pc.field("cell") == cell.id) & (pc.field("benchmark") == benchmark)
            base = scores.filter(wanted & (pc.field("metric") == metric) & (pc.field("edits") == 0))["value"]
            mean = pc.mean(base).as_py()
            text = f"{cell.id}: {benchmark} {metric} of the base {mean:.3f} over {len(base)}, chance {low} to {high}"
            yield low <= mean <= high, text
        last = (pc.field("cell") == cell.id) & (pc.field("edits") == max(results.spec.snapshots))
        seen = set(scores.filter(last)["benchmark"].to_pylist())
        yield seen == {"mmlu", "gsm8k", "probes", "locality"}, f"{cell.id}: scored to the end: {sorted(seen)}"


if __name__ == "__main__":
    sys.exit(main())
