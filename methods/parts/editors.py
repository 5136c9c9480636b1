"""Trained editors as files: saved, found again, and refused when they were made for something else.

A file is `<cache>/editors/<method>-<key>-<content>.safetensors`: `key` hashes what an editor must fit (method, digest
of the model, modules, shape of the network), `content` what came out of training. Its header tells both, and how it was
trained (settings, hash of the training cases, figures). Editors for the built-in world are shipped with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from methods.parts.artifacts import content, folder
from raysys.loading import WORLD
from raysys.model import Model
from raysys.types import EditCase

FORMAT = "1"
SHIPPED = WORLD.parent / "editors"
SHOWN = 12  # characters of a digest in names and messages


@dataclass(frozen=True, eq=False)
class Editor:
    """A trained editor: its tensors, their digest, how it was trained."""

    tensors: dict[str, Tensor]
    digest: str
    training: Mapping[str, Any]
    path: Path


def fits(method: str, model: Model, modules: Sequence[str], structure: Mapping[str, Any]) -> dict[str, Any]:
    """What an editor has to be made for, as JSON; `structure` says the shape of the network (rank, blocks, ...)."""
    return {
        "format": FORMAT,
        "method": method,
        "model": model.digest,
        "modules": list(modules),
        "structure": dict(structure),
    }


def digest_of(cases: Sequence[EditCase]) -> str:
    """SHA-256 (hex) of training cases: requests and probes, in order."""
    return hashlib.sha256(_json([asdict(c) | {"source": ""} for c in cases]).encode()).hexdigest()


def name(wanted: Mapping[str, Any]) -> str:
    """The part of a file's name that says what the editor fits."""
    return f"{wanted['method']}-{hashlib.sha256(_json(wanted).encode()).hexdigest()[:SHOWN]}"


def save(
    wanted: Mapping[str, Any], tensors: Mapping[str, Tensor], training: Mapping[str, Any], cache: Path | None = None
) -> Path:
    """Write an editor that fits `wanted`, whole or not at all. `training`: how it was trained, as JSON."""
    kept = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    digest = content(kept)
    path = folder(cache) / "editors" / f"{name(wanted)}-{digest[:SHOWN]}.safetensors"
    write(path, kept, {"fits": _json(wanted), "digest": digest, "training": _json(training)})
    return path


def write(path: Path, tensors: dict[str, Tensor], said: dict[str, str]) -> None:
    """A safetensors file with a header, whole or not at all. Raises ValueError when it can't be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(suffix=".partial", dir=path.parent)
        os.close(handle)
        try:
            save_file(tensors, temporary, said)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{path} can't be written ({error}); set RAYSYS_CACHE to another folder") from error


def find(wanted: Mapping[str, Any], model: Model, cache: Path | None = None, editor: str = "") -> Editor:
    """The editor that fits `wanted`: of the cache folder, else a shipped one.

    `editor`: which one, where there are several: its path, or the beginning of its digest. Raises ValueError when
    there is none, more than one, or a wrong one.
    """
    method = wanted["method"]
    if editor and Path(editor).suffix:
        return read(Path(editor), wanted)
    for place in (folder(cache) / "editors", SHIPPED):
        found = sorted(place.glob(f"{name(wanted)}-{editor[:SHOWN]}*.safetensors"))
        if len(found) > 1:
            digests = ", ".join(p.stem.rpartition("-")[2] for p in found)
            raise ValueError(
                f"{method}: {place} holds {len(found)} trained editors that fit {model.name or 'this model'}; "
                f'say which (editor = "..." with one of {digests}), or delete the others'
            )
        if found:
            return read(found[0], wanted)
    which = f" {editor!r}" if editor else ""
    dtype = str(model.dtype).removeprefix("torch.")
    same = "" if dtype == "float32" else f" --dtype {dtype}"  # an editor fits one dtype: the digest tells them apart
    raise ValueError(
        f"{method} needs an editor trained for {model.name or 'this model'} with these settings, and there is none"
        f"{which} in {folder(cache) / 'editors'}: run `raysys train-editor {method} {model.name or 'MODEL'}{same}`"
    )


def read(path: Path, wanted: Mapping[str, Any]) -> Editor:
    """The editor in a file. Raises ValueError when it can't be read, was changed, or doesn't fit."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            said = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"editor {path} can't be read ({error}); train it again") from error
    made_for = json.loads(said.get("fits", "{}"))
    if made_for != json.loads(_json(wanted)):
        differs = [
            f"{k} is {_short(made_for.get(k))}, not {_short(v)}" for k, v in wanted.items() if made_for.get(k) != v
        ]
        raise ValueError(f"editor {path} was trained for something else: {'; '.join(differs) or 'other settings'}")
    if said.get("digest") != content(tensors):
        raise ValueError(f"editor {path} was changed after it was written; train it again")
    return Editor(tensors, said["digest"], json.loads(said["training"]), path)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:SHOWN]}…"
