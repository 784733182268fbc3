"""States of a server process, as the processes of one server tell each other."""

STARTING, READY, UNSOUND, DRAINING = range(4)
