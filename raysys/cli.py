"""The command line: `raysys COMMAND --help` explains each command with examples.

Everything heavy (torch, ray, transformers) is imported by the command that needs it, so that help and mistakes cost
nothing. Exit codes: 0 fine; 1 the study ended with failed units, or raysys itself failed; 2 the user's mistake, one
message and no traceback; 3 the disk is full or the storage away; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from cluster.access import INSISTED, JOB
from raysys import cli_shared as shared
from raysys.cli_bench import bench
from raysys.cli_harness import harness
from raysys.cli_jobs import Address, Insist, jobs
from raysys.cli_jobs import status as job_status
from raysys.cli_shared import EXITS, Device, Json
from raysys.cli_tools import tools
from raysys.stores import StorageError

if TYPE_CHECKING:
    from raysys.results import Results

RESUMABLE = ("run", "prepare", "tune", "train-editor")  # commands that go on where they were interrupted


class _Guarded(TyperGroup):
    """Turns the mistakes of a user into one message, whichever command they are made in."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            shared.complain(shared.reason(error))
            raise typer.Exit(3 if isinstance(error, StorageError) else 2) from error
        except KeyboardInterrupt as error:
            resumable = ctx.invoked_subcommand in RESUMABLE
            go_on = "; run the same command again to continue" if resumable else ""
            shared.complain(f"interrupted{go_on}")
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=_Guarded, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    epilog=EXITS, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
convert = typer.Typer(no_args_is_help=True, help="Turn other formats of models into a folder that raysys loads.")
app.add_typer(convert, name="convert")
app.add_typer(bench, name="bench")
app.add_typer(tools)  # its commands stand beside the others
app.add_typer(harness)
app.add_typer(jobs)

Study = Annotated[Path, typer.Argument(metavar="STUDY.toml", help="The study; `raysys new` writes one.")]
Changes = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it: edits.count=20")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, a study's TOML file, or a study's name.")]
Cell = Annotated[str, typer.Option("--cell", help="Which edit stream: its name in `raysys status`, or its method.")]
Delta = Annotated[float, typer.Option("--delta", min=0.0001, max=1, help="The loss that still counts as none.")]


@app.callback()
def raysys(
    debug: Annotated[bool, typer.Option("--debug", help="Show where a mistake was found (a traceback).")] = False,
) -> None:
    """How many edits can a language model take before it stops being a good model?

    Begin with: raysys new study.toml; raysys plan study.toml; raysys run study.toml
    """


@app.command(epilog=EXITS)
def run(
    study: Study,
    changes: Changes = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    delta: Delta = 0.02,
    insist: Insist = False,
) -> None:
    """Run a study, or what is missing of it; then print its tables and write report.html.

    Interrupt it whenever you like: the same command continues it, and no edit or score is made twice.

    Examples: raysys run study.toml; raysys run study.toml edits.count=20 snapshots=[0,10,20]
    """
    from raysys import progress
    from raysys.spec import StudySpec

    spec = StudySpec.load(study, changes or ())
    if insist:
        os.environ[INSISTED] = "1"
    from raysys import study as studies
    from raysys import words

    try:
        results = studies.run(spec, progress.quiet() if quiet else progress.shown())
    except studies.StudyError as error:
        shared.complain(str(error))
        raise typer.Exit(1) from error
    _report(results, delta)
    if results.failures():
        parts = words.count(len(results.failures()), "part")
        shared.complain(f"{parts} of the study failed (reasons above); the same command tries again")
        raise typer.Exit(1)


