"""Ctrl-C and SIGTERM as exceptions that are not lost.

A signal is raised wherever the interpreter happens to be. That may be in a callback of a library that drops any error,
and the work would go on as if nothing had been asked. So the signal is kept, and raised again at the next step.
"""

from __future__ import annotations

import signal

TERMINATED = 128 + signal.SIGTERM

_came: list[BaseException] = []


class Terminated(BaseException):
    """SIGTERM, raised so that temporary files are removed on the way out."""


def install() -> None:
    """Raise on SIGTERM, and on SIGINT where the caller did not have it ignored."""
    _came.clear()
    signal.signal(signal.SIGTERM, lambda *_: _raise(Terminated()))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: _raise(KeyboardInterrupt()))


def check() -> None:
    """Raise the signal that came, if one did.

    Raises:
        Terminated, KeyboardInterrupt: as it came first.
    """
    if _came:
        raise _came[0]


def came() -> BaseException | None:
    """The first signal that came."""
    return _came[0] if _came else None


def _raise(error: BaseException) -> None:
    _came.append(error)
    raise error
