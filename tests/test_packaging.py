"""What users install holds the packages and the built-in world, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names of the files in the wheel."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [file] = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        return archive.namelist()


def test_the_wheel_holds_every_module_of_the_packages(wheel):
    packages = ("raysys", "actors", "methods", "benchmarks", "cluster")
    modules = {str(p.relative_to(ROOT)) for package in packages for p in (ROOT / package).rglob("*.py")}
    assert modules - set(wheel) == set()


def test_the_wheel_holds_the_world_with_its_model_and_the_demo(wheel):
    parts = ("model/config.json", "model/tokenizer.json", "model/model.safetensors", "demo.toml")
    assert [p for p in parts if f"benchmarks/world/{p}" not in wheel] == []


def test_the_wheel_holds_the_editors_trained_for_the_world(wheel):
    editors = sorted((ROOT / "benchmarks" / "world" / "editors").glob("*.safetensors"))
    assert editors and [str(p.relative_to(ROOT)) for p in editors if str(p.relative_to(ROOT)) not in wheel] == []
    assert sum(p.stat().st_size for p in editors) < 8e6


def test_the_wheel_holds_nothing_else(wheel):
    tops = {name.split("/")[0] for name in wheel if ".dist-info" not in name}
    assert tops == {"raysys", "actors", "methods", "benchmarks", "cluster"}


def test_pins_satisfy_the_ranges_and_name_no_place():
    """`constraints.txt` has no URL and no build of one machine, and every direct dependency is pinned in its range."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    assert [x for x in lines if "+" in x or "/" in x or "@" in x] == []
    pins = {canonicalize_name(r.name): Version(str(r.specifier).removeprefix("==")) for r in map(Requirement, lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = map(Requirement, [*project["dependencies"], *(need for extra in extras for need in extra)])
    for need in (w for w in wanted if w.marker is None or w.marker.evaluate()):
        assert pins[canonicalize_name(need.name)] in need.specifier, need
