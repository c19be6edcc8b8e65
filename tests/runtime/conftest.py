"""One artifact for all tests of the runtime; those that change it take a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.export.artifacts import write


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("artifact") / "engine")


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "engine"))
