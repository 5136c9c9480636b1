"""Tasks of lm-evaluation-harness (the extra `harness`): found by name or file, loaded and seeded as it does itself.

lm_eval is imported when it is used, and not before. What goes wrong is told as a ValueError that says what to do.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

YAML = (".yaml", ".yml")
SEED, OTHER_SEED = 0, 1234  # of lm_eval's command line: Python's random numbers; NumPy's, and the drawing of shots
MAX_TOKENS = 256  # of a generation that does not say
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # one setting; the first counts
SAMPLING = ("top_p", "top_k", "min_p", "typical_p")  # without a meaning where nothing is sampled
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "use_cache": True}


def module(name: str) -> Any:
    """A module of lm_eval. Raises ValueError where the extra is not installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ValueError(
            "tasks of lm-evaluation-harness need lm_eval, which is not installed: pip install 'raysys[harness]'"
        ) from error


class Found(NamedTuple):
    """Names of tasks, groups or tags, and lm_eval's task manager, which knows them."""

    names: list[str]
    manager: Any


def find(wanted: Sequence[str], include: Path | None = None) -> Found:
    """Tasks, groups or tags by name, or YAML files and folders of them (told by a slash); `include`: a folder of more.

    Raises ValueError for a name that is unknown (with the nearest one) and for a path without a task.
    """
    manager = module("lm_eval.tasks").TaskManager
    if include is not None and not include.is_dir():
        raise ValueError(f"no folder {str(include)!r} with tasks; give the folder that holds their YAML files")
    folders, named = [include] if include else [], list[str]()
    for name in wanted:
        if "/" not in name and not name.endswith(YAML):
            named.append(name)
            continue
        path = Path(name).expanduser()
        folders.append(path if path.is_dir() else path.parent)
        named += _inside(path, manager)
    folders = list({folder.resolve(): None for folder in folders})
    few = manager(include_path=folders, include_defaults=False)
    if unknown := [name for name in named if not _whole(name, few.task_index)]:
        few = manager(include_path=[*_near(unknown), *folders], include_defaults=False)
    if all(_whole(name, few.task_index) for name in named):
        return Found(named, few)
    every = manager(include_path=folders or None)
    for name in named:
        if name not in every.task_index:
            near = get_close_matches(name, every.all_tasks, n=1, cutoff=0.5)
            meant = f"Did you mean {near[0]!r}?" if near else "`lm_eval ls tasks` lists them."
            raise ValueError(
                f"lm_eval has no task, group or tag {name!r}. {meant} (Your own: give its YAML file, or './FOLDER'.)"
            )
    return Found(named, every)


def _whole(name: str, index: Mapping[str, Any]) -> bool:
    """Whether `index` holds a task, or a group with all its members: then the rest, which takes long, is not read."""
    if name not in index or index[name].cfg is None:  # of a tag, there may be tasks anywhere
        return False
    members = index[name].cfg.get("task")
    if not isinstance(members, list):
        return True
    names = [m.get("task") if isinstance(m, dict) else m for m in members]
    return all(isinstance(member, str) and _whole(member, index) for member in names)


def _inside(path: Path, manager: Any) -> list[str]:
    """The tasks of a folder, or the task or group of a YAML file."""
    if not path.exists():
        raise ValueError(f"no file or folder {str(path)!r}; give a YAML file of a task, or a folder of them")
    index = manager(include_path=path if path.is_dir() else path.parent, include_defaults=False)
    if path.is_dir():
        found = list(index.all_subtasks)
    else:
        found = [n for n, e in index.task_index.items() if e.yaml_path and Path(e.yaml_path).samefile(path)]
    if not found:
        raise ValueError(f"{path}: no task of lm-evaluation-harness in it; its YAML needs `task` and `dataset_path`")
    return found


def _near(names: Sequence[str]) -> list[Path]:
    """Those of lm_eval's folders whose files say one of `names`; all 14,000 tasks take ten seconds to read."""
    root = Path(module("lm_eval.tasks").__file__).parent
    said = [name.encode() for name in names]
    return [
        folder
        for folder in sorted(root.iterdir())
        if folder.is_dir() and any(name in file.read_bytes() for file in folder.rglob("*.yaml") for name in said)
    ]


def load(wanted: str, shots: int | None = None) -> dict[str, Any]:
    """The tasks that `wanted` names (see `find`), by their names, ready to build requests.

    `shots` is taken over as lm_eval does: a task whose own number is 0 keeps it. Raises ValueError when a task or its
    data can't be loaded, and for tasks that no text-only engine can run or that run code.
    """
    with settled():
        found = find([wanted])
        try:
            tasks: dict[str, Any] = found.manager.load(found.names)["tasks"]
        except Exception as error:  # tasks are programs of many hands
            raise ValueError(f"task {wanted!r} can't be loaded: {why(error)}") from error
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ValueError(f"task {name!r} runs code that the model writes, which raysys does not do; take another")
        if getattr(task, "MULTIMODAL", False):
            raise ValueError(f"task {name!r} asks about images or sound; only texts are asked here")
        if shots is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return tasks


@contextmanager
def settled() -> Iterator[None]:
    """Within it, random numbers begin as under lm_eval's command line, and its progress bars keep silent."""
    import numpy as np

    before, numpys = random.getstate(), np.random.get_state()
    random.seed(SEED)
    np.random.seed(OTHER_SEED)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        random.setstate(before)
        np.random.set_state(numpys)


def why(error: BaseException) -> str:
    """The beginning of what an error of somebody else's says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:300]}" if said else type(error).__name__


def greedy(settings: Mapping[str, Any], where: str, default: int = MAX_TOKENS) -> tuple[tuple[str, ...], int]:
    """Stops and the number of tokens that a task's `generation_kwargs` ask for.

    Raises ValueError where they ask for anything but greedy decoding; `where` names the task.
    """
    left = {k: v for k, v in settings.items() if v is not None}
    until = left.pop("until", [])
    stops = (until,) if isinstance(until, str) else tuple(until)
    sampled, temperature = left.pop("do_sample", None), left.pop("temperature", None)
    if (sampled is None and temperature) or (sampled and temperature != 0):
        told = ", ".join(f"{k} = {v}" for k, v in settings.items() if k in ("do_sample", "temperature"))
        raise ValueError(
            f"{where}: it samples its answers ({told}); only greedy answers are generated here, which are the same "
            "every time. In a study set greedy = true, on the command line --greedy, to have them instead."
        )
    lengths = [left.pop(name) for name in LENGTHS if name in left]
    for name, value in left.items():
        if name not in SAMPLING and NEUTRAL.get(name) != value:
            raise ValueError(f"{where}: its generation setting {name} = {value!r} is not known to this engine")
    tokens = int(lengths[0]) if lengths else default
    if tokens < 1:
        raise ValueError(f"{where}: {tokens} tokens to generate; 1 or more expected")
    return stops, tokens
