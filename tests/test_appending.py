"""Attention that writes in place: the same as attention over kept and new rows apart, eager and in ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optpass import stepping
from optpass.appending import append_attention
from optpass.capture import capture
from optpass.export import artifact
from optpass.grammar import parse
from optpass.kernels.tree_attention import tree_attention
from optpass.manager import apply
from optpass.runtime.generate import Generator
from optpass.runtime.kept import Kept
from optpass.runtime.manifest import TensorInfo
from optpass.runtime.trees import Batch, Tree


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    batch, tokens, groups = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 2))
    heads, spare = groups * draw(st.integers(1, 2)), draw(st.integers(0, 3))
    start = torch.tensor(draw(st.lists(st.integers(0, 6), min_size=batch, max_size=batch)))
    room = int(start.max()) + tokens + spare
    shape = {"query": (heads, tokens), "key": (groups, tokens), "value": (groups, tokens)}
    shape |= {"past_key": (groups, room), "past_value": (groups, room)}
    found: dict[str, Any] = {name: torch.randn(batch, *sizes, 8, generator=generator) for name, sizes in shape.items()}
    parents = [draw(st.integers(0, node - 1)) for node in range(1, tokens)]
    tree = Batch.of([Tree(np.arange(tokens), np.array([-1, *parents]))] * batch, tokens)
    place = torch.arange(room) * 2 + torch.randint(0, 2, (batch, room), generator=generator)  # some were pruned
    position = 2 * start + 1
    return {
        **found,
        "start": start,
        "depth": torch.from_numpy(tree.depth),
        "tree": torch.from_numpy(tree.mask) if draw(st.booleans()) else None,
        "place": place.masked_fill(torch.arange(room) >= start.unsqueeze(1), -1),
        "positions": position.unsqueeze(1) + (torch.from_numpy(tree.depth)),
        "window": draw(st.sampled_from([None, 3, 9])),
        "slopes": draw(st.sampled_from([None, [0.5] * heads])),
    }


@given(cases())
def test_kept_and_new_rows_in_one_buffer_are_those_apart(case: dict[str, Any]) -> None:
    chain = torch.arange(case["query"].shape[2])
    if case["tree"] is None:
        case["depth"] = chain.expand_as(case["depth"])
        case["positions"] = case["positions"][:, :1] + chain
    args = (case["positions"], case["depth"], case["place"], case["tree"], case["window"])
    bias = stepping._bias(*args)
    if case["slopes"] is not None:
        bias = stepping._slope(bias, case["positions"], case["place"], case["slopes"])
    rows = [case[name] for name in ("query", "key", "value", "past_key", "past_value")]
    expected = tree_attention.reference(*rows, bias, 0.3)
    more = (case["place"], case["tree"], case["window"], case["slopes"])
    written = stepping._bias_in_place(case["start"], case["positions"], case["past_key"], *more)
    found, present, _ = append_attention(*rows, case["start"], case["positions"], None, None, written, 0.3)
    assert torch.allclose(found, expected, atol=1e-5)
    for text, start in enumerate(case["start"].tolist()):
        stop = start + len(chain)
        assert torch.equal(present[text, :, start:stop], case["key"][text])
        untouched = [row for row in range(present.shape[2]) if not start <= row < stop]
        assert torch.equal(present[text][:, untouched], case["past_key"][text][:, untouched])


def test_op_holds_what_torch_asks_of_ops() -> None:
    rows = [torch.randn(2, heads, count, 8) for heads, count in ((4, 3), (2, 3), (2, 3), (2, 9), (2, 9))]
    angles = torch.randn(12, 4)
    positions = torch.arange(3).expand(2, -1).clone()
    args = (*rows, torch.tensor([1, 4]), positions, angles, angles.clone(), None, 0.5)
    torch.library.opcheck(append_attention, args)


class Small(nn.Module):
    """Two layers of grouped attention without positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(40, 32), nn.Linear(32, 40)
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(32, 32), "kv": nn.Linear(32, 32)}) for _ in "ab"])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            q = layer["q"](x).unflatten(-1, (4, 8)).transpose(1, 2)  # type: ignore[index]
            k, v = layer["kv"](x).unflatten(-1, (4, 8)).transpose(1, 2).chunk(2, 1)  # type: ignore[index]
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + mixed.transpose(1, 2).flatten(2)
        logits: torch.Tensor = self.head(x)
        return logits


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    ids = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    program = capture((Small().eval(), (), {"ids": ids}), dynamic=["ids:0=batch:1..4", "ids:1=tokens:2..64"])
    made = apply(program, parse("cache,speculate"))
    assert made.ok, made.records
    with artifact.writer(tmp_path_factory.mktemp("in-place") / "engine") as new:
        name = new.add(made.program.deployed[-1], "onnxruntime", "f32")
        assert all(row.ok for row in new.fidelity())
        session = new.session(name)
    assert isinstance(session, Generator)
    return session


