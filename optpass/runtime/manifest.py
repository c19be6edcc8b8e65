"""What an artifact holds: ``manifest.json`` as typed values, read back and held against the files beside it."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePosixPath

from pydantic import Field, ValidationError

import optpass
from optpass.errors import OptpassError
from optpass.results import Accepted, Fidelity, Latency, Layer, Metric, PassRecord, Result, Unrun

SCHEMA = 3
NAME = "manifest.json"

MAIN = "main"
"""Name of the stage that is the whole model."""

STEP, PREFILL = "step", "prefill"
"""Names of the stage that continues a text, whose twin without passes is the whole model, ``main``, and of the one that
takes the prompt, where passes drop tokens of it."""

FULL, REUSE, STEERED = "full", "reuse", "steered"
"""Names of the stages of a denoiser that keeps features: one that computes them, one that predicts them or refuses to,
and one that decides in its graph. Their twin without passes is ``main``."""

PRESENT, IN_PLACE = "present_", "-in-place"
"""What names of outputs begin with that lie where the inputs ``past_...`` do, and the name of a stage that has such."""

LIBRARIES = (
    "nncf", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "openvino", "tensorrt",
    "tensorrt-rtx-cu13-bindings", "torch", "transformers",
)  # fmt: skip
FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
         "asimd", "bf16", "i8mm", "sve")  # fmt: skip
"""CPU features that decide which kernels an engine picks."""


class Bounds(Result):
    """The sizes a dynamic dimension may take, both ends included."""

    minimum: int
    maximum: int


class TensorInfo(Result):
    """An input or output: numpy's name of the dtype, sizes or names of dynamic dimensions."""

    name: str
    dtype: str
    shape: list[int | str]


class Engine(Result):
    """One stage, lowered for one backend in one precision.

    Attributes:
        stage: name of the stage of the program.
        role: ``main`` for the optimized stage, ``dense`` for the same one without passes.
        entry: the file to open; ``files`` are all that belong to it.
        dynamic: bounds of the dynamic dimensions named in the shapes.
        tolerance: difference from eager execution that rounding explains, relative to the largest output.
        target: devices that it is built for, one of which must be there; empty where any will do.
        version: of the library that it is bound to; empty where any will do.
        initial: the knobs that a run of a denoiser begins with, by name.
    """

    stage: str = "main"
    role: str = "main"
    backend: str
    precision: str
    entry: str
    files: list[str]
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    dynamic: dict[str, Bounds] = Field(default_factory=dict)
    tolerance: float
    target: list[str] = Field(default_factory=list)
    version: str = ""
    initial: dict[str, float] = Field(default_factory=dict)

    @property
    def dense(self) -> bool:
        """Whether this is an engine to compare with, not to serve."""
        return self.role == "dense"

    @property
    def serves(self) -> bool:
        """Whether it is one to load, and no part of another or for comparison."""
        return not self.dense and self.stage not in (PREFILL, FULL)

    @property
    def twin(self) -> str:
        """The id of the engine without passes that it is compared with, which may be missing."""
        return engine_id(self.backend, self.precision, "dense", "main" if self.steps else self.stage)

    @property
    def steps(self) -> bool:
        """Whether one call is a step of many, with a state between them."""
        return self.stage in (STEP, REUSE, STEERED)

    @property
    def form(self) -> str:
        """The stage, and whether it is the form of it that writes in place: what its recorded outputs go by."""
        return self.stage + IN_PLACE * self.writes

    @property
    def writes(self) -> bool:
        """Whether it writes new rows into buffers that it is given, its outputs ``present_...``."""
        return any(info.name.startswith(PRESENT) for info in self.outputs)

    @property
    def declared(self) -> list[str]:
        """The dynamic dimensions as ``optimize --dynamic`` takes them, ``input_ids:1=tokens:2..512``."""
        return [
            f"{info.name}:{axis}={size}:{self.dynamic[size].minimum}..{self.dynamic[size].maximum}"
            for info in self.inputs
            for axis, size in enumerate(info.shape)
            if isinstance(size, str)
        ]

    def mib(self, folder: Path) -> float:
        """MiB of the files that it needs, in the artifact at ``folder``."""
        return sum((folder / file).stat().st_size for file in self.files) / 2**20


class Hardware(Result):
    """The machine on which the figures were taken."""

    cpu: str
    flags: list[str]
    cores: int
    system: str


