"""Ray for the tests of this folder: each file that asks for it has a cluster of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.actors import small


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster of our own, for all tests of a file."""
    with small.cluster():
        yield
