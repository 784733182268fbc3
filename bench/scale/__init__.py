"""The offline scoring benchmark: Ray actors beside a plain loop."""
