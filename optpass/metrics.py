"""What an approximation cost: figures of quality, taken on the engines, paired by sample, each with its interval.

With labelled data: one of ``METRICS``. Without: agreement with the dense engine, which is no figure of quality and
says so. Intervals are of 95 %: Wilson's for a share of right answers, the bootstrap over samples for all else.
"""

from __future__ import annotations

import difflib
import importlib
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optpass import similarity
from optpass.errors import OptpassError
from optpass.results import Interval, Metric
from optpass.runtime.check import Reference
from optpass.runtime.denoise import Taken
from optpass.runtime.manifest import TensorInfo
from optpass.runtime.session import Session

Array = NDArray[Any]
Data = dict[str, Array]
Progress = Callable[[float], None]

LABELS = "labels"
IGNORED = -100
"""Label of a token that does not count, as in transformers."""

BATCH = 32
RESAMPLES = 2000
SEED = 0
Z = 1.959964


# Data


def load_data(spec: str | os.PathLike[str] | Mapping[str, Any]) -> Data:
    """Inputs by name, and ``labels`` where there are any.

    Args:
        spec: an ``.npz`` file, ``package.module:function`` returning a mapping of arrays, or such a mapping.

    Raises:
        OptpassError: nothing is there, it is not arrays of one length, or it is empty.
    """
    if isinstance(spec, Mapping):
        found: Any = spec
    elif ":" in str(spec) and not Path(spec).exists():
        found = _from_function(str(spec))
    else:
        found = _from_file(Path(spec))
    return _checked(found, "the data" if isinstance(spec, Mapping) else str(spec))


def _from_file(path: Path) -> Data:
    if not path.is_file():
        raise OptpassError("data", f"there is no file {path}", "give an .npz file or module:function")
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise TypeError("it holds one array without a name")
        with file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OptpassError(
            "data", f"{path} is no .npz file of plain arrays: {text[:120]}", "write it with numpy.savez"
        ) from error


def _from_function(spec: str) -> Any:
    module, _, name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError) as error:
        raise OptpassError("data", f"{spec}: {module} cannot be imported: {error}", "check the name") from error
    except AttributeError as error:
        raise OptpassError("data", f"{spec}: {module} has no {name}", "check the name") from error
    try:
        return function()
    except OptpassError:
        raise
    except Exception as error:  # the user's own code
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(last.filename)}:{last.lineno}"
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        raise OptpassError("data", f"{spec} failed at {where}: {text}", "mend that function") from error


def _checked(found: Any, name: str) -> Data:
    if not isinstance(found, Mapping) or not found:
        raise OptpassError("data", f"{name} gives no arrays by name", "give inputs by name, and labels")
    data = {str(key): np.asarray(value) for key, value in found.items()}
    for key, array in data.items():
        if array.dtype.kind not in "fiub":
            raise OptpassError("data", f"{name}: {key} is of dtype {array.dtype}", "give numbers")
        if array.ndim == 0:
            raise OptpassError("data", f"{name}: {key} is a single number", "give one row per sample")
    lengths = {key: len(array) for key, array in data.items()}
    if 0 in lengths.values():
        empty = next(key for key, length in lengths.items() if not length)
        raise OptpassError("data", f"{name}: {empty} is empty", "give at least one sample")
    first, count = next(iter(lengths.items()))
    other = next((key for key, length in lengths.items() if length != count), None)
    if other is not None:
        raise OptpassError(
            "data", f"{name}: {first} has {count} samples, {other} has {lengths[other]}", "give one row per sample each"
        )
    return data


# Intervals


def wilson(right: int, count: int) -> Interval:
    """Wilson's interval of a share."""
    share = right / count
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * np.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return Interval(value=share, low=float(max(middle - half, 0.0)), high=float(min(middle + half, 1.0)))


Statistic = Callable[[Array, Array], Array]
"""From sums over the samples of a resample, values and weights, to the figure."""


