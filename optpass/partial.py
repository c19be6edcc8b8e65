"""Some tokens of a step computed and the others predicted: the skipped part of a denoiser, laid out for few tokens.

The chosen tokens are gathered where the stream enters the skipped blocks, by the walk that serves ``prune``, and see
each other alone; their features are put among the predicted ones. Paper: Accelerating Diffusion Transformers with
Token-wise Feature Caching, arXiv 2410.05317 (there the chosen tokens see kept keys of the others as well).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from optpass.denoising import Cut, extract
from optpass.errors import Place, Refusal
from optpass.rewrite import Builder, Refused, Space, Walker
from optpass.structure import TokenSpace
from optpass.tokens import Gather, Masked, TokenMap, Value

Make = Callable[[Builder, Value], TokenMap]


def gathered(found: Cut, into: Sequence[Node], count: int) -> GraphModule:
    """The skipped part for some tokens.

    Args:
        found: the cut.
        into: what the skipped part reads.
        count: tokens to compute, protected ones included.

    Returns:
        From ``chosen`` int64 ``[batch, count]``, ascending, and ``into``, to the features of these tokens.

    Raises:
        Refused: the tokens cannot be followed from the blocks to the features.
    """
    return _walked(found, into, torch.int64, count, lambda b, chosen: Gather(b.count, count, chosen))


def hidden(found: Cut, into: Sequence[Node]) -> GraphModule:
    """The same by other means, for probes: from ``chosen`` bool ``[batch, tokens]`` and ``into`` to the features of all
    tokens, where those that are not chosen are seen by none.
    """
    return _walked(found, into, torch.bool, tokens(found), lambda b, chosen: Masked(b.count, b.count, chosen))


def tokens(found: Cut) -> int:
    """How many tokens enter the blocks.

    Raises:
        Refused: their number is dynamic, or they do not come behind the batch.
    """
    space = space_of(found)
    if not isinstance(space.size, int) or (space.batch_dim, space.token_dim) != (0, 1):
        what = "its tokens are no second dimension of a fixed size"
        raise Refused(Refusal("recompute", what, "capture the model at one size", Place(found.blocks[0].path)))
    return space.size


def space_of(found: Cut) -> TokenSpace:
    """The token axis of the stream that enters the blocks."""
    block = found.blocks[0]
    return next(tower.space_at(block) for tower in found.structure.towers if block in tower.blocks)


def _walked(found: Cut, into: Sequence[Node], dtype: torch.dtype, width: int, make: Make) -> GraphModule:
    inner, nodes = extract(found.structure.module, into, found.features)
    entry, space = nodes[found.blocks[0].entry], space_of(found)
    with inner.graph.inserting_before(next(iter(inner.graph.nodes))):
        chosen = inner.graph.placeholder("chosen")
    value = entry.meta["val"]
    with value.fake_mode:
        chosen.meta["val"] = value.new_empty((value.shape[0], width), dtype=dtype)
    streams = frozenset(nodes[node] for tower in found.structure.towers for node in tower.streams if node in nodes)
    features = [nodes[feature] for feature in found.features]
    site = {entry: [("cache", lambda b: make(b, b.given(chosen)))]}
    rewritten = Walker(inner, site, Space(1, 0, space.prefix, space.suffix, streams), features).run()
    if set(rewritten.levels) != {1}:
        what = "not all of what is predicted follows the tokens of the blocks"
        raise Refused(Refusal("recompute", what, "predict another region, or leave recompute out"))
    output = rewritten.module.graph.output_node()
    results: Any = output.args[0]
    output.args = (tuple(results[len(features) : 2 * len(features)]),)
    rewritten.module.graph.eliminate_dead_code()
    rewritten.module.recompile()
    return rewritten.module


def choose(score: Tensor, count: int, space: TokenSpace) -> Tensor:
    """The tokens with the highest score and all protected ones, ascending, int64 ``[batch, count]``."""
    free = score[:, space.prefix : score.shape[1] - space.suffix]
    best = free.topk(count - space.protected, 1)[1] + space.prefix
    front = torch.arange(space.prefix).expand(best.shape[0], -1)
    back = torch.arange(score.shape[1] - space.suffix, score.shape[1]).expand(best.shape[0], -1)
    return torch.cat([front, best.sort(1)[0], back], 1) if space.protected else best.sort(1)[0]


def put(small: Sequence[Tensor], chosen: Tensor, predicted: Sequence[Tensor]) -> list[Tensor]:
    """Features ``[batch, tokens, ...]`` with those of the chosen tokens in their places."""
    maps = [Gather(whole.shape[1], chosen.shape[1], chosen) for whole in predicted]
    return [one.restore(new, whole) for one, new, whole in zip(maps, small, predicted, strict=True)]
