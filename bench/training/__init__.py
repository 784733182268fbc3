"""The training benchmark: one optimizer step beside the step it replaces."""
