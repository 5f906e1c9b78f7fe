"""Backends: one contract (`base`), one module or folder each, found by name in `registry`."""
