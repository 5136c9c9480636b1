"""The files for clusters: what launcher, operator and Ray take is what is in them, and their READMEs fit them."""

from __future__ import annotations

import json
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


def instructions(kind: str) -> list[str]:
    """What the Containerfile says in its instructions of this kind, each on one line."""
    text = (CLUSTER / "Containerfile").read_text().replace("\\\n", " ")
    return [line.removeprefix(kind + " ") for line in text.splitlines() if line.startswith(kind + " ")]


def environment() -> dict[str, str]:
    """The variables of the image."""
    return dict(setting.split("=", 1) for line in instructions("ENV") for setting in line.split())


class Machine:
    """In the place of Ray's SSH: a machine with Docker, NVIDIA's runtime and our image, which notes what it is told."""

    cluster_name, ssh_user = "raysys", "ubuntu"

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.replies = {
            "command -v docker": "/usr/bin/docker",
            ".Config.Env": json.dumps([f"{k}={v}" for k, v in environment().items()]),
            ".Runtimes": "map[nvidia:{nvidia-container-runtime [] <nil>} runc:{runc [] <nil>}]",
            "printenv HOME": "/home/ray",  # of the user's account, where the image does not say it
        }

    def run(self, command: str, **_: Any) -> bytes:
        self.ran.append(command)
        return next((reply for asked, reply in self.replies.items() if asked in command), "").encode()

    def run_rsync_up(self, source: str, target: str, options: Any = None) -> None:
        self.ran.append(f"rsync -avz {source} {target}")


def launched(path: Path) -> tuple[Any, list[str]]:
    """Ray's own runner of a launcher's commands, with the container started, and what the machine was told."""
    from ray.autoscaler._private.command_runner import DockerCommandRunner

    given, machine = tree(path), Machine()
    rest = {"provider": None, "process_runner": None, "use_internal_ip": False, "node_id": "n", "log_prefix": ""}
    runner = DockerCommandRunner(given["docker"], auth_config=given["auth"], cluster_name="raysys", **rest)
    runner.ssh_command_runner = machine
    runner.run_init(as_head=True, file_mounts=given["file_mounts"], sync_run_yet=True)
    return runner, machine.ran


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


@pytest.mark.parametrize("path", LAUNCHER, ids=name)
def test_the_token_is_mounted_into_the_home_of_the_containers_user(path: Path) -> None:
    runner, ran = launched(path)
    [start] = [command for command in ran if command.startswith("docker run")]
    assert re.findall(r" -v (\S+)", start) == ["/tmp/ray_tmp_mount/raysys/~/.ray/auth_token:/home/ray/.ray/auth_token"]
    text = (CLUSTER / "Containerfile").read_text()
    assert environment()["HOME"] == instructions("WORKDIR")[-1] == "/home/ray"
    assert text.index("USER ray") < text.index("RUN mkdir -p /home/ray/.ray") < text.index("ENV HOME=")
    for command in tree(path)["setup_commands"]:
        runner.run(command, run_env="auto")
    assert "chmod 600 /home/ray/.ray/auth_token" in ran[-1]


