"""Past one process: the same student and the same teacher on Ray Data workers."""
