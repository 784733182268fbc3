"""Checks of exported graphs: parity with PyTorch, accuracy, padding, NVIDIA's parser."""
