"""Long inputs: accuracy, time and memory against length."""
