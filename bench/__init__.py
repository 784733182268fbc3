"""Benchmarks that measure the peers in the same run. Imports are light, because a worker's first answer is timed."""
