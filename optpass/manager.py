"""The pass manager: order, apply, verify, re-trace, keep or roll back, and record."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import networkx as nx
from torch import Tensor
from torch.fx import Node

from optpass import incremental, probes, stepping, trajectory
from optpass.causal import Causal, analyse_causal
from optpass.errors import OptpassError, Refusal
from optpass.follow import follow
from optpass.kernels import base as kernels
from optpass.passes.base import Conversion, Finishing, Pass, Site, Staging
from optpass.program import Program, Stage, module_path, place_of
from optpass.results import PassRecord, Probes
from optpass.rewrite import Build, Refused, Rewritten, Space, Walker
from optpass.runtime.features import recognise
from optpass.runtime.manifest import STEP
from optpass.runtime.maps import TokenMaps
from optpass.structure import Structure, analyse

OnFail = Literal["stop", "skip"]

LONGER = 32
"""How many sizes above the smallest are tried before no better range is named."""


@dataclass(frozen=True)
class Placed:
    """A pass with its sites."""

    made: Pass
    sites: tuple[Site, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a program: it holds the passes that were kept, the records tell of all that were tried.

    Attributes:
        maps: where each token of the example went at the sites of the kept passes; None where no pass was kept.
    """

    program: Program
    records: tuple[PassRecord, ...]
    maps: TokenMaps | None = None

    @property
    def ok(self) -> bool:
        return all(record.done for record in self.records)


@dataclass(frozen=True)
class _State:
    """The captured graph, the passes laid over it so far, the stage that came of them, and where tokens went in it."""

    structure: Structure
    placed: tuple[Placed, ...]
    stage: Stage
    maps: TokenMaps | None = None