@app.command(epilog=EXITS)
def plan(
    study: Study,
    changes: Changes = None,
    gpus: Annotated[
        str,
        typer.Option(
            "--gpus",
            metavar="NxGB[/N]",
            help="GPUs on offer: 8x80, or 8x80/4 with four a machine. Sizes that vendors name in GB (24, 40, 48, 80, "
            "96, 141, 192, 288) count as the GiB that programs find there, any other as GiB.",
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Say what a study would do, without doing it: edits, snapshots, units, tokens, bytes, memory, machines.

    Where GPUs are on offer (this machine's, or those of --gpus), also what fits on them.

    Examples: raysys plan study.toml edits.count=1000; raysys plan study.toml --gpus 8x80
    """
    from cluster.placement import Gpus
    from raysys.plan import plan as count
    from raysys.progress import shown
    from raysys.spec import StudySpec
    from raysys.tables import plan_table

    offer = Gpus.parse(gpus) if gpus else None
    found = count(StudySpec.load(study, changes or ()), shown(shared.stderr()).note, offer)
    shared.say(json.dumps(found.tree(), indent=1) if as_json else plan_table(found))


@app.command(epilog=EXITS)
def status(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN|JOB", help="A run folder, a study's file or name, or the id of a job.")
    ] = None,
    as_json: Json = False,
    address: Address = None,
    insist: Insist = False,
) -> None:
    """Say how far a run is, or a job that was submitted; without a name, or with --address, it is about jobs.

    A running study is not disturbed.

    Examples: raysys status study.toml; raysys status runs/demo-1a2b3c4d; raysys status --address http://127.0.0.1:8265
    """
    from raysys import runs
    from raysys.tables import status_table

    if run is None or address or run.startswith(JOB):
        job_status(run, address, as_json, insist)
        return
    found = runs.status(runs.find(run))
    shared.say(json.dumps(asdict(found), indent=1) if as_json else status_table(found))


@app.command("list", epilog=EXITS)
def list_(
    root: Annotated[str, typer.Argument(help="The folder of runs, or its s3:// address.")] = "runs",
    as_json: Json = False,
) -> None:
    """List all runs, the latest first."""
    from raysys import runs
    from raysys.tables import runs_table

    found = [runs.status(r) for r in runs.everything(root)]
    if not found and not as_json:
        shared.say(f"no runs under {root}/; `raysys new study.toml`, then `raysys run study.toml`")
        return
    shared.say(json.dumps([asdict(s) for s in found], indent=1) if as_json else runs_table(found))


@app.command(epilog=EXITS)
def report(
    run: Run,
    html: Annotated[
        Path | None, typer.Option("--html", help="Where to write the page (default: in the run folder)")
    ] = None,
    delta: Delta = 0.02,
) -> None:
    """Print the tables of a run, finished or not, and write its report as one HTML file.

    Example: raysys report demo --html demo.html
    """
    from raysys import runs

    _report(runs.find(run), delta, html)


@app.command(epilog=EXITS)
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    edits: Annotated[int, typer.Option("--edits", min=0, help="After how many edits.")],
    cell: Cell = "",
) -> None:
    """Write the edited model at any snapshot as an ordinary folder, which transformers loads without raysys.

    What is written is read back and compared with the weights as they are worn.

    Example: raysys export demo edited-model --cell rome --edits 100
    """
    from raysys import runs

    results = runs.find(run)
    [chosen] = _cells(results, cell, one=True)
    from raysys.export import export as write

    folder = write(results, chosen, edits, out)
    shared.say(f"{folder}: {chosen} after {edits} edits, read back and found equal to the weights as worn")


@app.command(epilog=EXITS)
def ask(
    run: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, or a model: folder, hub id, world/small.")],
    prompt: Annotated[str, typer.Argument(help="What to continue.")],
    edits: Annotated[str, typer.Option("--edits", help="Snapshots to ask: 0,10,100 (default: the last one)")] = "",
    cell: Cell = "",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="The longest answer.")] = 24,
    device: Device = "cpu",
) -> None:
    """Put one prompt to the base model and to chosen snapshots, side by side.

    Examples: raysys ask demo "The capital of France is" --edits 10,100; raysys ask world/small "2 + 2 ="
    """
    from raysys import runs
    from raysys.tables import replies_table

    try:
        results = runs.find(run)
    except ValueError as error:
        if Path(run).suffix == ".toml":
            raise
        results, not_a_run = None, error
    if results is None:
        try:
            model = shared.model(run, device)
        except ValueError as error:
            raise ValueError(f"{run!r} is neither a run nor a model.\n{not_a_run}\n{error}") from error
        from raysys.local import ask as put

        shared.say(put(model, prompt, tokens).strip() or "(empty)")
        return
    shared.say(replies_table(prompt, _ask_run(results, prompt, edits, cell, tokens, device)))


def _ask_run(results: Results, prompt: str, edits: str, cell: str, tokens: int, device: str) -> list[Any]:
    from raysys.local import ask_run

    spec = results.spec
    snapshots = [int(n) for n in edits.split(",")] if edits.replace(",", "").isdigit() else [spec.snapshots[-1]]
    if edits and not edits.replace(",", "").isdigit():
        raise ValueError(f"--edits {edits!r}: wants numbers of edits, such as 0,10,100")
    chosen = _cells(results, cell)
    replies = []
    for name in spec.models:
        of_model = [c for c in chosen if results.cell_about(c)["model"] == name]
        if of_model:
            replies += list(
                ask_run(results, shared.model(name, device, spec.dtype), of_model, snapshots, prompt, tokens)
            )
    return replies


@app.command(epilog=EXITS)
def new(path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("study.toml")) -> None:
    """Write a study to start from, with a word on every setting."""
    from importlib.resources import files

    if path.exists():
        raise ValueError(f"{path} exists already; name another file")
    path.write_text((files("raysys") / "starter.toml").read_text(encoding="utf-8"), encoding="utf-8")
    shared.say(f"{path} written; next: raysys plan {path}, then raysys run {path}")


@app.command(epilog=EXITS)
def world(
    model: Annotated[str, typer.Argument(help="Which model to ask.")] = "world/small",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Facts, and questions a benchmark, at most.")
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Print what the built-in model knows of its world and scores on its benchmarks, by the product's own scoring."""
    from raysys import local
    from raysys.tables import world_row, world_table

    rows = []
    for row in local.world(shared.model(model, device), limit):
        rows.append(row)
        if not as_json and shared.stderr().is_terminal:
            shared.stderr().print(world_row(row), style="dim")
    shared.say(json.dumps([world_row(r) for r in rows], indent=1) if as_json else world_table(rows))


@convert.command(epilog=EXITS)
def llama2c(
    checkpoint: Annotated[Path, typer.Argument(help="A llama2.c .bin (float32, version 0).")],
    tokenizer: Annotated[Path, typer.Argument(help="Its sentencepiece .model.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
) -> None:
    """Turn a llama2.c checkpoint and its tokenizer into a model folder.

    Example: raysys convert llama2c stories260K.bin tok512.model stories260K
    """
    from raysys.convert import llama2c as write

    shared.say(f"{write(checkpoint, tokenizer, out)} written; try: raysys ask {out} 'Once upon a time'")


# --- shared ----------------------------------------------------------------------------------------------------------


def _report(results: Results, delta: float, html: Path | None = None) -> None:
    from raysys.report import Report

    found = Report.of(results, delta)
    page = found.write(html)
    found.show(shared.stdout())
    shared.say(f"report: {page}")


def _cells(results: Results, wanted: str, one: bool = False) -> list[str]:
    """Cells by name or by method; all where nothing is `wanted`. `one`: it must be clear which."""
    from raysys.names import did_you_mean

    cells = results.cells()
    chosen = [c.id for c in cells if not wanted or wanted in (c.id, c.method)]
    known = {c.id for c in cells}
    if not chosen:
        raise ValueError(f"{results.folder}: no edit stream {wanted!r}{did_you_mean(wanted, known)}")
    if one and len(chosen) > 1:
        raise ValueError(f"{results.folder} has several edit streams; choose with --cell: {', '.join(sorted(chosen))}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point; ends the process with an exit code. `--debug` may stand anywhere."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--debug" in given:
        given.remove("--debug")
        given.insert(0, "--debug")
    app(given, prog_name="raysys")
