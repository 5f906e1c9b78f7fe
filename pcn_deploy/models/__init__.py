"""Scriptable model definitions, their registry, checkpoint loading and the deploy form."""