def apply(
    program: Program,
    passes: Sequence[Pass],
    *,
    on_fail: OnFail = "stop",
    verify: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Apply passes one by one; each is verified before it is kept.

    Passes that reduce tokens are laid over the same captured graph in one walk: ``prune`` in the middle and ``merge``
    in every block follow each other along the stream, whatever the order they were asked for.

    Args:
        program: of one stage.
        passes: in any order; see ``ordered``.
        on_fail: ``stop`` at the first pass that is refused or rolled back, or ``skip`` it and go on.
        verify: without it a pass is only placed and built, for a preview.
        progress: called with a line before each step.

    Raises:
        OptpassError: two passes conflict, or what they say of their order is contradictory.
    """
    before = program.main
    progress("analyse the graph")
    state = _State(analyse(before), (), before)
    records: list[PassRecord] = []
    stages: list[Stage] = []
    staged: Staging | None = None
    for made in ordered(passes):
        progress(f"apply{' and verify' if verify else ''} {made.name}")
        if isinstance(made, Staging):
            record, found = _restage(made, state, staged, verify)
            if found:
                staged, stages = made, found
        elif isinstance(made, Finishing):
            options = made.options.model_dump(exclude_none=True)
            record = PassRecord(name=made.name, options=options, status="placed")
        elif isinstance(made, Conversion):
            record, found = _convert(made, stages or [state.stage], verify)
            if stages:
                stages = found
            else:
                state = replace(state, stage=found[0])
        else:
            record, state = _step(made, state, verify)
        records.append(record)
        if not record.done and on_fail == "stop":
            break
    dumped = tuple(record.model_dump() for record in records)
    driver = ("generate" if stages[-1].name == STEP else "denoise") if stages else program.driver
    done = replace(program, stages={s.name: s for s in (state.stage, *stages)}, driver=driver, record=dumped)
    return Outcome(done, tuple(records), state.maps)


def with_whole_kernels(before: Program, passes: Sequence[Pass], outcome: Outcome) -> Outcome:
    """The outcome with a form of each stage that holds its kernels whole, for backends that run them on a GPU.

    The passes that were kept are applied once more, and verified as the first time; all else of the outcome stays.

    Raises:
        OptpassError: a pass that was kept is not, with kernels whole, which is a bug of ours.
    """
    done = [made for made, record in zip(ordered(passes), outcome.records, strict=False) if record.done]
    with kernels.kept():
        again = apply(before, done)
    failed = next((record for record in again.records if not record.done), None)
    if failed is not None:
        what = f"{failed.name} holds, and with its kernels whole it does not: {failed.reason}"
        raise OptpassError("internal", what, "build for a CPU, and tell us")
    forms = {name: stage for name, stage in again.program.stages.items() if kernels.holds_any(stage)}
    stages = {name: replace(stage, whole=forms.get(name)) for name, stage in outcome.program.stages.items()}
    return replace(outcome, program=replace(outcome.program, stages=stages))


def ordered(passes: Sequence[Pass]) -> list[Pass]:
    """The passes in an order that honours what they declare; where nothing is declared, as they were given."""
    names = [made.name for made in passes]
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(passes)))
    for i, made in enumerate(passes):
        for other in made.conflicts:
            if other in names:
                raise OptpassError("pass-conflict", f"{made.name} cannot be combined with {other}", "drop one of them")
        graph.add_edges_from((i, j) for j, name in enumerate(names) if name in made.before)
        graph.add_edges_from((j, i) for j, name in enumerate(names) if name in made.after)
    try:
        return [passes[i] for i in nx.lexicographical_topological_sort(graph)]
    except nx.NetworkXUnfeasible as error:
        cycle = " before ".join(names[i] for i, _ in nx.find_cycle(graph))
        raise OptpassError("pass-order", f"{cycle} before {names[0]} is a circle", "drop one of them") from error


def rewrite(structure: Structure, placed: Sequence[Placed], tap: bool = False, reads: Sequence[Node] = ()) -> Rewritten:
    """The captured graph with the maps of all passes; ``tap`` appends what defines them to the outputs.

    ``reads`` are appended too; see ``Walker.run``.
    """
    return _walk(structure, placed, lambda made, site, number: lambda b: made.build(site, b), tap, reads)


def _walk(
    structure: Structure,
    placed: Sequence[Placed],
    builder: Callable[[Pass, Site, int], Build],
    tap: bool = False,
    reads: Sequence[Node] = (),
) -> Rewritten:
    found = _along_the_stream(structure, placed)
    builds: dict[Node, list[tuple[str, Build]]] = defaultdict(list)
    for number, (site, made) in enumerate(found):
        builds[site.node].append((made.name, builder(made, site, number)))
    first = found[0][0]
    space = Space(
        first.space.token_dim,
        first.space.batch_dim,
        first.space.prefix,
        first.space.suffix,
        frozenset(first.tower.streams),
    )
    return Walker(structure.module, builds, space, reads).run(tap)


def _along_the_stream(structure: Structure, placed: Sequence[Placed]) -> list[tuple[Site, Pass]]:
    """The sites of all passes in the order in which the tokens meet them, which is that of the maps."""
    order = {node: i for i, node in enumerate(structure.module.graph.nodes)}
    return sorted(((s, p.made) for p in placed for s in p.sites), key=lambda pair: order[pair[0].node])


def _followed(state: _State, placed: Sequence[Placed], rewritten: Rewritten, taps: Sequence[Tensor]) -> TokenMaps:
    sites = _along_the_stream(state.structure, placed)
    space = sites[0][0].space
    named = [(site.block.path, made.name) for site, made in sites]
    return TokenMaps(space.prefix, space.suffix, space.grid, follow(rewritten, taps, named))


def _step(made: Pass, state: _State, verify: bool) -> tuple[PassRecord, _State]:
    record = PassRecord(name=made.name, options=made.options.model_dump(exclude_none=True), status="refused")
    sites = made.sites(state.structure)
    if isinstance(sites, Refusal):
        return record.model_copy(update={"reason": str(sites)}), state
    record = record.model_copy(update={"sites": [site.block.path for site in sites]})
    if any(before.sites[0].tower is not sites[0].tower for before in state.placed):
        refusal = Refusal("two-towers", f"{made.name} acts on another tower than the passes before it", "run it alone")
        return record.model_copy(update={"reason": str(refusal)}), state
    placed = (*state.placed, Placed(made, tuple(sites)))
    try:
        rewritten = rewrite(state.structure, placed, tap=verify)
        found, outputs, taps, failure = _probe(state, placed, rewritten) if verify else (Probes(), (), (), "")
        maps = _followed(state, placed, rewritten, taps) if verify else None
        if not failure:
            stage = state.structure.stage.retraced(rewritten.untap())
    except Refused as refused:
        return record.model_copy(update={"reason": str(refused.refusal)}), state
    except Exception as error:  # noqa: BLE001  a graph that cannot be built, whatever the reason, is no result
        return record.model_copy(update=_unbuilt(made, error)), state
    sizes = [sites[0].space.size, *(m.target for m in rewritten.maps)]
    record = record.model_copy(
        update={
            "tokens": [_size(s) for s in sizes],
            "probes": found,
            "restored": sorted({f"{place_of(node)}: {why}" for node, why in rewritten.restored}),
        }
    )
    if not verify:
        return record.model_copy(update={"status": "placed"}), replace(state, placed=placed, stage=stage)
    if not failure:
        gap = probes.difference(stage.results, outputs)
        if gap > probes.tolerance(outputs):
            failure = f"the outputs changed by {gap:.1e} when the rewritten graph was traced again"
    if not failure and stage.ranges:
        short = _at_smallest(made, stage, rewritten)
        if isinstance(short, Refusal):
            return record.model_copy(update={"reason": str(short)}), state
        if short > probes.tolerance(outputs):
            failure = f"at the smallest sizes the outputs changed by {short:.1e} when the graph was traced again"
    if failure:
        return record.model_copy(update={"status": "rolled_back", "reason": failure}), state
    return record.model_copy(update={"status": "kept"}), replace(state, placed=placed, stage=stage, maps=maps)


def _restage(made: Staging, state: _State, before: Staging | None, verify: bool) -> tuple[PassRecord, list[Stage]]:
    """The stages that a pass makes, ``step`` as the last; none where it is refused, or found wrong."""
    record = PassRecord(name=made.name, options=made.options.model_dump(exclude_none=True), status="refused")
    if made.needs and (before is None or before.name != made.needs):
        what = f"{made.name} needs {made.needs} before it"
        refusal = Refusal("pass-missing", what, f"ask for {made.needs},{made.name}")
        return record.model_copy(update={"reason": str(refusal)}), []
    if recognise(state.stage.inputs, state.stage.outputs) is not None:
        return _reused(made, record, state.stage, verify)
    causal = analyse_causal(state.structure.stage)
    if isinstance(causal, Refusal):
        return record.model_copy(update={"reason": str(causal)}), []
    record = record.model_copy(update={"sites": [module_path(cached.node) for cached in causal.attentions]})
    try:
        placed = _placed_again(state.placed, causal)
        prefill = None
        if placed:
            reads = [node for _, pair in stepping.kept(causal) for node in pair]
            rewritten = rewrite(causal.structure, placed, reads=reads)
            causal = stepping.grouped(causal, rewritten.levels[::2])
            prefill = stepping.prefill(causal, rewritten)
        stage = made.step(causal)
        stages = [prefill, stage] if prefill else [stage]
        if not verify:
            return record.model_copy(update={"status": "placed"}), stages
        gap = 0.0
        for form in filter(None, (stage, stage.in_place)):
            gap = max(gap, incremental.incremental(causal, form))
            if made.tree:
                gap = max(gap, incremental.tree(causal, form))
            if prefill:
                lay = partial(_walk, causal.structure, placed)
                gap = max(gap, incremental.pruned(causal, form, prefill, lay))
    except Refused as refused:
        return record.model_copy(update={"reason": str(refused.refusal)}), []
    except Exception as error:  # noqa: BLE001  a graph that cannot be built or run, whatever the reason, is no result
        return record.model_copy(update=_unbuilt(made, error)), []
    record = record.model_copy(update={"probes": Probes(incremental=gap)})
    limit = probes.tolerance(causal.stage.results)
    if not gap <= limit:
        reason = f"a text in pieces differs from the whole by {gap:.1e}, more than {limit:.1e}"
        return record.model_copy(update={"status": "rolled_back", "reason": reason}), []
    return record.model_copy(update={"status": "kept"}), stages


def _reused(made: Staging, record: PassRecord, stage: Stage, verify: bool) -> tuple[PassRecord, list[Stage]]:
    """The stages of a denoiser that keeps features, held to a run beside them."""
    try:
        parts, stages = made.denoiser(stage)
        record = record.model_copy(update={"sites": [block.path for block in parts.found.blocks]})
        if not verify:
            return record.model_copy(update={"status": "placed"}), stages
        found = trajectory.walk(parts, stages)
    except Refused as refused:
        return record.model_copy(update={"reason": str(refused.refusal)}), []
    except Exception as error:  # noqa: BLE001  a graph that cannot be built or run, whatever the reason, is no result
        return record.model_copy(update=_unbuilt(made, error)), []
    record = record.model_copy(update={"probes": found})
    limit = probes.tolerance(stage.results)
    for name, gap in found.model_dump(exclude_none=True).items():
        if not gap <= limit:
            reason = f"the {name} probe found a difference of {gap:.1e}, more than {limit:.1e}"
            return record.model_copy(update={"status": "rolled_back", "reason": reason}), []
    return record.model_copy(update={"status": "kept"}), stages


def _convert(made: Conversion, stages: Sequence[Stage], verify: bool) -> tuple[PassRecord, list[Stage]]:
    """The stages in the other form; as they were where the pass is refused, or is beyond its limit."""
    record = PassRecord(name=made.name, options=made.options.model_dump(exclude_none=True), status="refused")
    if not verify:
        return record.model_copy(update={"status": "placed"}), list(stages)
    forms = [form for stage in stages for form in (stage, stage.in_place) if form is not None]
    limits = [made.limit(form) for form in forms]
    try:
        converted = [made.convert(form) for form in forms]
        errors = [_error(new.stage, form) for new, form in zip(converted, forms, strict=True)]
    except Refused as refused:
        return record.model_copy(update={"reason": str(refused.refusal)}), list(stages)
    except Exception as error:  # noqa: BLE001  a graph that cannot be built or run, whatever the reason, is no result
        return record.model_copy(update=_unbuilt(made, error)), list(stages)
    worst, limit = max(zip(errors, limits, strict=True), key=lambda pair: pair[0] / pair[1])
    ops: Counter[str] = Counter()
    for new, form in zip(converted, forms, strict=True):
        ops.update(new.ops if any(form is stage for stage in stages) else {})
    stayed = list(dict.fromkeys(text for new in converted for text in new.stayed))
    record = record.model_copy(update={"error": worst, "max_error": limit, "ops": dict(ops), "stayed": stayed})
    if not worst <= limit:
        reason = f"the outputs changed by {worst:.1e} of the largest, more than {limit:.1e}"
        return record.model_copy(update={"status": "rolled_back", "reason": reason}), list(stages)
    new_forms = iter(new.stage for new in converted)
    found = [replace(next(new_forms), in_place=next(new_forms) if stage.in_place else None) for stage in stages]
    return record.model_copy(update={"status": "kept"}), found


def _error(new: Stage, stage: Stage) -> float:
    """The largest error at the smallest, the example and the largest sizes."""
    inputs = [stage.resized(sizes) for sizes in stage.trials()]
    return max(probes.relative(new.run(tensors), stage.run(tensors)) for tensors in inputs)


def _placed_again(placed: Sequence[Placed], causal: Causal) -> list[Placed]:
    """The passes at their sites in the graph of a stage that takes ids alone."""
    found = []
    for one in placed:
        sites = one.made.sites(causal.structure)
        if isinstance(sites, Refusal):
            raise Refused(sites)
        found.append(Placed(one.made, tuple(sites)))
    return found


def _at_smallest(made: Pass, stage: Stage, rewritten: Rewritten) -> Refusal | float:
    """How far the traced graph is from the rewritten one at the smallest sizes; a refusal where neither runs there."""
    for more in range(LONGER):
        sizes = {name: min(r.minimum + more, r.maximum) for name, r in stage.ranges.items()}
        inputs = stage.resized(sizes)
        try:
            gap = probes.difference(stage.run(inputs), probes.run(rewritten.module, inputs))
        except (RuntimeError, IndexError):  # too few tokens for an op of the pass
            continue
        if not more:
            return gap
        smallest = ", ".join(f"{name}={r.minimum}" for name, r in stage.ranges.items())
        least = ", ".join(f"{name} from {size}" for name, size in sizes.items())
        return Refusal(
            "too-short", f"{made.name} has too few tokens to choose from at {smallest}", f"declare {least} on"
        )
    return Refusal("too-short", f"{made.name} does not run at the smallest sizes", "declare a range that starts higher")


def _probe(
    state: _State, placed: Sequence[Placed], rewritten: Rewritten
) -> tuple[Probes, tuple[Tensor, ...], tuple[Tensor, ...], str]:
    """The three probes, the outputs and taps at the real setting, and the first failure in words."""
    structure, example = state.structure, state.structure.stage.example
    dense = structure.stage.results
    last = placed[-1]
    still = Placed(last.made.at_identity(), last.sites)
    at_identity = rewrite(structure, (*placed[:-1], still)).module
    shuffled = _walk(structure, placed, lambda made, site, number: probes.permutation(number)).module
    results = probes.run(rewritten.module, example)
    outputs, taps = results[: len(dense)], results[len(dense) :]
    found = {
        "identity": probes.difference(probes.run(at_identity, example), state.stage.results),
        "permutation": probes.difference(probes.run(shuffled, example), dense),
    }
    builds = probes.references(rewritten, taps)
    if builds is not None:
        marked = _walk(structure, placed, lambda made, site, number: builds[number]).module
        found["equivalence"] = probes.difference(probes.run(marked, example), outputs)
    smallest = structure.stage.resized({name: range_.minimum for name, range_ in structure.stage.ranges.items()})
    if structure.stage.ranges:
        small = structure.stage.run(smallest)
        found["permutation"] = max(found["permutation"], probes.difference(probes.run(shuffled, smallest), small))
    limit = probes.tolerance(dense)
    for name, value in found.items():
        if not value <= limit:
            return (
                Probes(**found),
                outputs,
                taps,
                f"the {name} probe found a difference of {value:.1e}, more than {limit:.1e}",
            )
    return Probes(**found), outputs, taps, ""


def _unbuilt(made: Pass, error: Exception) -> dict[str, str]:
    """What a record says of a graph that could not be built: a range too wide is the user's, the rest a bug of ours."""
    if "Constraints violated" in str(error):
        guards = [line.strip(" -") for line in str(error).splitlines() if "generated guard" in line]
        guard = guards[0].partition("generated guard ")[2].rstrip(".") if guards else "its sizes"
        what = f"{made.name} does not hold in the whole range of the dynamic dimensions: {guard}"
        refusal = Refusal("dynamic-range", what, "declare a larger minimum, or keep more tokens")
        return {"status": "refused", "reason": str(refusal)}
    what = f"{type(error).__name__}: {_first_line(error)}"
    return {
        "status": "rolled_back",
        "reason": f"[internal] {made.name} built a graph that does not hold together: {what}",
    }


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _size(size: object) -> int | str:
    value = getattr(size, "value", size)
    return value if isinstance(value, int) else str(value)
