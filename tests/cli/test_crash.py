"""kill -9 at any moment, and two processes that write one artifact: it is whole, or not there."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from optpass.runtime import manifest as manifests
from tests.cli.driver import Driver
from tests.cli.test_bad_inputs import MODELS

MOMENTS = 20
OTHER = "\ndef other(): return Attention(), (torch.randn(2, 12, 16),)\n"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "mine.py").write_text(MODELS + OTHER)
    return folder


def optimize(model: str, *more: str) -> list[str]:
    return ["optimize", f"mine:{model}", "-o", "engine", "--seconds", "0", *more]


def there(home: Path) -> str:
    """Which model the artifact is of, every file of it held against its hash; empty where there is none."""
    if not os.path.lexists(home / "engine"):
        return ""
    return manifests.read(home / "engine").source.removeprefix("mine:")


def seen(home: Path) -> tuple[object, ...]:
    """What has changed on the way: files in the making, and which directory bears the name of the artifact."""
    try:
        made = tuple(sorted((str(path), path.stat().st_size) for path in home.glob(".optpass-*/**/*")))
        return made, (home / "engine").stat().st_ino if (home / "engine").exists() else 0
    except OSError:
        return ()


def watched(home: Path, until: int | None, pid: int) -> int:
    """Wait for so many changes, or for the end of the process; how many there were."""
    changes, last = 0, seen(home)
    while until is None or changes < until:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        now = seen(home)
        changes, last = changes + (now != last), now
        # changes that follow each other within the pause are seen as one: of a dozen, 4 ms leave five
        time.sleep(0.0002)
    return changes


def test_killed_at_any_moment_the_artifact_is_the_old_one_or_the_new_one(driver: Driver, home: Path) -> None:
    assert driver.run(*optimize("small"), cwd=home).code == 0
    running = driver.start(optimize("other", "--force"), home)
    changes = watched(home, None, running.pid)
    assert running.wait().code == 0
    assert there(home) == "other"
    assert changes > 5
    rng = random.Random(0)
    killed = 0
    for _ in range(MOMENTS):
        model = "small" if there(home) == "other" else "other"
        running = driver.start(optimize(model, "--force"), home)
        watched(home, rng.randint(0, changes), running.pid)
        # the last six changes fall within 30 ms of the end
        time.sleep(0.01 * rng.random())
        os.kill(running.pid, signal.SIGKILL)
        killed += running.wait().code == -signal.SIGKILL
        assert there(home) in ("small", "other")
    assert killed >= MOMENTS // 2, "most processes had ended before they were killed"
    for left in home.glob(".optpass-*"):
        os.utime(left, (0, 0))
    assert driver.run(*optimize("small", "--force"), cwd=home).code == 0
    assert not list(home.glob(".optpass-*"))


def test_killed_before_there_was_one_there_is_none_or_a_whole_one(driver: Driver, home: Path) -> None:
    for until in (1, 4, 7):
        running = driver.start(optimize("small", "--force"), home)
        watched(home, until, running.pid)
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        assert there(home) in ("", "small")


@pytest.mark.parametrize("force", [False, True])
def test_of_two_processes_that_write_one_artifact_one_wins_whole(force: bool, driver: Driver, home: Path) -> None:
    more = ["--force"] if force else []
    running = [driver.start(optimize(model, *more), home) for model in ("small", "other")]
    done = [one.wait() for one in running]
    codes = sorted(one.code for one in done)
    assert codes == ([0, 0] if force else [0, 2]), [one.stderr for one in done]
    assert there(home) in ("small", "other")
    if not force:
        won, lost = sorted(done, key=lambda one: one.code)
        assert lost.error == "output"
        assert there(home) == ("small" if won is done[0] else "other")
    assert not list(home.glob(".optpass-*"))
