"""Smaller vocabularies: the tokens a student reads and writes."""