class Manifest(Result):
    """The whole record of an artifact.

    Attributes:
        engines: by id, ``onnxruntime-f32`` or ``dense/onnxruntime-f32``.
        default: the engine that ``load`` opens: the fastest one recorded, otherwise the first.
        files: SHA-256 of every file of the artifact but the manifest itself.
        unrun: engines that the machine which built them could not run, so that nothing was measured on them.
        sampler: by which a denoiser draws samples unless another one is asked for.
        recipe: what to call ``optimize`` with to get the same artifact, as the caller records it.
    """

    schema_version: int = SCHEMA
    optpass: str
    created: str
    source: str
    libraries: dict[str, str]
    hardware: Hardware
    engines: dict[str, Engine]
    default: str
    files: dict[str, str]
    passes: list[PassRecord] = Field(default_factory=list)
    layers: list[Layer] = Field(default_factory=list)
    fidelity: list[Fidelity] = Field(default_factory=list)
    metric: list[Metric] = Field(default_factory=list)
    latency: list[Latency] = Field(default_factory=list)
    accepted: list[Accepted] = Field(default_factory=list)
    unrun: list[Unrun] = Field(default_factory=list)
    sampler: str = ""
    recipe: str = ""

    def engine(self, name: str) -> Engine:
        """The engine of an id.

        Raises:
            OptpassError: there is none.
        """
        if name not in self.engines:
            known = ", ".join(self.engines)
            raise OptpassError("engine-name", f"the artifact has no engine {name!r}", f"it has {known}")
        return self.engines[name]


def engine_id(backend: str, precision: str, role: str = "main", stage: str = "main") -> str:
    """The name of an engine in its artifact."""
    parts = [role] if role != "main" else []
    parts += [stage] if stage != "main" else []
    return "/".join([*parts, f"{backend}-{precision}"])


def now() -> str:
    """The time of creation, or ``SOURCE_DATE_EPOCH`` for artifacts that are to be equal byte for byte."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    moment = datetime.fromtimestamp(int(fixed), UTC) if fixed.isdigit() else datetime.now(UTC)
    return moment.isoformat(timespec="seconds")


def libraries() -> dict[str, str]:
    """Versions of what took part, as far as installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> Hardware:
    """This machine."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags |= set(value.split())
    return Hardware(
        cpu=model, flags=[flag for flag in FLAGS if flag in flags], cores=cores(), system=platform.platform()
    )


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def sha256(path: Path) -> str:
    """The hash of a file, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(manifest: Manifest, folder: Path) -> None:
    """Write ``manifest.json``."""
    (folder / NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> Manifest:
    """Read the manifest and hold every file against its hash.

    Raises:
        OptpassError: no artifact, another schema, a path that leaves the directory, a file missing or changed.
    """
    path = folder / NAME
    if not folder.is_dir() or not path.is_file():
        raise OptpassError("no-artifact", f"{folder} is no artifact", f"name a directory that holds {NAME}")
    manifest = _parsed(path)
    for name in _paths(manifest):
        _check_inside(folder, name)
    for name, expected in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise OptpassError("artifact-file", f"{name} is missing from {folder}", "copy the artifact again, whole")
        if _hash(file, name) != expected:
            raise OptpassError(
                "artifact-hash",
                f"{name} in {folder} is not what optimize wrote",
                "copy the artifact again, or rebuild it",
            )
    _check_complete(folder, manifest)
    return manifest


def _parsed(path: Path) -> Manifest:
    import json

    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptpassError(
            "manifest", f"{path} is no JSON: {error}", "copy the artifact again, or rebuild it"
        ) from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA:
        newer = isinstance(version, int) and version > SCHEMA
        raise OptpassError(
            "manifest-schema",
            f"{path} has schema version {version!r}, this optpass {optpass.__version__} reads {SCHEMA}",
            "update optpass" if newer else "rebuild the artifact with optpass optimize",
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        raise OptpassError("manifest", f"{path}: {at}: {first['msg']}", "rebuild the artifact") from error


def _hash(path: Path, name: str) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise OptpassError(
            "artifact-file", f"{name} cannot be read: {error.strerror}", "check its permissions"
        ) from error


def _paths(manifest: Manifest) -> Iterator[str]:
    yield from manifest.files
    for engine in manifest.engines.values():
        yield engine.entry
        yield from engine.files


def _check_inside(folder: Path, name: str) -> None:
    """A path that leaves the directory could make the engine read, and run, any file of this machine."""
    pure = PurePosixPath(name)
    bad = not name or "\\" in name or "\0" in name or pure.is_absolute() or ".." in pure.parts or ":" in pure.parts[0]
    if not bad:
        steps = [folder.joinpath(*pure.parts[: count + 1]) for count in range(len(pure.parts))]
        bad = any(step.is_symlink() for step in steps)
    if bad:
        raise OptpassError(
            "artifact-path",
            f"the manifest names {name!r}, which is no plain path inside the artifact",
            "do not trust it",
        )


def _check_complete(folder: Path, manifest: Manifest) -> None:
    for name, engine in manifest.engines.items():
        for file in (engine.entry, *engine.files):
            if file not in manifest.files:
                raise OptpassError("manifest", f"{file} of engine {name} has no hash", "rebuild the artifact")
    if not manifest.engines or manifest.default not in manifest.engines:
        raise OptpassError("manifest", f"the default engine {manifest.default!r} is not there", "rebuild the artifact")
