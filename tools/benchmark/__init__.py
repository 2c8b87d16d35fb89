"""How fast this code is: python -m tools.benchmark."""
