"""Commands that join several steps: data to bundle, and teacher compared with students."""
