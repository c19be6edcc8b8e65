"""``cache`` and ``speculate`` on causal models of every form of position and mask, held to the whole forward."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional

from optpass import incremental, stepping
from optpass.capture import capture
from optpass.causal import Causal, Visible, analyse_causal
from optpass.errors import Refusal
from optpass.export import artifact
from optpass.grammar import parse
from optpass.incremental import Eager
from optpass.manager import apply
from optpass.passes import speculate
from optpass.program import Program
from optpass.runtime.generate import Generator

sys.path.insert(0, str(Path(__file__).parents[1]))
import architectures

ROUNDING = 1e-5
DYNAMIC = ["input_ids:0=batch:1..4", "input_ids:1=tokens:2..128"]
WINDOWED = {"mistral_window": {16}, "gemma3_alternating": {16}, "alternating": {16, None}}
CAUSAL = (
    "llama", "qwen2", "qwen3", "mistral_window", "gemma3_alternating", "phi", "gpt2", "gpt_neox", "opt", "bloom_alibi",
    "mixtral_experts", "alternating",
)  # fmt: skip


def alternating() -> architectures.Sample:
    """Layers with a window and layers without, in turn."""
    import transformers

    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] * 2
    more = {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16, "layer_types": kinds}
    config = transformers.Gemma3TextConfig(**architectures.GROUPED, **more)
    ids = torch.randint(4, 128, (2, 37), generator=torch.Generator().manual_seed(0))
    return transformers.Gemma3ForCausalLM(config).eval(), (), {"input_ids": ids, "use_cache": False}


@functools.cache
def model(name: str) -> tuple[nn.Module, dict[str, Any], Program]:
    module, args, kwargs = alternating() if name == "alternating" else architectures.FACTORIES[name]()
    return module, kwargs, capture((module, args, kwargs), dynamic=DYNAMIC)


@functools.cache
def causal(name: str) -> Causal:
    found = analyse_causal(model(name)[2].main)
    assert isinstance(found, Causal), found
    return found


def generated(module: nn.Module, ids: np.ndarray, count: int, mask: np.ndarray | None = None) -> np.ndarray:
    """What Hugging Face generates with its own cache."""
    mask = np.ones_like(ids) if mask is None else mask
    result: Tensor = module.generate(  # type: ignore[operator]
        torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), max_new_tokens=count, min_new_tokens=count,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return result.numpy()


@pytest.mark.parametrize("name", CAUSAL)
def test_a_text_in_pieces_is_the_whole_text(name: str, tmp_path: Path) -> None:
    module, kwargs, program = model(name)
    made = apply(program, parse("cache,speculate"))
    for record in made.records:
        assert record.status == "kept", record
        assert record.probes.incremental is not None
        assert record.probes.incremental <= ROUNDING * float(program.main.results[0].abs().max())
    assert {cached.visible.window for cached in causal(name).attentions} == WINDOWED.get(name, {None})
    with artifact.writer(tmp_path / "engine") as new:
        engine = new.session(new.add(made.program.deployed[-1], "onnxruntime", "f32"))
        assert isinstance(engine, Generator)
        for entry in new.fidelity():
            assert entry.ok, entry
        ids = kwargs["input_ids"].numpy()
        expected = generated(module, ids, 24)
        assert (engine.generate(ids, max_new_tokens=24) == expected).all()
        for drafter in ("lookup", "goose"):
            assert (engine.generate(ids, max_new_tokens=24, drafter=drafter, nodes=12) == expected).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom_alibi", "mistral_window"])
def test_padding_on_the_left_is_as_hugging_face_has_it(name: str) -> None:
    module, kwargs, _ = model(name)
    ids = kwargs["input_ids"].numpy().copy()
    mask = np.ones_like(ids)
    mask[0, :9] = 0
    ids[0, :9] = 0
    found = Eager(stepping.step(causal(name))).generate(ids, max_new_tokens=12, attention_mask=mask)
    assert (found == generated(module, ids, 12, mask)).all()


def test_probe_is_measured_on_every_kind_of_position() -> None:
    assert causal("bloom_alibi").attentions[0].visible == Visible(None, (0.25, 0.0625, 0.015625, 0.00390625))
    assert not causal("bloom_alibi").tables
    assert len(causal("llama").tables) == 2
    assert len(causal("gpt2").tables) == 1


def test_forms_that_write_in_place_are_where_every_attention_has_rows_of_its_own() -> None:
    assert {name for name in CAUSAL if not stepping._may_append(causal(name))} == {"bloom_alibi"}
    rotated = {name for name in CAUSAL if _rotates(causal(name))}
    assert rotated == {*CAUSAL} - {"bloom_alibi", "gpt2", "opt", "phi", "gpt_neox"}  # phi and neox rotate a part


def _rotates(found: Causal) -> bool:
    made = stepping._Step(found, tree=False, in_place=True)
    return all(made._unrotated(n) for cached in found.attentions for n in (cached.node.args[0], cached.key))


def test_grouped_heads_are_kept_once() -> None:
    shapes = {spec.name: spec.shape for spec in stepping.step(causal("llama")).inputs}
    assert shapes["past_key_0"] == ("batch", 2, "past_0", 16)  # of 4 query heads


def test_inputs_for_padding_and_positions_are_the_business_of_the_driver() -> None:
    module, args, kwargs = architectures.FACTORIES["llama"]()
    ids = kwargs["input_ids"]
    more = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(ids.shape[1]).expand_as(ids).clone()}
    names = ("input_ids", *more)
    dynamic = [f"{name}:{axis}={size}" for name in names for axis, size in enumerate(("batch:1..4", "tokens:2..128"))]
    found = analyse_causal(capture((module, args, {**kwargs, **more}), dynamic=dynamic).main)
    assert isinstance(found, Causal)
    assert [spec.name for spec in found.stage.inputs] == ["input_ids"]
    assert incremental.incremental(found, stepping.step(found)) <= ROUNDING


# planted errors: a probe that cannot fail proves nothing


def unwindowed(positions: Tensor, depth: Tensor, past: Tensor, tree: Tensor | None, window: int | None) -> Tensor:
    return BIAS(positions, depth, past, tree, None)


def unlimited(positions: Tensor, depth: Tensor, past: Tensor, tree: Tensor | None, window: int | None) -> Tensor:
    return BIAS(positions, depth, past.clamp(min=0), tree, window)


def flat(positions: Tensor, depth: Tensor, past: Tensor, tree: Tensor | None, window: int | None) -> Tensor:
    return BIAS(positions, depth, past, None, window)


def stuck(position: Tensor, depth: Tensor, limit: int) -> Tensor:
    return (position * 0).unsqueeze(1) + depth


def unordered(accepted: Tensor) -> Tensor:
    return torch.arange(accepted.shape[1]).unsqueeze(0) + 0 * accepted


def behind_nothing(length: Tensor, past: Tensor, ids: Tensor) -> Tensor:
    return START(length, past, ids) * 0


def unwindowed_in_place(*args: Any) -> Tensor:
    return BIAS_IN_PLACE(*args[:5], None, args[6])


def flat_in_place(*args: Any) -> Tensor:
    return BIAS_IN_PLACE(*args[:4], None, *args[5:])


def turned_back(step: Any, node: Node) -> tuple[Node, tuple[Node, Node]] | None:
    found = UNROTATED(step, node)
    return found and (found[0], (found[1][1], found[1][0]))


BIAS, BIAS_IN_PLACE, START = stepping._bias, stepping._bias_in_place, stepping._start
UNROTATED = stepping._Step._unrotated
FAULTS = {
    "new rows over old ones": ("llama", "cache", stepping, "_start", behind_nothing),
    "window forgotten in place": ("mistral_window", "cache", stepping, "_bias_in_place", unwindowed_in_place),
    "tree taken for a chain in place": ("llama", "cache,speculate", stepping, "_bias_in_place", flat_in_place),
    "sine for cosine": ("llama", "cache", stepping._Step, "_unrotated", turned_back),
    "window forgotten": ("mistral_window", "cache", stepping, "_bias", unwindowed),
    "empty rows seen": ("llama", "cache", stepping, "_bias", unlimited),
    "tree taken for a chain": ("llama", "cache,speculate", stepping, "_bias", flat),
    "positions from zero": ("gpt2", "cache", stepping, "_positions", stuck),
    "rotary from zero": ("llama", "cache", stepping, "_positions", stuck),
    "slope of positions from zero": ("bloom_alibi", "cache", stepping, "_positions", stuck),
    "rejected rows kept": ("llama", "cache,speculate", speculate, "_accepted_first", unordered),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_rolled_back(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, passes, where, what, wrong = FAULTS[fault]
    monkeypatch.setattr(where, what, wrong)
    record = apply(model(name)[2], parse(passes)).records[-1]
    assert record.status == "rolled_back", record
    assert "differs from the whole" in record.reason


# refusals


class Tiny(nn.Module):
    """A causal model with something that cannot be cached."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        count = ids.shape[1]
        if self.kind == "position of the end":
            x = x + torch.arange(count).flip(0).unsqueeze(-1) / 100
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, -1))
        seen = torch.ones(count, count, dtype=torch.bool).tril()
        bias = torch.zeros(count, count).masked_fill(~seen, -torch.inf)
        if self.kind == "mask from the text":
            bias = bias.unsqueeze(0) + torch.where(ids == 3, -1e9, 0.0).unsqueeze(1)
            bias = bias.unsqueeze(1)
        if self.kind == "bent bias":
            distance = torch.arange(count).unsqueeze(1) - torch.arange(count)
            bias = bias - distance.abs().float().sqrt()
        if self.kind == "both directions":
            bias = torch.zeros_like(bias)
        if self.kind == "capped scores":
            scores = torch.tanh(q @ k.transpose(-1, -2)) + bias
            mixed = torch.softmax(scores, -1) @ v
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, bias)
        x = x + self.out(mixed.squeeze(1))
        if self.kind == "mean of the text":
            x = x + x.cumsum(1)
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("plain", "kept", ""),
        ("position of the end", "refused", "cache-position"),
        ("mask from the text", "refused", "cache-mask"),
        ("bent bias", "refused", "cache-mask"),
        ("both directions", "refused", "not-causal"),
        ("capped scores", "refused", "cache-attention"),
        ("mean of the text", "rolled_back", "differs from the whole"),
    ],
)
def test_what_cannot_be_kept_is_refused(kind: str, status: str, code: str) -> None:
    ids = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(0))
    program = capture((Tiny(kind).eval(), (), {"ids": ids}), dynamic=["ids:0=batch:1..4", "ids:1=tokens:2..64"])
    (record,) = apply(program, parse("cache")).records
    assert record.status == status, record
    assert code in record.reason


