"""``sbs-edge study``: how small a student, and how few rows, will do."""
