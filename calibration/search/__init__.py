"""The search for a plan within an accuracy budget, and what it measures."""
