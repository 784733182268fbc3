"""ONNX graphs of a T5 student, written node by node."""
