"""Every kernel becomes machine code for every GPU that we name, on a machine that has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from optpass.kernels.base import ARCHITECTURES, builds, cubin

triton = pytest.importorskip("triton", reason="install the extra dev, which brings Triton")

FOLDERS = sorted(path.parent.name for path in (Path(__file__).parents[2] / "kernels").glob("*/triton.py"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", FOLDERS)
def test_it_compiles_without_a_gpu(
    kernel: str, architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for build in builds()[kernel]:
        code = cubin(build, architecture)
        assert code.startswith(b"\x7fELF"), build
        # where CUDA's loader looks for the architecture: the second byte of the flags, and the lowest of older files
        flags = int.from_bytes(code[48:52], "little")
        assert architecture in (flags & 0xFF, flags >> 8 & 0xFF), (build, hex(flags))


def test_every_kernel_has_a_triton_face_that_lists_its_builds() -> None:
    assert set(builds()) == set(FOLDERS)
    assert all(builds().values())
