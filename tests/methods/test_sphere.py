"""SPHERE against a dense computation: AlphaEdit's change, projected with the leading directions of the matrix."""

import pytest
import torch

from methods.alphaedit import AlphaEdit
from methods.sphere import Sphere, directions
from tests.families import tiny
from tests.methods.dense import FACTS, Twin, close, stream

SETTINGS = {"batch": 2, "layers": (0, 1), "steps": 4, "lr": 0.1, "threshold": 0.3, "relative": True, "l2": 0.5,
            "contexts": ((5, 3),), "documents": 9}  # fmt: skip


def _projector(matrix, ratio, strength):
    """I - s U Uᵀ (n, n) of `matrix` (m, n), from the whole n x n matrix."""
    rows = matrix / (matrix.norm(dim=1, keepdim=True) + 1e-8)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    shares = values.flip(0).cumsum(0) / values.sum()
    number = int((shares <= ratio).sum()) + 1
    leading = vectors[:, -number:]
    return torch.eye(matrix.shape[1], dtype=matrix.dtype) - strength * leading @ leading.T, number


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_updates_equal_the_dense_solution(family, published, corpus, found_values, tmp_path):
    model = tiny(family)
    ready = Sphere(**SETTINGS, corpus=corpus, published=published).prepare(model, tmp_path)
    twin = Twin(model)
    contexts = ready.alpha.contexts.texts
    modules = [model.mlp_out(i) for i in (0, 1)]
    null = {}
    for module in modules:
        values, vectors = torch.linalg.eigh(twin.moment(module, corpus, 9))
        free = vectors[:, values < 0.3 * values.mean()]
        null[module] = free @ free.T
    earlier = {m: torch.zeros_like(null[m]) for m in modules}
    batches = [FACTS[:2], FACTS[2:]]
    for number, (edit, changes) in enumerate(stream(model, ready, batches)):
        for layer, module in enumerate(modules):
            keys = twin.keys(module, batches[number], contexts)
            missing = (found_values[number] - twin.hidden(1, batches[number])) / (2 - layer)
            whole = null[module] @ (keys @ keys.T + earlier[module]) + 0.5 * torch.eye(len(keys))
            alpha = torch.linalg.solve(whole, null[module] @ keys @ missing.T).T
            across = published and model.transposed(f"{module}.weight")
            matrix = twin.matrix(module)
            projector, leading = _projector(matrix.T if across else matrix, 0.5, 0.5)
            wanted = projector @ alpha if across else alpha @ projector
            close(changes[module], wanted, 1e-3)
            assert edit.log["leading"][module] == leading
            matrix.add_(wanted)
        for module in modules:
            keys = twin.keys(module, batches[number], contexts)
            earlier[module] += keys @ keys.T


def test_without_strength_it_is_alphaedit(corpus, tmp_path):
    model = tiny("llama")
    one = Sphere(**SETTINGS, corpus=corpus, strength=0.0).prepare(model, tmp_path).edit(model, FACTS[:2])
    other = AlphaEdit(**SETTINGS, corpus=corpus).prepare(model, tmp_path).edit(model, FACTS[:2])
    for a, b in zip(one.patches, other.patches, strict=True):
        assert torch.equal(a.left, b.left) and torch.equal(a.right, b.right)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_leading_directions_are_the_same_from_either_side(shape, ratio):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    held = directions(matrix, ratio)
    projector, number = _projector(matrix, ratio, 1.0)
    torch.testing.assert_close(torch.eye(shape[1], dtype=torch.float64) - held @ held.T, projector)
    assert held.shape[1] == number


def test_at_full_strength_nothing_is_written_along_them(corpus, tmp_path):
    model = tiny("gpt2")
    ready = Sphere(**SETTINGS, corpus=corpus, strength=1.0).prepare(model, tmp_path)
    first = ready.edit(model, FACTS[:2]).patches[0]
    held = directions(model.matrix(first.weight), 0.5)
    assert float((first.right.double() @ held).norm()) < 1e-5 * float(first.right.norm())


def test_shares_outside_zero_and_one_are_refused():
    with pytest.raises(ValueError, match="are shares"):
        Sphere(ratio=1.5)
