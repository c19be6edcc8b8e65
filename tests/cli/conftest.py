"""Fixtures of the tests of the command line."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cli.driver import Driver


@pytest.fixture(scope="session")
def driver() -> Iterator[Driver]:
    """Starts each process where and as a test asks; the libraries are imported once."""
    started = Driver()
    yield started
    started.close()
