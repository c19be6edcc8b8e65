"""Functions of a module, and the task of renaming something in one: a text of which most is a copy of its first part.

A small share of the training text has this form, of training functions, so that the model has seen the task; decoding
by speculation is judged on it, since there a draft can be copied from the prompt.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections import Counter
from dataclasses import dataclass

import numpy as np

KEPT = frozenset(("self", "cls"))
"""Names that are not renamed."""
WORDS = re.compile(r"(?<![\w.])[^\W\d]\w*")
"""Names where they are no attribute."""


@dataclass(frozen=True)
class Function:
    """A function of a module.

    Attributes:
        text: its source, from its ``def`` on, without the indentation that all its lines share.
        start: line of its ``def`` in the module, counted from 0.
        body: line of the first statement after its docstring, or of the docstring where there is nothing more.
        end: line after its last.
        names: its parameters and variables that occur at least twice in it.
    """

    text: str
    start: int
    body: int
    end: int
    names: tuple[str, ...]


def functions(module: str) -> list[Function]:
    """Functions and methods of a module's text, in its order; none of a text that this Python cannot parse."""
    try:
        tree = ast.parse(module)
    except SyntaxError:
        return []
    # Not splitlines, for which a form feed ends a line too.
    lines = module.split("\n")
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [_function(node, lines) for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset))]


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Function:
    start, end = node.lineno - 1, node.end_lineno or node.lineno
    text = textwrap.dedent("\n".join(lines[start:end]))
    found = {inner.arg for inner in ast.walk(node) if isinstance(inner, ast.arg)}
    found |= {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)}
    counts = Counter(WORDS.findall(text))
    names = tuple(sorted(name for name in found - KEPT if counts[name] > 1))
    documented = ast.get_docstring(node) is not None and len(node.body) > 1
    return Function(text, start, node.body[int(documented)].lineno - 1, end, names)


def task(function: Function, others: list[str], rng: np.random.Generator) -> tuple[str, str] | None:
    """A renaming in a function: the text up to the first line of the renamed function, and the lines after it.

    Args:
        function: what is edited.
        others: names to choose the new one from.
        rng: chooses which name of the function becomes which other.

    Returns:
        None where the function has no name to change, is a single line, or holds every other name.
    """
    taken = set(WORDS.findall(function.text))
    free = [name for name in others if name not in taken]
    if not function.names or not free or "\n" not in function.text:
        return None
    old, new = str(rng.choice(function.names)), str(rng.choice(free))
    renamed = WORDS.sub(lambda match: new if match[0] == old else match[0], function.text)
    first, rest = renamed.split("\n", 1)
    return f"# before\n{function.text}\n\n# after, with {old} renamed to {new}\n{first}", f"\n{rest}"