def bootstrap(values: Array, weights: Array, statistic: Callable[[Array], Array]) -> Interval:
    """The bootstrap interval over samples of ``statistic(sum(values) / sum(weights))``.

    Args:
        values: ``[samples, ...]``, summed over samples.
        weights: ``[samples]``.
        statistic: from ``[resamples, ...]`` to ``[resamples]``.
    """
    count = len(weights)
    rng = np.random.default_rng(SEED)
    found = []
    for _ in range(RESAMPLES):
        pick = rng.integers(count, size=count)
        found.append(values[pick].sum(0) / weights[pick].sum())
    low, high = np.percentile(statistic(np.array(found)), (2.5, 97.5))
    point = statistic((values.sum(0) / weights.sum())[None])[0]
    return Interval(value=float(point), low=float(low), high=float(high))


# Metrics


@dataclass(frozen=True)
class Measure:
    """A metric: a value and a weight per sample, and what their weighted mean becomes.

    Attributes:
        score: from outputs and data of a batch to values and weights per sample.
        label: what the figure is, in a sentence.
        final: from the weighted mean to the figure.
        share: whether values are 0 or 1.
        labelled: whether it needs labels.
        lower: whether lower is better.
    """

    score: Callable[[Array, Data], tuple[Array, Array]]
    label: str
    final: Callable[[Array], Array] = lambda mean: mean
    share: bool = False
    labelled: bool = True
    lower: bool = False


def _top1(output: Array, batch: Data) -> tuple[Array, Array]:
    labels = batch[LABELS]
    if labels.dtype.kind not in "iu" or labels.shape != output.shape[:-1]:
        raise _unfit("top1", f"integer labels of shape {_text(output.shape[:-1])}", labels)
    right = (output.argmax(-1) == labels).astype(np.float64)
    return right.reshape(len(right), -1).mean(1), np.ones(len(right))


def _token_loss(output: Array, batch: Data) -> tuple[Array, Array]:
    """Sum of the loss and number of tokens, each token predicted from those before it."""
    labels = batch.get(LABELS, batch.get("input_ids"))
    if labels is None or output.ndim != 3 or labels.shape != output.shape[:2] or labels.dtype.kind not in "iu":
        raise _unfit("perplexity", f"labels or input_ids of shape {_text(output.shape[:2])}", labels)
    logits, wanted = output[:, :-1].astype(np.float64), labels[:, 1:].astype(np.int64)
    counted = wanted != IGNORED
    if (wanted[counted] < 0).any() or (wanted[counted] >= output.shape[-1]).any():
        raise OptpassError("data", f"labels are not all in 0 to {output.shape[-1] - 1}", f"use {IGNORED} for none")
    loss = -_log_softmax(logits)
    picked = np.take_along_axis(loss, np.where(counted, wanted, 0)[..., None], -1)[..., 0]
    return (picked * counted).sum(1), counted.sum(1).astype(np.float64)


def _mse(output: Array, batch: Data) -> tuple[Array, Array]:
    a, b = _flat_pair("mse", output, batch[LABELS])
    return ((a - b) ** 2).mean(1), np.ones(len(a))


def _cosine(output: Array, batch: Data) -> tuple[Array, Array]:
    a, b = _flat_pair("cosine", output, batch[LABELS])
    return cosine(a, b), np.ones(len(a))


