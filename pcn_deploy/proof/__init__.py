"""The verdict on what was built: every form against what it was made from, every engine against the golden set."""
