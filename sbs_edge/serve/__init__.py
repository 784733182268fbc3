"""HTTP service over bundles: admission, batching, metrics, drain."""
