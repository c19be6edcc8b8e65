"""What goes wrong, said so that the user can act on it: what, where in the model, what to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A point in the user's model: module path, op, and the line of source that produced it."""

    module: str = ""
    op: str = ""
    line: str = ""

    def __str__(self) -> str:
        parts = [self.module or "the model", f"({self.op})" if self.op else "", f"at {self.line}" if self.line else ""]
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Refusal:
    """Why something cannot be done, as a value.

    Attributes:
        code: stable kebab-case code, a heading of the manual.
        what: what happened, one sentence without a full stop.
        where: the place in the user's model, if there is one.
        remedy: what the user can do about it.
    """

    code: str
    what: str
    remedy: str
    where: Place | None = None

    def __str__(self) -> str:
        where = f" in {self.where}" if self.where else ""
        return f"[{self.code}] {self.what}{where}; {self.remedy}"


class OptpassError(Exception):
    """An error with a refusal as its value and an exit code for the command line.

    Exit codes: 2 for what the user can mend in the call, 1 for a result that failed its checks.
    """

    def __init__(self, code: str, what: str, remedy: str, where: Place | None = None, *, exit_code: int = 2) -> None:
        self.refusal = Refusal(code, what, remedy, where)
        self.exit_code = exit_code
        super().__init__(str(self.refusal))

    @classmethod
    def of(cls, refusal: Refusal, *, exit_code: int = 2) -> OptpassError:
        return cls(refusal.code, refusal.what, refusal.remedy, refusal.where, exit_code=exit_code)


def first_line(error: BaseException) -> str:
    """The first line that an error of another library says, or its type where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
