"""The verdicts of a gate in the forms that CI systems read: JUnit XML, Markdown, and annotations."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from optpass.errors import OptpassError
from optpass.gating import Check, GateResult, interval, number
from optpass.runtime.manifest import Hardware

LEVELS = {"fail": "error", "inconclusive": "warning", "pass": "notice"}
SIGNS = {"pass": "✅ pass", "fail": "❌ fail", "inconclusive": "❔ inconclusive"}


def junit(result: GateResult) -> str:
    """One test case a limit: broken is a failure, undecided is skipped with the reason."""
    counts = [sum(one.verdict == verdict for one in result.checks) for verdict in ("fail", "inconclusive")]
    suite = ElementTree.Element(
        "testsuite",
        name="optpass gate",
        tests=str(len(result.checks)),
        failures=str(counts[0]),
        errors="0",
        skipped=str(counts[1]),
        time=f"{result.seconds:.3f}",
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in (("source", result.source), ("engine", result.engine), ("cpu", result.hardware.cpu)):
        ElementTree.SubElement(properties, "property", name=name, value=_printable(value))
    for one in result.checks:
        name = f"{one.name} {one.at}".strip()
        case = ElementTree.SubElement(suite, "testcase", classname=_printable(result.artifact), name=_printable(name))
        if one.verdict == "pass":
            ElementTree.SubElement(case, "system-out").text = _printable(one.said)
        else:
            kind = "failure" if one.verdict == "fail" else "skipped"
            ElementTree.SubElement(case, kind, message=_printable(one.said)).text = _printable(result.hint)
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _printable(text: str) -> str:
    """XML has no form at all for most control characters."""
    return "".join(c if c in "\t\n" or c >= " " else "?" for c in text)


def markdown(result: GateResult) -> str:
    """A summary for a job page or a comment."""
    lines = [
        f"### optpass gate: {SIGNS[result.verdict]}",
        "",
        f"`{result.engine}` of `{result.artifact}`, a {_cell(result.source)}; {_machine(result.hardware)}",
        "",
        "| limit | at | budget | measured | verdict |",
        "|---|---|--:|--:|---|",
    ]
    lines += [_row(one) for one in result.checks]
    if result.noise:
        said = f"one round of an engine against itself is within {result.noise.percent:g} % of 1"
        lines += ["", f"Noise of the machine: {said}."]
    if result.hint:
        lines += ["", f"{_cell(result.hint)}."]
    return "\n".join(lines) + "\n"


def _machine(hardware: Hardware) -> str:
    return f"{_cell(hardware.cpu)}, {hardware.cores} cores"


def _row(one: Check) -> str:
    bound = f"{'≥' if one.least else '≤'} {number(one.limit)} {one.unit}"
    figure = f"{number(one.value)} {one.unit}{interval(one)}"
    return f"| {_cell(one.name)} | {_cell(one.at)} | {bound} | {_cell(figure)} | {SIGNS[one.verdict]} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def workflow_commands(result: GateResult) -> list[str]:
    """Workflow commands, as GitHub, Gitea and Forgejo read them: one for each limit that is not held."""
    return [
        f"::{LEVELS[one.verdict]} file={_property(result.budget)},title={_property(one.name)}::{_message(one.said)}"
        for one in result.checks
        if one.verdict != "pass"
    ]


def _message(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")


def append(path: Path, text: str) -> None:
    """Add to a file, as job summaries are written by several steps."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OptpassError("output", f"{path} cannot be written: {error.strerror}", "give another path") from error
