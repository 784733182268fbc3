"""Number formats of a graph: int8, int4, half precision, and the calibration they need."""
