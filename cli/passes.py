"""``optpass passes``: the passes there are, and the options of each, as their fields declare them."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optpass.cli import _options as options
from optpass.cli._outcome import Outcome
from optpass.errors import OptpassError

if TYPE_CHECKING:
    from rich.console import Console


def command(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show the options of this pass.")] = None,
    json: options.Json = False,
) -> Outcome:
    """List the passes, or the options of one."""
    from optpass import api

    found = api.describe_passes()
    if name is None:
        data = {"ok": True, "passes": [_data(one) for one in found]}
        return Outcome(data, lambda console: _list(found, console))
    names = [one.name for one in found]
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        remedy = f"did you mean {near[0]}?" if near else f"passes are {', '.join(names)}"
        raise OptpassError("unknown-pass", f"there is no pass {name!r}", remedy)
    one = found[names.index(name)]
    return Outcome({"ok": True, **_data(one)}, lambda console: _details(one, console))


def _data(one: Any) -> dict[str, Any]:
    fields = [
        {"name": o.name, "type": o.type, "default": _plain(o.default), "description": o.description}
        for o in one.options
    ]
    return {"name": one.name, "summary": one.summary, "paper": one.paper, "options": fields}


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _list(found: list[Any], console: Console) -> None:
    width = max((len(one.name) for one in found), default=0)
    for one in found:
        console.print(f"{one.name:<{width}}  {one.summary}", markup=False, soft_wrap=True)
    console.print("\noptpass passes NAME shows the options of one", markup=False)


def _details(one: Any, console: Console) -> None:
    from rich import box
    from rich.table import Table

    console.print(f"{one.name}: {one.summary}", markup=False, soft_wrap=True)
    if one.paper:
        console.print(f"paper: {one.paper}", markup=False, soft_wrap=True)
    table = Table("option", "type", "default", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for option in one.options:
        cells = (option.name, option.type, option.default, option.description)
        table.add_row(*(_cell(value) for value in cells))
    console.print(table)
    example = ",".join(f"{o.name}={o.default}" for o in one.options if o.default is not None)
    console.print(f"optpass optimize MODEL --passes '{one.name}({example})' --out DIR", markup=False, soft_wrap=True)


def _cell(value: Any) -> Any:
    from rich.text import Text

    return Text("-" if value is None else str(value))
