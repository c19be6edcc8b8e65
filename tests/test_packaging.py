"""What is shipped, how it is started, and which room may import which."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("passes", "kernels", "export", "cli", "zoo")
DATA = (".py", ".typed", ".json", ".toml", ".safetensors", ".md")


def python(*args: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "PYTHONDONTWRITEBYTECODE": "1"}
    if path:
        env["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a clean copy, unpacked."""
    work = tmp_path_factory.mktemp("wheel")
    copy, built, unpacked = work / "copy", work / "built", work / "unpacked"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("optpass", *ROOMS):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--no-deps", "--no-build-isolation", "--no-cache-dir", "--disable-pip-version-check", "-q")
    done = python("-m", "pip", "wheel", str(copy), "-w", str(built), *options, cwd=work)
    assert done.returncode == 0, done.stderr
    (file,) = built.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(unpacked)
    return unpacked


def test_wheel_holds_every_room_and_its_data(wheel: Path) -> None:
    folders = [ROOT / "optpass", *(ROOT / room for room in ROOMS)]
    own = {path for folder in folders for path in folder.rglob("*") if path.suffix in DATA and path.is_file()}
    inside = {
        path.relative_to(ROOT / "optpass") if path.is_relative_to(ROOT / "optpass") else path.relative_to(ROOT)
        for path in own
    }
    shipped = {path.relative_to(wheel / "optpass") for path in (wheel / "optpass").rglob("*") if path.is_file()}
    assert inside - shipped == set()
    assert Path("zoo/fashion_vit/model.safetensors") in shipped
    assert {path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")} == {"optpass"}


def test_wheel_runs_away_from_the_repository(wheel: Path, tmp_path: Path) -> None:
    where = python("-c", "import optpass; print(optpass.__file__)", cwd=tmp_path, path=wheel)
    assert where.stdout.startswith(str(wheel)), where.stderr
    listed = python("-m", "optpass", "zoo", "list", cwd=tmp_path, path=wheel)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "\nfashion-vit " in listed.stdout


def test_console_script_is_the_module(wheel: Path, tmp_path: Path) -> None:
    (metadata,) = wheel.glob("*.dist-info/entry_points.txt")
    assert "optpass = optpass.cli.main:main" in metadata.read_text()
    script = Path(sys.executable).parent / "optpass"
    done = subprocess.run([script, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == python("-m", "optpass", "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    "text",
    [
        "import optpass",
        "import optpass.cli.main as m; m.build()",
        "import optpass; optpass.OptpassError",
        "import optpass; optpass.load",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_used(text: str, tmp_path: Path) -> None:
    heavy = ["torch", "transformers", "diffusers", "onnxruntime", "openvino", "onnx", "networkx"]
    check = f"import sys; sys.modules.update(dict.fromkeys({heavy})); {text}"
    done = python("-c", check, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_public_name_is_there() -> None:
    import optpass

    assert all(getattr(optpass, name) is not None for name in optpass.__all__)
    assert set(optpass.__all__) <= set(dir(optpass))
    with pytest.raises(AttributeError, match="has no attribute 'optimise'"):
        _ = optpass.optimise


def test_imports_point_one_way() -> None:
    script = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([script, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_rooms_are_links_and_hold_docstrings_only() -> None:
    for room in ROOMS:
        assert (ROOT / "optpass" / room).is_symlink()
        text = (ROOT / room / "__init__.py").read_text()
        assert text.startswith('"""')
        assert text.rstrip().count("\n") == 0
