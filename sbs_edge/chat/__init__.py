"""Reads what language models and their servers send, for ``annotate`` and for the cascade of ``serve`` alike."""
