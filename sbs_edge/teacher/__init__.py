"""The teacher: prompts, calls, parsing, and the journal of answers."""
