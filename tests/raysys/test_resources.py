"""What a study asks of a cluster, and what it is told of GPUs that it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest

from raysys.resources import device, needs, unused
from raysys.spec import StudySpec


def study(**cluster: Any) -> StudySpec:
    spec = StudySpec.parse('[[methods]]\nname = "rome"\n[[benchmarks]]\nname = "mmlu"\n')
    return spec.model_copy(update={"cluster": spec.cluster.model_copy(update=cluster)})


def test_every_actor_and_ray_data_have_a_place() -> None:
    spec = study(evaluators=3, editors=2, threads=4, gpus_per_evaluator=0.5, gpus_per_editor=1.0)
    cpus, gpus, bundles = needs(spec)
    assert cpus == (3 + 2) * 4 + 2
    assert gpus == 3 * 0.5 + 1.0
    assert bundles == [{"CPU": 4.0, "GPU": 1.0}, *[{"CPU": 4.0, "GPU": 0.5}] * 3, {"CPU": 1.0}, {"CPU": 1.0}]


@pytest.mark.parametrize(("gpus", "what"), [(0.0, "cpu"), (0.25, "cuda")])
def test_actors_compute_where_their_share_is(gpus: float, what: str) -> None:
    assert device(study(), gpus) == what
    assert device(study().model_copy(update={"device": "cpu"}), gpus) == "cpu"


def test_gpus_that_nobody_asked_for_are_spoken_of() -> None:
    assert "has 1 GPU, and the study runs on CPUs" in unused(study(), 1.0)
    assert "has 8 GPUs" in unused(study(), 8.0)
    for spec in (study(gpus_per_evaluator=0.5), study(gpus_per_editor=1.0)):
        assert unused(spec, 8.0) == ""
    assert unused(study().model_copy(update={"device": "cpu"}), 8.0) == ""
    assert unused(study(), 0.0) == ""
