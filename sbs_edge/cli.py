"""The command line: one function a command, each in :mod:`sbs_edge.commands`.

Nothing heavy is imported until the command that needs it runs.
"""

from __future__ import annotations

import sys

from sbs_edge.commands.app import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
