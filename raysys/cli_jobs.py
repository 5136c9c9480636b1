"""`raysys submit`, `logs`, `stop`, and what `status` says of jobs: studies on a running Ray cluster."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raysys import cli_shared as shared
from raysys.job import PASSED

if TYPE_CHECKING:
    from cluster.jobs import Job, Jobs

JOB_EXITS = (
    "Exit codes: 0 the study is complete; 1 parts of it failed, or raysys or the cluster did; 2 refused, or a mistake "
    "in what was asked (token, address, room, storage, the study): nothing was run; 3 no space left, or the storage is "
    "away; 4 the job was stopped; 130 interrupted here, the job goes on."
)
STOPPED = 4
SECRETS = {"TOKEN", "SECRET", "PASS", "PASSWORD", "PASSWD", "PWD", "CREDENTIAL", "KEY", "PAT"}  # in names

jobs = typer.Typer()

Address = Annotated[
    str | None,
    typer.Option(
        "--address", help="The cluster's dashboard (default: $RAY_API_SERVER_ADDRESS, http://127.0.0.1:8265)."
    ),
]
Insist = Annotated[
    bool,
    typer.Option(
        "--allow-unauthenticated-cluster", help="Use a cluster that lets in, without a token, whoever can reach it."
    ),
]
Id = Annotated[str, typer.Argument(metavar="ID", help="The job's id, or the name of its study.")]


@jobs.command(epilog=JOB_EXITS)
def submit(
    study: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="The study.")],
    changes: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to it.")] = None,
    address: Address = None,
    more: Annotated[
        list[Path] | None, typer.Option("--with", help="A file or folder that is to travel too. May be repeated.")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", help="NAME=VALUE for the job's processes. Ray logs it: nothing secret. May be repeated."),
    ] = None,
    hub_token: Annotated[
        bool, typer.Option("--hub-token", help="Give the job your token of the model hub, for gated models.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when the study has begun; `raysys logs` follows it.")
    ] = False,
    insist: Insist = False,
) -> None:
    """Run a study on a Ray cluster, as a job, and follow it. Submitted again, it continues from its run folder.

    The study travels with the files, folders and modules that it names by paths relative to this folder, and with
    raysys itself; nothing else of this folder does. Results go to `root`, a folder that all machines of the cluster
    share. Before the study starts, the job looks whether the cluster has room for it and every machine reaches `root`
    and can read the models.

    Examples: raysys submit study.toml root=/shared/runs; raysys submit study.toml root=/shared/runs --detach
    """
    from raysys.spec import StudySpec

    spec = StudySpec.load(study, changes or ())
    if not (str(spec.folder).startswith("/") or "://" in str(spec.folder)):
        raise ValueError(
            f"root = {spec.root!r} would lie in the job's own folder, which goes when the job ends. Name a folder that "
            f"all machines of the cluster share: raysys submit {study} root=/shared/runs"
        )
    token = _hub_token() if hub_token else ""
    connected = _connect(address, insist)
    from cluster import parcel

    with tempfile.TemporaryDirectory(prefix="raysys-") as made:
        packed = parcel.pack(study, spec, Path(made), more or ())
        about = {"study": spec.folder.name, "folder": str(spec.folder)}
        shared.say(f"{parcel.words(packed.size)} travel: {', '.join(packed.parts)}")
        name = connected.submit(packed, changes or (), about, _variables(env or ()), token)
    where = f" --address {connected.access.address}" if address else ""
    shared.say(f"{name} submitted; results: {spec.folder}; follow: raysys logs {name}{where}")
    shared.say(f"end: raysys stop {name}{where}")
    _follow(connected, name, token, detach)


@jobs.command(epilog=JOB_EXITS)
def logs(
    name: Id,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Go on until the job ends.")] = True,
    insist: Insist = False,
) -> None:
    """Show what a submitted study prints, from the beginning and until it ends.

    Example: raysys logs job-study-1a2b3c4d-5e6f70
    """
    connected = _connect(address, insist)
    job = connected.one(name)
    if not follow:
        shared.say(connected.log(job.id).rstrip())
        return
    _follow(connected, job.id)


@jobs.command(epilog=JOB_EXITS)
def stop(name: Id, address: Address = None, insist: Insist = False) -> None:
    """End a submitted study. What it has found stays; submit it again to continue.

    Example: raysys stop job-study-1a2b3c4d-5e6f70
    """
    connected = _connect(address, insist)
    before = connected.one(name)
    after = before if before.over else connected.stop(before.id)
    if before.over:
        shared.say(f"{before.id} has ended already: {before.state}")
    else:
        shared.say(f"{after.id}: {after.state}; submit the study again to continue")


def status(name: str | None, address: str | None, as_json: bool, insist: bool) -> None:
    """What `raysys status` says of one job, or of all."""
    connected = _connect(address, insist)
    found = [connected.one(name)] if name else connected.all()
    if as_json:
        trees = [asdict(job) for job in found]
        shared.say(json.dumps(trees[0] if name else trees, indent=1))
        return
    if not found:
        shared.say(f"no studies were submitted to {connected.access.address}")
    for job in found:
        shared.say(_line(job))
    if name:
        lines = connected.log(found[0].id).strip().splitlines()
        shared.say("\n".join(f"  {line}" for line in lines[-3:]))


# --- shared ----------------------------------------------------------------------------------------------------------


def _connect(address: str | None, insist: bool) -> Jobs:
    """The jobs of a cluster, once it is clear that it may be used. Raises ValueError."""
    from cluster import access

    given = address or os.environ.get("RAY_API_SERVER_ADDRESS") or access.DEFAULT
    found = access.approach(given, insist or access.insisted())
    for warning in found.warnings:
        shared.warn(warning)
    from cluster.jobs import Jobs

    return Jobs(found)


def _follow(connected: Jobs, name: str, secret: str = "", until_begun: bool = False) -> None:
    """Print what a job prints; end with the exit code that says how it went."""
    try:
        for text in _without(secret, connected.follow(name)):
            typer.echo(text, nl=False)
            if until_begun and PASSED in text:
                return
        job = connected.wait(name, 120)
    except KeyboardInterrupt:
        shared.complain(f"interrupted here; the job goes on. Follow: raysys logs {name}; end: raysys stop {name}")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise
    except OSError as error:
        shared.complain(f"{error}. The job may go on; follow it again: raysys logs {name}")
        raise typer.Exit(1) from error
    if job.state == "SUCCEEDED":
        shared.say(f"{job.id}: complete; results: {job.folder}")
        return
    if job.state == "STOPPED":
        shared.complain(f"{job.id} was stopped; submit the study again to continue")
        raise typer.Exit(STOPPED)
    if job.code == 2:
        shared.complain(f"{job.id}: refused, for the reasons above")
        raise typer.Exit(2)
    if job.code == 3:
        shared.complain(f"{job.id}: its storage is full or away (above); mend it and submit the study again")
        raise typer.Exit(3)
    shared.complain(f"{job.id} failed: {job.message.splitlines()[0] if job.message else 'no reason was given'}")
    raise typer.Exit(1)


def _without(secret: str, pieces: Iterable[str]) -> Iterable[str]:
    """Text that does not hold `secret`, whoever printed it."""
    return (piece.replace(secret, "***") for piece in pieces) if secret else pieces


def _line(job: Job) -> str:
    """One job in a line."""
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started)) if job.started else "not begun"
    took = f", {(job.ended or time.time()) - job.started:.0f} s" if job.started else ""
    code = f" (exit code {job.code})" if job.code else ""
    return f"{job.id}: {job.state}{code}; {began}{took}; {job.folder}"


def _variables(given: Iterable[str]) -> dict[str, str]:
    """Environment variables given as NAME=VALUE. Raises ValueError for what is none, or looks like a secret."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--env {name}: wants NAME=VALUE")
        if _secret(name.upper()) or re.search(r"://[^/]*@", value):
            raise ValueError(
                f"--env {name}: Ray writes a job's environment into its logs on every machine. A token of the model "
                f"hub travels safely with --hub-token; give other secrets to the machines themselves."
            )
        found[name] = value
    return found


def _secret(name: str) -> bool:
    """Whether a variable of this name is likely to hold a secret; one that names a file does not."""
    words = re.split(r"_|(?<=API)(?=KEY)", name)
    return words[-1] not in ("PATH", "FILE") and any({w, w.removesuffix("S")} & SECRETS for w in words)


def _hub_token() -> str:
    """The user's token of the model hub, where its own tools look for it. Raises ValueError when there is none."""
    from huggingface_hub import get_token

    if not (token := get_token()):
        raise ValueError("--hub-token: there is none; set $HF_TOKEN, or log in with `hf auth login`")
    return token
