"""Parts that the benchmarks share: worker processes, results, statistics, tables."""
