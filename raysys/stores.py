"""Object storage as a folder: `s3://bucket/prefix` (Amazon's, or any server that speaks its protocol) and `gs://`.

`Remote` has those parts of `pathlib.Path` that run folders need, so that the same code serves both. What differs:

- an object is written by one request and appears whole or not at all; there is no renaming and no appending;
- a folder exists while something is in it;
- a server that is away for a while (a restart, a network that is down) is waited for, which is said in the log; after
  `$RAYSYS_STORAGE_WAIT` seconds (600) StorageError ends the wait. What is asked again is safe to ask twice.

Endpoint, region and credentials come from the standard variables (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE, or the role of the machine) in every process that touches the
folder; none of them is ever written into it.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, TypeVar

T = TypeVar("T")

SCHEMES = ("s3", "gs")
WAIT = "RAYSYS_STORAGE_WAIT"  # environment variable: seconds that a storage server may be away
PUBLIC = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", WAIT)  # no secrets
LONGEST = 5.0  # seconds between two tries
TRIES = 50  # to read an object that is being replaced all the time
REFUSED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE|INVALID_CLIENT_TOKEN|UNRECOGNIZED_CLIENT|MISSING_AUTHENTICATION"
    r"|EXPIRED_TOKEN|HTTP status 40[13]\b"
)
WRONG = re.compile(r"NO_SUCH_BUCKET|NoSuchBucket|InvalidBucketName|PermanentRedirect|HTTP status 3\d\d\b")
LOG = logging.getLogger(__name__)


class StorageError(OSError):
    """The storage of a run can't be used (full, away, closed to us); the message says what, where, and how to go on."""


@dataclass(frozen=True)
class Stat:
    """What is known of an object."""

    st_mtime: float  # unix seconds
    st_size: int  # bytes


