"""How passes are asked for: ``prune(selector=divprune,keep=0.5,at=3),merge(r=8)``, or the same as a TOML recipe."""

from __future__ import annotations

import ast
import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from optpass.errors import OptpassError
from optpass.passes.base import Pass, registry

NAME = re.compile(r"\s*([A-Za-z][\w-]*)\s*")
KEY = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*")
VERSION = 1
"""Of the form of recipes."""

EXAMPLE = 'such as "prune(keep=0.5,at=3),merge(r=8)"'


def parse(text: str) -> list[Pass]:
    """Passes in the grammar ``name(option=value,...),...``; values are numbers, words, ranges ``a:b`` or ``[lists]``.

    Raises:
        OptpassError: the text is not of that form, or names an unknown pass, option or value.
    """
    return [make(name, options) for name, options in _calls(text)]


def load_recipe(path: Path) -> list[Pass]:
    """Passes of a TOML file; see ``read_recipe`` for its form.

    Raises:
        OptpassError: the file is missing, no TOML, or of another form.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise OptpassError(
            "missing-file", f"recipe {path} cannot be read: {error.strerror}", "check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise OptpassError("recipe", f"recipe {path} is no TOML: {error}", "mend the file") from error
    return read_recipe(text, f"recipe {path}")


def read_recipe(text: str, name: str) -> list[Pass]:
    """Passes of a TOML text: ``[[pass]]`` tables with ``name`` and the options, after an optional ``version = 1``.

    Raises:
        OptpassError: it is no TOML, or of another form; ``name`` says what it is.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptpassError("recipe", f"{name} is no TOML: {error}", "mend the file") from error
    version = content.pop("version", VERSION)
    if type(version) is not int or version != VERSION:
        what = f"{name} is of version {version!r}, this optpass reads {VERSION}"
        raise OptpassError("recipe-version", what, "update optpass, or write the recipe anew")
    unknown = sorted(set(content) - {"pass"})
    tables = content.get("pass")
    if unknown or not isinstance(tables, list) or not tables:
        what = f"{name} has {', '.join(unknown) or 'no [[pass]] table'}"
        raise OptpassError("recipe", what, 'write [[pass]] tables with name = "prune" and its options')
    made = []
    for table in tables:
        if not isinstance(table, dict) or not isinstance(table.get("name"), str):
            raise OptpassError("recipe", f"a [[pass]] table of {name} has no name", 'add name = "prune"')
        made.append(make(table["name"], {key: value for key, value in table.items() if key != "name"}))
    return made


def as_recipe(passes: Sequence[Pass]) -> str:
    """The passes as the text of a recipe."""
    lines = [f"version = {VERSION}", ""] if passes else []
    for made in passes:
        lines += ["[[pass]]", f'name = "{made.name}"']
        lines += [f"{key} = {_toml(value)}" for key, value in made.options.model_dump(exclude_none=True).items()]
        lines.append("")
    return "\n".join(lines)


def make(name: str, options: Mapping[str, Any]) -> Pass:
    """One pass with checked options."""
    known = registry()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        remedy = f"did you mean {near[0]}?" if near else f"passes are {', '.join(sorted(known))}"
        raise OptpassError("unknown-pass", f"there is no pass {name!r}", remedy)
    kind = known[name]
    unknown = [key for key in options if key not in kind.options_type.model_fields]
    if unknown:
        near = difflib.get_close_matches(unknown[0], kind.options_type.model_fields, 1)
        remedy = f"did you mean {near[0]}?" if near else f"options are {', '.join(kind.options_type.model_fields)}"
        raise OptpassError("unknown-option", f"{name} has no option {unknown[0]!r}", remedy)
    try:
        return kind(kind.options_type(**options))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if str(part) in kind.options_type.model_fields)
        message = first["msg"].removeprefix("Value error, ")
        given = f"{place}={options[place]!r}: " if place in options and "Value error" not in first["msg"] else ""
        raise OptpassError("option-value", f"{name}: {given}{message}", f"see optpass passes {name}") from error


def _calls(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    at = 0
    while at < len(text) or not text.strip():
        match = NAME.match(text, at)
        if not match:
            raise _wrong(text, at)
        at = match.end()
        options: dict[str, Any] = {}
        if at < len(text) and text[at] == "(":
            options, at = _options(text, at + 1)
        yield match[1], options
        if at < len(text) and text[at] not in ", \t":
            raise _wrong(text, at)
        rest = text[at:].strip()
        if rest == ",":
            raise _wrong(text, len(text))
        at = at + 1 + text[at:].index(",") if rest.startswith(",") else len(text) if not rest else _fail(text, at)


def _fail(text: str, at: int) -> int:
    raise _wrong(text, at)


def _options(text: str, at: int) -> tuple[dict[str, Any], int]:
    options: dict[str, Any] = {}
    while True:
        if text[at:].lstrip().startswith(")"):
            return options, text.index(")", at) + 1
        match = KEY.match(text, at)
        if not match:
            raise _wrong(text, at)
        if match[1] in options:
            raise OptpassError("passes-grammar", f"option {match[1]} is given twice in {text!r}", "give it once")
        end = _end(text, match.end())
        options[match[1]] = _value(text[match.end() : end].strip())
        at = end + 1 if end < len(text) and text[end] == "," else end


def _end(text: str, at: int) -> int:
    """Where a value ends: at a comma or the closing parenthesis, outside of brackets."""
    depth = 0
    for i in range(at, len(text)):
        if text[i] == "[":
            depth += 1
        elif text[i] == "]":
            depth -= 1
        elif text[i] in ",)" and not depth:
            return i
    raise _wrong(text, len(text))


def _value(text: str) -> Any:
    if text.startswith("[") and text.endswith("]"):
        return [_value(part.strip()) for part in text[1:-1].split(",") if part.strip()]
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, int | float | str) else text


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return f"[{', '.join(map(_toml, value))}]" if isinstance(value, list) else repr(value)


def _wrong(text: str, at: int) -> OptpassError:
    if not text.strip():
        return OptpassError("passes-grammar", "no pass is named", f"name one or more, {EXAMPLE}")
    found = f"{text[at]!r}" if at < len(text) else "the end"
    return OptpassError(
        "passes-grammar", f"{text!r}: a pass or option was expected, not {found}", f"write it {EXAMPLE}"
    )
