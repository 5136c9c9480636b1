"""What is costly and depends on the unedited model alone: second moments of keys, and sampled contexts.

Each is computed once and kept in a cache folder under a name that hashes everything it was made from, so that it can't
be reused for another model, corpus or setting; what a file says of itself is checked when it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from methods.parts import moments
from raysys.corpora import Corpus
from raysys.model import Model

FORMAT = "2"  # changes when the same inputs give other numbers
SEEDS = ("The", "Therefore", "Because", "I", "You")  # what the sampled contexts begin with
TOP_K = 5

Collect = Callable[[Model, Sequence[str], Corpus], Mapping[str, moments.Sums]]
Tell = Callable[[str, int, int], None]  # what is being made, how many documents of it are done, of how many


@dataclass(frozen=True)
class Moment:
    """`matrix` (d_in, d_in) float64: C = Σ k kᵀ / count over the inputs k of a module at every token but padding."""

    matrix: Tensor
    count: int
    digest: str


@dataclass(frozen=True)
class Contexts:
    """Texts with one "{}" that an edit should survive; the first is the bare "{}"."""

    texts: tuple[str, ...]
    digest: str


def hashes(contexts: Contexts, moments: Mapping[str, Moment]) -> dict[str, str]:
    """What a method with sampled contexts and second moments (by module) was made from, for its identity."""
    return {"contexts": contexts.digest, **{f"second_moment.{m}": k.digest for m, k in moments.items()}}


def folder(cache: Path | str | None = None) -> Path:
    """The cache folder: `cache`, else $RAYSYS_CACHE, else ~/.cache/raysys."""
    return Path(cache or os.environ.get("RAYSYS_CACHE") or Path.home() / ".cache" / "raysys").expanduser()


def second_moment(model: Model, module: str, corpus: Corpus, cache: Path | None = None) -> Moment:
    """The uncentred second moment of what enters `module` while the unedited model reads `corpus`.

    Texts are cut to what the model reads, at most moments.LONGEST tokens. Raises ValueError for a corpus that can't be
    read, a wrong file, or keys that are not finite.
    """
    return second_moments(model, [module], corpus, cache)[module]


def second_moments(
    model: Model, modules: Sequence[str], corpus: Corpus, cache: Path | None = None
) -> dict[str, Moment]:
    """`second_moment` of each of `modules`: those that the cache lacks are taken from one pass over the corpus.

    Who makes the sums can be chosen (see `making`); the bits are the same (methods/parts/moments.py).
    """
    length = moments.longest(model.tokens)
    recipes = {m: {"module": m, "corpus": corpus.digest, "length": length} for m in modules}
    kept = {m: _kept(model, "second_moment", recipe, cache) for m, recipe in recipes.items()}
    missing = [m for m, found in kept.items() if found is None]
    if missing:
        for m, sums in _COLLECT.get()(model, missing, corpus).items():
            finite(sums.total, f"the second moment of {m} ({model.name or 'the model'} in {model.dtype})")
            tensors = {"sum": sums.total, "count": torch.tensor(sums.count)}
            kept[m] = _keep(model, "second_moment", recipes[m], tensors, cache)
    found = {m: k for m, k in kept.items() if k is not None}
    counts = {m: int(k.tensors["count"]) for m, k in found.items()}
    return {m: Moment(k.tensors["sum"] / counts[m], counts[m], k.digest) for m, k in found.items()}


def finite(moment: Tensor, what: str) -> None:
    """Raises ValueError when `moment` (d, d), called `what`, comes from keys that are infinite, or no numbers."""
    if not bool(moment.diagonal().isfinite().all()):  # what is not finite anywhere shows on the diagonal
        raise ValueError(
            f"{what} is not finite: the model's activations overflow, as they may in half precision; load it in "
            "bfloat16 or float32"
        )


@contextmanager
def making(collect: Collect | None = None, tell: Tell | None = None) -> Iterator[None]:
    """Within it, `collect` makes the sums of second moments that no cache has, and `tell` hears how far they are."""
    before = _COLLECT.set(collect or _COLLECT.get()), _TELL.set(tell or _TELL.get())
    try:
        yield
    finally:
        _COLLECT.reset(before[0])
        _TELL.reset(before[1])


def _here(model: Model, modules: Sequence[str], corpus: Corpus) -> Mapping[str, moments.Sums]:
    """In this process, part by part."""
    tell, what = _TELL.get(), making_of(modules, corpus)

    def told() -> Iterator[str]:
        for done, text in enumerate(corpus.texts()):
            if done % moments.PART == 0:
                tell(what, done, corpus.documents)
            yield text

    found = moments.collect(model, modules, told())
    tell(what, corpus.documents, corpus.documents)
    return found


def making_of(modules: Sequence[str], corpus: Corpus) -> str:
    """What users are told while second moments are made."""
    several = f"{len(modules)} modules" if len(modules) > 1 else modules[0]
    return f"second moments of {several} from {corpus.documents} documents of {corpus.name}"


_COLLECT: ContextVar[Collect] = ContextVar("collect", default=_here)
_TELL: ContextVar[Tell] = ContextVar("tell", default=lambda what, done, total: None)


def contexts(model: Model, lengths: Sequence[tuple[int, int]], seed: int = 0, cache: Path | None = None) -> Contexts:
    """The bare "{}" and, for each (length, number) of `lengths`, `number` texts that the model itself goes on to write.

    A text is `length` tokens long, special tokens included, begins with one of SEEDS in turn and is sampled among the
    TOP_K likeliest next tokens with `seed`; then comes ". {}". Raises ValueError when a length leaves no room.
    """
    recipe = {"lengths": [list(pair) for pair in lengths], "seed": seed, "seeds": SEEDS, "top_k": TOP_K}
    kept = _kept(model, "contexts", recipe, cache)
    if kept is None:
        generator = torch.Generator().manual_seed(seed)
        texts = ["{}"]
        for length, number in lengths:
            for begin, many in zip(SEEDS, _shares(number, len(SEEDS)), strict=True):
                texts += [f"{t}. {{}}" for t in _sampled(model, begin, length, many, generator)]
        data = torch.frombuffer(bytearray(json.dumps(texts).encode()), dtype=torch.uint8)
        kept = _keep(model, "contexts", recipe, {"texts": data}, cache)
    return Contexts(tuple(json.loads(bytes(kept.tensors["texts"].tolist()))), kept.digest)


def _shares(number: int, parts: int) -> list[int]:
    return [number // parts + (i < number % parts) for i in range(parts)]


@torch.no_grad()
def _sampled(model: Model, begin: str, length: int, many: int, generator: torch.Generator) -> list[str]:
    ids = torch.tensor([model.encode(begin)] * many, dtype=torch.long, device=model.device)
    if many and length > model.max_length:
        raise ValueError(f"contexts of {length} tokens: the model reads at most {model.max_length}")
    while many and ids.shape[1] < length:
        hidden, _ = model.hidden(ids, use_cache=False)
        best, which = model.logits(hidden[:, -1]).float().cpu().topk(TOP_K)  # (many, TOP_K) each
        drawn = torch.multinomial(best.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, which.gather(1, drawn).to(ids.device)], 1)
    return [_clean(model.decode(row)) for row in ids]


def _clean(text: str) -> str:
    text = unicodedata.normalize("NFKD", text).replace("\n\n", " ")
    return text.replace("{", "").replace("}", "")


def kept(
    model: Model, kind: str, recipe: Mapping[str, Any], make: Callable[[], dict[str, Tensor]], cache: Path | None = None
) -> tuple[dict[str, Tensor], str]:
    """The tensors that `make` gives, and their content hash: made once for each `recipe` (JSON) and kept in `cache`."""
    found = _kept(model, kind, recipe, cache) or _keep(model, kind, recipe, make(), cache)
    return found.tensors, found.digest


# --- the store -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kept:
    tensors: dict[str, Tensor]
    digest: str


def _origin(model: Model, kind: str, recipe: Mapping[str, Any]) -> str:
    """Everything an artifact was made from, as JSON."""
    return json.dumps({"format": FORMAT, "kind": kind, "model": model.digest, **recipe}, sort_keys=True)


def _path(origin: str, kind: str, cache: Path | None) -> Path:
    return folder(cache) / kind / f"{hashlib.sha256(origin.encode()).hexdigest()[:24]}.safetensors"


def _kept(model: Model, kind: str, recipe: Mapping[str, Any], cache: Path | None) -> _Kept | None:
    """The artifact if the cache has it: for every rank of a split model, or for none of them.

    Raises ValueError when the file there is another one or damaged.
    """
    origin = _origin(model, kind, recipe)
    path = _path(origin, kind, cache)
    return _read(path, origin) if model.agreed(path.is_file()) else None


def _read(path: Path, origin: str) -> _Kept:
    """The artifact in `path`, which must have been made from `origin`. Raises ValueError."""
    way_out = "delete it and it will be computed again"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"artifact {path} can't be read ({error}); {way_out}") from error
    if said.get("origin") != origin:
        raise ValueError(f"artifact {path} was made from something else ({said.get('origin')}); {way_out}")
    digest = content(tensors)
    if said.get("digest") != digest:
        raise ValueError(f"artifact {path} was changed after it was written; {way_out}")
    return _Kept(tensors, digest)


def _keep(model: Model, kind: str, recipe: Mapping[str, Any], tensors: dict[str, Tensor], cache: Path | None) -> _Kept:
    """Write the artifact, whole or not at all; when two processes do so, one of them wins and both are right."""
    origin = _origin(model, kind, recipe)
    path = _path(origin, kind, cache)
    digest = content(tensors)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".partial", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            save_file({k: t.contiguous() for k, t in tensors.items()}, temporary, {"origin": origin, "digest": digest})
            os.link(temporary, path)  # the first to finish wins
        except FileExistsError:
            return _read(path, origin)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"artifact {path} can't be written ({error}); set RAYSYS_CACHE to another folder") from error
    return _Kept(tensors, digest)


def content(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of named tensors: names, types, shapes, bytes."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
