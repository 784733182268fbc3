"""Export a trained student: graphs, targets and a bundle.

The package can be called: ``sbs_edge.export(student, out)`` is :func:`sbs_edge.export.api.export`. The package
and the function have the same name, and ``from sbs_edge import export`` may find either.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__all__: list[str] = []


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return import_module(f"{__name__}.api").export(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
