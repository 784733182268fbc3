"""The command line's functions, one module a command or command group."""
