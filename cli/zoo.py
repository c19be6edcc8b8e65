"""``optpass zoo``: the small, really trained models that come with optpass."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from optpass.cli import _options as options
from optpass.cli._outcome import Outcome
from optpass.cli._progress import progress

app = typer.Typer(help="List or train the models that come with optpass.", rich_markup_mode=None)


@app.command("list")
def list_models(json: options.Json = False) -> Outcome:
    """List the zoo's models."""
    from optpass.zoo import registry

    rows = [registry.describe(name) for name in registry.names()]

    def show(console: Any) -> None:
        width = max((len(row["name"]) for row in rows), default=0)
        for row in rows:
            line = f"{row['name']:<{width}}  {row['summary']}; {row['metric']} {row['quality']:.4f} on its test split"
            console.print(line, markup=False, soft_wrap=True)

    return Outcome({"ok": True, "models": rows}, show)


@app.command("train")
def train(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model that zoo list shows.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the weights go.")],
    json: options.Json = False,
) -> Outcome:
    """Train a zoo model by its recipe."""
    from optpass.zoo import registry

    trainer = registry.trainer(name)
    with progress() as report:
        quality = trainer(output, lambda done, total, text: report(text, done, total))
    data = {"ok": True, "name": name, "output": str(output), "quality": quality}
    line = f"{name}: {quality:.4f} on its test split, weights in {output}"
    return Outcome(data, lambda console: console.print(line, markup=False, soft_wrap=True))
