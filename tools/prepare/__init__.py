"""Data sets as they come, made into what training reads: python -m tools.prepare."""
