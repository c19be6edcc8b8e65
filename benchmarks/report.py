"""What every benchmark shares: the machine in words, tables, and the files that results are written to."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optpass.results import Interval
from optpass.runtime import manifest

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The processor, the cores in use, versions and the date: what a figure needs beside it to mean anything."""
    hardware = manifest.hardware()
    return {
        "cpu": hardware.cpu,
        "flags": hardware.flags,
        "cores": hardware.cores,
        "load_before": round(os.getloadavg()[0], 2),
        "libraries": manifest.libraries(),
        "date": manifest.now(),
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose source is aligned, so that it is read in a terminal as well."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def ratio(value: Interval | Mapping[str, float]) -> str:
    """``1.92x [1.90, 1.94]``."""
    value, low, high = _three(value)
    return f"{value:.2f}x [{low:.2f}, {high:.2f}]"


def points(value: Interval | Mapping[str, float]) -> str:
    """A difference of shares in percentage points, ``0.15 [-0.10, 0.40]``."""
    value, low, high = _three(value)
    return f"{100 * value:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


def _three(value: Interval | Mapping[str, float]) -> tuple[float, float, float]:
    if isinstance(value, Interval):
        return value.value, value.low, value.high
    return value["value"], value["low"], value["high"]


def say(text: str) -> None:
    """Progress, on stderr: stdout is for the tables."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def write(name: str, data: Mapping[str, Any], sections: Sequence[tuple[str, str]], folder: Path = RESULTS) -> str:
    """Write ``<name>.json`` and ``<name>.md`` and return the text of the latter.

    Args:
        name: of the benchmark.
        data: everything measured; ``machine`` is in it.
        sections: headings and their text.
        folder: where to.
    """
    about = data["machine"]
    versions = ", ".join(f"{library} {version}" for library, version in about["libraries"].items())
    text = f"# {name}\n\n{about['cpu']}, {about['cores']} cores, {about['date']}; {versions}.\n"
    text += "".join(f"\n## {heading}\n\n{body}\n" for heading, body in sections)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")
    (folder / f"{name}.md").write_text(text)
    return text
