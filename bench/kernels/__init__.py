"""The loss benchmark: time, memory and error of the fused loss and its peers."""
