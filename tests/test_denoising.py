"""A denoiser cut and put together again: where the cut lies, what each stage computes, and that probes find faults."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from optpass import denoising, reusing, trajectory
from optpass.capture import capture
from optpass.denoising import Cut
from optpass.grammar import parse
from optpass.manager import apply
from optpass.passes.cache import Cache
from optpass.passes.cache.policies import Polynomial, policies
from optpass.passes.cache.teacache import TeaCache
from optpass.passes.cache.worldcache import WorldCache
from optpass.program import Program, Stage, op_name
from optpass.results import PassRecord
from optpass.reusing import Parts
from optpass.rewrite import Refused
from optpass.runtime.features import COUNTED, COUNTERS, ROOM, SINCE, STEP, counter
from optpass.structure import Block, call_path
from tests.denoisers import TOKENS, WIDTH, Small, program, stages

FORMS = ("branch", "split")
ROUNDING = 1e-5


def cut(form: str = "plain", policy: str = "interval", region: str | None = None) -> Cut:
    (made,) = parse(f"cache(policy={policy})")
    return denoising.cut(program(form).main, made.options.chosen(), region)


def parts(form: str = "plain", policy: str = "interval", region: str | None = None) -> Parts:
    (made,) = parse(f"cache(policy={policy})")
    return Parts(cut(form, policy, region), made.options.chosen())


def blocks(found: Cut) -> tuple[Block, ...]:
    (tower,) = found.structure.towers
    return tower.blocks


def paths(module: GraphModule) -> set[str]:
    return {call_path(node) for node in module.graph.nodes if node.op == "call_function"}


def named(stage: Stage, results: Sequence[Tensor]) -> dict[str, Tensor]:
    return {spec.name: result for spec, result in zip(stage.outputs, results, strict=True)}


# the cut


@pytest.mark.parametrize("form", ["plain", "shared", "variance"])
def test_what_the_blocks_add_to_the_stream_is_predicted(form: str) -> None:
    found = cut(form)
    every = blocks(found)
    assert found.blocks == every
    assert found.features == (every[2].exit,)
    assert found.anchors == (every[0].entry,)
    assert found.probes == ()
    assert (found.roles.sample, found.roles.timestep, found.roles.conditions) == ("sample", "timestep", ("label",))


@pytest.mark.parametrize(
    ("region", "first", "last"), [("1:2", 1, 1), ("1:", 1, 2), (":1", 0, 0), ("0:99", 0, 2), (":", 0, 2)]
)
def test_a_range_of_blocks_is_predicted_from_where_it_begins(region: str, first: int, last: int) -> None:
    found = cut(region=region)
    every = blocks(found)
    assert found.blocks == every[first : last + 1]
    assert found.features == (every[last].exit,)
    assert found.anchors == (every[first].entry,)


def test_the_output_is_predicted_before_it_is_laid_out_as_an_image() -> None:
    for found in (cut(region="output"), cut(policy="worldcache")):
        (feature,) = found.features
        assert (call_path(feature), op_name(feature)) == ("head", "linear")
        assert found.anchors == (None,)
        assert found.blocks == blocks(found)


def test_policies_are_shown_what_they_ask_for() -> None:
    found = cut(policy="first-block")
    assert found.probes == (blocks(found)[0].exit, blocks(found)[0].entry)
    assert found.blocks == blocks(found)[1:]
    (read,) = cut(policy="teacache").probes
    (layer,) = [node for node in read.users if op_name(node) == "linear"]
    assert call_path(layer) == "blocks.0.qkv"


def test_a_stream_that_joins_again_across_the_range_is_a_feature_of_its_own() -> None:
    found = cut("long", region="0:2")
    every = blocks(found)
    assert set(found.features) == {every[0].exit, every[1].exit}
    assert found.anchors == (every[0].entry, every[0].entry)
    inside = cut("long", region="1:2")
    assert inside.features == (blocks(inside)[1].exit,)
    # where it joins again inside the range, a linear layer stands between the stream and where it came in
    behind = cut("long")
    assert behind.features == (blocks(behind)[2].exit,)
    assert behind.anchors == (None,)


def test_conditions_are_computed_in_each_step_though_a_skipped_block_owns_them() -> None:
    made = parts("shared")
    assert "blocks.0.condition.mix" in paths(made.front)
    assert "modulation" in paths(made.front)
    assert paths(made.back) <= {"", "head"}
    full, reuse = stages("policy=interval,form=split", "shared")
    sample, timestep, label, *state = full.example
    new = named(full, full.run(full.example))
    names = [spec.name for spec in full.inputs[3:]]
    kept = [new.get(name.replace("state_", "new_"), old) for name, old in zip(names, state, strict=True)]
    main = program("shared").main
    before, after = (reuse.run([sample, time, label, *kept])[0] for time in (timestep, timestep / 2))
    torch.testing.assert_close(before, main.run([sample, timestep, label])[0])
    # of the condition the head sees that of this step
    assert float((before - after).abs().max()) > 0.1


# the stages


def attentions(module: torch.nn.Module) -> int:
    graphs = [inner for inner in module.modules() if isinstance(inner, GraphModule)]
    return sum(op_name(n) == "scaled_dot_product_attention" for g in graphs for n in g.graph.nodes)


@pytest.mark.parametrize(("options", "always"), [("policy=first-block", 1), ("policy=interval,region=1:2", 2)])
def test_blocks_that_are_skipped_are_in_one_branch_alone(options: str, always: int) -> None:
    full, reuse = stages(f"{options},form=split")
    assert (full.name, reuse.name) == ("full", "reuse")
    assert (attentions(full.exported.graph_module), attentions(reuse.exported.graph_module)) == (3, always)
    (steered,) = stages(f"{options},form=branch")
    module = steered.exported.graph_module
    (cond,) = [node for node in module.graph.nodes if node.target is torch.ops.higher_order.cond]
    sides = [module.get_submodule(str(branch.target)) for branch in cond.args[1:3]]
    assert [attentions(side) for side in sides] == [3 - always, 0]
    assert attentions(module) == 3


def test_a_state_of_its_batch_is_taken_and_given_back() -> None:
    full, reuse = stages("policy=worldcache,form=split", dynamic=True)
    for stage in (full, reuse):
        shapes = {spec.name: spec.shape for spec in stage.inputs}
        assert shapes["sample"] == ("batch", 2, 8, 8)
        assert shapes["state_velocity_0"] == ("batch", TOKENS, 8)
        assert shapes["state_drift"] == ("batch",)
        assert (shapes["state_counters"], shapes["state_threshold"]) == ((7,), (1,))
        # whatever the tracer makes of a size that it computes
        assert stage.outputs[0].shape == ("batch", 2, 8, 8)
        assert stage.initial == {"warmup": 5, "streak": 6, "threshold": 1.0}
    assert [spec.name for spec in reuse.outputs] == ["output", "new_counters", "new_drift", "refused", "damaged"]
    assert [spec.name for spec in full.outputs][1:] == [
        f"new_{name}" for name in ("counters", "feature_0", "velocity_0", "turn_0", "curvature_0", "group_0", "drift")
    ]


# the probes


def outcome(options: str, form: str = "plain") -> PassRecord:
    (record,) = apply(program(form), parse(f"cache({options})")).records
    return record


def kinds(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the steps of the probed runs are computed, filled as they are taken."""
    found: list[bool] = []
    original = trajectory._beside

    def beside(*args: Any) -> trajectory.Walked:
        step = original(*args)
        found.append(step.computed)
        return step

    monkeypatch.setattr(trajectory, "_beside", beside)
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", sorted(policies()))
def test_every_policy_holds_on_runs_with_steps_of_both_kinds(
    policy: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = kinds(monkeypatch)
    rest: list[bool] = []
    original = trajectory._take

    def take(*args: Any) -> trajectory.Walked:
        rest.append((step := original(*args)).computed)
        return step

    monkeypatch.setattr(trajectory, "_take", take)
    record = outcome(f"policy={policy},form={form}")
    assert record.status == "kept", record
    assert record.probes.identity is not None
    assert record.probes.reuse is not None
    assert max(record.probes.identity, record.probes.reuse) <= ROUNDING
    assert {True, False} == set(taken)
    assert taken.count(False) >= 3
    # and where nothing changes, the step behind many computed ones is predicted
    assert rest[-6:] == [True] * 5 + [False]


@pytest.mark.parametrize("options", ["policy=interval,warmup=40,form=split", "threshold=0,streak=0"])
def test_options_that_predict_nothing_are_probed_at_others_that_do(
    options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = kinds(monkeypatch)
    assert outcome(options).status == "kept"
    assert taken[:12] == [True] * 12
    assert taken[12:].count(False) >= 3


# planted faults: in the stages alone, while the run beside them is as it should be

Plant = Callable[[pytest.MonkeyPatch, Parts], None]

LOOK, MUST, AFTER = Parts.look, Parts.must, Parts.after
COND = torch.ops.higher_order.cond


def stale(patch: pytest.MonkeyPatch, made: Parts) -> None:
    with torch.no_grad():
        around = [tensor.clone() for tensor in LOOK(made, made.example)[3]]
    patch.setattr(Parts, "look", lambda self, inputs: (*LOOK(self, inputs)[:3], around))


def moved(state: Mapping[str, Tensor], name: str, before: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A counter that is one too far, or what it was before and one."""
    more = counter(before, name) if before else 1
    place = torch.tensor([n == name for n in COUNTERS], dtype=torch.int32)
    return {**state, COUNTED: state[COUNTED] + more * place}


def unnoted(patch: pytest.MonkeyPatch, made: Parts) -> None:
    patch.setattr(Parts, "after", lambda self, state, *args: moved(AFTER(self, state, *args), SINCE, state))


def hasty(patch: pytest.MonkeyPatch, made: Parts) -> None:
    patch.setattr(Parts, "after", lambda self, *args: moved(AFTER(self, *args), STEP))


def longer(patch: pytest.MonkeyPatch, made: Parts) -> None:
    patch.setattr(Parts, "must", lambda self, state, *args: MUST(self, moved(state, ROOM), *args))


def inverted(patch: pytest.MonkeyPatch, made: Parts) -> None:
    patch.setattr(Parts, "must", lambda *args: ~MUST(*args))


def turned(patch: pytest.MonkeyPatch, made: Parts) -> None:
    patch.setattr(torch.ops.higher_order, "cond", lambda which, a, b, given: COND(which, b, a, given))


def exchanged(patch: pytest.MonkeyPatch, made: Parts) -> None:
    original = Polynomial.predict
    patch.setattr(Polynomial, "predict", lambda self, state: original(self, state)[::-1])


def last_distance(patch: pytest.MonkeyPatch, made: Parts) -> None:
    patch.setattr(Polynomial, "newton", property(lambda self: False))


def forgotten_probe(patch: pytest.MonkeyPatch, made: Parts) -> None:
    original = TeaCache.predicted
    patch.setattr(TeaCache, "predicted", lambda *args: {"change": original(*args)["change"]})


def no_drift(patch: pytest.MonkeyPatch, made: Parts) -> None:
    patch.setattr(WorldCache, "predicted", lambda self, state, probes: {"drift": state["drift"] + 0})


def no_turn(patch: pytest.MonkeyPatch, made: Parts) -> None:
    patch.setattr(WorldCache, "_turned", lambda self, state, k: 0 * k)


FAULTS: dict[str, tuple[str, str, Plant]] = {
    "condition of another step in the tail": ("plain", "policy=interval,form=split", stale),
    "last computed step not noted": ("plain", "policy=interval,form=branch", unnoted),
    "steps counted twice": ("plain", "policy=interval,form=split", hasty),
    "last step predicted": ("plain", "policy=interval,form=branch", longer),
    "decision inverted": ("plain", "policy=first-block", inverted),
    "refusal inverted": ("plain", "policy=first-block,form=split", inverted),
    "branches exchanged": ("plain", "policy=interval,form=branch", turned),
    "features exchanged": ("long", "policy=interval,region=0:2", exchanged),
    "differences over the last distance": ("plain", "policy=taylorseer", last_distance),
    "probe of the last computed step": ("plain", "policy=teacache,form=split", forgotten_probe),
    "drift not added up": ("plain", "policy=worldcache", no_drift),
    "turning tokens followed straight on": ("plain", "policy=worldcache,form=split", no_turn),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_in_the_stages_is_rolled_back(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form, options, plant = FAULTS[fault]
    original = reusing.stages

    def faulty(made: Parts, kind: str) -> list[Stage]:
        with monkeypatch.context() as patch:
            plant(patch, made)
            return original(made, kind)

    monkeypatch.setattr(reusing, "stages", faulty)
    record = outcome(options, form)
    assert record.status == "rolled_back", record
    assert re.fullmatch(r"the (identity|reuse) probe found a difference of \S+, more than \S+", record.reason)


def test_an_anchor_of_another_block_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    original = reusing.extract

    def extract(module: GraphModule, inputs: Sequence[Node], outputs: Sequence[Node]) -> Any:
        if not all(node.op == "placeholder" for node in inputs):
            return original(module, inputs, outputs)
        anchor, *rest = outputs
        assert call_path(anchor) == "blocks.1"
        (*_, other) = [n for n in module.graph.nodes if (call_path(n), op_name(n)) == ("blocks.0", "add")]
        assert other.meta["val"].shape == anchor.meta["val"].shape
        return original(module, inputs, [other, *rest])

    monkeypatch.setattr(reusing, "extract", extract)
    record = outcome("policy=interval,region=2:")
    assert record.status == "rolled_back", record
    assert "the reuse probe" in record.reason


@pytest.mark.parametrize("forgotten", ["less", "plus"])
def test_features_that_are_not_put_on_what_they_were_taken_from_are_noticed_at_rest(
    forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # also in the run beside the stages, which asks the same parts
    monkeypatch.setattr(Parts, forgotten, lambda self, features, anchors: list(features))
    record = outcome("policy=interval,form=split")
    assert record.status == "rolled_back", record
    assert "the reuse probe" in record.reason


# refusals


class Towers(nn.Module):
    """Two blocks over a text, which know nothing of the noise, and two over the image, which read the text."""

    def __init__(self, heavy: bool = True) -> None:
        super().__init__()
        self.inner = Small()
        self.text = nn.ModuleList(self.inner.blocks[:2])
        self.image = nn.ModuleList(self.inner.blocks[2:])
        self.heavy = heavy

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor, text: Tensor) -> Tensor:
        condition = self.inner.condition(timestep, label)  # type: ignore[misc]
        x = self.inner.embed(sample)
        if self.heavy:
            for block in self.text:
                text = block(text, condition, None)
            x = x + text.mean(1, keepdim=True)
            for block in self.image:
                x = block(x, condition, None)
        found: Tensor = self.inner.head(x)
        return found


def towers(heavy: bool = True, axes: Sequence[str] = ()) -> Program:
    torch.manual_seed(2)
    given = {"sample": torch.randn(2, TOKENS, 8), "timestep": torch.tensor([3.0, 400.0]), "label": torch.tensor([1, 2])}
    given["text"] = torch.randn(2, 7, WIDTH)
    return capture((Towers(heavy).eval(), (), given), dynamic=axes)


def test_blocks_that_see_nothing_of_the_noise_are_none_to_skip() -> None:
    (record,) = apply(towers(), parse("cache(policy=interval,region=:2)")).records
    assert record.reason == "[region] the blocks compute nothing of the noisy input; name other blocks"
    (record,) = apply(towers(), parse("cache(policy=interval)")).records
    assert record.status == "kept"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("policy=interval,region=3:", "[region] region=3: holds none of 3 blocks to skip; name a range inside 0:3"),
        ("policy=interval,region=2:1", "[region] region=2:1 holds none of 3 blocks to skip; name a range inside 0:3"),
        (
            "policy=first-block,region=0:2",
            "[region] region=0:2 holds block 0, which this policy computes in each step; begin with 1",
        ),
        (
            "groups=[a:0..17]",
            "[groups] groups has a:0..17, and what is predicted has 16 tokens; name spans inside of them",
        ),
    ],
)
def test_what_cannot_be_skipped_is_refused(options: str, sentence: str) -> None:
    record = outcome(options)
    assert (record.status, record.reason) == ("refused", sentence)


def test_a_denoiser_without_blocks_is_refused() -> None:
    (record,) = apply(towers(heavy=False), parse("cache")).records
    assert record.reason == "[no-blocks] no blocks were found to skip; see optpass inspect"


def test_a_model_that_denoises_nothing_is_refused() -> None:
    main = program().main
    inputs = tuple(
        replace(spec, name=spec.name.replace("sample", "pixels").replace("time", "")) for spec in main.inputs
    )
    outputs = (replace(main.outputs[0], shape=(2, 3)),)
    (made,) = parse("cache")
    assert isinstance(made, Cache)
    with pytest.raises(
        Refused, match=r"\[no-denoiser\] the model has no noisy input .* name its inputs sample and time"
    ):
        made.denoiser(replace(main, inputs=inputs, outputs=outputs))


def test_of_dynamic_sizes_beside_the_batch_those_of_what_is_kept_are_refused() -> None:
    (record,) = apply(towers(axes=["text:1=words:2..9"]), parse("cache(policy=interval,region=2:)")).records
    assert record.status == "kept", record
    (record,) = apply(towers(axes=["sample:1=tokens:4..32"]), parse("cache(policy=interval)")).records
    what = "what is kept between steps has a dynamic size that is not the batch in front"
    assert record.reason == f"[dynamic-range] {what}; declare a range for the batch alone, or for nothing"


def test_verify_off_places_without_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = kinds(monkeypatch)
    (record,) = apply(program(), parse("cache(policy=interval)"), verify=False).records
    assert record.status == "placed"
    assert not taken
