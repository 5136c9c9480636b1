"""The study, as a user writes it: TOML plus `key=value`, checked whole, every fault listed at once.

A study is a grid: models x methods x edit orders. Its hash names the folder of results, so the same study continues
where it stopped and a changed one starts afresh. What can't change a score (how many evaluators, how many retries)
stays out of the hash.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from raysys import names
from raysys.chat import Chat
from raysys.files import Location, content_hash, place

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class SpecError(ValueError):
    """The study as written can't run; the message lists every fault, one a line."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Named(BaseModel):
    """A component: its name, and every other key is a setting of it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def settings(self) -> dict[str, Any]:
        """The component's own settings."""
        return dict(self.model_extra or {})


class EditsSpec(_Named):
    """Which edits: a data set, how many of it, in which order, and what to do with records that can't be used."""

    dataset: str = "world"
    count: int = Field(default=100, ge=1)
    policy: Literal["fail", "skip", "last"] = "fail"


def method_title(name: str, settings: Mapping[str, Any]) -> str:
    """What a method without a label is called: its name, and whether it is the published variant of itself."""
    return name + (" (published)" if settings.get("published") is True else "")


class ComponentSpec(_Named):
    """A method or a benchmark by name, with its settings; `label` tells two of the same name apart."""

    name: str
    label: str = Field(default="", pattern=r"^([A-Za-z0-9_][A-Za-z0-9_ .,()+=-]*)?$")  # it names folders

    @property
    def title(self) -> str:
        """What results and report call it; a method's published variant is named as such."""
        return self.label or method_title(self.name, self.settings)


class Between(_Part):
    """As many as are needed, from `min` to `max`."""

    min: int = Field(default=0, ge=0)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Between:
        if self.min > self.max:
            raise ValueError(f"min = {self.min} is more than max = {self.max}")
        return self


class ClusterSpec(_Part):
    """Who does the work. `threads` (of CPUs), `tensor_parallel`, and whether GPUs do it, are part of a study's
    identity; the rest is not."""

    evaluators: Annotated[int, Field(ge=1)] | Between = 2  # a number, or {min = 0, max = 8}: as many as are needed
    editors: int = Field(default=1, ge=1)  # cells edited at the same time
    gpus_per_evaluator: float = Field(default=0.0, ge=0)
    gpus_per_editor: float = Field(default=0.0, ge=0)
    tensor_parallel: int = Field(default=1, ge=1)  # processes that every copy of the model is split over
    across_nodes: bool = False  # those of one copy may lie on several nodes
    threads: int = Field(default=1, ge=1)  # torch threads of every actor on CPU
    retries: int = Field(default=3, ge=0)  # of a unit, before it is reported as failed; lost nodes don't count
    idle: float = Field(default=60.0, ge=0)  # seconds after which an evaluator beyond the least number is let go
    stall: float = Field(default=3600.0, gt=0)  # seconds without progress after which an actor is killed and replaced
    snapshots_in_flight: int = Field(default=4, ge=1)  # ahead of scoring, per edit stream
    dashboard: bool = True  # of our own cluster, on loopback
    address: str | None = None  # of a running Ray cluster; None: $RAY_ADDRESS, else one of our own on this machine
    wait: float = Field(default=300.0, gt=0)  # seconds to wait for missing resources before giving up
    trunk_memory: float = Field(default=2.0, ge=0)  # GiB an evaluator may keep of what edits don't change; 0: nothing
    drafts: bool = True  # verify earlier answers instead of generating them again (float32 alone): the same text

    @model_validator(mode="after")
    def _whole_gpus(self) -> ClusterSpec:
        for name in ("gpus_per_evaluator", "gpus_per_editor"):
            if self.tensor_parallel > 1 and getattr(self, name) % self.tensor_parallel:
                raise ValueError(
                    f"{name}: a model that is split over {self.tensor_parallel} processes needs one GPU for each "
                    f"(give a multiple of {self.tensor_parallel}), or none"
                )
        return self

    @property
    def fewest(self) -> int:
        """Evaluators at least."""
        return self.evaluators if isinstance(self.evaluators, int) else self.evaluators.min

    @property
    def most(self) -> int:
        """Evaluators at most."""
        return self.evaluators if isinstance(self.evaluators, int) else self.evaluators.max


