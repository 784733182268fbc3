"""The offline scoring benchmark: Ray actors against a plain loop."""
