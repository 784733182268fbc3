"""The two-task student around any T5-family checkpoint, its training and evaluation."""