@pytest.mark.parametrize(
    ("name", "dynamic", "code"),
    [("llama", [], "not-dynamic"), ("bert", None, "not-causal"), ("vit", [], "cache-input")],
)
def test_models_that_are_no_captured_text_model(name: str, dynamic: list[str] | None, code: str) -> None:
    if dynamic is None:
        names = ("input_ids", "attention_mask")
        dynamic = [f"{n}:{axis}={size}" for n in names for axis, size in enumerate(("batch:1..4", "tokens:2..128"))]
    found = analyse_causal(capture(architectures.FACTORIES[name](), dynamic=dynamic).main)
    assert isinstance(found, Refusal)
    assert found.code == code


def test_speculate_needs_a_cache() -> None:
    made = apply(model("llama")[2], parse("speculate"))
    assert made.records[-1].status == "refused"
    assert "pass-missing" in made.records[-1].reason


# a prompt that is pruned

PRUNE = "prune(selector=norm,keep=[0.5,0.6],at=[1,2])"


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral_window", "bloom_alibi"])
def test_pruned_prompt_and_what_follows_is_the_pruned_program(name: str, tmp_path: Path) -> None:
    # with a window the text, repeated to the largest size, has tokens that are equal but for rounding
    prune = PRUNE.replace("norm", "random") if name == "mistral_window" else PRUNE
    made = apply(model(name)[2], parse(f"cache,{prune}"))  # the manager puts them in order
    assert [record.name for record in made.records] == ["prune", "cache"]
    assert made.ok, made.records
    assert (made.records[-1].probes.incremental or 1.0) <= ROUNDING
    with artifact.writer(tmp_path / "engine") as new:
        prefill, step = (new.add(stage, "onnxruntime", "f32") for stage in made.program.deployed)
        assert all(entry.ok for entry in new.fidelity([prefill, step]))
        engine = new.session(step)
        assert isinstance(engine, Generator)
        ids = model(name)[1]["input_ids"].numpy()
        kept = engine.start(2)
        for text, prompt in enumerate(ids):
            assert engine.begin(kept, prompt, text) is not None
        free = ids.shape[1] - 2
        first = round(free * 0.5) + 2
        assert kept.length.tolist() == [[37, 37], [first, first], [round((first - 2) * 0.6) + 2] * 2]
        eager = Eager(made.program.stages["step"], made.program.stages["prefill"])
        found = engine.generate(ids, max_new_tokens=10)
        assert (found == eager.generate(ids, max_new_tokens=10)).all()
        assert kept.position.tolist() == [37, 37]


