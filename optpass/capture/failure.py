"""Why a model could not be traced, said with the user's line, the value in question, and a way out."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from optpass.capture.dynamic import Declared, constant, narrowed
from optpass.capture.lines import innermost, mentioned, source_text
from optpass.errors import OptpassError, Place
from optpass.program import TensorSpec, trace

FIX = re.compile(r"^  (?P<name>\w+) = (?P<fix>.+)$", re.MULTILINE)
BOUND = re.compile(r"(?P<end>min|max)=(?P<size>\d+)")
EXPRESSION = re.compile(r"data-dependent expression (?P<expression>.*?) \(unhinted")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep logs, prints and warnings of the tracer and of libraries off the user's terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def explain(
    failures: Sequence[Exception],
    module: nn.Module,
    example: Sequence[Tensor],
    specs: Sequence[TensorSpec],
    declared: Mapping[str, Declared],
) -> OptpassError:
    """The error to raise for the failures of each way of tracing, in the order they were tried."""
    texts = [str(failure) for failure in failures]
    violated = next((text for text in texts if "Constraints violated" in text), "")
    if violated:
        guards = _guards(module, example, specs, declared)
        return _dynamic(violated, specs, declared, guards)
    line = _line(failures)
    dependent = next((text for text in texts if "data-dependent" in text or "Data-dependent" in text), "")
    if dependent:
        found = EXPRESSION.search(dependent)
        code = source_text(failures)
        value = f"`{code}`" if code else found["expression"] if found else "a branch"
        return OptpassError(
            "data-dependent",
            f"{value} depends on the value of a tensor, which is unknown when the graph is captured",
            "write a branch with torch.where or torch.cond; bound a size with torch._check(size <= limit)",
            Place("", line=line),
        )
    first = next((part for part in texts[0].strip().splitlines() if part.strip()), "")
    return OptpassError(
        "trace",
        f"the model cannot be traced: {type(failures[0]).__name__}: {first}",
        "rewrite that line with tensor operations, or try --static if dimensions are dynamic",
        Place("", line=line),
    )


def _line(failures: Sequence[Exception]) -> str:
    frames = innermost(traceback.extract_tb(failures[0].__traceback__))
    return frames or next(filter(None, (mentioned(str(failure)) for failure in failures)), "")


def _dynamic(
    text: str, specs: Sequence[TensorSpec], declared: Mapping[str, Declared], guards: Sequence[tuple[str, str]]
) -> OptpassError:
    """The tracer's suggested fix, said of the user's input and axis."""
    fixes = {m["name"]: m["fix"] for m in FIX.finditer(text.partition("Suggested fixes:")[2])}
    name, fix = next(((n, f) for n, f in fixes.items() if n in declared), ("", ""))
    if not name:
        return OptpassError("dynamic-range", text.strip().splitlines()[-1].strip(" -"), "use --static")
    place, axis = declared[name].places[0]
    if fix.isdigit():
        return constant(
            place, axis, int(fix), specs, _guarded_by(guards, rf"Eq\(s\d+, {fix}\)|Eq\({fix}, s\d+\)", r"Eq\(")
        )
    if fix in declared:
        other, other_axis = declared[fix].places[0]
        return OptpassError(
            "dynamic-equal",
            f"{place}:{axis} and {other}:{other_axis} are always equal in the model",
            f"declare both under one name, as {place}:{axis}=size:min..max and {other}:{other_axis}=size:min..max",
        )
    bounds = {m["end"]: int(m["size"]) for m in BOUND.finditer(fix)}
    range_ = declared[name].range
    if bounds:
        found = f"{bounds.get('min', range_.minimum)}..{bounds.get('max', range_.maximum)}"
        return narrowed(place, axis, range_, found, _guarded_by(guards, ""))
    line = _guarded_by(guards, "")
    return OptpassError(
        "dynamic-range",
        f"the model holds only for {place}:{axis} of the form {fix.replace('_' + name, 'n')}"
        + (f", by {line}" if line else ""),
        "use --static, or pad the input outside of the model",
    )


def _guarded_by(guards: Sequence[tuple[str, str]], *patterns: str) -> str:
    """The line of the first guard that matches the first pattern that any guard matches."""
    found = (line for pattern in patterns for expression, line in guards if line and re.search(pattern, expression))
    return next(found, "")


def _guards(
    module: nn.Module, example: Sequence[Tensor], specs: Sequence[TensorSpec], declared: Mapping[str, Declared]
) -> list[tuple[str, str]]:
    """Trace again and note each guard the tracer adds, with the user's line that was running then."""
    guards: list[tuple[str, str]] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if message.startswith("eval ") and "[guard added]" in message:
                guards.append((message.partition(" [guard added]")[0], innermost(traceback.extract_stack())))

    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    listener, level, propagate = Listener(), logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.addHandler(listener)
    logger.propagate = False
    others = [handler for handler in logger.handlers if handler is not listener]
    try:
        for handler in others:
            logger.removeHandler(handler)
        ranges = {name: d.range for name, d in declared.items()}
        with contextlib.suppress(Exception), contextlib.redirect_stderr(io.StringIO()):
            trace(module, example, specs, ranges)
    finally:
        for handler in others:
            logger.addHandler(handler)
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = propagate
    return guards
