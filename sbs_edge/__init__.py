"""sbs-edge: distil a large model's rationales into a small student and ship it as a bundle.

Three names do the work. The others are their results, settings and errors::

    from sbs_edge import Student, export, train

    trained = train("builtin", out="runs/student")
    export(trained.student_dir, "runs/bundle")
    student = Student.from_pretrained("runs/bundle")
    print(student.predict("the coil is frosted . the room is too cold .").label)

``import sbs_edge`` is light: each name loads its module when it is first used, and ``Student`` never loads torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbs_edge.errors import (
        AnswerError,
        DataError,
        GuardError,
        IntegrityError,
        MissingExtra,
        OutOfMemory,
        SbsEdgeError,
        UsageError,
    )
    from sbs_edge.export.api import ExportResult, export
    from sbs_edge.runtime.answers import Explanation, Prediction
    from sbs_edge.runtime.student import Student
    from sbs_edge.training.config import TrainConfig
    from sbs_edge.training.train import TrainResult, train

__all__ = [
    "AnswerError",
    "DataError",
    "Explanation",
    "ExportResult",
    "GuardError",
    "IntegrityError",
    "MissingExtra",
    "OutOfMemory",
    "Prediction",
    "SbsEdgeError",
    "Student",
    "TrainConfig",
    "TrainResult",
    "UsageError",
    "__version__",
    "export",
    "train",
]
__version__ = "0.2.0"

_MODULES = {
    "sbs_edge.export.api": ("ExportResult", "export"),
    "sbs_edge.runtime.answers": ("Explanation", "Prediction"),
    "sbs_edge.runtime.student": ("Student",),
    "sbs_edge.training.config": ("TrainConfig",),
    "sbs_edge.training.train": ("TrainResult", "train"),
}
_MODULE_OF = dict.fromkeys(set(__all__) - {"__version__"}, "sbs_edge.errors")  # unless it is named above
_MODULE_OF |= {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        from importlib import import_module

        # `export` is also a package of this name, which can be called in the same way.
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazy names too, so that editors and notebooks complete them."""
    return sorted({*globals(), *__all__})
