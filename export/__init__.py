"""From a trained student to graphs, targets and a bundle.

The package can be called: ``sbs_edge.export(student, out)`` is :func:`sbs_edge.export.api.export`. A package
and a function share the name, and whichever a ``from sbs_edge import export`` finds must work.
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