def cosine(a: Array, b: Array) -> Array:
    """Cosine of each row; 1 for two rows of zeros."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = ~a.any(1) & ~b.any(1)
    return np.where(both_zero, 1.0, (a * b).sum(1) / np.maximum(norms, np.finfo(np.float64).tiny))


def _flat_pair(metric: str, output: Array, labels: Array) -> tuple[Array, Array]:
    if labels.shape != output.shape:
        raise _unfit(metric, f"labels of the output's shape {_text(output.shape)}", labels)
    return tuple(x.reshape(len(x), -1).astype(np.float64) for x in (output, labels))  # type: ignore[return-value]


def _unfit(metric: str, wanted: str, labels: Array | None) -> OptpassError:
    found = "none" if labels is None else f"{labels.dtype} of shape {_text(labels.shape)}"
    return OptpassError("data", f"{metric} takes {wanted} in each batch, the data has {found}", "give such labels")


def _text(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


METRICS: dict[str, Measure] = {
    "top1": Measure(_top1, "share of samples whose highest output is the label", share=True),
    "perplexity": Measure(_token_loss, "perplexity per token, lower is better", np.exp, labelled=False, lower=True),
    "cross-entropy": Measure(
        _token_loss, "cross-entropy per token in nats, lower is better", labelled=False, lower=True
    ),
    "mse": Measure(_mse, "mean squared difference from the labels, lower is better", lower=True),
    "cosine": Measure(_cosine, "cosine of output and label"),
}
"""By name; a new one is a row."""


def metric(name: str) -> Measure:
    """The metric of a name.

    Raises:
        OptpassError: there is none.
    """
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, 1)
        hint = f"did you mean {near[0]}?" if near else f"metrics are {', '.join(METRICS)}"
        raise OptpassError("unknown-metric", f"there is no metric {name!r}", hint)
    return METRICS[name]


AGREEMENT = ("top1-agreement", "kl-divergence", "cosine-agreement")
"""What ``agreement`` gives, with data or without."""


def lower_is_better(name: str) -> bool:
    """Whether a rise of a metric is a loss."""
    return name == "kl-divergence" or (name in METRICS and METRICS[name].lower)


def scale(name: str) -> float:
    """100 for a share of samples, which people state in points of 100; 1 for all else."""
    return 100.0 if name == "top1-agreement" or (name in METRICS and METRICS[name].share) else 1.0


def loss(found: Metric) -> Interval:
    """What was lost from the dense engine to the other: positive where worse, in points of 100 for a share."""
    low, value, high = (scale(found.name) * x for x in (found.drop.low, found.drop.value, found.drop.high))
    return (
        Interval(value=-value, low=-high, high=-low)
        if lower_is_better(found.name)
        else Interval(value=value, low=low, high=high)
    )


def evaluate(
    name: str,
    dense: Session,
    optimized: Session,
    data: Data,
    *,
    output: str | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Metric:
    """Take a metric on two engines.

    Args:
        name: one of ``METRICS``.
        dense: engine of the unmodified model.
        optimized: the other; the same samples go to both.
        data: as ``load_data`` gives it.
        output: the output to look at; ``logits``, or else the first, by default.
        batch: samples in a call; by default as many as fit.
        progress: called with the share that is done.
    """
    halves: list[Scores] = []
    for session in (dense, optimized):
        done = len(halves) / 2
        tell = (lambda share, done=done: progress(done + share / 2)) if progress else None
        halves.append(scores(name, session, data, output=output, batch=batch, progress=tell))
    return paired(name, optimized.name, *halves)


@dataclass(frozen=True)
class Scores:
    """A metric on one engine: a value and a weight of each sample."""

    values: Array
    weights: Array


def scores(
    name: str,
    session: Session,
    data: Data,
    *,
    output: str | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Take a metric on one engine; arguments as those of ``evaluate``."""
    measure = metric(name)
    if measure.labelled and LABELS not in data:
        raise OptpassError("data", f"{name} needs labels, the data has {', '.join(data)}", f"add an array {LABELS}")
    which = _output(session, output)
    found: list[tuple[Array, Array]] = []
    for share, part, inputs, count in batches(session, data, batch):
        found.append(measure.score(session.run(**inputs)[which][:count], part))
        if progress:
            progress(share)
    values, weights = (np.concatenate(column) for column in zip(*found, strict=True))
    return Scores(values, weights)


def paired(name: str, engine: str, dense: Scores, optimized: Scores) -> Metric:
    """What two engines scored on the same samples, as figures with intervals; ``engine`` names the optimized one."""
    measure = metric(name)
    a, b, w = dense.values, optimized.values, dense.weights
    if not w.sum():
        raise OptpassError("data", f"no label counts for {name}", f"label {IGNORED} means that a token does not count")
    # A sample without a token that counts is none: a resample of such alone would have no mean.
    a, b, w = a[w > 0], b[w > 0], w[w > 0]
    kind = "Wilson" if measure.share and set(np.unique((a, b))) <= {0.0, 1.0} else "bootstrap"
    sides = [_interval(x, w, measure, kind) for x in (a, b)]
    drop = bootstrap(np.stack([a, b], 1), w, lambda mean: measure.final(mean[:, 0]) - measure.final(mean[:, 1]))
    label = f"{measure.label}; {kind} intervals, bootstrap for the drop, over {len(w)} samples"
    return Metric(engine=engine, name=name, samples=len(w), dense=sides[0], optimized=sides[1], drop=drop, label=label)


