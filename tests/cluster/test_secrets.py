"""What a submitted job may carry and print, and a cluster that is in trouble for a moment."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import ray

from cluster.access import Access
from cluster.jobs import Jobs
from raysys import cli_jobs, job
from tests.cluster.test_access import server


@pytest.mark.parametrize(
    "given",
    ["HF_TOKEN=x", "S3_SECRET_KEY=x", "DB_PASS=x", "OPENAI_KEY=x", "OPENAI_APIKEY=x", "GITHUB_PAT=x",
     "MY_CREDENTIALS=x", "aws_secret_access_key=x", "HTTPS_PROXY=http://me:mine@host:80", "DB_PASSWORD=x"],
)  # fmt: skip
def test_what_looks_like_a_secret_is_not_put_into_a_jobs_environment(given: str) -> None:
    with pytest.raises(ValueError, match="Ray writes a job's environment into its logs") as told:
        cli_jobs._variables([given])
    assert "mine" not in str(told.value)


def test_other_variables_are() -> None:
    given = ["TOKENIZERS_PARALLELISM=false", "HF_TOKEN_PATH=/run/token", "HTTP_PROXY=http://host:80", "COMPASS=north",
             "RAY_AUTH_MODE=token", "MONKEYS=3"]  # fmt: skip
    assert cli_jobs._variables(given) == dict(text.split("=", 1) for text in given)


def test_a_job_prints_its_hub_token_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("hf_nobodys\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    said = io.StringIO()
    stream = job.Without(job._hub_token(), said)
    print("Bearer hf_nobodys", 3, file=stream, flush=True)
    stream.writelines(["a hf_nobodys\n", "b"])
    assert said.getvalue() == "Bearer *** 3\na ***\nb"
    assert not stream.isatty()
    monkeypatch.delenv("HF_TOKEN_PATH")
    assert job._hub_token() == ""


class Anyone(dict[str, tuple[int, str]]):
    """The same answer, whatever token Ray's client shows."""

    def get(self, *_: object) -> tuple[int, str]:
        return self[""]


def test_trouble_of_the_cluster_is_no_mistake_of_the_users() -> None:
    """It is tried again, where a refusal is not."""
    version = json.dumps({"version": "4", "ray_version": ray.__version__, "ray_commit": ray.__commit__})
    answers = Anyone({"": (200, version)})
    with server(answers) as (address, _):
        jobs = Jobs(Access(address, None, False))
        answers[""] = (503, "busy")
        with pytest.raises(ConnectionError, match="503"):
            jobs.all()
        answers[""] = (400, "no")
        with pytest.raises(ValueError, match="400"):
            jobs.all()
