"""What a study asks of a cluster: CPUs, GPUs, and what of them must be on one machine. Arithmetic on its spec alone."""

from __future__ import annotations

from raysys.spec import StudySpec


def needs(spec: StudySpec) -> tuple[float, float, list[dict[str, float]]]:
    """Logical CPUs and GPUs that a study can't do without, and what of them must be on one node each."""
    gpus = spec.cluster.fewest * spec.cluster.gpus_per_evaluator + spec.cluster.gpus_per_editor
    return logical_cpus(spec), gpus, _bundles(spec)


def logical_cpus(spec: StudySpec, evaluators: int | None = None) -> int:
    """Logical CPUs that a study holds: its actors (the fewest evaluators unless told), and two for Ray Data."""
    evaluators = spec.cluster.fewest if evaluators is None else evaluators
    return (evaluators + spec.cluster.editors) * spec.cluster.threads * spec.cluster.tensor_parallel + 2


def _bundles(spec: StudySpec) -> list[dict[str, float]]:
    """What each actor needs on a node, of those that a study can't do without; and a place for Ray Data."""
    c = spec.cluster

    def share(gpus: float) -> list[dict[str, float]]:
        parts = c.tensor_parallel if c.across_nodes else 1
        cpus = float(c.threads * c.tensor_parallel)
        return [{"CPU": cpus / parts} | ({"GPU": gpus / parts} if gpus else {})] * parts

    return share(c.gpus_per_editor) + share(c.gpus_per_evaluator) * c.fewest + [{"CPU": 1.0}] * 2


def device(spec: StudySpec, gpus: float) -> str:
    """What an actor with so many GPUs computes on."""
    if spec.device != "auto":
        return spec.device
    return "cuda" if gpus > 0 else "cpu"


def unused(spec: StudySpec, gpus: float) -> str:
    """A sentence for who lets a cluster's `gpus` GPUs lie idle without having asked for CPUs; else nothing."""
    c = spec.cluster
    if not gpus or c.gpus_per_evaluator or c.gpus_per_editor or spec.device != "auto":
        return ""
    return (
        f"this cluster has {gpus:g} GPU{'s' if gpus != 1 else ''}, and the study runs on CPUs: to use them, set "
        "cluster.gpus_per_evaluator and cluster.gpus_per_editor (`raysys plan` says what fits)"
    )
