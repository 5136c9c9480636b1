"""What runs on the cluster when a study is submitted: look whether it can run there, then run it.

`python -m raysys.job STUDY.toml [key=value ...]`, in the folder that travelled with it. Its exit codes are those of
`raysys run`; 2 also for a study that can't run on this cluster, told before anything was started.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

PASSED = "preflight: passed"  # the line after which a study starts; `raysys submit --detach` waits for it


class Without:
    """A text stream that puts out everything but a secret, whoever writes it."""

    def __init__(self, secret: str, stream: Any) -> None:
        self.secret, self.stream = secret, stream

    def write(self, text: str) -> int:
        """As a stream's own; a secret that is cut in two between calls is not found."""
        self.stream.write(text.replace(self.secret, "***"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """As a stream's own."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Check, run, and end the process with an exit code."""
    study, *changes = sys.argv[1:] if arguments is None else arguments
    if token := _hub_token():
        sys.stdout, sys.stderr = Without(token, sys.stdout), Without(token, sys.stderr)
    from actors.cluster import cluster
    from raysys import cli
    from raysys import cli_shared as shared

    try:
        with cluster(None, 1):  # the one that this job is in
            signal.signal(signal.SIGTERM, _interrupted)  # `raysys stop`: as Ctrl-C. Ray sets its own when it connects
            faults = _faults(study, changes)
            if not faults:
                _say(PASSED.removeprefix("preflight: "))
                cli.main(["run", study, *changes])
    except (ValueError, OSError) as error:
        faults = [shared.reason(error)]
    except KeyboardInterrupt:
        shared.complain("interrupted before the study began")
        sys.exit(130)
    for fault in faults:
        shared.complain(fault)
    sys.exit(2)


def _hub_token() -> str:
    """The token of the model hub that travelled with the study, if there is one."""
    path = os.environ.get("HF_TOKEN_PATH", "")
    try:
        return Path(path).read_text().strip() if path else ""
    except OSError:
        return ""


def _faults(study: str, changes: Sequence[str]) -> list[str]:
    """What keeps the study from running on this cluster."""
    from raysys.spec import StudySpec

    spec = StudySpec.load(study, changes)
    from actors import preflight
    from raysys.resources import needs

    return preflight.room(*needs(spec), _say) + preflight.reach(spec.root, spec.models, _say)


def _say(text: str) -> None:
    from raysys import cli_shared as shared

    shared.say(f"preflight: {text}")
    sys.stdout.flush()


def _interrupted(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