@dataclass(frozen=True)
class Remote:
    """`scheme`://`key`, where key is the bucket and then names, divided by single slashes. `wait`: see above."""

    scheme: str
    key: str
    wait: float

    @classmethod
    def parse(cls, uri: str) -> Remote:
        """Raises ValueError for what is no such address."""
        scheme, _, rest = uri.partition("://")
        parts = [p for p in rest.split("/") if p]
        if scheme not in SCHEMES:
            known = ", ".join(f"{s}://" for s in SCHEMES)
            raise ValueError(f"runs are kept in a folder, or under {known}; {scheme}:// is not known")
        if any(c in (parts or [""])[0] for c in "@:") or "?" in rest:
            raise ValueError(
                f"{scheme}://: an address of a run folder is kept with the results and must hold no keys and no "
                f"settings; set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL instead"
            )
        if not parts or {".", ".."} & set(parts):
            raise ValueError(f"wants {scheme}://bucket/folder, without . and ..")
        return cls(scheme, "/".join(parts), float(os.environ.get(WAIT, "600")))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    def __truediv__(self, name: str) -> Remote:
        return replace(self, key=f"{self.key}/{name.strip('/')}")

    def __lt__(self, other: Remote) -> bool:
        return self.key < other.key

    def __reduce__(self) -> Any:
        return Remote, (self.scheme, self.key, self.wait)  # without its client, which belongs to a process

    # --- names -------------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        head, dot, _ = self.name.rpartition(".")
        return head if head and dot else self.name

    @property
    def suffix(self) -> str:
        return self.name[len(self.stem) :]

    @property
    def parent(self) -> Remote:
        return replace(self, key=self.key.rpartition("/")[0] or self.key)

    def with_name(self, name: str) -> Remote:
        return self.parent / name

    def resolve(self) -> Remote:
        return self

    def hasty(self, wait: float = 5.0) -> Remote:
        """The same, for a question that is worth less waiting."""
        return replace(self, wait=min(wait, self.wait))

    # --- questions ---------------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        return str(self._info().type.name) != "NotFound"

    def is_file(self) -> bool:
        return str(self._info().type.name) == "File"

    def is_dir(self) -> bool:
        return str(self._info().type.name) == "Directory"

    def stat(self) -> Stat:
        """Raises FileNotFoundError."""
        info = self._info()
        if info.type.name == "NotFound":
            raise FileNotFoundError(2, "no such object", str(self))
        return Stat(info.mtime_ns / 1e9 if info.mtime_ns else 0.0, info.size or 0)

    def iterdir(self) -> Iterator[Remote]:
        """What lies in this folder, in order; nothing where there is none."""
        from pyarrow import fs

        selector = fs.FileSelector(self.key, allow_not_found=True)
        infos = self._ask("list", lambda: self._files.get_file_info(selector))
        yield from sorted(replace(self, key=i.path.rstrip("/")) for i in infos)

    def glob(self, pattern: str) -> Iterator[Remote]:
        """As Path's, without `**`: one listing a level that has wildcards, one question per name that hasn't."""
        first, _, rest = pattern.partition("/")
        if not re.search(r"[*?\[]", first):
            found = [self / first]
        else:
            found = [p for p in self.iterdir() if fnmatchcase(p.name, first)]
            if not rest:
                yield from found
                return
        for path in found:
            if rest:
                yield from path.glob(rest)
            elif path.exists():
                yield path

    # --- contents ----------------------------------------------------------------------------------------------------

    def read_bytes(self, first: int | None = None) -> bytes:
        """All of it, or the `first` bytes. Raises FileNotFoundError, StorageError.

        A client asks for the size first and then for that many bytes: an object that was replaced in between would be
        cut short, so it is asked for again until it was the same one before and after.
        """

        def read() -> bytes:
            for _ in range(TRIES):
                with self._files.open_input_stream(self.key) as stream:
                    before = stream.metadata()
                    size = int(before.get("Content-Length", -1))
                    data = bytes(stream.read(size if first is None else min(first, size))) if size >= 0 else b""
                    if size < 0:
                        data = bytes(stream.read())[:first]
                with self._files.open_input_stream(self.key) as stream:
                    if stream.metadata() == before:
                        return data
            raise OSError(f"{self} was replaced {TRIES} times while it was read")

        return self._ask("read", read)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        """One request: the whole object, or the one before. Raises StorageError."""

        def write() -> None:
            with self._files.open_output_stream(self.key) as stream:
                stream.write(data)

        self._ask("write", write)

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        self.write_bytes(text.encode(encoding))

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._ask("remove", lambda: self._files.delete_file(self.key))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """A mark that a folder is there, also while it is empty."""
        self._ask("make", lambda: self._files.create_dir(self.key))

    def _info(self) -> Any:
        return self._ask("ask for", lambda: self._files.get_file_info(self.key))

    # --- the server --------------------------------------------------------------------------------------------------

    @cached_property
    def _files(self) -> Any:
        """The client; its own tries are few, since `_ask` tries again."""
        from pyarrow import fs

        if self.scheme == "gs":
            return fs.GcsFileSystem()
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        return fs.S3FileSystem(
            endpoint_override=endpoint, region=region or ("us-east-1" if endpoint else None),
            connect_timeout=5, request_timeout=30, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=2),
            background_writes=False, allow_delayed_open=True,
        )  # fmt: skip

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        """The answer, however often it takes to ask. Raises FileNotFoundError, StorageError."""
        began, pause = 0.0, 0.2
        while True:
            try:
                answer = call()
            except FileNotFoundError:
                raise
            except OSError as error:
                now = time.monotonic()
                began = began or now
                reason = _reason(error)
                self._final(what, str(error), reason)
                if now - began >= self.wait:
                    raise StorageError(
                        f"can't {what} {self}: the storage has been away for {now - began:.0f} s ({reason}). What was "
                        f"found so far is kept there; when it is back, run the same command again: it continues"
                    ) from error
                if now == began:
                    LOG.warning("can't %s %s (%s); waiting for it, at most %g s", what, self, reason, self.wait)
                time.sleep(pause)
                pause = min(2 * pause, LONGEST)
                continue
            if began:
                LOG.warning("the storage of %s is back after %.0f s", self, time.monotonic() - began)
            return answer

    def _final(self, what: str, text: str, reason: str) -> None:
        """Raises StorageError for what waiting does not mend."""
        if REFUSED.search(text):
            raise StorageError(
                f"can't {what} {self}: the storage refuses {platform.node()} ({reason}). Credentials must be known on "
                f"every machine of the cluster: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment that "
                f"Ray is started in, or a role of the machine; AWS_ENDPOINT_URL for a server that is not Amazon's"
            )
        if WRONG.search(text):
            raise StorageError(f"can't {what} {self}: {reason}. Is the bucket there, and AWS_REGION the right one?")


def _reason(error: OSError) -> str:
    """What a person needs of Arrow's long message."""
    text = str(error).strip().splitlines()[0]
    found = re.search(r"AWS Error (.*?)(?: \(Request ID.*|; Details:.*)?$", text)
    return (found.group(1) if found else text).strip(" :.")
