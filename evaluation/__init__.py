"""Evaluation worth publishing: predictions per image, what follows from them, and what test.py writes."""
