"""The files for clusters: what launcher, operator and Ray take is what is in them, and their READMEs fit them."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.cluster.kuberay import SCHEMAS
from tests.conftest import ROOT

CLUSTER = ROOT / "cluster"
LAUNCHER = [CLUSTER / "aws" / "cluster.yaml", CLUSTER / "gcp" / "cluster.yaml"]
KUBERNETES = sorted((CLUSTER / "kuberay").glob("*.yaml"))
BLANK = re.compile(r"<(?!LIKE_THIS)[A-Z][A-Z_]*>")


def name(path: Path) -> str:
    return str(path.relative_to(CLUSTER))


def tree(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


# --- the cluster launcher --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", LAUNCHER, ids=name)
def test_rays_launcher_takes_the_file(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    whole = prepare_config(tree(path))
    validate_config(whole)
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**whole, "max_worker": 3})


@pytest.mark.parametrize("path", LAUNCHER, ids=name)
def test_gpu_workers_are_spot_machines_that_come_when_needed_and_the_head_is_not(path: Path) -> None:
    given = tree(path)
    kinds = given["available_node_types"]
    head, gpu = kinds[given["head_node_type"]], kinds["gpu"]
    assert (gpu["min_workers"], gpu["resources"]["GPU"]) == (0, 1)
    assert given["max_workers"] >= gpu["max_workers"] > 0

    def spot(kind: Any) -> bool:
        config = kind["node_config"]
        market = config.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        return market or {"preemptible": True} in config.get("scheduling", [])

    assert spot(gpu) and not spot(head)


@pytest.mark.parametrize("path", LAUNCHER, ids=name)
def test_launched_clusters_ask_for_a_token_and_show_their_dashboard_to_loopback_alone(path: Path) -> None:
    given = tree(path)
    starts = [c for key in ("head", "worker") for c in given[f"{key}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert given["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "chmod 600 ~/.ray/auth_token" in given["setup_commands"]


# --- Kubernetes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", KUBERNETES, ids=name)
def test_the_operator_documents_every_field_of_the_file(path: Path) -> None:
    given = tree(path)
    schema = SCHEMAS[given["kind"]]
    jsonschema.validate(given, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**given, "spec": {**given["spec"], "headGroup": {}}}, schema)


def test_both_kubernetes_clusters_are_the_same_ask_for_a_token_and_begin_without_workers() -> None:
    stays, goes = tree(CLUSTER / "kuberay" / "raycluster.yaml"), tree(CLUSTER / "kuberay" / "rayjob.yaml")
    study = goes["spec"]["rayClusterSpec"]
    assert study["workerGroupSpecs"] == stays["spec"]["workerGroupSpecs"]
    assert study["authOptions"] == stays["spec"]["authOptions"] == {"mode": "token"}
    assert [(g["replicas"], g["minReplicas"]) for g in study["workerGroupSpecs"]] == [(0, 0)]
    mounts = study["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert {m["mountPath"] for m in mounts} == {"/shared", "/study"}
    assert goes["spec"]["entrypoint"] == "python -m raysys.job /study/study.toml root=/shared/runs"


# --- Ray's environment, the container, the certificates --------------------------------------------------------------


def test_ray_takes_the_environments() -> None:
    from ray.runtime_env import RuntimeEnv

    job = tree(CLUSTER / "kuberay" / "rayjob.yaml")["spec"]["runtimeEnvYAML"]
    for given in (tree(CLUSTER / "runtime_env.yaml"), yaml.safe_load(job)):
        assert RuntimeEnv(**given).env_vars() == given["env_vars"]
        assert not [k for k in given["env_vars"] if "TOKEN" in k]


def test_the_container_copies_what_is_there_and_every_file_names_the_same_ray() -> None:
    lines = (CLUSTER / "Containerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert [c for c in copied if not (ROOT / c).exists()] == []
    assert {"raysys", "actors", "methods", "benchmarks", "cluster"} <= set(copied)
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None and pinned[1] == metadata.version("ray")
    versions = {tree(CLUSTER / "kuberay" / "raycluster.yaml")["spec"]["rayVersion"]}
    versions.add(tree(CLUSTER / "kuberay" / "rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"])
    assert versions == {pinned[1]}


@pytest.mark.parametrize("target", ["aws", "gcp", "kuberay"])
def test_each_readme_has_the_commands_in_order_and_says_how_to_fill_every_blank(target: str) -> None:
    text = (CLUSTER / target / "README.md").read_text()
    steps = re.findall(r"^## \d+\. (\w+)", text, re.MULTILINE)
    assert steps == ["Fill", "Create", "Tunnel", "Submit", "Watch", "Stop", "Tear"]
    blanks = {b for p in (CLUSTER / target).glob("*.yaml") for b in BLANK.findall(p.read_text())}
    assert blanks and {b for b in blanks if b not in text} == set()
    for command in ("raysys submit", "raysys status", "raysys logs", "raysys stop"):
        assert command in text


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_certificates_are_for_the_names_given_and_keys_are_private(tmp_path: Path) -> None:
    authority, machine = tmp_path / "authority", tmp_path / "machine"
    script = ["sh", str(CLUSTER / "tls" / "certificates.sh"), str(authority), str(machine)]
    said = subprocess.check_output([*script, "head.example", "10.0.0.7", "fd00::7"], text=True)
    assert "DNS:head.example,IP:10.0.0.7,IP:fd00::7" in said
    names = ["openssl", "x509", "-in", str(machine / "tls.crt"), "-noout", "-text"]
    assert "DNS:head.example, IP Address:10.0.0.7" in subprocess.check_output(names, text=True)
    verify = ["openssl", "verify", "-CAfile", str(machine / "ca.crt"), str(machine / "tls.crt")]
    assert subprocess.run(verify, capture_output=True, check=False).returncode == 0
    assert {f.name for f in machine.iterdir()} == {"ca.crt", "tls.crt", "tls.key"}
    assert all(f.stat().st_mode & 0o077 == 0 for f in (*authority.iterdir(), *machine.iterdir()))
