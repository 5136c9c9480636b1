"""What travels with a study to a cluster: the study, the local files it names, modules of the user's own, raysys.

Nothing else does: the folder a study is submitted from may hold secrets and gigabytes. Paths in a study are relative to
that folder, as for `raysys run`, and mean the same on the cluster, where the parcel is every process' working folder.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raysys.spec import StudySpec

PACKAGES = ("raysys", "actors", "methods", "benchmarks", "cluster")
LIMIT = 256 * 2**20  # bytes: Ray keeps a parcel in the memory of the head
HUB_TOKEN = ".hub_token"  # in the parcel: a token of the model hub, which $HF_TOKEN_PATH names
LEFT = {".git", ".venv", "venv", ".tox", "node_modules", "__pycache__", ".ipynb_checkpoints", ".cache"}
LEFT |= {".mypy_cache", ".pytest_cache", ".ruff_cache", ".gitignore", ".rayignore", ".DS_Store", ".env", ".ssh"}
_NO_PATHS = {"name", "label", "root", "dtype", "device", "seed"}  # keys whose value is never a path
_MODULE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # package.module:Class


@dataclass
class Parcel:
    """A folder that holds what travels; `parts` says what is in it: what -> bytes."""

    folder: Path
    study: str
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.parts.values())


def pack(study: Path, spec: StudySpec, folder: Path, more: Sequence[Path] = (), here: Path | None = None) -> Parcel:
    """Copy into the empty `folder` what `spec`, read from the file `study`, needs of the folder `here`.

    `more`: what the user adds. Raises ValueError for what can't travel, and when it is too much.
    """
    here = (here or Path.cwd()).resolve()
    parcel = Parcel(folder, study.name)
    root = (here / spec.root).resolve()
    for package in PACKAGES:
        parcel.parts[package] = _copy(_own(package), folder / package, Path())
    for name in sorted({*_paths(spec, here), *(str(p) for p in more)}):
        where = _inside(name, here)
        parcel.parts[name] = _copy(here / where, folder / where, root)
        _check(parcel)
    for name in sorted(set(_modules(spec))):
        if (module := _module(name, here)) is not None:
            parcel.parts[f"module {name}"] = _copy(module, folder / module.name, root)
            _check(parcel)
    shutil.copyfile(study, folder / study.name)
    return parcel


def words(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.0f} KiB"


# --- what a study names ----------------------------------------------------------------------------------------------


def _paths(spec: StudySpec, here: Path) -> Iterator[str]:
    """Relative paths in the study that are files or folders in `here`."""
    for key, value in _strings(spec.model_dump(mode="json", exclude={"cluster", "scoring"})):
        word = key in _NO_PATHS or (key == "data" and value in ("world", "hub"))
        short = 0 < len(value) < 1024 and not value.startswith(("/", "~"))
        if short and not word and (here / value).exists():
            yield value


def _modules(spec: StudySpec) -> Iterator[str]:
    """Top-level names of modules that the study names by dotted path."""
    for _, value in _strings(spec.model_dump(mode="json", exclude={"cluster", "scoring"})):
        if _MODULE.fullmatch(value) and (top := value.partition(":")[0].partition(".")[0]) not in PACKAGES:
            yield top


def _strings(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in plain data with the nearest key above it."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _strings(value, str(name))
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _strings(value, key)


def _module(name: str, here: Path) -> Path | None:
    """The file or folder of a module of the user's own; None for one that is installed, here and hopefully there."""
    for found in (here / name, here / f"{name}.py"):
        if found.exists():
            return found
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or ()) if spec else []
    origin = Path(places[0]) if places else Path(spec.origin) if spec and spec.origin else None
    installed = {Path(p).resolve() for p in sysconfig.get_paths().values()}
    if origin is None or any(p in installed for p in origin.resolve().parents):
        return None
    return origin


def _own(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


# --- copying ---------------------------------------------------------------------------------------------------------


def _inside(name: str, here: Path) -> Path:
    """The path of `name` within `here`. Raises ValueError for one that leads out of it."""
    real = (here / name).resolve()
    if not real.is_relative_to(here):
        raise ValueError(
            f"{name!r} leads out of {here}, so it can't travel to the cluster. Name it by an absolute path that the "
            f"cluster's machines can read, or submit from a folder that holds it."
        )
    if real == here:
        raise ValueError(f"{name!r} is the whole folder {here}; name what the study needs of it")
    return Path(os.path.normpath(name))


def _copy(source: Path, target: Path, root: Path) -> int:
    """Copy a file or a folder, without what never travels and without runs under `root`; the bytes copied."""
    if not source.exists():
        raise ValueError(f"{source}: no such file")
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        shutil.copyfile(source, target)
        return source.stat().st_size
    limit, size = source.resolve(), 0
    for folder, folders, files in os.walk(source):
        at = Path(folder)
        folders[:] = sorted(f for f in folders if f not in LEFT and (at / f).resolve() != root and not _run(at / f))
        for name in sorted(set(files) - LEFT):
            real = (at / name).resolve()
            if not real.is_relative_to(limit):
                raise ValueError(f"{at / name} is a link that leads out of {source}; put the file itself there")
            size += real.stat().st_size
            if size > LIMIT:
                raise ValueError(_too_much(f"{source} alone"))
            to = target / at.relative_to(source) / name
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(real, to)
    return size


def _run(folder: Path) -> bool:
    """Whether a folder is that of a run, or an environment."""
    return (folder / "pyvenv.cfg").is_file() or ((folder / "spec.json").is_file() and (folder / ".lock").is_file())


def _check(parcel: Parcel) -> None:
    if parcel.size > LIMIT:
        largest = sorted(parcel.parts.items(), key=lambda part: -part[1])[:3]
        told = ", ".join(f"{name} {words(size)}" for name, size in largest)
        raise ValueError(_too_much(f"what the study names here ({told})"))


def _too_much(what: str) -> str:
    return (
        f"{what} is more than the {words(LIMIT)} that can travel with a study. Put large files where every machine of "
        f"the cluster can read them and name them by absolute path; name a model by its hub id."
    )