class ScoringSpec(_Part):
    """How questions are put, and batched: part of the study's identity, since rounding depends on the shapes.

    The four settings of chats are those of lm-evaluation-harness by the same names (see raysys/chat.py).
    """

    batch: Annotated[int, Field(ge=1)] | Literal["auto"] = 16  # queries a forward pass; auto: as memory allows
    block: int = Field(default=64, ge=1)  # queries a unit of work
    softmax: Literal["float32", "model"] = "float32"  # "model": in its number type, as lm-evaluation-harness does
    apply_chat_template: bool = False  # ask benchmarks through the chat template of an instruction-tuned model
    fewshot_as_multiturn: bool = True  # examples are turns of the chat; false: all is one message of the user's
    system_instruction: str = ""  # what the system says before a task's own description
    chat_template_args: dict[str, Any] = Field(default_factory=dict)  # what the template is given besides

    @model_validator(mode="after")
    def _needs_template(self) -> ScoringSpec:
        if not self.apply_chat_template and self._chat != Chat():
            raise ValueError(
                "fewshot_as_multiturn, system_instruction and chat_template_args say how a chat is held; set "
                "apply_chat_template = true, or leave them out"
            )
        return self

    @property
    def _chat(self) -> Chat:
        told = self.system_instruction
        return Chat(multiturn=self.fewshot_as_multiturn, system=told, arguments=self.chat_template_args)

    @property
    def chat(self) -> Chat | None:
        """How the chat template is applied; None where it is not."""
        return self._chat if self.apply_chat_template else None

    def chat_of(self, benchmark: Any) -> Chat | None:
        """`chat`, unless the benchmark (or its class) is one that is never asked so: what is about plain text."""
        return self.chat if getattr(benchmark, "chat", True) else None

    @property
    def rows(self) -> int:
        """Queries a forward pass, 0 for as many as memory allows."""
        return 0 if self.batch == "auto" else self.batch