def test_engine_writes_the_new_rows_where_they_are_kept_and_nothing_else(model: Generator) -> None:
    assert model.engine.writes
    assert model.context == 64
    kept = model.start(1)
    for _ in model.feed(kept, [np.arange(9)]):
        pass
    before = {name: rows.copy() for name, rows in kept.rows.items()}
    buffers = dict(kept.rows)
    model.step(kept, np.array([[3, 4]]), np.array([[0, 1]]))
    for name, rows in kept.rows.items():
        assert rows is buffers[name]
        assert (rows[:, :, :9] == before[name][:, :, :9]).all()
        assert (rows[:, :, 9:11] != before[name][:, :, 9:11]).any()
        assert (rows[:, :, 11:] == before[name][:, :, 11:]).all()


def test_several_tokens_of_several_texts_are_those_of_each(model: Generator) -> None:
    ids = np.random.default_rng(0).integers(0, 40, (3, 11))
    texts = [ids[0, :4], ids[1], ids[2, :7]]
    together, apart = model.start(3), [model.start(1) for _ in texts]
    for _ in model.feed(together, texts):
        pass
    for kept, text in zip(apart, texts, strict=True):
        for _ in model.feed(kept, [text]):
            pass
    tokens = np.array([[1, 2], [3, 4], [5, 6]])
    found = model.step(together, tokens, np.array([[0, 1]] * 3))[model.outputs[0].name]
    for text, kept in enumerate(apart):
        alone = model.step(kept, tokens[text : text + 1], np.array([[0, 1]]))[model.outputs[0].name]
        assert np.allclose(found[text], alone[0], atol=1e-5)


def test_arrays_that_may_not_be_written_to_are_copied(model: Generator) -> None:
    kept = model.start(1)
    kept.reserve(1)
    given = {**kept.arrays(), "ids": np.array([[1]]), "position": np.zeros(1, np.int64), "pick": np.array([[0]])}
    one = Batch.chains(1, 1)
    given |= {"tree": one.mask, "depth": one.depth, "parent": one.parent}
    for array in given.values():
        array.setflags(write=False)
    results = model.raw.run(**{info.name: given[info.name] for info in model.engine.inputs})
    assert not kept.rows["past_key_0"].any()
    assert results["present_key_0"][:, :, 0].any()


def test_wrong_guesses_fit_behind_a_text_that_fills_the_context(model: Generator) -> None:
    ids = np.random.default_rng(0).integers(0, 40, (1, 60))
    plain = model.generate(ids, max_new_tokens=4)
    assert (model.generate(ids, max_new_tokens=4, drafter="goose", nodes=30) == plain).all()


def test_rows_of_a_path_come_to_lie_behind_what_is_kept() -> None:
    kept = Kept(
        [
            TensorInfo(name="length_0", dtype="int64", shape=["batch"]),
            TensorInfo(name="past_key_0", dtype="float32", shape=["batch", 1, "past_0", 1]),
        ],
        2,
        50,
    )
    rows = kept.rows["past_key_0"]
    rows[:, 0, :, 0] = np.arange(32)
    kept.append({}, np.array([3, 1]))
    kept.append({}, np.array([3, 0]), [[0, 2, 4], [0, 1]])
    assert rows[0, 0, :7, 0].tolist() == [0, 1, 2, 3, 5, 7, 6]
    assert rows[1, 0, :3, 0].tolist() == [0, 1, 2]
    assert kept.length.tolist() == [[6, 1]]
    kept.reserve(40)
    assert kept.rows["past_key_0"].shape[2] == 50
