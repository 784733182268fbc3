"""The serving benchmark: latency, throughput, overload, drain and soak over loopback."""
