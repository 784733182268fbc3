"""HTTP server for bundles: admission, batching, metrics, drain."""
