"""The same student and teacher on Ray Data workers, for more than one process."""
