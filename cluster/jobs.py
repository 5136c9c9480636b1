"""Studies as jobs of a Ray cluster: submit, look, follow, stop. All of it over the cluster's job API (HTTP).

A job's environment (runtime_env) is written into Ray's own logs on every machine, so nothing secret is in it: a token
of the model hub travels as a file of the parcel, readable by its owner alone.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from cluster.access import INSISTED, JOB, Access, loopback
from cluster.parcel import HUB_TOKEN, Parcel

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
POLL = 1.0  # seconds between looks at a job
RECONNECT = 5  # times in a row that following a job tries again
STOPPING = 120.0  # seconds that a job may take to stop
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}


@dataclass(frozen=True)
class Job:
    """A study on a cluster. `state` is Ray's word (PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED); times in seconds
    since 1970; `code`: the exit code of `raysys run` there, None before it ended."""

    id: str
    state: str
    study: str
    folder: str
    started: float | None
    ended: float | None
    code: int | None
    message: str

    @property
    def over(self) -> bool:
        """Whether it has ended, one way or the other."""
        return self.state in ENDED


class Jobs:
    """The jobs of one cluster. Everything raises ValueError for what a user can mend, OSError when it is gone."""

    def __init__(self, access: Access) -> None:
        from ray.job_submission import JobSubmissionClient

        self.access = access
        with _only(access.address), _mended(access.address):
            self._client = JobSubmissionClient(access.address, headers=dict(access.headers))

    def submit(
        self,
        parcel: Parcel,
        changes: Sequence[str],
        about: Mapping[str, str],
        env: Mapping[str, str],
        hub_token: str = "",
    ) -> str:
        """Start a study that was packed, with `changes` to it; its id.

        `about`: "study" (name and hash) and "folder" (where its results go), which tell it from others.
        """
        for job in self.all():
            if not job.over and job.folder == about["folder"]:
                raise ValueError(
                    f"this study runs already as {job.id}: follow it with `raysys logs {job.id}`, or end it with "
                    f"`raysys stop {job.id}`"
                )
        variables = ENVIRONMENT | dict(env)
        if self.access.insisted:
            variables[INSISTED] = "1"
        if hub_token:
            path = parcel.folder / HUB_TOKEN
            path.touch(mode=0o600)
            path.write_text(hub_token)
            variables["HF_TOKEN_PATH"] = HUB_TOKEN
        name = f"{JOB}{about['study']}-{secrets.token_hex(3)}"
        entry = shlex.join(["python", "-m", "raysys.job", parcel.study, *changes])
        with _only(self.access.address), _mended(self.access.address):
            return self._client.submit_job(
                entrypoint=entry,
                submission_id=name,
                runtime_env={"working_dir": str(parcel.folder), "env_vars": variables},
                metadata=dict(about),
            )

    def all(self) -> list[Job]:
        """Every study that was submitted, the latest first."""
        with _only(self.access.address), _mended(self.access.address):
            found = [_job(j) for j in self._client.list_jobs() if (j.submission_id or "").startswith(JOB)]
        return sorted(found, key=lambda job: -(job.started or 0))

    def one(self, name: str) -> Job:
        """The job `name`; a study's name stands for its latest job. Raises ValueError when there is none."""
        from raysys.names import did_you_mean

        jobs = self.all()
        for job in jobs:
            if name in (job.id, job.study, job.study.rpartition("-")[0]):
                return job
        raise ValueError(f"no job {name!r} at {self.access.address}{did_you_mean(name, {j.id for j in jobs})}")

    def log(self, name: str) -> str:
        """All that a job has printed so far."""
        with _only(self.access.address), _mended(self.access.address):
            return str(self._client.get_job_logs(name))

    def follow(self, name: str) -> Iterator[str]:
        """What a job has printed, and prints until it ends, in pieces. A connection that breaks is made again.

        Raises OSError when it can't be.
        """
        from aiohttp import ClientError

        heard, broken = 0, 0
        while True:
            place = 0  # a new connection begins at the beginning
            try:
                for piece in self._pieces(name):
                    place += len(piece)
                    if place > heard:
                        yield piece[max(0, len(piece) - (place - heard)) :]
                        heard, broken = place, 0
                if self.one(name).over:
                    return
                raise ConnectionError("it was closed before the job ended")
            except (ClientError, RuntimeError, OSError) as error:
                broken += 1
                if broken > RECONNECT:
                    raise ConnectionError(f"the connection to {self.access.address} is lost: {error}") from error
                time.sleep(POLL * broken)

    def _pieces(self, name: str) -> Iterator[str]:
        """Everything a job prints, as it comes, over one connection."""
        loop = asyncio.new_event_loop()
        pieces: Any = self._client.tail_job_logs(name)
        waiting: asyncio.Future[str] | None = None
        try:
            while True:
                waiting = asyncio.ensure_future(anext(pieces), loop=loop)
                try:
                    yield loop.run_until_complete(waiting)
                except StopAsyncIteration:
                    return
        finally:
            if waiting is not None and not waiting.done():
                waiting.cancel()
                with suppress(asyncio.CancelledError):
                    loop.run_until_complete(waiting)
            loop.run_until_complete(pieces.aclose())
            loop.close()

    def stop(self, name: str) -> Job:
        """End a job, and return when it has ended. One that has ended already is left as it is."""
        job = self.one(name)
        if not job.over:
            with _only(self.access.address), _mended(self.access.address):
                self._client.stop_job(job.id)
        return self.wait(job.id, STOPPING)

    def wait(self, name: str, seconds: float) -> Job:
        """The job when it has ended. Raises TimeoutError after `seconds`."""
        deadline = time.monotonic() + seconds
        while not (job := self.one(name)).over:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{job.id} is {job.state} still after {seconds:g} s; look at `raysys logs {job.id}`")
            time.sleep(POLL)
        return job


def _job(details: Any) -> Job:
    about = details.metadata or {}
    code = details.driver_exit_code
    return Job(
        id=details.submission_id, state=str(details.status.value), study=about.get("study", ""),
        folder=about.get("folder", ""), started=_seconds(details.start_time), ended=_seconds(details.end_time),
        code=None if code is None else int(code), message=details.message or "",
    )  # fmt: skip


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None


@contextmanager
def _only(address: str) -> Iterator[None]:
    """Meanwhile Ray's client talks to `address`, whatever the environment says, and to loopback without a proxy."""
    host = address.partition("://")[2].rpartition(":")[0]
    wanted = {"RAY_API_SERVER_ADDRESS": address}
    if loopback(host):
        wanted |= {k: ",".join(filter(None, (os.environ.get(k), host))) for k in ("NO_PROXY", "no_proxy")}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@contextmanager
def _mended(address: str) -> Iterator[None]:
    """Ray's own errors as ours."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise ValueError(f"{address} does not accept this token: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        passing = re.search(r"status code 5\d\d", str(error))  # the cluster's trouble, not the user's mistake
        raise (ConnectionError if passing else ValueError)(f"{address}: {error}") from error
