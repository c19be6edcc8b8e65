"""Prompts for decoding, all cut from the held-out modules, the same ones on every call."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from optpass.errors import OptpassError
from optpass.zoo.stdlib_lm import data, edits
from optpass.zoo.stdlib_lm.tokens import encode

Prompt = NDArray[np.int64]

LENGTHS = {"completion": (64, 256), "edit": (64, 512), "open": (16, 64)}
"""Fewest and most tokens of a prompt of each kind."""
FUNCTION = (90, 220)
"""Fewest and most tokens of a function to edit."""
SEED = 0


def prompts(kind: str, count: int) -> list[Prompt]:
    """Prompts of a kind, ``int64 [tokens]`` each, those of all modules mixed.

    Args:
        kind: ``completion``, a module cut after the first line of a function or inside it; ``edit``, a function and
            the first line of the same with a name changed; ``open``, a definition and the start of its docstring.
        count: how many; more are the same ones and then others.

    Raises:
        OptpassError: there is no such kind, or there are not so many.
    """
    if kind not in LENGTHS:
        raise OptpassError("data", f"there is no kind of prompts {kind!r}", f"kinds are {', '.join(LENGTHS)}")
    found = _all(kind)
    if not 1 <= count <= len(found):
        raise OptpassError("data", f"{count} prompts of kind {kind} asked for", f"ask for 1 to {len(found)}")
    return [prompt.copy() for prompt in found[:count]]


@functools.cache
def _all(kind: str) -> tuple[Prompt, ...]:
    least, most = LENGTHS[kind]
    rng = np.random.default_rng(SEED)
    makers: dict[str, Callable[[str, np.random.Generator], Iterator[Prompt]]]
    makers = {"completion": _completions, "edit": _edits, "open": _openings}
    made = [prompt for text in data.held_out().values() for prompt in makers[kind](text, rng)]
    fitting = [prompt for prompt in made if least <= len(prompt) <= most]
    return tuple(fitting[i] for i in rng.permutation(len(fitting)))


def _completions(text: str, rng: np.random.Generator) -> Iterator[Prompt]:
    """Whole lines up to the end of a function's first line, and up to the end of one inside it."""
    lines = text.split("\n")
    least, most = LENGTHS["completion"]
    for function in edits.functions(text):
        inside = int(rng.integers(function.body, function.end)) if function.end - function.body > 2 else function.start
        for last in {function.start: None, inside: None}:
            wanted = int(rng.integers(least, most + 1))
            yield _context(lines[: last + 1], wanted)


def _context(lines: list[str], wanted: int) -> Prompt:
    """The longest run of last lines of at most ``wanted`` tokens."""
    chosen = encode("")
    for start in range(len(lines) - 1, -1, -1):
        tried = encode("\n".join(lines[start:]))
        if len(tried) > wanted:
            break
        chosen = tried
    return chosen


def _edits(text: str, rng: np.random.Generator) -> Iterator[Prompt]:
    found = edits.functions(text)
    names = sorted({name for function in found for name in function.names})
    for function in found:
        made = edits.task(function, names, rng)
        if made and FUNCTION[0] <= len(encode(function.text)) <= FUNCTION[1]:
            yield encode(made[0])


def _openings(text: str, rng: np.random.Generator) -> Iterator[Prompt]:
    """From a definition to a word in the first half of its docstring."""
    lines = text.split("\n")
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not ast.get_docstring(node):
            continue
        said = node.body[0]
        definition = "\n".join(lines[node.lineno - 1 : said.lineno - 1])
        docstring = "\n".join(lines[said.lineno - 1 : said.end_lineno])
        ends = [match.end() for match in re.finditer(r"\w(?=\s)", docstring[: len(docstring) // 2 + 1])]
        if len(ends) > 2:
            yield encode(f"{definition}\n{docstring[: int(rng.choice(ends[2:]))]}")
