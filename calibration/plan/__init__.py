"""Which layer in which precision, and why."""
