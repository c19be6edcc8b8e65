"""What a pass is, and what every pass that reduces tokens shares: where it acts, and how many tokens stay."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch.fx import Node

import optpass.passes
from optpass.causal import Causal
from optpass.errors import OptpassError, Place, Refusal
from optpass.program import Stage, op_name, place_of
from optpass.reusing import Parts
from optpass.rewrite import Builder, Refused
from optpass.structure import Block, Structure, TokenSpace, Tower
from optpass.tokens import TokenMap, Value

ENTRY_POINT = "optpass.passes"
"""Group of entry points under which third parties name their ``Pass`` classes."""


class Options(BaseModel):
    """Options of a pass; one declaration serves the command line, recipes, the manifest and the help."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Site:
    """One place where a pass inserts a map.

    Attributes:
        node: the residual stream that the map acts on.
        number: which of the pass's sites it is, from 0.
    """

    block: Block
    node: Node
    space: TokenSpace
    tower: Tower
    number: int


class Pass:
    """A pass: where it acts (``sites``) and which map it inserts there (``build``). The manager does the rest.

    Attributes:
        name: as written in ``--passes``.
        identity: option values under which the pass must change nothing; what the identity probe applies.
        before, after: names of passes that must come later, or earlier, when both are asked for.
        conflicts: names of passes that cannot be combined with this one.
    """

    name: ClassVar[str]
    options_type: ClassVar[type[Options]]
    identity: ClassVar[Mapping[str, Any]]
    before: ClassVar[Sequence[str]] = ()
    after: ClassVar[Sequence[str]] = ()
    conflicts: ClassVar[Sequence[str]] = ()

    def __init__(self, options: Options) -> None:
        self.options: Any = options

    def sites(self, structure: Structure) -> list[Site] | Refusal:
        """Where to insert maps, in order, or why nowhere."""
        raise NotImplementedError

    def build(self, site: Site, b: Builder) -> TokenMap:
        """The map at a site, computed from what ``b`` gives."""
        raise NotImplementedError

    def at_identity(self) -> Pass:
        """The same pass with the options under which it must change nothing."""
        given = {k: v for k, v in self.options.model_dump(exclude_unset=True).items() if k not in ("keep", "r")}
        return type(self)(self.options_type(**{**given, **self.identity}))


class Staging(Pass):
    """A pass that makes of a causal model the stage ``step``, which continues texts; the manager verifies it.

    Of a denoiser it may make stages that keep features between steps.

    It comes after all passes that reduce tokens.

    Attributes:
        needs: name of the pass of this kind that must come before, whose stage it takes the place of.
        tree: whether new tokens are nodes of a tree.
    """

    after: ClassVar[Sequence[str]] = ("prune", "merge", "transform", "cache")
    needs: ClassVar[str] = ""
    tree: ClassVar[bool] = False

    def step(self, causal: Causal) -> Stage:
        """The stage."""
        raise NotImplementedError

    def denoiser(self, stage: Stage) -> tuple[Parts, list[Stage]]:
        """A denoiser taken apart, and the stages made of it, the one that is run most at the end.

        Raises:
            Refused: the pass has nothing for denoisers, or not for this one.
        """
        raise Refused(Refusal("no-site", f"{self.name} has nothing for a denoiser", "leave it out"))

    def at_identity(self) -> Pass:
        """The pass itself: it changes nothing at any setting."""
        return self


@dataclass(frozen=True)
class Converted:
    """What a conversion made of a stage.

    Attributes:
        ops: how many ops compute in each precision.
        stayed: module path and op of those that were left as they were.
    """

    stage: Stage
    ops: Mapping[str, int]
    stayed: Sequence[str] = ()


class Conversion(Pass):
    """A pass that computes a whole stage in another way, to a stated error; the manager measures what it is.

    It comes after all passes that change what is computed, and acts on each stage that is deployed.
    """

    after: ClassVar[Sequence[str]] = ("prune", "merge", "transform", "cache", "speculate")

    def limit(self, stage: Stage) -> float:
        """The largest error of an output that the pass may bring, relative to its largest value."""
        raise NotImplementedError

    def convert(self, stage: Stage) -> Converted:
        """The stage, computed in the other way.

        Raises:
            Refused: it cannot be, or not within the limit.
        """
        raise NotImplementedError

    def sites(self, structure: Structure) -> list[Site] | Refusal:
        return Refusal("no-site", f"{self.name} acts on the whole model, and not at sites", "leave it out here")

    def at_identity(self) -> Pass:
        """The pass itself: what it changes is measured."""
        return self


Arrays = Mapping[str, NDArray[Any]]
"""Inputs of an engine, or samples, by name."""


