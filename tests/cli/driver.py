"""Real processes of the command line that do not pay for importing torch each time.

``python -m tests.cli.driver`` imports the libraries once, then forks a process for each line of JSON that it reads:
its own arguments, directory, stdout and stderr. It answers with the process id at once, and with the exit code later.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRESS = "optpass: "


@dataclass(frozen=True)
class Done:
    """A process that has ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        """The lines on stderr that are not progress."""
        return [line for line in self.stderr.splitlines() if not line.startswith(PROGRESS)]

    @property
    def error(self) -> str:
        """The code of the one error line."""
        (line,) = self.errors
        assert line.startswith("error["), line
        return line[len("error[") : line.index("]")]


class Driver:
    """The side of the test."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.cli.driver"]
        root = Path(__file__).parent.parent.parent
        self.process = subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def start(
        self, args: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None, file_size: int | None = None
    ) -> Running:
        """Start ``optpass ARGS`` in ``cwd``; ``file_size`` limits, in bytes, the files that it may write."""
        output = cwd.parent / f"{cwd.name}-output-{time.monotonic_ns()}"
        job = {"args": list(args), "cwd": str(cwd), "env": dict(env or {}), "output": str(output), "limit": file_size}
        for name in ("out", "err"):  # a process may be killed before it opens them
            Path(f"{output}.{name}").touch()
        pid = int(self._ask(job)["pid"])
        return Running(self, pid, output)

    def run(self, *args: str, cwd: Path, env: Mapping[str, str] | None = None, file_size: int | None = None) -> Done:
        """Run ``optpass ARGS`` to its end."""
        return self.start(args, cwd, env, file_size).wait()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(message), file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        """End the process that forks."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


@dataclass(frozen=True)
class Running:
    """A process under way."""

    driver: Driver
    pid: int
    output: Path

    def wait(self) -> Done:
        """Wait for its end."""
        code = int(self.driver._ask({"wait": self.pid})["code"])
        stdout, stderr = (Path(f"{self.output}.{name}").read_text() for name in ("out", "err"))
        return Done(code, stdout, stderr)


def main() -> None:
    """The side that forks; no thread may be running in it."""
    for name in ("torch", "transformers", "networkx", "pydantic", "typer", "onnx", "onnxscript", "optpass.capture"):
        importlib.import_module(name)
    for name in ("optpass.api", "rich.table"):
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            _, status = os.waitpid(job["wait"], 0)
            print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)
        elif pid := os.fork():
            print(json.dumps({"pid": pid}), flush=True)
        else:
            _child(job)


def _child(job: dict[str, Any]) -> None:
    from optpass.cli.main import main as command_line

    for number, name in ((0, None), (1, "out"), (2, "err")):
        path = os.devnull if name is None else f"{job['output']}.{name}"
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), number)
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    if job["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
    code: Any = 99
    try:
        command_line(job["args"])
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 98)


if __name__ == "__main__":
    main()
