"""The errors a user can meet, each with the exit code the command line returns.

Every message is one paragraph: what is wrong, where (file, line, field), and what to do about it.

    SbsEdgeError          1   anything that went wrong while doing what was asked
    ├── UsageError        2   the request itself is wrong (flag, value, combination)
    │   ├── DataError     2   an input file or row is wrong
    │   └── MissingExtra  2   an optional package is not installed
    ├── GuardError        3   a lossy step cost more accuracy than allowed
    ├── AnswerError       1   a model gave a number that is not finite
    └── IntegrityError    4   a bundle is damaged, incomplete or not what its manifest says
"""

from __future__ import annotations

__all__ = [
    "AnswerError",
    "DataError",
    "GuardError",
    "IntegrityError",
    "MissingExtra",
    "SbsEdgeError",
    "UsageError",
]


class SbsEdgeError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class UsageError(SbsEdgeError):
    """The request is wrong: a flag, a value or a combination of them."""

    exit_code = 2


class DataError(UsageError):
    """An input file or one of its rows is wrong; the message names file, line and field."""


class MissingExtra(UsageError):
    """An optional package is needed and absent; the message gives the command that adds it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Add it with: pip install 'sbs-edge[{extra}]'"
        )
        self.package = package
        self.extra = extra


class GuardError(SbsEdgeError):
    """A lossy step lost more accuracy than the guard allows; nothing was replaced."""

    exit_code = 3


class AnswerError(SbsEdgeError):
    """A model computed a score that is NaN or infinite, so that there is no answer to give."""


class IntegrityError(SbsEdgeError):
    """A bundle does not match its manifest, or a path in it leaves its directory."""

    exit_code = 4
