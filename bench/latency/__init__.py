"""The latency benchmark: bundles and peers on the same weights and inputs."""
