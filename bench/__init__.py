"""Benchmarks with the peers in the same run. Light to import: a worker's first answer is timed."""
