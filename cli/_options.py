"""Options that several commands share, declared once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import optpass
from optpass.errors import OptpassError

Source = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Zoo name, Hugging Face or diffusers directory, Hugging Face id, .pt2 file, or package.module:factory.",
        show_default=False,
    ),
]
Artifact = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Directory that optimize wrote.")]
Passes = Annotated[
    str, typer.Option("--passes", "-p", metavar="PASSES", help="Such as 'prune(keep=0.5,at=3),merge(r=8)'.")
]
Recipe = Annotated[Path | None, typer.Option(metavar="FILE.toml", help="The same as a file.", show_default=False)]
Preset = Annotated[
    Literal["safe", "balanced", "fast"] | None,
    typer.Option(help="A measured schedule for the kind of model, in place of passes.", show_default=False),
]
Dynamic = Annotated[
    list[str] | None,
    typer.Option(
        metavar="INPUT:AXIS=[NAME:]MIN..MAX",
        help="A dynamic dimension, such as input_ids:1=2..512; dimensions of one name are equal. Repeatable.",
        show_default=False,
    ),
]
Static = Annotated[bool, typer.Option("--static", help="No dynamic dimension, whatever the model itself declares.")]
Inputs = Annotated[
    Path | None,
    typer.Option(metavar="FILE.npz", help="Example inputs by name, in place of the model's own.", show_default=False),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.npz|MODULE:FUNCTION",
        help="Samples for the metric: arrays by input name, and labels if there are any. Zoo models bring their own.",
        show_default=False,
    ),
]
MetricName = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Metric on the data, such as top1.", show_default=False),
]
Samples = Annotated[
    int | None, typer.Option(min=1, help="How many samples of the data to use.", show_default="all of them")
]
Target = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DEVICES",
        help="Devices to build for, such as sm_89,sm_120; none of them need be here. Repeatable.",
        show_default="those that are here",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"optpass {optpass.__version__}")
        raise typer.Exit


def dynamic_dimensions(dynamic: list[str] | None, static: bool) -> list[str] | None:
    """``None`` leaves the choice to the model, an empty list makes all of it static."""
    if static and dynamic:
        raise OptpassError("usage", "--static and --dynamic exclude each other", "give one of them")
    return [] if static else dynamic or None


def share(text: str, name: str) -> float:
    """``2%`` or ``0.02``."""
    number, percent, rest = text.strip().partition("%")
    try:
        found = float(number) / (100 if percent else 1)
    except ValueError:
        found = math.nan
    if rest or not 0 < found < 1:
        raise OptpassError("usage", f"{name} is {text!r}", "give a share such as 2% or 0.02")
    return found


def read_inputs(path: Path | None) -> dict[str, Any] | None:
    """The arrays of an ``.npz`` file."""
    if path is None:
        return None
    import zipfile

    import numpy as np

    if not path.is_file():
        raise OptpassError("missing-file", f"there is no file {path}", "check the path")
    try:
        with np.load(path, allow_pickle=False) as file:
            if not hasattr(file, "files"):
                raise ValueError("it is one array without a name")
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise OptpassError(
            "corrupt-file", f"{path} is no readable .npz file: {error}", "write it with numpy.savez(path, name=array)"
        ) from error


def program(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show it.")] = False,
) -> None:
    """Turn a captured transformer into a verified, faster engine that runs without torch.

    Exit codes: 0 ok, 1 a check failed or a pass was refused, 2 bad input, 3 undecided.
    """
