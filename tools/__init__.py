"""Commands for people: python -m tools.<name>."""