class StudySpec(_Part):
    """One study. See the README for an example; `StudySpec.load` reads it from TOML."""

    name: str = Field(default="study", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = 0
    root: str = "runs"  # folder under which runs are kept; or object storage, s3://bucket/folder, gs://bucket/folder
    models: tuple[str, ...] = Field(default=("world/small",), min_length=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    snapshots: tuple[int, ...] = (0, 1, 5, 10, 20, 50, 100)
    orders: int = Field(default=1, ge=1)  # edit orders; the first is the data's own
    on_refusal: Literal["stop", "skip"] = "skip"  # when a method can't serve a request
    on_bad_benchmark: Literal["stop", "skip"] = "stop"  # when a benchmark's data can't be read
    edits: EditsSpec = EditsSpec()
    methods: tuple[ComponentSpec, ...] = Field(min_length=1)
    benchmarks: tuple[ComponentSpec, ...] = Field(min_length=1)
    scoring: ScoringSpec = ScoringSpec()
    cluster: ClusterSpec = ClusterSpec()

    @field_validator("root")
    @classmethod
    def _known_place(cls, root: str) -> str:
        place(root)
        return root

    @field_validator("snapshots")
    @classmethod
    def _ordered(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if not values or min(values) < 0:
            raise ValueError("wants numbers of edits, 0 or more, such as [0, 1, 10, 100]")
        return tuple(sorted({0, *values}))  # the base is always scored: every curve is a difference to it

    @model_validator(mode="after")
    def _reachable(self) -> StudySpec:
        if self.snapshots[-1] > self.edits.count:
            raise ValueError(
                f"snapshots: {self.snapshots[-1]} is beyond the {self.edits.count} edits of the study; "
                f"raise edits.count or lower the snapshot"
            )
        for what, parts in (("methods", self.methods), ("benchmarks", self.benchmarks)):
            titles = [p.title for p in parts]
            for title in sorted({t for t in titles if titles.count(t) > 1}):
                raise ValueError(f'{what}: {title!r} is there twice; give each its own label = "..."')
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> StudySpec:
        """Read a TOML file and apply `key=value` overrides (`edits.count=20`, `methods.0.layer=3`).

        Raises SpecError that names the file and every fault in it.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise SpecError(f"{path}: no such file; `raysys new` writes a study to start from") from error
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"{path}: can't be read ({error})") from error
        return cls.parse(text, overrides, str(path))

    @classmethod
    def parse(cls, text: str, overrides: Sequence[str] = (), where: str = "study") -> StudySpec:
        """As `load`, from the text of a TOML file."""
        try:
            tree = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise SpecError(f"{where}: not valid TOML: {error}") from error
        for override in overrides:
            set_key(tree, override)
        return cls.check(tree, where)

    @classmethod
    def check(cls, tree: dict[str, Any], where: str = "study") -> StudySpec:
        """A spec from plain data, with the settings of every component checked. Raises SpecError with all faults."""
        faults: list[str] = []
        spec = None
        try:
            spec = cls.model_validate(tree)
        except ValidationError as error:
            faults += [_fault(where, dict(f), cls) for f in error.errors()]
        for kind, find in (("methods", names.method), ("benchmarks", names.benchmark)):
            parts = tree.get(kind, [])
            for number, part in enumerate(parts if isinstance(parts, list | tuple) else []):
                if isinstance(part, dict) and isinstance(part.get("name"), str):
                    settings = {k: v for k, v in part.items() if k not in ("name", "label")}
                    faults += _component(find, part["name"], settings, f"{where}: {kind}[{number}] {part['name']}")
        edits = tree.get("edits", {})
        if isinstance(edits, dict) and isinstance(edits.get("dataset", "world"), str):
            settings = {k: v for k, v in edits.items() if k not in EditsSpec.model_fields}
            faults += _component(names.dataset, edits.get("dataset", "world"), settings, f"{where}: edits")
        if spec is not None and not faults:
            faults += _inside_batches(spec, where)
        if faults or spec is None:
            raise SpecError("\n".join(faults))
        return spec

    @classmethod
    def read(cls, tree: Any, where: str) -> StudySpec:
        """A spec that was checked when it was written. No component in it is imported or built: whoever reads a run
        folder runs nothing that it names. Raises SpecError."""
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            faults = [_fault(where, dict(f), cls) for f in error.errors()]
            raise SpecError("\n".join([*faults, f"{where}: not a study of this version, or damaged"])) from error

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the numbers: everything but where results lie and who does the work."""
        tree: dict[str, Any] = self.model_dump(mode="json", exclude={"root", "cluster"})
        gpus = [self.cluster.gpus_per_editor > 0, self.cluster.gpus_per_evaluator > 0]
        ranks = self.cluster.tensor_parallel
        split = {"tensor_parallel": ranks} if ranks > 1 else {}  # sums are taken in another order
        return tree | {"threads": self.cluster.threads, "gpus": gpus} | split

    @property
    def hash(self) -> str:
        """Eight hex digits of the identity."""
        return content_hash(self.identity)[:8]

    @property
    def folder(self) -> Location:
        """Where this study's results live."""
        return place(self.root) / f"{self.name}-{self.hash}"

    def grid(self) -> list[tuple[str, ComponentSpec, int]]:
        """(model, method, order) of every cell."""
        return list(product(self.models, self.methods, range(self.orders)))


def _component(find: Any, name: str, settings: dict[str, Any], where: str) -> list[str]:
    try:
        names.build(find(name), settings, where)
    except ValueError as error:
        text = str(error)
        return [text if text.startswith(where) else f"{where}: {text}"]
    return []


def _inside_batches(spec: StudySpec, where: str) -> list[str]:
    """Snapshots that a method can't give, since it makes several edits at a time."""
    faults = []
    for number, method in enumerate(spec.methods):
        batch = getattr(names.build(names.method(method.name), method.settings, method.name), "batch", 1)
        inside = [n for n in spec.snapshots if batch > 1 and n % batch and n < spec.edits.count]
        if inside:
            faults.append(
                f"{where}: methods[{number}] {method.name} makes {batch} edits at a time, so there is no snapshot "
                f"after {', '.join(map(str, inside))}; choose multiples of {batch}, or a smaller batch"
            )
    return faults


def _fault(where: str, fault: dict[str, Any], cls: type[BaseModel]) -> str:
    place = ".".join(map(str, fault["loc"]))
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        owner: Any = cls
        for step in fault["loc"][:-1]:
            owner = getattr(owner, "model_fields", {}).get(step)
            owner = getattr(owner, "annotation", None)
        known = set(getattr(owner, "model_fields", {}))
        message = f"no such key{names.did_you_mean(str(fault['loc'][-1]), known)}"
    elif fault["type"] != "missing" and place and not isinstance(given := fault.get("input"), dict):
        message += "" if "://" in str(given) else f" (got {given!r})"  # an address may hold a password
    return f"{where}: {place + ': ' if place else ''}{message}"


def set_key(tree: dict[str, Any], override: str) -> None:
    """Apply one `key=value` to plain data, in place. Raises SpecError when it makes no sense."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise SpecError(f"{override!r}: wants key=value, such as edits.count=20")
    try:
        parsed = tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        parsed = value
    node: Any = tree
    *path, last = key.split(".")
    for step in path:
        node = node[_index(node, step, override)] if isinstance(node, list) else node.setdefault(step, {})
        if not isinstance(node, dict | list):
            raise SpecError(f"{override!r}: {step!r} holds a value, not settings")
    if isinstance(node, list):
        node[_index(node, last, override)] = parsed
    else:
        node[last] = parsed


def _index(node: list[Any], step: str, override: str) -> int:
    if not step.isdigit() or int(step) >= len(node):
        raise SpecError(f"{override!r}: {step!r} wants a number below {len(node)}")
    return int(step)
