"""Read the answers of language models and their servers, for ``annotate`` and for escalation in ``serve``."""
