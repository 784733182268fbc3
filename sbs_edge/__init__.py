"""sbs-edge: distil a large model's rationales into a small student and ship it as a bundle.

The three calls most users need; each import is lazy, so that ``import sbs_edge`` stays light and
``Student`` never pulls in torch::

    from sbs_edge import Student, export, train
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbs_edge.export.api import export
    from sbs_edge.runtime.student import Student
    from sbs_edge.training.train import train

__all__ = ["Student", "__version__", "export", "train"]
__version__ = "0.2.0"

_LAZY = {
    "Student": "sbs_edge.runtime.student",
    "export": "sbs_edge.export.api",
    "train": "sbs_edge.training.train",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        # `export` is a package of this name too, which can be called just the same.
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
