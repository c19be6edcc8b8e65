"""Peak memory of an engine: a process of its own opens it, runs it, and says how much it ever held."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from optpass.errors import OptpassError

CALLS = 3


def peak_mib(folder: Path, engine: str, threads: int | None = None, sizes: Mapping[str, int] | None = None) -> float:
    """Most MiB of resident memory of a process that imports the runtime, opens the engine and runs it three times.

    Raises:
        OptpassError: the process fails, or this system does not tell.
    """
    asked = json.dumps({"folder": str(folder), "engine": engine, "threads": threads, "sizes": dict(sizes or {})})
    done = subprocess.run([sys.executable, "-m", __name__, asked], capture_output=True, text=True, check=False)
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise OptpassError("memory", f"the memory of {engine} cannot be measured: {last[:200]}", "see optpass verify")
    return float(done.stdout.split()[-1]) / 1024


def _resident_kib() -> int:
    """The high-water mark of this program alone: that of ``getrusage`` counts what the parent held when it forked."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most // 1024 if sys.platform == "darwin" else most
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def main() -> None:
    """The process: its one argument is the JSON of what to run."""
    from optpass.runtime import check
    from optpass.runtime import manifest as manifests
    from optpass.runtime.session import open_session

    asked = json.loads(sys.argv[1])
    folder = Path(asked["folder"])
    manifest = manifests.read(folder)
    arrays = check.read(folder, manifest, asked["engine"]).inputs(asked["sizes"])
    session = open_session(folder, manifest, asked["engine"], asked["threads"])
    for _ in range(CALLS):
        session.run(**arrays)
    print(_resident_kib())


if __name__ == "__main__":
    main()
