"""``optpass gate``: an artifact against a budget; in CI, the exit code is the verdict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from optpass.cli import _options as options
from optpass.cli._outcome import Outcome, of_model
from optpass.cli._progress import progress
from optpass.errors import OptpassError

if TYPE_CHECKING:
    from optpass.gating import GateResult

CODES = {"pass": 0, "fail": 1, "inconclusive": 3}


def command(
    artifact: Annotated[Path | None, typer.Argument(metavar="ARTIFACT", help="Directory that optimize wrote.")] = None,
    budget: Annotated[
        Path | None, typer.Option("--budget", metavar="FILE.toml", help="The budget.", show_default=False)
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="ARTIFACT|FILE.json", help="In place of the budget's baseline.", show_default=False),
    ] = None,
    engine: Annotated[str | None, typer.Option(help="Engine to judge.", show_default="the budget's")] = None,
    inconclusive: Annotated[
        Literal["pass", "fail", "report"],
        typer.Option(help="What a limit means that noise leaves undecided: exit code 0, 1, or 3."),
    ] = "report",
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Write the figures as a baseline for this machine.", show_default=False),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE.xml", help="Write the verdicts as JUnit XML.", show_default=False)
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Append a summary in Markdown.", show_default=False)
    ] = None,
    annotations: Annotated[
        bool, typer.Option("--annotations", help="Print broken limits as annotations that CI shows beside the budget.")
    ] = False,
    blame: Annotated[
        bool, typer.Option("--blame", help="Where quality or speed broke its limit, bisect at once and name the pass.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of a budget, and nothing else.")
    ] = False,
    json: options.Json = False,
) -> Outcome:
    """Hold ARTIFACT against a budget.

    Latency is measured until each limit is decided. Exit codes: 0 pass, 1 fail, 3 inconclusive, 2 bad input.
    """
    from optpass import budget as budgets
    from optpass import ci, files, gating
    from optpass.cli import _gate

    if schema:
        return Outcome(budgets.schema(), lambda console: console.print_json(data=budgets.schema()))
    if artifact is None or budget is None:
        raise OptpassError("usage", "an artifact and --budget are needed", "see optpass gate --help")
    for target in (save, junit, markdown):
        files.check_target(target)
    with progress() as report:
        result = gating.gate(
            artifact, budget, engine=engine, baseline=baseline, save=save, blame=blame, progress=report
        )
    if junit:
        files.write(junit, ci.junit(result))
    if markdown:
        ci.append(markdown, ci.markdown(result))
    said = ci.workflow_commands(result) if annotations else []
    failure = _failure(result, inconclusive)
    judged = result.model_copy(update={"ok": failure is None})
    return of_model(judged, lambda console: _gate.show(result, said, console), failure)


def _failure(result: GateResult, inconclusive: str) -> OptpassError | None:
    if result.verdict == "pass" or (result.verdict == "inconclusive" and inconclusive == "pass"):
        return None
    broken = [one for one in result.checks if one.verdict == result.verdict]
    more = f", and {len(broken) - 1} more" if len(broken) > 1 else ""
    if result.verdict == "fail":
        return OptpassError("budget-broken", f"{broken[0].said}{more}", result.hint or "see the table", exit_code=1)
    code = CODES["fail" if inconclusive == "fail" else "inconclusive"]
    remedy = "give more seconds, more samples, or a quieter machine"
    return OptpassError("budget-undecided", f"{broken[0].said}{more}", remedy, exit_code=code)
