"""Images, observers, calibrators, the precision plan and the quantised module."""
