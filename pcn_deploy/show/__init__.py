"""Pictures made of plain data."""
