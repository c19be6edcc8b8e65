"""Does a step continue a text as if it were computed whole? Probes of the state, by eager execution.

Incremental: texts fed a few tokens at a time, each at its own pace, give what the whole forward gives. Tree: each node
of a tree gives what the forward on its own path gives, and the rows that are kept of the accepted ones are those of the
text that they make. The driver that feeds is the one that runs engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from optpass.causal import Causal
from optpass.probes import constant, run
from optpass.program import Stage
from optpass.rewrite import Build, Rewritten
from optpass.runtime.engines.base import Array
from optpass.runtime.generate import Generator
from optpass.runtime.kept import ACCEPTED, ORDER, PAST, Kept, everyone
from optpass.runtime.manifest import PRESENT, Bounds, Engine, TensorInfo
from optpass.runtime.trees import Batch, Tree
from optpass.tokens import Masked

PIECES = (3, 1, 1, 5, 2)
"""Tokens of each step, in turn."""

DEEP = 4
"""Depth of the tree."""


class Eager(Generator):
    """A generator on a stage that is not lowered yet."""

    def __init__(self, stage: Stage, prefill: Stage | None = None) -> None:
        self.name = stage.name
        self.threads = torch.get_num_threads()
        self.engine = _engine(stage)
        self.opened = _Opened(stage)
        self._prepare(_Opened(prefill) if prefill else None, _engine(prefill) if prefill else None)


def _engine(stage: Stage) -> Engine:
    return Engine(
        stage=stage.name,
        backend="eager",
        precision="f32",
        entry="",
        files=[],
        inputs=[TensorInfo(name=s.name, dtype=s.dtype, shape=list(s.shape)) for s in stage.inputs],
        outputs=[TensorInfo(name=s.name, dtype=s.dtype, shape=list(s.shape)) for s in stage.outputs],
        dynamic={n: Bounds(minimum=r.minimum, maximum=r.maximum) for n, r in stage.ranges.items()},
        tolerance=0.0,
    )


class _Opened:
    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def run(self, arrays: Sequence[Array], wanted: Sequence[int] | None = None) -> list[Array]:
        results = self.stage.run([torch.from_numpy(np.ascontiguousarray(array)) for array in arrays])
        found = [result.numpy() for result in results]
        outputs = {spec.name: result for spec, result in zip(self.stage.outputs, found, strict=True)}
        for spec, array in zip(self.stage.inputs, arrays, strict=True):
            if spec.name.startswith(PAST) and (name := spec.name.replace("past_", PRESENT, 1)) in outputs:
                array[:] = outputs[name]
        return found if wanted is None else [found[number] for number in wanted]


def incremental(causal: Causal, stage: Stage) -> float:
    """Largest difference between the whole forward and a text fed in pieces, each text at its own pace."""
    model = Eager(stage)
    ids = causal.stage.example[0].numpy()
    whole = causal.stage.results[0].numpy()
    kept = model.start(len(ids))
    length = np.zeros(len(ids), np.int64)
    worst, turn = 0.0, 0
    while (length < ids.shape[1]).any():
        width = PIECES[turn % len(PIECES)]
        # every second text lags behind by one token in each step that has several
        counts = np.minimum(np.maximum(width - np.arange(len(ids)) % 2, 1), ids.shape[1] - length)
        tokens = np.zeros((len(ids), width), np.int64)
        for text, count in enumerate(counts.tolist()):
            tokens[text, :count] = ids[text, length[text] : length[text] + count]
        results = model.step(kept, tokens, everyone(tokens))
        for text, count in enumerate(counts.tolist()):
            start = int(length[text])
            worst = max(worst, _gap(results[model.outputs[0].name][text, :count], whole[text, start : start + count]))
        kept.append(results, counts)
        length += counts
        turn += 1
    return worst


def tree(causal: Causal, stage: Stage) -> float:
    """Largest difference between the nodes of a tree and the forward on their paths, and between rows that are kept.

    The tree hangs off the middle of each text: what the model would say, behind a wrong token at each depth.
    """
    model = Eager(stage)
    ids = causal.stage.example[0].numpy()
    before = max(ids.shape[1] // 2, 1)
    said = ids[:, :before]
    for _ in range(DEEP):
        said = np.concatenate([said, _forward(causal, said)[:, -1:].argmax(-1)], 1)
    right = said[:, before:]
    nodes = np.concatenate([said[:, before - 1 : before], np.stack([right + 1, right], 2).reshape(len(ids), -1)], 1)
    nodes %= model.vocabulary
    shape = Tree(nodes[0], np.array([-1, *np.repeat(np.arange(0, 2 * DEEP, 2), 2)]))
    kept = model.start(len(ids))
    if before > 1:
        for _ in model.feed(kept, list(ids[:, : before - 1])):
            pass
    worst = 0.0
    same = Batch.of([shape] * len(ids), len(shape))
    results = model.step(kept, nodes, everyone(nodes), same)
    logits = results[model.outputs[0].name]
    paths = [[0, *shape.path(node)] for node in range(len(shape))]
    for length in {len(path) for path in paths}:
        group = [node for node, path in enumerate(paths) if len(path) == length]
        texts = np.concatenate([np.concatenate([ids[:, : before - 1], nodes[:, paths[node]]], 1) for node in group])
        whole = _forward(causal, texts)[:, -1].reshape(len(group), len(ids), -1)
        for number, node in enumerate(group):
            worst = max(worst, _gap(logits[:, node], whole[number]))
    return max(worst, _compaction(model, kept, nodes, results))


def pruned(causal: Causal, step: Stage, prefill: Stage, walk: Callable[[Builder], Rewritten]) -> float:
    """Largest difference between a text that goes on behind a pruned prompt, and the same computed whole.

    The latter is one forward over prompt and what follows, in which the tokens that were dropped at a site are hidden
    as keys from there on: no step, no cache and no gather is in it.

    Args:
        causal: with its groups.
        step: made of it.
        prefill: the stage of the prompt.
        walk: lays maps over the graph of ``causal`` at the sites of the passes, given which.
    """
    model = Eager(step, prefill)
    ids = causal.stage.example[0].numpy()
    behind = max(ids.shape[1] // 4, 1)
    prompt = ids[:, : ids.shape[1] - behind]
    kept = model.start(len(ids))
    for text, row in enumerate(prompt):
        if model.begin(kept, row, text) is None:
            return float("inf")
    seen = {}
    for group, places in zip(kept.groups, kept.places, strict=True):
        seen[int(group)] = torch.ones(ids.shape, dtype=torch.bool)
        seen[int(group)][:, : prompt.shape[1]] = False
        for text, row in enumerate(places):
            seen[int(group)][text, torch.from_numpy(row[row >= 0])] = True
    # what is dropped where no attention follows is hidden from none
    every = torch.ones(ids.shape, dtype=torch.bool)
    marked = walk(lambda made, site, number: constant(Masked, number, kept=seen.get(number + 1, every))).module
    (whole, *_) = run(marked, causal.stage.example)
    worst = 0.0
    for start in range(prompt.shape[1], ids.shape[1]):
        tokens = ids[:, start : start + 1]
        results = model.step(kept, tokens, everyone(tokens))
        worst = max(worst, _gap(results[model.outputs[0].name][:, 0], whole[:, start].numpy()))
        kept.append(results, np.ones(len(ids), np.int64))
    return worst


Builder = Callable[[Any, Any, int], Build]


def _compaction(model: Generator, kept: Kept, nodes: Array, results: dict[str, Array]) -> float:
    """Accepted rows of a tree beside those of the same tokens fed one after the other."""
    if not (results[ACCEPTED] == DEEP + 1).all():
        return float("inf")
    plain = kept.fork(range(len(nodes)))
    paths = results[ORDER][:, : DEEP + 1]
    kept.append(results, results[ACCEPTED], paths.tolist() if kept.in_place else None)
    tokens = np.take_along_axis(nodes, paths, 1)
    plain.append(model.step(plain, tokens, everyone(tokens)), results[ACCEPTED])
    worst = 0.0
    for name, rows in kept.rows.items():
        for text, count in enumerate(kept.position.tolist()):
            worst = max(worst, _gap(rows[text, :, :count], plain.rows[name][text, :, :count]))
    return worst


def _forward(causal: Causal, ids: Array) -> Array:
    """The whole forward, as many texts at a time as the stage takes."""
    size = len(causal.stage.example[0])
    return np.concatenate(
        [
            causal.stage.run((torch.from_numpy(ids[start : start + size]),))[0].numpy()
            for start in range(0, len(ids), size)
        ]
    )


def _gap(a: Any, b: Any) -> float:
    gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
    return float("inf") if np.isnan(gap).any() else float(gap.max(initial=0.0))
