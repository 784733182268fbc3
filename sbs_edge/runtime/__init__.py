"""The runtime: bundles, sessions, label scoring and rationales. It never imports torch."""
