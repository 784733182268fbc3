"""The loss benchmark: time, memory and error beside its peers."""