@pytest.mark.parametrize("path", LAUNCHER, ids=name)
def test_the_container_sees_the_machines_gpus(path: Path) -> None:
    [start] = [command for command in launched(path)[1] if command.startswith("docker run")]
    assert "--runtime=nvidia" in start and "--gpus" not in start  # which leaves the choice to the image's variables
    assert environment()["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert environment()["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"


@pytest.mark.parametrize("path", LAUNCHER, ids=name)
def test_a_prometheus_on_the_machine_reads_the_list_that_ray_writes_in_the_container(path: Path) -> None:
    [start] = [command for command in launched(path)[1] if command.startswith("docker run")]
    [scraped] = tree(CLUSTER / "prometheus" / "prometheus.yml")["scrape_configs"]
    [source] = scraped["file_sd_configs"]
    assert source["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    assert "--volume=/tmp/ray:/tmp/ray " in start  # at the same path: what Ray writes there is a link to a whole path
    assert "refresh_interval" in source  # the link's target changes, and the link does not
    [user] = re.findall(r"useradd .*--uid (\d+) ray", (CLUSTER / "Containerfile").read_text())
    assert f"sudo mkdir -p /tmp/ray && sudo chown {user}:{user} /tmp/ray" in tree(path)["initialization_commands"]
    text = (CLUSTER / "WATCHING.md").read_text()
    assert f"docker cp {tree(path)['docker']['container_name']}:/opt/raysys/cluster/prometheus/. prometheus" in text
    assert "cluster cluster" in instructions("COPY") and "/opt/raysys" in instructions("WORKDIR")


@pytest.mark.parametrize("path", LAUNCHER, ids=name)
def test_a_model_is_copied_to_the_path_that_the_readme_names(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " ".join((path.parent / "README.md").read_text().split())
    [(source, target)] = re.findall(r"`ray rsync-up cluster.yaml (\S+) (\S+)`", text)
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    runner, ran = launched(path)
    runner.run_rsync_up(source, target)
    assert "rsync -avz model/ /tmp/ray_tmp_mount/raysys/shared/models/model/" in ran
    assert ran[-1].endswith("/shared/models/model//. raysys:/shared/models/model/")  # what is in it, not itself
    assert "name it `/shared/models/model`." in text


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


def pods() -> list[Any]:
    """The pod templates of both Kubernetes clusters with their `ray start` parameters: (head, worker) of each."""
    stays, goes = tree(CLUSTER / "kuberay" / "raycluster.yaml"), tree(CLUSTER / "kuberay" / "rayjob.yaml")
    specs = (stays["spec"], goes["spec"]["rayClusterSpec"])
    return [group for spec in specs for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def test_pods_may_write_to_a_shared_volume_that_belonged_to_root() -> None:
    [user] = re.findall(r"useradd .*--uid (\d+) ray", (CLUSTER / "Containerfile").read_text())
    assert [p["template"]["spec"]["securityContext"]["fsGroup"] for p in pods()] == [int(user)] * 4
    for head in pods()[::2]:
        assert head["rayStartParams"]["num-gpus"] == "0"  # the image asks for GPUs; the head's pod did not
        [first] = head["template"]["spec"]["initContainers"]
        assert first["securityContext"] == {"runAsUser": 0}
        assert first["image"] == head["template"]["spec"]["containers"][0]["image"]
        assert first["resources"]["requests"] == first["resources"]["limits"]  # else the head is evicted early
        assert first["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]
        assert first["command"][-1].startswith(f"chown {user}:{user} /shared ||")  # a server may not let it: go on


def test_prometheus_operator_scrapes_every_pod() -> None:
    spec = tree(CLUSTER / "kuberay" / "podmonitor.yaml")["spec"]
    [endpoint] = spec["podMetricsEndpoints"]
    for pod in pods():
        assert spec["selector"]["matchLabels"].items() <= pod["template"]["metadata"]["labels"].items()
        ports = {port["name"]: port["containerPort"] for port in pod["template"]["spec"]["containers"][0]["ports"]}
        assert str(ports[endpoint["port"]]) == pod["rayStartParams"]["metrics-export-port"] == "8080"


def test_the_alerts_for_kubernetes_are_made_of_the_same_file() -> None:
    text = (CLUSTER / "WATCHING.md").read_text()
    [command] = re.findall(r"^    (\{ printf .*?; \}) \| kubectl apply -f -$", text, re.MULTILINE | re.DOTALL)
    made = yaml.safe_load(subprocess.check_output(["sh", "-c", command], text=True, cwd=ROOT))
    assert made["kind"] == "PrometheusRule" and made["spec"] == tree(CLUSTER / "prometheus" / "rules.yml")
    monitor = tree(CLUSTER / "kuberay" / "podmonitor.yaml")
    assert (made["apiVersion"], made["metadata"]) == (monitor["apiVersion"], monitor["metadata"])


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
