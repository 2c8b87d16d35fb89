"""How fast this code is: python -m tools.benchmark."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