def _interval(values: Array, weights: Array, measure: Measure, kind: str) -> Interval:
    if kind == "Wilson":
        return wilson(round(values.sum()), len(values))
    return bootstrap(values, weights, measure.final)


def _output(session: Session, name: str | None) -> str:
    names = [info.name for info in session.outputs]
    if name is not None and name not in names:
        raise OptpassError("output-name", f"there is no output {name!r}", f"outputs are {', '.join(names)}")
    return name or ("logits" if "logits" in names else names[0])


def batches(session: Session, data: Data, batch: int | None = None) -> Iterator[tuple[float, Data, Data, int]]:
    """Share done, data, inputs and number of samples of each batch; where the batch is fixed, the last one is padded.

    Raises:
        OptpassError: an input is missing, or its rows are not samples.
    """
    missing = [info.name for info in session.inputs if info.name not in data]
    if missing:
        raise OptpassError("data", f"the data lacks input {missing[0]}", f"it has {', '.join(data)}")
    total = len(next(iter(data.values())))
    size = _batch(session, batch)
    fixed = isinstance(session.inputs[0].shape[0], int)
    least = 1 if fixed else session.engine.dynamic[str(session.inputs[0].shape[0])].minimum
    for start in range(0, total, size):
        part = {name: array[start : start + size] for name, array in data.items()}
        count = min(size, total - start)
        padded = size if fixed else max(count, least)
        pick = np.arange(padded) % count
        inputs = {info.name: _as(part[info.name], info)[pick] for info in session.inputs}
        yield min((start + count) / total, 1.0), part, inputs, count


def _as(array: Array, info: TensorInfo) -> Array:
    """Data to the input's dtype where no value changes its kind: floats and integers to a narrower or wider type."""
    wanted = np.dtype(info.dtype)
    return array.astype(wanted) if array.dtype.kind == wanted.kind else array


def _batch(session: Session, asked: int | None) -> int:
    first = session.inputs[0].shape[0] if session.inputs[0].shape else 1
    if isinstance(first, int):
        if asked not in (None, first):
            raise OptpassError("batch", f"the engine takes {first} samples in a call, not {asked}", f"use {first}")
        return first
    bounds = session.engine.dynamic[first]
    if asked is not None and not bounds.minimum <= asked <= bounds.maximum:
        raise OptpassError("batch", f"batch {asked} is outside {bounds.minimum} to {bounds.maximum}", "use one inside")
    return asked or max(min(BATCH, bounds.maximum), bounds.minimum)


# Without data


def agreement(
    dense: Session,
    optimized: Session,
    inputs: Data,
    *,
    random: bool,
    output: str | None = None,
    progress: Progress | None = None,
) -> list[Metric]:
    """How far the optimized engine agrees with the dense one: top-1, KL divergence, cosine.

    Args:
        dense: engine of the unmodified model.
        optimized: the engine that is held against it.
        inputs: rows are samples; random ones, or given ones without labels.
        random: which of the two, for the label.
        output: the output to look at; ``logits``, or else the first, by default.
        progress: called with the share that is done.
    """
    return agreed(answers(dense, inputs, output), optimized, random=random, progress=progress)


@dataclass(frozen=True)
class Answer:
    """What the dense engine gave for one batch.

    Attributes:
        share: of all batches that are done with it.
        inputs: of the call.
        output: name of what was looked at.
        values: of the samples alone, where the batch was padded.
    """

    share: float
    inputs: Data
    output: str
    values: Array


def answers(dense: Session, inputs: Data, output: str | None = None) -> Iterator[Answer]:
    """Batch by batch; as a list they let the engine go before the other one is opened."""
    which = _output(dense, output)
    for share, _, arrays, count in batches(dense, inputs):
        yield Answer(share, arrays, which, dense.run(**arrays)[which][:count])


