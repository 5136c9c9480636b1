"""The presets for the built-in model: single edits of its facts take, generalise and leave neighbours alone."""

from itertools import islice
from statistics import fmean

import pytest

from benchmarks.edits import World
from methods.alphaedit import AlphaEdit
from methods.emmet import Emmet
from methods.ft import FtM
from methods.memit import Memit
from methods.pmet import Pmet
from methods.rome import Rome
from raysys import checks
from raysys.loading import WORLD
from raysys.model import Model

pytestmark = pytest.mark.skipif(not (WORLD / "model.safetensors").is_file(), reason=f"no model in {WORLD}")


@pytest.mark.parametrize(("method", "count"), [(Rome, 12), (FtM, 8), (Memit, 6), (Emmet, 6), (AlphaEdit, 6), (Pmet, 6)])
def test_single_edits_of_world_facts_take(method, count, tmp_path):
    model = Model.load("world/small")
    done = list(checks.single_edits(model, method().prepare(model, tmp_path), islice(World().cases(), count)))
    found = checks.shares(done)
    assert not any(single.refused for single in done)
    assert found["rewrite/likelier"] >= 0.9 and found["rewrite/greedy"] >= 0.9
    assert found["paraphrase/likelier"] >= 0.8 and found["neighbourhood/likelier"] >= 0.8
    assert max(single.miss for single in done) < 1e-4
    assert fmean(o.was_likelier for s in done for o in s.outcomes if o.kind == "rewrite") < 0.1