def test_pruned_row_in_the_wrong_group_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from optpass import manager

    grouped = stepping.grouped
    monkeypatch.setattr(
        manager.stepping, "grouped", lambda causal, groups: grouped(causal, [min(g, 1) for g in groups])
    )
    assert apply(model("llama")[2], parse(f"{PRUNE},cache")).records[-1].status == "rolled_back"


@pytest.mark.parametrize("at", ["3", "[1,3]"])
def test_prune_behind_the_last_attention_keeps_all_rows(at: str) -> None:
    made = apply(model("llama")[2], parse(f"prune(selector=norm,keep=0.5,at={at}),cache"))
    assert made.ok, made.records


def test_two_prunes_between_attentions_leave_a_gap_in_the_groups() -> None:
    passes = parse("prune(selector=norm,keep=0.5,at=1),prune(selector=random,keep=0.5,at=1,place=block),cache")
    made = apply(model("llama")[2], passes)
    assert made.ok, made.records
    names = [spec.name for spec in made.program.stages["step"].inputs]
    assert [name for name in names if name.startswith("past_position")] == ["past_position_0", "past_position_2"]


def test_speculation_on_a_pruned_prompt_changes_no_token() -> None:
    made = apply(model("llama")[2], parse(f"{PRUNE},cache,speculate"))
    assert made.ok, made.records
    eager = Eager(made.program.stages["step"], made.program.stages["prefill"])
    ids = model("llama")[1]["input_ids"].numpy()
    assert (
        eager.generate(ids, max_new_tokens=16, drafter="goose", nodes=9) == eager.generate(ids, max_new_tokens=16)
    ).all()


@pytest.mark.parametrize(("vocabulary", "count"), [(4096, 10), (32000, 10), (1000, 4), (97, 10), (7, 3), (4, 4)])
def test_candidates_found_in_spans_are_those_found_among_all(vocabulary: int, count: int) -> None:
    logits = torch.randn(2, 5, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    places, values = speculate._candidates(logits, count)
    expected = logits.topk(count, -1)
    assert torch.equal(places, expected.indices)
    assert torch.equal(values, expected.values)
