"""The shape of the repository: sizes, imports, and what its README promises."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("raysys", "actors", "methods", "benchmarks", "cluster")
LIBRARY = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
FILES = LIBRARY + sorted((ROOT / "tests").rglob("*.py"))
NEVER_IMPORTED = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_fits_in_the_head(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_function_fits_on_a_screen(path):
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= 60}
    assert long == {}


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_a_file_begins_with_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_library_code_never_unpickles(path):
    tree = ast.parse(path.read_text())
    plain = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    from_ = {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    calls = [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) in ("torch.load", "torch.save")
    ]
    assert (plain | from_) & NEVER_IMPORTED == set()
    assert calls == []


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_library_code_never_prints(path):
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_lies_in_this_repository(package):
    """Some wheels ship a top-level `benchmarks` or `tests` of their own."""
    file = importlib.import_module(package).__file__
    assert file is not None
    assert Path(file).resolve() == ROOT / package / "__init__.py"


def test_importing_raysys_is_light():
    code = "import raysys, sys; print(sorted({'ray', 'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_every_public_name_can_be_imported():
    import raysys

    assert [n for n in raysys.__all__ if getattr(raysys, n) is None] == []


def test_the_readme_maps_every_folder():
    text = (ROOT / "README.md").read_text()
    assert [p for p in (*PACKAGES, "tests", "notebooks") if f"{p}/" not in text] == []


def commands() -> dict[str, Any]:
    """Every command of the command line by its full name, those of groups included."""
    import typer.main

    from raysys.cli import app

    found = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        found |= {f"{name} {n}": c for n, c in getattr(command, "commands", {}).items()} or {name: command}
    return found


def test_the_readme_explains_every_command():
    text = (ROOT / "README.md").read_text()
    assert [c for c in commands() if f"raysys {c}" not in text] == []


def test_every_command_says_what_it_does():
    assert [n for n, c in commands().items() if not (c.help or "").strip()] == []


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md"])
def test_links_to_files_lead_somewhere(path):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / path).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
