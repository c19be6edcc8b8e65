"""Budgets: what an engine may take and must keep, as the tables of a ``budget.toml``.

    [latency]                 # of one call, in milliseconds
    p50_ms = 8.0

    [speedup]                 # over the unmodified model on the same engine, measured in turn
    at_least = 1.3

    [quality]
    metric = "top1"
    max_drop = 0.5            # points of 100 for shares such as top1

A table may be repeated, as ``[[latency]]``, for several sizes or data sets.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from optpass.errors import OptpassError

Limit = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Over = Literal["dense", "baseline"]


class Table(BaseModel):
    """Base of all tables; an unknown key is an error, since a limit that is misspelt would never be held."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Sized(Table):
    """A table about calls of one size."""

    batch: int | None = Field(None, ge=1, description="size of the first dimension, where it is dynamic")
    sizes: dict[str, int] = Field(
        default_factory=dict, description="sizes of dynamic dimensions by name; those of the example otherwise"
    )


class Latency(Sized):
    """How long one call may take."""

    p50_ms: Limit | None = Field(None, description="most milliseconds for half of the calls")
    p95_ms: Limit | None = Field(None, description="most milliseconds for 95 % of the calls")

    @model_validator(mode="after")
    def _check(self) -> Latency:
        _needs(self, "p50_ms", "p95_ms")
        return self


class Throughput(Sized):
    """How many samples must be done in a second by calls one after the other."""

    at_least: Limit = Field(description="fewest samples a second; a call does as many as its first dimension has")


class Speedup(Sized):
    """How much faster, or no slower, than something else a call must be."""

    over: Over = Field("dense", description="the unmodified model on the same engine, or the baseline")
    of: Literal["quiet", "p50", "p95"] = Field(
        "quiet", description="the third of the turns that a busy machine disturbed least, or a percentile of all calls"
    )
    at_least: Limit = Field(description="least ratio of latencies; 0.97 allows 3 % slower")


class Memory(Table):
    """How much memory a process may take that only opens the engine and runs it."""

    peak_mib: Limit = Field(description="most resident memory at any moment, Python and libraries included, in MiB")


class Size(Table):
    """How large the files of the engine may be."""

    mib: Limit = Field(description="most MiB of the files that the engine needs")


class Quality(Table):
    """How much of the quality must be kept."""

    metric: str | None = Field(None, description="top1, perplexity ...; that of the zoo model by default")
    over: Over = Field("dense", description="the unmodified model on the same engine, or the baseline")
    max_drop: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="most that may be lost: points of 100 for a share, else its unit"
    )
    at_least: float | None = Field(None, allow_inf_nan=False, description="least value; most where lower is better")
    data: str | None = Field(None, description="FILE.npz or module:function; a zoo model brings its own")
    samples: int | None = Field(None, ge=1, description="how many of the samples; all by default")
    decide: Literal["interval", "value"] = Field(
        "interval", description="by the whole 95 % interval, or by the value alone"
    )

    @model_validator(mode="after")
    def _check(self) -> Quality:
        _needs(self, "max_drop", "at_least")
        return self


class Reference(Table):
    """What ``over = "baseline"`` means."""

    artifact: str | None = Field(None, description="directory of an artifact, measured in turn with this one")
    file: str | None = Field(None, description="figures that gate --save wrote on this machine")

    @model_validator(mode="after")
    def _check(self) -> Reference:
        if (self.artifact is None) == (self.file is None):
            raise ValueError("needs one of artifact and file")
        return self


def _needs(table: Table, *names: str) -> None:
    if all(getattr(table, name) is None for name in names):
        raise ValueError(f"needs {' or '.join(names)}")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