def agreed(
    given: Iterable[Answer], optimized: Session, *, random: bool, progress: Progress | None = None
) -> list[Metric]:
    """``agreement`` with answers of the dense engine."""
    found: list[tuple[Array, Array, Array]] = []
    for one in given:
        other = optimized.run(**one.inputs)[one.output][: len(one.values)]
        found.append(_agree(one.values.astype(np.float64), other.astype(np.float64)))
        if progress:
            progress(one.share)
    same, divergence, close = (np.concatenate(part) for part in zip(*found, strict=True))
    samples = len(close)
    kind = f"measured on {samples} {'random' if random else 'given'} inputs"
    label = f"agreement with the dense engine, {kind}; says nothing about quality"
    figures = [("cosine-agreement", close, 1.0)]
    if not np.isnan(same).any():
        figures = [("top1-agreement", same, 1.0), ("kl-divergence", divergence, 0.0), *figures]
    return [_agreement(optimized.name, name, values, best, label) for name, values, best in figures]


def _agreement(engine: str, name: str, values: Array, best: float, label: str) -> Metric:
    interval = bootstrap(values, np.ones(len(values)), lambda mean: mean)
    perfect = Interval(value=best, low=best, high=best)
    drop = Interval(value=best - interval.value, low=best - interval.high, high=best - interval.low)
    return Metric(
        engine=engine, name=name, samples=len(values), dense=perfect, optimized=interval, drop=drop, label=label
    )


def similar(engine: str, found: Array, expected: Array, taken: Taken) -> list[Metric]:
    """How near samples ``[n, ...]`` are to those of the dense engine from the same noise."""
    values = similarity.ssim(found, expected)
    ratio = float(np.median(similarity.psnr(found, expected)))
    steps = f"{len(taken.computed)} of {taken.steps} steps computed"
    label = f"similarity to the samples of the dense engine, {ratio:.1f} dB in the median, {steps}"
    return [_agreement(engine, "ssim", values, 1.0, label)]


def _agree(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """Per sample: share of equal top-1, mean KL(dense || optimized), cosine; the first two NaN for one number a row."""
    rows = len(a)
    flat = a.reshape(rows, -1), b.reshape(rows, -1)
    if a.ndim < 2 or a.shape[-1] < 2:
        nothing = np.full(rows, np.nan)
        return nothing, nothing, cosine(*flat)
    same = (a.argmax(-1) == b.argmax(-1)).reshape(rows, -1).mean(1)
    p, q = _log_softmax(a), _log_softmax(b)
    divergence = (np.exp(p) * (p - q)).sum(-1).reshape(rows, -1).mean(1)
    return same, divergence, cosine(*flat)


RANDOM_ROWS, RANDOM_CALLS = 8, 4
"""Random inputs to look at: as many batches of the example's size as give the rows, but no more than the calls."""


def random_inputs(reference: Reference, sizes: Mapping[str, int] | None = None, calls: int | None = None) -> Data:
    """Inputs in the domain of the recorded example, rows of ``calls`` batches of its size.

    Floats are normal with the mean and deviation of the example; integers are those of the example in another order
    within their row, so that tokens which stand for an image stay as many, but masks of 0 and 1 stay as they are.
    """
    rng = np.random.default_rng(SEED)
    example = reference.inputs(sizes or {})
    rows = max(len(next(iter(example.values()))), 1)
    calls = calls or min(-(-RANDOM_ROWS // rows), RANDOM_CALLS)
    draws = [{name: _draw(rng, array) for name, array in example.items()} for _ in range(calls)]
    return {name: np.concatenate([draw[name] for draw in draws]) for name in reference.example}


def _draw(rng: np.random.Generator, array: Array) -> Array:
    if array.dtype.kind == "f":
        drawn = rng.standard_normal(array.shape) * max(float(array.std()), 1e-3) + float(array.mean())
        return drawn.astype(array.dtype)
    if array.dtype.kind == "b" or set(np.unique(array)) <= {0, 1}:
        return array
    return rng.permuted(array, axis=-1) if array.ndim else array
