"""Verify drafts: a step takes a tree of guessed tokens, and finds in the graph which of them the model agrees with.

The tokens that come out are those of plain decoding. Papers: Fast Inference from Transformers via Speculative Decoding,
arXiv 2211.17192; SpecInfer, arXiv 2305.09781, section 4.2 (tree attention).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.fx import Graph, Node

from optpass import stepping
from optpass.causal import Causal
from optpass.passes.base import Options, Staging
from optpass.program import Stage
from optpass.runtime.kept import ACCEPTED, CANDIDATES, DEPTH, ORDER, PARENT, ROWS, TOKEN, TREE


class SpeculateOptions(Options):
    """Options of ``speculate``."""

    candidates: int = Field(
        10, ge=0, description="most likely next tokens returned for each token, which some drafters learn from; 0: none"
    )


class Speculate(Staging):
    """Verify a tree of drafted tokens in one step: several tokens come out of it, the same as without."""

    name = "speculate"
    options_type = SpeculateOptions
    identity: ClassVar[dict[str, Any]] = {}
    needs = "cache"
    tree = True

    def step(self, causal: Causal) -> Stage:
        """Continue texts by the tokens of a tree; the rows of accepted ones come first."""
        return stepping.step(causal, tree=True, finish=self._finish)

    def _finish(self, graph: Graph, inputs: Mapping[str, Node], outputs: dict[str, Node]) -> None:
        ids = next(iter(inputs.values()))
        logits = next(iter(outputs.values()))
        best = graph.call_function(_candidates, (logits, max(self.options.candidates, 1)))
        token = graph.call_function(_first, (best,))
        accepted = graph.call_function(_accepted, (ids, inputs[TREE], inputs[DEPTH], inputs[PARENT], token))
        order = graph.call_function(_accepted_first, (accepted,))
        for name, rows in outputs.items():
            if name.startswith(ROWS):
                outputs[name] = graph.call_function(_compacted, (rows, order))
        outputs[TOKEN] = token
        outputs[ORDER] = order
        outputs[ACCEPTED] = graph.call_function(_count, (accepted,))
        if self.options.candidates:
            outputs |= {name: graph.call_function(operator.getitem, (best, i)) for i, name in enumerate(CANDIDATES)}


# what is called in the graph, taken apart when it is traced


def _first(best: tuple[Tensor, Tensor]) -> Tensor:
    return best[0][..., 0]


def _accepted(ids: Tensor, tree: Tensor, depth: Tensor, parent: Tensor, token: Tensor) -> Tensor:
    """Nodes whose whole path is what the model would have said, bool ``[batch, tokens]``; the first one always is."""
    # ids go through a gather, since half precisions do not hold them; of a prompt not every token is picked
    expected = token.gather(1, parent.clamp(max=token.shape[1] - 1))
    agreed = (depth > 0) & (ids == expected)
    right = torch.matmul(tree.to(torch.float32), agreed.to(torch.float32).unsqueeze(-1)).squeeze(-1)
    return right == depth.to(torch.float32)


def _accepted_first(accepted: Tensor) -> Tensor:
    """Node numbers, the accepted ones in front, parents before children, int64 ``[batch, tokens]``."""
    place = torch.arange(accepted.shape[1]).unsqueeze(0)
    return torch.where(accepted, place, place + accepted.shape[1]).argsort(1)


def _count(accepted: Tensor) -> Tensor:
    """How many nodes are accepted, int64 ``[batch]``: one of each depth, since siblings differ."""
    return accepted.to(torch.int64).sum(1)


def _compacted(rows: Tensor, order: Tensor) -> Tensor:
    index = order.unsqueeze(1).unsqueeze(-1).expand(-1, rows.shape[1], -1, rows.shape[3])
    return rows.gather(2, index)


def _candidates(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens ``[batch, tokens, count]`` and their logits, best first.

    They lie in the spans of the vocabulary whose largest logits are the largest: two searches among few values are
    many times faster than one among all, in OpenVINO above all.
    """
    width = logits.shape[-1]
    spans = [size for size in range(2, width // count + 1) if width % size == 0]
    if not spans:
        values, places = logits.topk(count, -1)
        return places, values
    size = min(spans, key=lambda size: width // size + count * size)
    apart = logits.reshape(*logits.shape[:2], -1, size)
    span = apart.amax(-1).topk(count, -1).indices
    index = span.unsqueeze(-1).expand(-1, -1, -1, size)
    values, places = apart.gather(2, index).flatten(2).topk(count, -1)
    tokens = (span.unsqueeze(-1) * size + torch.arange(size)).flatten(2)
    return tokens.gather(-1, places), values
