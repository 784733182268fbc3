"""Errors raised by this package, with the exit code that the command line returns for each.

Each class is also the built-in exception that describes it, so a caller may catch either. Every message is one
paragraph: the problem, its place (file, line, field) and the remedy.

    SbsEdgeError              1   anything that went wrong during the requested work
    ├── UsageError            2   ValueError: the request itself is wrong (parameter, value, combination)
    │   ├── DataError         2   ValueError: an input file or row is wrong
    │   └── MissingExtra      2   ImportError too: an optional package is not installed
    ├── GuardError            3   a lossy step cost more accuracy than allowed
    ├── AnswerError           1   ArithmeticError: a model computed NaN or infinity
    ├── OutOfMemory           1   MemoryError: a graph or a call does not fit into memory
    └── IntegrityError        4   OSError: a bundle is damaged, incomplete or differs from its manifest

Example:
    >>> from sbs_edge import Student, UsageError
    >>> try:
    ...     Student.from_pretrained("not/a/bundle")
    ... except UsageError as error:  # or: except ValueError
    ...     print(type(error).__name__, error.exit_code)
    UsageError 2
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AnswerError",
    "DataError",
    "GuardError",
    "IntegrityError",
    "MissingExtra",
    "OutOfMemory",
    "SbsEdgeError",
    "UsageError",
]


class SbsEdgeError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1


class UsageError(SbsEdgeError, ValueError):
    """The request is wrong: a parameter, its value or a combination of parameters."""

    exit_code = 2


class DataError(UsageError):
    """An input file or one of its rows is wrong; the message names file, line and field."""


class MissingExtra(UsageError, ImportError):
    """A needed optional package is not installed; the message gives the command that installs it.

    Attributes:
        package: the missing package, also as ``name``, as in every ImportError.
        extra: the extra of this package that installs it.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        message = (
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Add it with: pip install 'sbs-edge[{extra}]'"
        )
        super().__init__(message)
        self.msg = message
        self.name = self.package = package
        self.extra = extra
        self._purpose = purpose

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the constructor's arguments: errors cross processes in Ray and multiprocessing."""
        return type(self), (self.package, self.extra, self._purpose)


class GuardError(SbsEdgeError):
    """A lossy step lost more accuracy than allowed; nothing was replaced."""

    exit_code = 3


class AnswerError(SbsEdgeError, ArithmeticError):
    """A model computed a score that is NaN or infinite, so it has no answer."""


class OutOfMemory(SbsEdgeError, MemoryError):
    """A graph, a call or a library does not fit into the memory that this process may use."""


class IntegrityError(SbsEdgeError, OSError):
    """A bundle does not match its manifest, or a path in it leaves its directory.

    It is an OSError, as transformers and huggingface_hub raise for a directory that they cannot load.
    """

    exit_code = 4
