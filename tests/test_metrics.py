"""Figures of quality: what they are for outputs that are known, and what data is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from optpass import metrics
from optpass.errors import OptpassError
from optpass.results import Interval, Metric
from optpass.runtime.check import Reference
from optpass.runtime.manifest import Bounds, TensorInfo
from optpass.runtime.session import Session


def engine(function: Any, shape: list[int | str], batch: tuple[int, int] = (1, 8), dtype: str = "float32") -> Session:
    """A session that computes a function of its one input."""
    calls: list[int] = []

    def run(x: Any) -> dict[str, Any]:
        calls.append(len(x))
        return {"logits": function(x)}

    entry = SimpleNamespace(dynamic={"batch": Bounds(minimum=batch[0], maximum=batch[1])})
    inputs = [TensorInfo(name="x", dtype=dtype, shape=shape)]
    outputs = [TensorInfo(name="logits", dtype="float32", shape=shape)]
    return cast(
        Session, SimpleNamespace(name="main", run=run, inputs=inputs, outputs=outputs, engine=entry, calls=calls)
    )


ROWS = np.eye(4, dtype=np.float32)[np.arange(100) % 4]
LABELS = (np.arange(100) % 4).astype(np.int64)


def test_top1_is_counted_in_pairs_with_wilson_intervals() -> None:
    wrong = LABELS.copy()
    wrong[:10] = (wrong[:10] + 1) % 4
    shifted = engine(lambda x: x * 2, ["batch", 4])
    result = metrics.evaluate("top1", engine(lambda x: x, ["batch", 4]), shifted, {"x": ROWS, "labels": wrong})
    assert result.samples == 100
    assert result.dense == result.optimized
    assert result.dense.value == 0.9
    # Wilson's interval of 90 in 100, from the closed form.
    assert (result.dense.low, result.dense.high) == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert (result.drop.low, result.drop.value, result.drop.high) == (0, 0, 0)
    assert "Wilson" in result.label


def test_a_drop_is_dense_minus_optimized_with_its_own_interval() -> None:
    def worse(x: Any) -> Any:
        out = x.copy()
        out[0] = np.roll(out[0], 1)
        return out

    result = metrics.evaluate(
        "top1", engine(lambda x: x, ["batch", 4]), engine(worse, ["batch", 4]), {"x": ROWS, "labels": LABELS}, batch=5
    )
    assert result.dense.value == 1
    assert result.drop.value == pytest.approx(0.2)
    assert 0.1 < result.drop.low < 0.2 < result.drop.high < 0.3


def test_perplexity_is_of_the_next_token_and_skips_what_does_not_count() -> None:
    ids = np.array([[0, 1, 2], [3, 0, 1]], np.int64)
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    both = engine(lambda x: np.broadcast_to(logits, (*x.shape, 4)), ["batch", 3], dtype="int64")
    result = metrics.evaluate("cross-entropy", both, both, {"x": ids, "input_ids": ids})
    expected = -np.log([0.25, 0.125, 0.5, 0.25])
    assert result.dense.value == pytest.approx(expected.mean())
    assert metrics.evaluate("perplexity", both, both, {"x": ids, "input_ids": ids}).dense.value == pytest.approx(
        np.exp(expected.mean())
    )
    labels = ids.copy()
    labels[1] = metrics.IGNORED
    assert metrics.evaluate("cross-entropy", both, both, {"x": ids, "labels": labels}).dense.value == pytest.approx(
        expected[:2].mean()
    )


def test_mse_and_cosine_are_per_sample() -> None:
    dense, zero = engine(lambda x: x, ["batch", 4]), engine(lambda x: x + 1, ["batch", 4])
    data = {"x": ROWS, "labels": ROWS}
    result = metrics.evaluate("mse", dense, zero, data)
    assert (result.dense.value, result.optimized.value, result.drop.value) == pytest.approx((0, 1, -1))
    assert metrics.evaluate("cosine", dense, zero, data).dense.value == pytest.approx(1)
    # Of e_i and 1 + e_i: 2 / sqrt(7).
    assert metrics.evaluate("cosine", dense, zero, data).optimized.value == pytest.approx(2 / 7**0.5)


@pytest.mark.parametrize(
    ("shape", "batch", "calls"),
    [(["batch", 4], (1, 64), [32, 32, 32, 4]), (["batch", 4], (8, 16), [16] * 6 + [8]), ([30, 4], (1, 1), [30] * 4)],
)
def test_batches_fit_the_engine_and_padding_does_not_count(shape: Any, batch: Any, calls: list[int]) -> None:
    both = engine(lambda x: x, shape, batch)
    result = metrics.evaluate("top1", both, both, {"x": ROWS, "labels": LABELS})
    assert result.samples == 100
    assert result.dense.value == 1
    assert cast(Any, both).calls == [*calls, *calls]


def test_without_labels_there_is_agreement_and_it_claims_nothing() -> None:
    dense = engine(lambda x: x, ["batch", 4])
    found = metrics.agreement(dense, engine(lambda x: 2 * x, ["batch", 4]), {"x": ROWS}, random=True)
    figures = {entry.name: entry for entry in found}
    assert set(figures) == {"top1-agreement", "kl-divergence", "cosine-agreement"}
    assert figures["top1-agreement"].optimized.value == 1
    assert figures["cosine-agreement"].optimized.value == pytest.approx(1)
    p = np.exp([1, 0, 0, 0]) / np.exp([1, 0, 0, 0]).sum()
    q = np.exp([2, 0, 0, 0]) / np.exp([2, 0, 0, 0]).sum()
    assert figures["kl-divergence"].optimized.value == pytest.approx((p * np.log(p / q)).sum())
    assert {entry.label for entry in found} == {
        "agreement with the dense engine, measured on 100 random inputs; says nothing about quality"
    }


def test_outputs_of_one_number_have_a_cosine_only() -> None:
    dense = engine(lambda x: x[:, 0], ["batch", 4])
    assert [entry.name for entry in metrics.agreement(dense, dense, {"x": ROWS}, random=False)] == ["cosine-agreement"]


def test_random_inputs_stay_in_the_domain_of_the_example() -> None:
    ids = np.array([[5, 7, 9]], np.int64)
    mask = np.array([[1, 1, 0]], np.int64)
    pixels = np.random.default_rng(0).normal(3, 2, (1, 500)).astype(np.float32)
    drawn = metrics.random_inputs(Reference({"ids": ids, "mask": mask, "pixels": pixels}, {}, []), calls=3)
    assert drawn["ids"].shape == (3, 3)
    assert set(np.unique(drawn["ids"])) <= {5, 7, 9}
    assert (drawn["mask"] == mask).all()
    assert drawn["pixels"].dtype == np.float32
    assert abs(drawn["pixels"].mean() - 3) < 0.3
    assert abs(drawn["pixels"].std() - 2) < 0.3


# Data


def both() -> tuple[Session, Session]:
    return engine(lambda x: x, ["batch", 4]), engine(lambda x: x, ["batch", 4])


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("top2", {"x": ROWS}, r"no metric 'top2'; did you mean top1\?"),
        ("elo", {"x": ROWS}, "no metric 'elo'; metrics are top1, perplexity"),
        ("top1", {"x": ROWS}, "top1 needs labels, the data has x; add an array labels"),
        ("top1", {"y": ROWS, "labels": LABELS}, "the data lacks input x; it has y, labels"),
        ("top1", {"x": ROWS, "labels": LABELS.astype(np.float32)}, "top1 takes integer labels .* has float32"),
        ("top1", {"x": ROWS, "labels": ROWS}, "top1 takes integer labels"),
        (
            "mse",
            {"x": ROWS, "labels": LABELS},
            r"mse takes labels of the output's shape \[8, 4\].* int64 of shape \[8\]",
        ),
        ("perplexity", {"x": ROWS}, "perplexity takes labels or input_ids"),
    ],
)
def test_data_that_does_not_fit_is_one_sentence(name: str, data: metrics.Data, sentence: str) -> None:
    with pytest.raises(OptpassError, match=sentence):
        metrics.evaluate(name, *both(), data)


def test_labels_outside_the_vocabulary_are_refused() -> None:
    ids = np.array([[0, 9, 2]], np.int64)
    session = engine(lambda x: np.zeros((*x.shape, 4), np.float32), ["batch", 3], dtype="int64")
    with pytest.raises(OptpassError, match="labels are not all in 0 to 3"):
        metrics.evaluate("perplexity", session, session, {"x": ids, "input_ids": ids})


def test_data_comes_from_a_file_a_function_or_a_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "data.npz", x=ROWS, labels=LABELS)
    (tmp_path / "optpass_test_data.py").write_text("import numpy\ndef test():\n    return {'x': numpy.ones((2, 3))}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert sorted(metrics.load_data(tmp_path / "data.npz")) == ["labels", "x"]
    assert metrics.load_data("optpass_test_data:test")["x"].shape == (2, 3)
    assert metrics.load_data({"x": [[1, 2]]})["x"].shape == (1, 2)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({}, "gives no arrays by name"),
        ({"x": ROWS, "labels": LABELS[:99]}, "x has 100 samples, labels has 99"),
        ({"x": ROWS[:0], "labels": LABELS[:0]}, "x is empty"),
        ({"x": np.float32(1)}, "x is a single number"),
        ({"x": np.array(["a"])}, "x is of dtype <U1"),
    ],
)
def test_arrays_that_are_no_data_are_refused(arrays: Any, sentence: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(OptpassError, match=sentence):
        metrics.load_data(tmp_path / "data.npz")


def test_a_file_that_is_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptpassError, match="there is no file"):
        metrics.load_data(tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(OptpassError, match=r"is no .npz file"):
        metrics.load_data(tmp_path / "text.npz")
    np.save(tmp_path / "one.npy", ROWS)
    with pytest.raises(OptpassError, match="one array without a name"):
        metrics.load_data(tmp_path / "one.npy")
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], dtype=object))
    with pytest.raises(OptpassError, match=r"is no .npz file of plain arrays"):
        metrics.load_data(tmp_path / "pickled.npz")


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("no_such_module_here:f", "cannot be imported"),
        ("json:no_such_function", "json has no no_such_function"),
        ("optpass_test_broken:data", r"failed at optpass_test_broken.py:2: ZeroDivisionError"),
        ("optpass_test_broken:number", "gives no arrays by name"),
    ],
)
def test_a_function_that_gives_no_data_is_refused(
    spec: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "optpass_test_broken.py").write_text("def data():\n    return 1 / 0\ndef number():\n    return 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(OptpassError, match=sentence):
        metrics.load_data(spec)


@pytest.mark.parametrize(("name", "expected"), [("top1", (1, 2, 3)), ("cosine", (0.01, 0.02, 0.03))])
def test_a_loss_is_positive_where_less_is_worse(name: str, expected: tuple[float, ...]) -> None:
    assert _lost(name) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["perplexity", "mse", "kl-divergence"])
def test_a_loss_is_positive_where_more_is_worse(name: str) -> None:
    assert _lost(name) == pytest.approx((-0.03, -0.02, -0.01))


def _lost(name: str) -> tuple[float, ...]:
    one, drop = Interval(value=1, low=1, high=1), Interval(value=0.02, low=0.01, high=0.03)
    found = metrics.loss(Metric(engine="e", name=name, samples=9, dense=one, optimized=one, drop=drop, label=""))
    return found.low, found.value, found.high
