"""Other layouts of a bundle: optimum, the Triton Inference Server, a single file."""
