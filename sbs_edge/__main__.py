"""``python -m sbs_edge``: the command line."""

import sys

from sbs_edge.cli.app import main

sys.exit(main())
