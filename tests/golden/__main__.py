"""Compare our methods with vectors recorded from reference implementations: `python -m tests.golden FOLDER [FILTER]`.

FOLDER holds `<family>_<METHOD>/{vectors.safetensors,meta.json}`, `<family>_common` and `models/tiny-<family>`. Prints
a table of relative errors (Frobenius) and, last, "N passed, N failed"; exit code 1 when anything failed or a folder
could not be read.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
from safetensors import SafetensorError

from raysys.types import EditRefused
from tests import golden
from tests.golden.common import Case, Line, load, unseen
from tests.golden.moments import moments

# What an odd folder may bring about, here or in the libraries that read it.
BROKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EditRefused,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)


def methods() -> dict[str, Callable[[Case], Iterator[Line]]]:
    """Every comparison by the method's name in folder names: the METHODS of all modules here."""
    return _tables("METHODS")


def _tables(name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module in iter_modules(golden.__path__, "tests.golden."):
        if not module.name.endswith("__main__"):
            found |= getattr(import_module(module.name), name, {})
    return found


def folders(root: Path, only: str = "") -> list[Path]:
    """What is compared: every folder of `root` that holds vectors and has `only` in its name."""
    return [f for f in sorted(root.iterdir()) if f.is_dir() and "_" in f.name.lstrip("._") and only in f.name]


def compare(root: Path, folder: Path) -> Iterator[Line]:
    """The comparisons of one folder. Raises one of BROKEN when it can't be read or its method is unknown."""
    family, _, method = folder.name.partition("_")
    with _one_thread():
        yield from moments(root, family) if method == "common" else _compared(root, folder, family, method)


@contextmanager
def _one_thread() -> Iterator[None]:
    """As the vectors were recorded: Adam's first steps turn the rounding of near-zero gradients into whole steps."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compared(root: Path, folder: Path, family: str, method: str) -> Iterator[Line]:
    known = methods()
    if method not in known:
        raise ValueError(f"no comparison for {method!r}; there are {', '.join(sorted(known))}")
    case = load(root, folder, family, method)
    lines = []
    for line in known[method](case):
        lines.append(line)
        yield line
    yield from unseen(case, lines, _tables("INPUTS").get(method, ()))


def main(argv: list[str]) -> int:
    """Print the comparison of argv[0]; 0 when everything passed."""
    if not argv or not Path(argv[0]).is_dir():
        print(f"usage: python -m tests.golden FOLDER [FILTER]; {argv[:1]} is no folder")
        return 2
    warnings.filterwarnings("ignore", message=".*loss_type.*")
    passed = failed = 0
    for folder in folders(Path(argv[0]), *argv[1:2]):
        try:
            for line in compare(Path(argv[0]), folder):
                passed, failed = passed + line.passed, failed + (not line.passed)
                allowed = "" if line.passed else f"  (allowed {line.tolerance:.0e})"
                print(f"{'ok  ' if line.passed else 'FAIL'}  {line.error:8.1e}  {line.case:20} {line.what}{allowed}")
        except BROKEN as error:
            failed += 1
            reason = " ".join(str(error).split())
            print(f"FAIL           {folder.name:20} {type(error).__name__}: {reason}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
