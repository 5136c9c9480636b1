"""The fields of KubeRay's and Kubernetes' objects that our files use, as JSON schemas that know no other field.

Sources: KubeRay's API reference, package ray.io/v1 (https://ray-project.github.io/kuberay/reference/api/; fields and
enumerations of RayClusterSpec, RayJobSpec, HeadGroupSpec, WorkerGroupSpec, AutoscalerOptions, AuthOptions, as of
v1.5.1), Kubernetes' API reference, core/v1 (PodTemplateSpec, PodSpec, Container, SecurityContext, PodSecurityContext,
Volume, PersistentVolumeClaim), and the Prometheus operator's, monitoring.coreos.com/v1 (PodMonitorSpec,
PodMetricsEndpoint; https://prometheus-operator.dev/docs/api-reference/api/).
"""

from __future__ import annotations

from typing import Any

TEXT: dict[str, Any] = {"type": "string"}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
FLAG: dict[str, Any] = {"type": "boolean"}
TEXTS: dict[str, Any] = {"type": "object", "additionalProperties": TEXT}
NAME: dict[str, Any] = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}
QUANTITY: dict[str, Any] = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kKMGTP]i?)?$"}


def thing(required: str = "", **fields: Any) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


def many(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


def one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
RESOURCES = thing(requests=QUANTITIES, limits=QUANTITIES)
METADATA = thing("name", name=NAME, namespace=NAME, labels=TEXTS, annotations=TEXTS)
SOURCE = thing(secretKeyRef=thing("name key", name=NAME, key=TEXT))
CONTAINER = thing(
    "name image", name=NAME, image=TEXT, command=many(TEXT), args=many(TEXT),
    securityContext=thing(runAsUser=COUNT, runAsGroup=COUNT, runAsNonRoot=FLAG),
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"), resources=RESOURCES,
    env=many(thing("name", name=TEXT, value=TEXT, valueFrom=SOURCE)),
    ports=many(thing("containerPort", name=NAME, containerPort=COUNT)),
    volumeMounts=many(thing("name mountPath", name=NAME, mountPath=TEXT, readOnly=FLAG)),
)  # fmt: skip
VOLUME = thing(
    "name", name=NAME, persistentVolumeClaim=thing("claimName", claimName=NAME), configMap=thing("name", name=NAME),
    emptyDir=thing(medium=one_of("", "Memory"), sizeLimit=QUANTITY), secret=thing("secretName", secretName=NAME),
)  # fmt: skip
TOLERATION = thing(
    key=TEXT, operator=one_of("Exists", "Equal"), value=TEXT,
    effect=one_of("NoSchedule", "NoExecute", "PreferNoSchedule"),
)  # fmt: skip
POD = thing(
    "containers", containers=many(CONTAINER), initContainers=many(CONTAINER),
    securityContext=thing(fsGroup=COUNT, fsGroupChangePolicy=one_of("OnRootMismatch", "Always")),
    volumes=many(VOLUME), nodeSelector=TEXTS, tolerations=many(TOLERATION),
    terminationGracePeriodSeconds=COUNT, serviceAccountName=NAME,
)  # fmt: skip
TEMPLATE = thing("spec", metadata=thing(labels=TEXTS, annotations=TEXTS), spec=POD)
HEAD = thing(
    "template", serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"), enableIngress=FLAG, rayStartParams=TEXTS,
    template=TEMPLATE, resources=TEXTS, labels=TEXTS,
)  # fmt: skip
WORKERS = thing(
    "groupName template", groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, numOfHosts=COUNT,
    rayStartParams=TEXTS, template=TEMPLATE, idleTimeoutSeconds=COUNT, suspend=FLAG, resources=TEXTS, labels=TEXTS,
)  # fmt: skip
AUTOSCALER = thing(
    idleTimeoutSeconds=COUNT, upscalingMode=one_of("Default", "Aggressive", "Conservative"), version=one_of("v1", "v2"),
    resources=RESOURCES, image=TEXT, imagePullPolicy=one_of("Always", "IfNotPresent", "Never"), env=many(thing()),
)  # fmt: skip
CLUSTER = thing(
    "headGroupSpec", rayVersion=TEXT, authOptions=thing(mode=one_of("disabled", "token")), enableInTreeAutoscaling=FLAG,
    autoscalerOptions=AUTOSCALER, headGroupSpec=HEAD, workerGroupSpecs=many(WORKERS), suspend=FLAG,
    headServiceAnnotations=TEXTS,
)  # fmt: skip
JOB = thing(
    "", entrypoint=TEXT, runtimeEnvYAML=TEXT, jobId=TEXT, metadata=TEXTS, clusterSelector=TEXTS, backoffLimit=COUNT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"), activeDeadlineSeconds=COUNT,
    shutdownAfterJobFinishes=FLAG, ttlSecondsAfterFinished=COUNT, rayClusterSpec=CLUSTER, suspend=FLAG,
    entrypointNumCpus={"type": "number"}, entrypointNumGpus={"type": "number"},
)  # fmt: skip
MONITOR = thing(
    "selector podMetricsEndpoints", selector=thing(matchLabels=TEXTS), namespaceSelector=thing(any=FLAG),
    podMetricsEndpoints=many(thing("port", port=NAME, path=TEXT, interval={"type": "string", "pattern": "^[0-9]+s$"})),
)  # fmt: skip
CLAIM = thing(
    "accessModes resources", accessModes=many(one_of("ReadWriteMany")), storageClassName=TEXT,
    resources=thing("requests", requests=QUANTITIES),
)  # fmt: skip


def whole(kind: str, version: str, spec: dict[str, Any]) -> dict[str, Any]:
    about = {"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": METADATA, "spec": spec}
    return thing("apiVersion kind metadata spec", **about)


SCHEMAS = {
    "RayCluster": whole("RayCluster", "ray.io/v1", CLUSTER),
    "RayJob": whole("RayJob", "ray.io/v1", JOB),
    "PodMonitor": whole("PodMonitor", "monitoring.coreos.com/v1", MONITOR),
    "PersistentVolumeClaim": whole("PersistentVolumeClaim", "v1", CLAIM),
}
