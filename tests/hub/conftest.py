"""A hub on loopback for the tests of this folder."""

from collections.abc import Iterator

import pytest
from fake_hub import FakeHub, serving


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    """A running, empty hub."""
    with serving() as server:
        yield server
