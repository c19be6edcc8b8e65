"""An engine of the step in numpy that gives away what it is shown.

Its kept rows are the token ids themselves. For each new token it gathers the tokens that it may see, in the order of
their positions, and the logits are drawn from a generator that these tokens seed. A row in the wrong place, a position
that is off by one or a tree mask with a hole changes the text that is made.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from optpass.runtime.engines.base import Array
from optpass.runtime.generate import Generator
from optpass.runtime.kept import ACCEPTED, CANDIDATES, DEPTH, ORDER, PARENT, PAST_POSITION, PICK, POSITION, TOKEN, TREE
from optpass.runtime.manifest import Bounds, Engine, Hardware, Manifest, TensorInfo
from optpass.runtime.trees import Tree, walk

VOCABULARY = 13


def logits(prefix: Sequence[int], vocabulary: int = VOCABULARY) -> Array:
    """What the model says behind a text."""
    seed = zlib.crc32(np.array(prefix, np.int64).tobytes())
    return np.random.default_rng(seed).normal(size=vocabulary).astype(np.float32) * 2


def decoded(prompt: Sequence[int], count: int, vocabulary: int = VOCABULARY) -> list[int]:
    """Plain greedy decoding."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(logits(text, vocabulary).argmax()))
    return text[len(prompt) :]


class Counting:
    """The engine. ``verifies`` as one that ``speculate`` made."""

    def __init__(self, info: Engine, vocabulary: int) -> None:
        self.inputs = [i.name for i in info.inputs]
        self.outputs = [o.name for o in info.outputs]
        self.vocabulary = vocabulary
        self.steps: list[tuple[int, int]] = []

    def run(self, arrays: Sequence[Array], wanted: Sequence[int] | None = None) -> list[Array]:
        given = dict(zip(self.inputs, arrays, strict=True))
        ids, past = given["input_ids"], given["past_key_0"][:, 0, :, 0]
        batch, count = ids.shape
        self.steps.append((batch, count))
        depth = given.get(DEPTH, np.broadcast_to(np.arange(count), ids.shape))
        tree = given.get(TREE, np.broadcast_to(np.tri(count, dtype=bool), (batch, count, count)))
        every = np.zeros((batch, count, self.vocabulary), np.float32)
        for text in range(batch):
            places = given[f"{PAST_POSITION}0"][text]
            kept = {int(place): int(past[text, row]) for row, place in enumerate(places) if place >= 0}
            assert len(kept) == int((places >= 0).sum()), "two rows lie at one position"
            for node in range(count):
                seen = {
                    int(given[POSITION][text] + depth[text, n]): int(ids[text, n])
                    for n in range(count)
                    if tree[text, node, n]
                }
                assert len(seen) == int(tree[text, node].sum()), "a node sees two tokens at one position"
                assert not seen.keys() & kept.keys(), "a new token stands where one is kept"
                shown = kept | seen
                if sorted(shown) == list(range(len(shown))):
                    every[text, node] = logits([shown[place] for place in sorted(shown)], self.vocabulary)
                else:
                    every[text, node] = np.nan  # of padding, which is not looked at
        picked = np.take_along_axis(every, given[PICK][..., None], 1) if PICK in given else every
        results = {"logits": picked, "key_0": ids[:, None, :, None].astype(np.float32)}
        results["value_0"] = results["key_0"]
        if TREE in given:
            results |= self._verified(ids, tree, picked, results)
        return [results[self.outputs[n]] for n in (wanted if wanted is not None else range(len(self.outputs)))]

    def _verified(self, ids: Array, tree: Array, picked: Array, results: dict[str, Array]) -> dict[str, Array]:
        token = picked.argmax(-1)
        order, accepted = np.zeros_like(ids), np.zeros(len(ids), np.int64)
        for text in range(len(ids)):
            parent = [
                int(max((n for n in np.flatnonzero(row) if n != i), default=-1)) for i, row in enumerate(tree[text])
            ]
            path = [0]
            if picked.shape[1] == ids.shape[1]:
                path += walk(Tree(ids[text], np.array(parent)), token[text])
            accepted[text] = len(path)
            order[text] = [*path, *(n for n in range(ids.shape[1]) if n not in path)]
        if picked.shape[1] < ids.shape[1]:
            order = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
        best = np.argsort(-np.nan_to_num(picked, nan=-9), -1, kind="stable")[..., :4]
        values = np.take_along_axis(np.nan_to_num(picked), best, -1)
        rows = {name: np.take_along_axis(results[name], order[:, None, :, None], 2) for name in ("key_0", "value_0")}
        return {**rows, TOKEN: token, ORDER: order, ACCEPTED: accepted, CANDIDATES[0]: best, CANDIDATES[1]: values}


def generator(
    *, verifies: bool = False, picks: bool = True, vocabulary: int = VOCABULARY, context: int = 200
) -> Generator:
    """A generator on the engine."""
    row = ["batch", 1, "past_0", 1]
    new = ["batch", 1, "tokens", 1]
    shapes: dict[str, tuple[str, list[int | str]]] = {
        "input_ids": ("int64", ["batch", "tokens"]),
        POSITION: ("int64", ["batch"]),
        f"{PAST_POSITION}0": ("int64", ["batch", "past_0"]),
    }
    if picks:
        shapes[PICK] = ("int64", ["batch", "picked"])
    outputs: dict[str, tuple[str, list[int | str]]] = {"logits": ("float32", ["batch", "picked", vocabulary])}
    outputs |= {"key_0": ("float32", new), "value_0": ("float32", new)}
    if verifies:
        shapes |= {name: ("int64", ["batch", "tokens"]) for name in (DEPTH, PARENT)}
        shapes |= {TREE: ("bool", ["batch", "tokens", "tokens"])}
        outputs |= {TOKEN: ("int64", ["batch", "picked"]), ORDER: ("int64", ["batch", "tokens"])}
        outputs |= {ACCEPTED: ("int64", ["batch"])}
        outputs |= {
            name: (kind, ["batch", "picked", 4]) for name, kind in zip(CANDIDATES, ("int64", "float32"), strict=True)
        }
    shapes |= {"past_key_0": ("float32", row), "past_value_0": ("float32", row)}
    limits = {"batch": 64, "tokens": 256, "past_0": context, "picked": 256}
    info = Engine(
        stage="step",
        backend="counting",
        precision="f32",
        entry="",
        files=[],
        inputs=[TensorInfo(name=name, dtype=kind, shape=shape) for name, (kind, shape) in shapes.items()],
        outputs=[TensorInfo(name=name, dtype=kind, shape=shape) for name, (kind, shape) in outputs.items()],
        dynamic={name: Bounds(minimum=1, maximum=most) for name, most in limits.items()},
        tolerance=0.0,
    )
    manifest = Manifest(
        optpass="", created="", source="", libraries={}, files={}, default="step",
        hardware=Hardware(cpu="", flags=[], cores=1, system=""), engines={"step": info},
    )  # fmt: skip
    return Generator(manifest, "step", Counting(info, vocabulary), 1)
