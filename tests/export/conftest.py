"""What tests of reports share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.export import pages


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with token maps, figures of quality, latency and layers; not to be changed."""
    return pages.write(tmp_path_factory.mktemp("reported") / "engine")
