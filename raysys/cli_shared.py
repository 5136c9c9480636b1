"""What the commands of every group share: options, the two consoles, models, methods and data sets by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from raysys.model import Model
    from raysys.types import EditCase

EXITS = (
    "Exit codes: 0 fine; 1 units of work failed, or raysys itself; 2 a mistake in what was asked; 3 no space left, or "
    "the storage is away (make room, run it again: it continues); 130 interrupted."
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, auto")]
Settings = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Its settings.")]


def model(name: str, device: str, dtype: str = "float32") -> Model:
    """A loaded model. Raises ValueError that says what to do."""
    from raysys.model import Model

    return Model.load(name, dtype, device)


def chosen(settings: Sequence[str] | None) -> dict[str, Any]:
    """Settings given as "key=value" each. Raises ValueError for one that isn't."""
    from raysys.spec import set_key

    found: dict[str, Any] = {}
    for setting in settings or ():
        set_key(found, setting)
    return found


def method(name: str, settings: Sequence[str] | None) -> Any:
    """An editing method with `settings`, each "key=value". Raises ValueError that names every wrong one."""
    from raysys import names

    return names.build(names.method(name), chosen(settings), f"method {name}")


def cases(dataset: str, path: str = "", **settings: Any) -> Iterator[EditCase]:
    """The records of a data set of edits; `path` where it needs one. Raises ValueError."""
    from raysys import names

    given = {**settings, "path": path} if path else settings
    found: Iterator[EditCase] = names.build(names.dataset(dataset), given, f"data set {dataset}").cases()
    return found


def stdout() -> Console:
    """Standard output; wide enough for tables where it is no terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 120))


def stderr() -> Console:
    """Standard error."""
    from rich.console import Console

    return Console(stderr=True)


def say(what: RenderableType) -> None:
    """Put out a text as it is, or a table."""
    if isinstance(what, str):
        typer.echo(what)
    else:
        stdout().print(what, highlight=False)


def complain(message: str) -> None:
    """One message about what went wrong, on standard error."""
    from rich.markup import escape

    stderr().print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)


def warn(message: str) -> None:
    """One message about what may go wrong, on standard error."""
    from rich.markup import escape

    stderr().print(f"[bold yellow]warning:[/] {escape(message)}", highlight=False, soft_wrap=True)


def reason(error: Exception) -> str:
    """What a user should read of `error`."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(filter(None, (str(error.filename or ""), error.strerror)))
    return str(error) or type(error).__name__