class Finishing(Pass):
    """A pass that acts on the files of an engine after lowering; ``optpass.export.finish`` applies and measures it.

    It comes last, and leaves the unmodified model that engines are compared with as it is.
    """

    after: ClassVar[Sequence[str]] = (*Conversion.after, "precision")

    def check(self, backend: str) -> None:
        """Raise an OptpassError if there is no way to act on files of this backend here; called before any work."""
        raise NotImplementedError

    def samples(self, backend: str) -> int:
        """How many samples to set apart, to calibrate on."""
        return 0

    def limit(self, stage: Stage) -> float:
        """The largest difference from eager execution, relative to the largest value of an output."""
        raise NotImplementedError

    def finish(self, backend: str, source: Path, target: Path, samples: Sequence[Arrays]) -> Mapping[str, int]:
        """Write the new files, and count the ops in each precision.

        Args:
            backend: whose files they are.
            source: the file that engines are opened by, with what belongs to it beside it.
            target: the same in an empty folder, to be written.
            samples: inputs of one call each, to calibrate on.
        """
        raise NotImplementedError

    def sites(self, structure: Structure) -> list[Site] | Refusal:
        return Refusal("no-site", f"{self.name} acts on the files of an engine, and not at sites", "leave it out here")

    def at_identity(self) -> Pass:
        """The pass itself: what it changes is measured."""
        return self


PERCENT = re.compile(r"\d{1,2}%|100%")
"""A block by its place along the depth of the tower: ``50%`` is block 3 of 6, 6 of 12."""

At = int | str | list[int | str]


class ReductionOptions(Options):
    """Where a pass reduces tokens, and by how many."""

    at: At | None = Field(
        None,
        description="blocks of the tower that costs most: 3, [1,3,5], 2:8:2, 50% (of its depth), all; or module paths, "
        "also as a glob",
    )
    place: Literal["attention", "block"] = Field(
        "attention", description="inside the block, after its attention, or after the whole block"
    )
    keep: float | list[float] | None = Field(
        None, description="fraction of the free tokens that stay, at each site or one number a site; 0 < keep <= 1"
    )
    r: int | list[int] | None = Field(
        None, description="tokens that go, at each site or one number a site; in place of keep"
    )

    @model_validator(mode="after")
    def _check(self) -> ReductionOptions:
        if self.keep is not None and self.r is not None:
            raise ValueError("give keep or r, not both")
        for keep in _listed(self.keep):
            if not 0 < keep <= 1:
                raise ValueError(f"keep={keep:g} lies outside 0 < keep <= 1")
        for r in _listed(self.r):
            if r < 0:
                raise ValueError(f"r={r} is negative")
        return self