class Budget(BaseModel):
    """A whole budget; see the module for the form."""

    model_config = ConfigDict(extra="forbid", frozen=True, title="optpass budget")

    version: Literal[1] = Field(1, description="of this form")
    engine: str | None = Field(None, description="engine of the artifact, such as onnxruntime-f32; its default one")
    threads: int | None = Field(None, ge=1, description="cores for one call; all by default")
    seconds: float = Field(60.0, gt=0, le=3600, description="most time for each comparison of latencies")
    baseline: Reference | None = None
    latency: Annotated[list[Latency], BeforeValidator(_as_list, json_schema_input_type=Latency | list[Latency])] = (
        Field(default_factory=list)
    )
    throughput: Annotated[
        list[Throughput], BeforeValidator(_as_list, json_schema_input_type=Throughput | list[Throughput])
    ] = Field(default_factory=list)
    speedup: Annotated[list[Speedup], BeforeValidator(_as_list, json_schema_input_type=Speedup | list[Speedup])] = (
        Field(default_factory=list)
    )
    memory: Annotated[list[Memory], BeforeValidator(_as_list, json_schema_input_type=Memory | list[Memory])] = Field(
        default_factory=list
    )
    size: Annotated[list[Size], BeforeValidator(_as_list, json_schema_input_type=Size | list[Size])] = Field(
        default_factory=list
    )
    quality: Annotated[list[Quality], BeforeValidator(_as_list, json_schema_input_type=Quality | list[Quality])] = (
        Field(default_factory=list)
    )

    @model_validator(mode="after")
    def _check(self) -> Budget:
        if not any((self.latency, self.throughput, self.speedup, self.memory, self.size, self.quality)):
            raise ValueError("it sets no limit")
        return self


def load_budget(path: str | os.PathLike[str]) -> Budget:
    """Read a ``budget.toml``; paths in it are relative to the file.

    Raises:
        OptpassError: the file is missing, no TOML, or says what makes no sense.
    """
    file = Path(path)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        what = f"budget {file} cannot be read: {error.strerror}"
        raise OptpassError("missing-file", what, "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptpassError("budget", f"budget {file} is no TOML: {error}", "mend the file") from error
    return _based(parse(content, str(file)), file.parent)


def parse(content: dict[str, Any], name: str = "the budget") -> Budget:
    """A budget of tables that are read already.

    Raises:
        OptpassError: a key is unknown, or a value makes no sense.
    """
    try:
        return Budget.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = _place([str(part) for part in first["loc"]])
        if first["type"] == "extra_forbidden":
            known = _keys(first["loc"])
            near = difflib.get_close_matches(place.rpartition(".")[2], known, 1)
            remedy = f"did you mean {near[0]}?" if near else f"keys are {', '.join(known)}"
            raise OptpassError("budget", f"{name}: there is no key {place}", remedy) from error
        message = first["msg"].removeprefix("Value error, ")
        given = first["input"]
        shown = f" = {given!r}" if not isinstance(given, dict | list | Budget) and first["type"] != "missing" else ""
        what = f"{name}: {place}{shown}: {message[0].lower()}{message[1:]}" if place else f"{name}: {message}"
        raise OptpassError("budget", what, "mend it; optpass gate --schema prints the form") from error


def _place(parts: list[str]) -> str:
    """``latency.p50_ms`` for the first table of its name, ``latency[1].p50_ms`` for the second."""
    text = ""
    for part in parts:
        if part.isdigit():
            text += f"[{part}]" if part != "0" else ""
        else:
            text += f".{part}" if text else part
    return text


def _keys(place: tuple[int | str, ...]) -> list[str]:
    """The keys of the table in which an unknown one was found."""
    tables: dict[str, type[BaseModel]] = {
        "latency": Latency, "throughput": Throughput, "speedup": Speedup, "memory": Memory, "size": Size,
        "quality": Quality, "baseline": Reference,
    }  # fmt: skip
    return list((tables[str(place[0])] if len(place) > 1 else Budget).model_fields)


def _based(budget: Budget, folder: Path) -> Budget:
    def beside(path: str | None) -> str | None:
        return path if path is None or ":" in path else str(folder / path)

    quality = [table.model_copy(update={"data": beside(table.data)}) for table in budget.quality]
    baseline = budget.baseline and budget.baseline.model_copy(
        update={"artifact": beside(budget.baseline.artifact), "file": beside(budget.baseline.file)}
    )
    return budget.model_copy(update={"quality": quality, "baseline": baseline})


def schema() -> dict[str, Any]:
    """The JSON schema of a budget, which editors use to complete and check the file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Budget.model_json_schema()}
