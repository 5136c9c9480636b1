"""Names for what can be plugged in: lazy, so that nothing is imported before it is used.

A plug-in outside this repository needs no line here: name it by dotted path, `package.module:Class`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

METHODS = {
    "rome": "methods.rome:Rome",
    "r_rome": "methods.r_rome:RRome",
    "memit": "methods.memit:Memit",
    "emmet": "methods.emmet:Emmet",
    "pmet": "methods.pmet:Pmet",
    "alphaedit": "methods.alphaedit:AlphaEdit",
    "encore": "methods.encore:Encore",
    "nse": "methods.nse:Nse",
    "sphere": "methods.sphere:Sphere",
    "rect": "methods.rect:Rect",
    "prune": "methods.prune:Prune",
    "mend": "methods.mend:Mend",
    "malmen": "methods.malmen:Malmen",
    "rledit": "methods.rledit:RlEdit",
    "ultraedit": "methods.ultraedit:UltraEdit",
    "kn": "methods.kn:Kn",
    "grace": "methods.grace:Grace",
    "wise": "methods.wise:Wise",
    "melo": "methods.melo:Melo",
    "serac": "methods.serac:Serac",
    "ike": "methods.ike:Ike",
    "lora": "methods.lora:Lora",
    "ft_l": "methods.ft:FtL",
    "ft_m": "methods.ft:FtM",
}
BENCHMARKS = {
    "mmlu": "benchmarks.mmlu:Mmlu",
    "bbh": "benchmarks.bbh:Bbh",
    "gsm8k": "benchmarks.gsm8k:Gsm8k",
    "commonsense_qa": "benchmarks.commonsense_qa:CommonsenseQa",
    "trivia_qa": "benchmarks.trivia_qa:TriviaQa",
    "truthful_qa": "benchmarks.truthful_qa:TruthfulQa",
    "toxigen": "benchmarks.toxigen:Toxigen",
    "probes": "benchmarks.probes:Probes",
    "locality": "benchmarks.probes:Locality",
    "fluency": "benchmarks.fluency:Fluency",
    "perplexity": "benchmarks.perplexity:Perplexity",
    "harness": "benchmarks.harness:Harness",
}
DATASETS = {
    "world": "benchmarks.edits:World",
    "counterfact": "benchmarks.edits:CounterFact",
    "zsre": "benchmarks.edits:Zsre",
    "mquake": "benchmarks.mquake:Mquake",
    "json": "benchmarks.edits:Custom",
}


def method(name: str) -> Any:
    """The class of an editing method. Raises ValueError with the nearest name when there is none."""
    return _find("method", METHODS, name)


def benchmark(name: str) -> Any:
    """The class of a benchmark. Raises ValueError with the nearest name when there is none."""
    return _find("benchmark", BENCHMARKS, name)


def dataset(name: str) -> Any:
    """The class of a data set of edits. Raises ValueError with the nearest name when there is none."""
    return _find("edit data set", DATASETS, name)


def build(cls: Any, settings: Mapping[str, Any], where: str) -> Any:
    """An instance of the dataclass `cls` with `settings`, types checked and converted (lists to tuples, int to float).

    `where` says in the user's words whose settings these are. Raises ValueError that lists every wrong one.
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ValueError(f"{where}: {cls!r} is not a dataclass of settings")
    fields = {f.name for f in dataclasses.fields(cls) if f.init}
    faults = [
        f"{where}: unknown setting {name!r}{did_you_mean(name, fields)}" for name in settings if name not in fields
    ]
    try:
        built = TypeAdapter(cls).validate_python({k: v for k, v in settings.items() if k in fields})
    except ValidationError as error:
        faults += [f"{where}: {_place(f['loc'])}{f['msg'].removeprefix('Value error, ')}" for f in error.errors()]
    if faults:
        raise ValueError("\n".join(faults))
    return built


def _place(loc: tuple[int | str, ...]) -> str:
    """Which setting is meant; a message of the class itself (`limit = 0: ...`) names it already."""
    return f"setting {'.'.join(map(str, loc))!r}: " if loc else ""


def did_you_mean(name: str, known: Mapping[str, Any] | set[str]) -> str:
    """The end of a message about a wrong name: the nearest right one, or all of them."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f". Did you mean {near[0]!r}?" if near else f". There are: {', '.join(sorted(known)) or 'none'}."


def _find(what: str, table: Mapping[str, str], name: str) -> Any:
    path = table.get(name, name)
    if ":" not in path or path.startswith("."):
        raise ValueError(
            f"unknown {what} {name!r}{did_you_mean(name, table)} "
            f"(Your own: give its dotted path, 'package.module:Class'.)"
        )
    module, _, attribute = path.partition(":")
    _not_of_a_run(module, what, name)
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name.split(".")[0]):
            raise
        raise ValueError(f"{what} {name!r}: no module {module!r}; is its folder on PYTHONPATH?") from error
    except AttributeError as error:
        raise ValueError(f"{what} {name!r}: module {module!r} has no {attribute!r}") from error


def _not_of_a_run(module: str, what: str, name: str) -> None:
    """Raises ValueError for code that lies in a run folder: whoever reads a stranger's run must not run it."""
    try:
        top = importlib.util.find_spec(module.partition(".")[0])
    except ValueError:  # a module without a file, such as a notebook's own
        return
    for place in filter(None, [top.origin, *(top.submodule_search_locations or ())] if top else ()):
        runs = [p for p in Path(place).resolve().parents if (p / "spec.json").is_file()]
        if runs:
            raise ValueError(f"{what} {name!r}: its code lies in a run folder, {runs[0]}; move it elsewhere to use it")