class Reduction(Pass):
    """A pass that reduces the tokens of one tower; subclasses say which map.

    Attributes:
        mixing: what the map does to tokens, such as ``merging``, where it puts several into one: a causal tower refuses
            it, since the one would stand at two places in the order.
    """

    default_keep: ClassVar[float] = 0.7
    mixing: ClassVar[str] = ""

    def default_at(self, structure: Structure) -> At:
        """All blocks where ``r`` says how many go in each; else a quarter, half and three quarters into the tower.

        Few large reductions are the default: each site costs some small ops, which engines run no faster for a few
        tokens than for many.
        """
        if isinstance(self.options.r, int):
            return "all"
        depth = len(structure.main.blocks) if structure.main else 0
        return sorted({depth // 4, depth // 2, 3 * depth // 4})

    def sites(self, structure: Structure) -> list[Site] | Refusal:
        """Blocks that ``at`` names, all of one tower, one number of ``keep`` or ``r`` for each."""
        if structure.main is None:
            if structure.unplaced:
                attention, reason = structure.unplaced[0]
                what = f"no attention block has tokens that can be followed: {reason}"
                return Refusal(
                    "no-blocks", what, "use another model: its tokens form no sequence", place_of(attention.node)
                )
            what = "no attention block with a residual stream was found"
            return Refusal("no-blocks", what, "see optpass inspect for what was found")
        at = self.options.at if self.options.at is not None else self.default_at(structure)
        found = _blocks_at(at, structure)
        if isinstance(found, Refusal):
            return found
        tower, blocks = found
        if self.mixing and tower.space_at(blocks[0]).causal:
            where = Place(blocks[0].path, op_name(blocks[0].attentions[0].node))
            what = f"{self.mixing} breaks token order, and this attention is causal"
            return Refusal("token-order", what, "use prune", where)
        for name in ("keep", "r"):
            numbers = getattr(self.options, name)
            if isinstance(numbers, list) and len(numbers) != len(blocks):
                what = f"{self.name} has {len(blocks)} sites, but {name} lists {len(numbers)} numbers"
                return Refusal("schedule-length", what, "list one number a site")
        inside = self.options.place == "attention"
        return [
            Site(block, block.after_attention if inside else block.exit, tower.space_at(blocks[0]), tower, number)
            for number, block in enumerate(blocks)
        ]

    def kept(self, site: Site, b: Builder) -> Value:
        """How many free tokens stay at a site; an int, or a proxy where the count is dynamic."""
        free = self.free(site, b)
        r, keep = _nth(self.options.r, site.number), _nth(self.options.keep, site.number)
        if r is not None:
            self._check_room(site, free, r)
            return free - r
        if keep is None:
            keep = self.default_keep
        if keep == 1:
            return free
        if isinstance(free, int):
            return max(round(keep * free), min(free, 1))
        # tenths of a per mille in integers: a float of a symbolic size would be rounded differently by each engine
        return (free * round(keep * 10_000) + 5_000) // 10_000

    def free(self, site: Site, b: Builder) -> Value:
        """How many tokens the pass may choose among."""
        return b.count - b.prefix - b.suffix

    def room(self, free: int) -> int:
        """The most that can go of ``free`` tokens at one site."""
        return free - 1

    def _check_room(self, site: Site, free: Value, r: int) -> None:
        if isinstance(free, int) and r and r > self.room(free):
            what = f"{self.name} is asked to take r={r} of {free} free tokens"
            raise Refused(
                Refusal("no-room", what, f"use r={max(self.room(free), 0)} or less, or keep", Place(site.block.path))
            )


def _blocks_at(at: At, structure: Structure) -> tuple[Tower, list[Block]] | Refusal:
    main = structure.main
    assert main is not None
    picked: list[tuple[Tower, Block]] = []
    for item in at if isinstance(at, list) else [at]:
        found = _matches(item, structure, main)
        if isinstance(found, Refusal):
            return found
        picked += found
    towers = {id(tower): tower for tower, _ in picked}
    if len(towers) > 1:
        names = ", ".join(tower.path or "the model" for tower in towers.values())
        return Refusal("two-towers", f"at={at} names blocks of {names}", "give each tower a pass of its own")
    tower = picked[0][0]
    chosen = {block.path for _, block in picked}
    return tower, [block for block in tower.blocks if block.path in chosen]


def _matches(item: int | str, structure: Structure, main: Tower) -> list[tuple[Tower, Block]] | Refusal:
    count = len(main.blocks)
    text = str(item).strip()
    if text == "all":
        return [(main, block) for block in main.blocks]
    if text.lstrip("-").isdigit():
        index = int(text)
        if not -count <= index < count:
            what = f"at={index} names no block: {main.path or 'the model'} has {count}, 0 to {count - 1}"
            return Refusal("no-site", what, "see optpass inspect")
        return [(main, main.blocks[index])]
    if PERCENT.fullmatch(text):
        index = min(int(text[:-1]) * count // 100, count - 1)
        return [(main, main.blocks[index])]
    if ":" in text and all(not part or part.lstrip("-").isdigit() for part in text.split(":")):
        found = main.blocks[slice(*(int(part) if part else None for part in text.split(":")))]
        if not found:
            return Refusal("no-site", f"at={text} names no block of {count}", "see optpass inspect")
        return [(main, block) for block in found]
    named = [(t, block) for t in structure.towers for block in t.blocks if fnmatch.fnmatchcase(block.path, text)]
    if not named:
        example = main.blocks[count // 2].path
        return Refusal("no-site", f"at={text} matches no block", f"name one such as {example}; see optpass inspect")
    return named


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _nth(value: Any, number: int) -> Any:
    return value[number] if isinstance(value, list) else value


def scanned(package: str, base: type[Any]) -> dict[str, type[Any]]:
    """The named subclasses of ``base`` in the modules of a package: a new one is a new file, and no list to edit."""
    found = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = importlib.import_module(f"{package}.{info.name}")
        for value in vars(module).values():
            own = inspect.isclass(value) and issubclass(value, base) and value.__module__ == module.__name__
            if own and "name" in vars(value):
                found[value.name] = value
    return found


def registry() -> dict[str, type[Pass]]:
    """Every pass, by name: those of this package, and those that entry points bring.

    Raises:
        OptpassError: an entry point cannot be loaded, or brings no pass.
    """
    found: dict[str, type[Pass]] = scanned(optpass.passes.__name__, Pass)
    for point in importlib.metadata.entry_points(group=ENTRY_POINT):
        try:
            value = point.load()
        except Exception as error:  # a plug-in's own import
            what = f"the plug-in pass {point.name} cannot be loaded: {type(error).__name__}: {error}"
            raise OptpassError("plug-in", what, f"mend or uninstall {point.value.partition(':')[0]}") from error
        if not (inspect.isclass(value) and issubclass(value, Pass) and hasattr(value, "identity")):
            what = f"the plug-in {point.name} is no pass with a name, options and an identity"
            raise OptpassError("plug-in", what, "subclass optpass.passes.base.Pass")
        found[value.name] = value
    return found
