"""The bundle: its members, its manifest, its golden set, and an engine opened from it."""
