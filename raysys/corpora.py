"""Documents of plain text, for statistics over what a model reads: the built-in world, a text file, a hub data set."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WORLD = "benchmarks.world:corpus"  # corpus(documents, seed) -> list of texts; by name: the floor imports no benchmark


@dataclass(frozen=True)
class Corpus:
    """`documents` texts of `name`, chosen by `seed`.

    `name` is "world", the path of a text file (documents are separated by blank lines, or are its lines when it has
    none), or a hub data set "owner/name:config" with a column `text`, optionally "owner/name:config@revision".
    """

    name: str
    documents: int
    seed: int = 1

    @property
    def digest(self) -> str:
        """Names the texts: a hash of their content, or for a hub data set of its name, revision, count and seed."""
        if _on_hub(self.name):
            return hashlib.sha256(f"{self.name} {self.documents} {self.seed}".encode()).hexdigest()
        sha = hashlib.sha256()
        for text in self.texts():
            sha.update(text.encode() + b"\0")
        return sha.hexdigest()

    def texts(self) -> Iterator[str]:
        """The documents, in a fixed order. Raises ValueError when the corpus can't be read or is empty."""
        if self.documents < 1:
            raise ValueError(f"corpus {self.name!r}: documents is {self.documents}, must be at least 1")
        if self.name == "world":
            yield from _world(self.documents, self.seed)
        elif _on_hub(self.name):
            yield from _hub(self.name, self.documents, self.seed)
        else:
            yield from _file(Path(self.name).expanduser(), self.documents, self.seed)


def _on_hub(name: str) -> bool:
    return name != "world" and not Path(name).expanduser().exists() and name.count("/") == 1 and ":" in name


def _world(documents: int, seed: int) -> Iterator[str]:
    module, _, attribute = WORLD.partition(":")
    try:
        corpus = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"corpus 'world' is not installed ({WORLD} is missing); name a text file") from error
    yield from corpus(documents, seed)


def _file(path: Path, documents: int, seed: int) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"corpus {str(path)!r}: can't be read ({error}); give 'world', the path of a UTF-8 text file, or a hub id "
            "such as 'wikimedia/wikipedia:20231101.en'"
        ) from error
    whole = text.split("\n\n") if "\n\n" in text.strip() else text.splitlines()
    kept = [t.strip() for t in whole if t.strip()]
    if not kept:
        raise ValueError(f"corpus {str(path)!r} holds no text")
    if documents < len(kept):
        kept = [kept[i] for i in _sample(len(kept), documents, seed)]
    yield from kept


def _hub(name: str, documents: int, seed: int) -> Iterator[str]:
    import datasets

    where, _, revision = name.partition("@")
    path, _, config = where.partition(":")
    try:
        data = datasets.load_dataset(path, config or None, split="train", revision=revision or None)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"corpus {name!r} can't be loaded from the hub ({error}); where there is no network, give the path of a "
            "text file with one document per line"
        ) from error
    if "text" not in data.column_names:
        raise ValueError(f"corpus {name!r} has no column 'text'; it has {', '.join(data.column_names)}")
    for i in _sample(len(data), min(documents, len(data)), seed):
        yield data[i]["text"]


def _sample(total: int, count: int, seed: int) -> list[int]:
    """`count` of `total` numbers without repetition, ascending: the same on every machine."""
    import random

    return sorted(random.Random(seed).sample(range(total), count))
