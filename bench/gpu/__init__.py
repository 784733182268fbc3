"""A GPU session: correctness, peers and timings in one command."""
