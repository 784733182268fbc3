"""Error analysis of a student's answers, as plain values; numpy only, no torch."""
