"""What a drafter is, and the making of one by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from optpass.errors import OptpassError
from optpass.runtime import drafters
from optpass.runtime.trees import Ids, Tree


class Options(BaseModel):
    """Options of a drafter."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Drafter:
    """Guesses the coming tokens of one sequence. A wrong guess costs time and never changes the text.

    Attributes:
        name: that of its module.
        options: an ``options_type``.
        vocabulary: how many token ids there are; all ids given and drafted are below it.
    """

    name: ClassVar[str]
    options_type: ClassVar[type[Options]] = Options

    def __init__(self, vocabulary: int, options: Options) -> None:
        self.vocabulary = vocabulary
        self.options: Any = options

    def begin(self, tokens: Ids) -> None:
        """Start a sequence with its prompt, int64 ``[tokens]``, one or more. What belongs to no sequence may stay."""
        raise NotImplementedError

    def commit(self, tokens: Ids) -> None:
        """Append int64 ``[tokens]`` to the sequence; the last one is the anchor of the next draft."""
        raise NotImplementedError

    def draft(self, budget: int) -> Tree:
        """A tree of at most ``budget`` nodes, 1 or more, of which the anchor is one."""
        raise NotImplementedError

    def observe(self, tokens: Ids, previous: Ids, candidates: Ids, scores: NDArray[np.floating[Any]]) -> None:
        """Learn from rows that the engine computed: of a prompt, and of a tree, the rejected ones too.

        Args:
            tokens: int64 ``[rows]``, the token of each row; a later row about the same token counts.
            previous: int64 ``[rows]``, the token before it; -1 where unknown.
            candidates: int64 ``[rows, count]``, the likeliest next tokens, best first, distinct in a row.
            scores: float ``[rows, count]``, softmax over these candidates alone.
        """

    def accepted(self, tree: Tree, path: Sequence[int]) -> None:
        """Learn which nodes of the last draft, or of what was cut from it, were right."""


def names() -> list[str]:
    """The drafters there are."""
    return [module.name for module in pkgutil.iter_modules(drafters.__path__) if module.name != "base"]


def create(name: str, vocabulary: int, **options: Any) -> Drafter:
    """Make a drafter, for one sequence at a time.

    Raises:
        OptpassError: the name, an option or its value is unknown; lists what there is.
    """
    if name not in names():
        raise OptpassError("drafter", f"there is no drafter {name!r}", f"drafters are {', '.join(names())}")
    module = importlib.import_module(f"{drafters.__name__}.{name}")
    kind: type[Drafter] = next(
        value for value in vars(module).values() if isinstance(value, type) and vars(value).get("name") == name
    )
    known = kind.options_type.model_fields
    unknown = [key for key in options if key not in known]
    if unknown:
        remedy = f"options are {', '.join(known)}" if known else "it has none"
        raise OptpassError("drafter-option", f"{name} has no option {unknown[0]!r}", remedy)
    try:
        return kind(vocabulary, kind.options_type(**options))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        what = f"{name}: {place}={options.get(str(first['loc'][0]))!r}: {first['msg']}"
        raise OptpassError("drafter-option", what, f"options are {', '.join(known)}") from error


def successors(logits: NDArray[Any], count: int) -> tuple[Ids, NDArray[np.float32]]:
    """What ``observe`` takes, for an engine that gives logits ``[rows, vocabulary]`` and no candidates.

    Returns:
        int64 ``[rows, count]``, best first and the lower id of equal ones; float32 of the same shape.
    """
    count = min(count, logits.shape[1])
    found = np.sort(np.argpartition(-logits, count - 1, axis=1)[:, :count], axis=1)
    values = np.take_along_axis(logits, found, 1).astype(np.float32)
    order = np.argsort(-values, axis=1, kind="stable")
    found, values = np.take_along_axis(found, order, 1), np.take_along_axis(values, order, 1)
    scores = np.exp(values - values[:, :1])
    return found.astype(np.int64, copy=False), scores / scores.sum(1, keepdims=True)
