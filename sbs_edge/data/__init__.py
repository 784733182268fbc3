"""Examples: the record, its readers, splits, the built-in task and its tokenizer."""
