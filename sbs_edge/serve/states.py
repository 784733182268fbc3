"""States that the processes of a server report to each other."""

STARTING, READY, UNSOUND, DRAINING = range(4)
