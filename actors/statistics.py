"""Second moments over Ray Data: texts are tokenised by tasks, and summed by workers that hold the model; resumable.

Texts come in the fixed parts of methods/parts/moments.py. A part's sums are a file, named by what they were made from,
before anyone hears of them; parts are added in their order, whoever made them and whenever. So the total has the same
bits as the one made in a single process with as many threads on the same kind of hardware, and an interrupted pass
goes on. On several machines the cache folder must be one that all of them see.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.data
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from actors.machine import settle
from methods.parts import artifacts, moments
from methods.parts.moments import Sums
from raysys.corpora import Corpus
from raysys.files import content_hash, write_bytes
from raysys.model import Model
from raysys.tokens import Tokens

FORMAT = 1  # changes when the same part gives other sums
TRIES = 3  # passes over the parts that are missing
FOLD = 8  # finished parts whose files are replaced by that of the total so far


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Who sums: `number` workers, each with its own copy of `model`, `threads` of CPUs and `gpus`.

    An instance is what `artifacts.making` takes. `cache` is the folder of artifacts, `tell` hears of progress.
    """

    model: str
    dtype: str
    device: str
    number: int = 1
    threads: int = 1
    gpus: float = 0.0
    cache: Path | None = None
    tell: artifacts.Tell = lambda what, done, total: None

    def __call__(self, model: Model, modules: Sequence[str], corpus: Corpus) -> Mapping[str, Sums]:
        """The sums of `modules` over `corpus`. Raises ValueError for a corpus without text or workers of another model.

        `model` says whose sums are wanted; the workers load it by name.
        """
        names = tuple(dict.fromkeys(modules))
        texts = list(moments.parts(corpus.texts()))
        if not texts:
            raise ValueError(f"second moment of {', '.join(names)}: the corpus has no text; give one with documents")
        store = self.store(model, names, texts)
        what, total = artifacts.making_of(names, corpus), sum(map(len, texts))

        def told() -> None:
            store.fold()
            self.tell(what, sum(len(texts[i]) for i in store.there()), total)

        told()
        for _ in range(TRIES):  # a damaged part is found when it is added, and made again
            for row in self._summed(model, names, texts, store):
                if row["fault"]:
                    raise ValueError(row["fault"])
                told()
        if store.number < len(texts):
            raise RuntimeError(f"{what}: {len(texts) - store.number} of {len(texts)} parts could not be summed")
        store.clear()
        return store.total

    def store(self, model: Model, names: Sequence[str], texts: Sequence[Sequence[str]]) -> Store:
        """Where the sums of these parts are kept until they are added: named by all that they are made from."""
        keys = [
            content_hash([FORMAT, model.digest, moments.longest(model.tokens), self.threads, names, part])
            for part in texts
        ]
        return Store(artifacts.folder(self.cache) / "partial" / content_hash([names, keys])[:24], keys)

    def _summed(
        self, model: Model, names: Sequence[str], texts: Sequence[Sequence[str]], store: Store
    ) -> Iterator[Mapping[str, Any]]:
        """A row for each part that was missing, once its sums are on disk, in any order."""
        rows = [{"texts": list(texts[i]), "path": str(store.path(i))} for i in store.missing()]
        if not rows:
            return
        data: Any = ray.data.from_items(rows, override_num_blocks=len(rows))
        data = data.map(_tokens, fn_kwargs={"model": self.model}, num_cpus=0.5)
        about = {"model": self.model, "dtype": self.dtype, "device": self.device, "threads": self.threads}
        size = min(self.number, len(rows))
        yield from data.map_batches(
            _Summer,
            fn_constructor_kwargs=about | {"digest": model.digest, "modules": list(names)},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
            num_cpus=self.threads,
            num_gpus=self.gpus,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self.threads)}},
        ).iter_rows()


def _tokens(row: Mapping[str, Any], model: str) -> dict[str, Any]:
    tokens = Tokens.load(model)
    return {"path": row["path"], "rows": [moments.rows_of(tokens, text) for text in row["texts"]]}


class _Summer:
    """A worker: holds the model, once it has something to do, and sums one part after another."""

    def __init__(self, modules: Sequence[str], digest: str, threads: int, **about: str) -> None:
        self.modules, self.digest, self.threads, self.about = list(modules), digest, threads, about
        self.model: Model | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Sum the parts of `batch` (one) and write each; what travels on is what was wrong."""
        settle(self.threads)
        try:
            self.model = self.model or self._load()
            for path, rows in zip(batch["path"], batch["rows"], strict=True):
                given = [[int(i) for i in row] for row in rows]
                _write(Path(path), moments.token_sums(self.model, self.modules, given))
        except (ValueError, OSError) as error:  # the user's: told in their words, without Ray's
            return {"fault": [str(error)]}
        return {"fault": [""]}

    def _load(self) -> Model:
        model = Model.load(self.about["model"], self.about["dtype"], self.about["device"])
        if model.digest != self.digest:
            raise ValueError(
                f"{model.name} as the workers load it is another model than the one that is being prepared (digests "
                f"{model.digest[:12]} and {self.digest[:12]}); are all machines given the same files?"
            )
        return model


class Store:
    """Sums of parts on disk, and the total of the first `number` of them."""

    def __init__(self, folder: Path, keys: Sequence[str]) -> None:
        self.folder, self.keys = folder, list(keys)
        self.total: Mapping[str, Sums] = {}
        self.number = 0
        self._folded: list[Path] = []
        for path in sorted(folder.glob("total-*.safetensors")):
            if (found := _read(path)) is not None:
                self.total, self.number = found, int(path.stem.partition("-")[2])

    def path(self, number: int) -> Path:
        """Where the sums of a part are, or will be."""
        return self.folder / f"{self.keys[number][:32]}.safetensors"

    def there(self) -> list[int]:
        """Parts that are done."""
        return [i for i in range(len(self.keys)) if i < self.number or self.path(i).is_file()]

    def missing(self) -> list[int]:
        """Parts that are not."""
        done = set(self.there())
        return [i for i in range(len(self.keys)) if i not in done]

    def fold(self) -> None:
        """Add what is there to the total, in order, up to the first part that is missing."""
        while self.number < len(self.keys) and self.path(self.number).is_file():
            path = self.path(self.number)
            sums = _read(path)
            if sums is None:  # cut short or of something else: made again
                path.unlink()
                return
            self.total = moments.added(self.total, sums)
            self.number += 1
            self._folded.append(path)
        if len(self._folded) >= FOLD and self.number < len(self.keys):
            self._shrink()

    def _shrink(self) -> None:
        """One file of the total instead of its parts' files."""
        before = list(self.folder.glob("total-*.safetensors"))
        _write(self.folder / f"total-{self.number:06d}.safetensors", self.total)
        for path in (*before, *self._folded):
            path.unlink(missing_ok=True)
        self._folded.clear()

    def clear(self) -> None:
        """Everything is summed: the parts are of no more use."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _write(path: Path, sums: Mapping[str, Sums]) -> None:
    """Whole or not at all. Raises OSError."""
    tensors = {f"sum.{name}": s.total.contiguous() for name, s in sums.items()}
    tensors |= {f"count.{name}": torch.tensor(s.count) for name, s in sums.items()}
    write_bytes(path, save(tensors))


def _read(path: Path) -> Mapping[str, Sums] | None:
    """None for a file that is no such thing."""
    try:
        found = load_file(path)
    except (SafetensorError, OSError):
        return None
    names: Iterable[str] = (n.removeprefix("sum.") for n in found if n.startswith("sum."))
    return {n: Sums(found[f"sum.{n}"], int(found[f"count.{n}"])) for n in names}
