"""Parts that every benchmark shares: worker processes, results, statistics, reports."""
