"""A snapshot: the model after some number of edits, as one cumulative change against the untouched base.

Stored as safetensors with a JSON description in the header; nothing in it can run code. The `digest` covers the base
model and the canonical bytes of the patches, so whoever wears a snapshot can tell that it is the one that was made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from raysys.files import Location, write_bytes
from raysys.patch import rebuild
from raysys.stores import Remote
from raysys.types import Patch

FORMAT = 1
LONGEST = 100_000_000  # bytes of a header, as safetensors itself allows


@dataclass(frozen=True, eq=False)
class Snapshot:
    """`patches` after `edits` edits of a stream; `base` is the digest of the model they belong to.

    `id` names the recipe (model, dtype, method, settings, requests in order, seed), `digest` the outcome.
    """

    id: str
    parent: str | None
    edits: int
    patches: tuple[Patch, ...]
    base: str
    digest: str = ""

    def __post_init__(self) -> None:
        if not self.digest:
            object.__setattr__(self, "digest", digest(self.base, self.patches))

    @property
    def bytes(self) -> int:
        """Size of the change: bytes of all tensors."""
        return sum(t.numel() * t.element_size() for p in self.patches for t in p.tensors().values())

    def verify(self) -> None:
        """Raises ValueError when the patches are not the ones that `digest` was computed from."""
        if digest(self.base, self.patches) != self.digest:
            raise ValueError(f"snapshot {self.id} is damaged: its contents don't match its digest {self.digest[:12]}")

    def save(self, path: Location) -> None:
        """Write to `path`, whole or not at all. Raises OSError."""
        about = {"id": self.id, "parent": self.parent, "edits": self.edits, "base": self.base, "digest": self.digest}
        write(path, self.patches, {}, about)

    @classmethod
    def load(cls, path: Location) -> Snapshot:
        """Read back what `save` wrote. Raises ValueError when the file is not a whole, undamaged snapshot."""
        patches, _, about = read(path)
        try:
            snapshot = cls(about["id"], about["parent"], about["edits"], patches, about["base"], about["digest"])
        except KeyError as error:
            raise ValueError(f"{path}: not a snapshot, its header lacks {error}") from error
        snapshot.verify()
        return snapshot


def digest(base: str, patches: Sequence[Patch]) -> str:
    """Hex SHA-256 over the base digest and every patch: kind, fields, names, shapes, dtypes and bytes."""
    sha = hashlib.sha256(base.encode())
    for patch in patches:
        sha.update(json.dumps([patch.kind, patch.fields()], sort_keys=True).encode())
        for name, tensor in sorted(patch.tensors().items()):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor_bytes(tensor))
    return sha.hexdigest()


def tensor_bytes(tensor: Tensor) -> bytes:
    """The raw bytes of a tensor in row-major order, any dtype."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def write(path: Location, patches: Sequence[Patch], memory: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Patches, a method's memory and a JSON description as one safetensors file, whole or not at all."""
    tensors = {f"{i}.{name}": t for i, patch in enumerate(patches) for name, t in patch.tensors().items()}
    tensors |= {f"memory.{name}": tensor for name, tensor in memory.items()}
    described = [{"kind": p.kind, "fields": p.fields(), "tensors": sorted(p.tensors())} for p in patches]
    header = {"raysys": json.dumps({"format": FORMAT, "patches": described, "about": dict(about)}, sort_keys=True)}
    data = save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, metadata=header)
    write_bytes(path, data)


def read(path: Location, tensors: bool = True) -> tuple[tuple[Patch, ...], dict[str, Tensor], dict[str, Any]]:
    """(patches, memory, description) from a file of `write`; only the description without `tensors`.

    Raises ValueError when it is not such a file, or is cut short.
    """
    try:
        text, held = _contents(path, tensors)
        header = json.loads(text)
        if header["format"] != FORMAT:
            raise ValueError(f"{path}: format {header['format']}, this version reads {FORMAT}")
        patches = tuple(
            rebuild(p["kind"], p["fields"], {name: held[f"{i}.{name}"] for name in p["tensors"]})
            for i, p in enumerate(header["patches"] if tensors else ())
        )
        memory = {name.removeprefix("memory."): t for name, t in held.items() if name.startswith("memory.")}
        about: dict[str, Any] = dict(header["about"])
    except (SafetensorError, KeyError, TypeError, AttributeError, IndexError, json.JSONDecodeError, RecursionError,
            UnicodeDecodeError) as error:  # fmt: skip
        raise ValueError(f"{path}: not a whole file of raysys ({error}); remove it, it will be made again") from error
    return patches, memory, about


def _contents(path: Location, tensors: bool) -> tuple[str, dict[str, Tensor]]:
    """(our part of the header, tensors by name); no tensor is read unless they are wanted."""
    if not isinstance(path, Remote):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys()) if tensors else []
            return (file.metadata() or {})["raysys"], {name: file.get_tensor(name) for name in names}
    data = path.read_bytes() if tensors else path.read_bytes(8)
    size = int.from_bytes(data[:8], "little")
    if size > LONGEST:
        raise ValueError(f"{path}: a header of {size} bytes; not a file of raysys")
    start = data if tensors else path.read_bytes(8 + size)
    return json.loads(start[8 : 8 + size])["__metadata__"]["raysys"], load(data) if tensors else {}
