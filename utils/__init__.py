"""The machinery of a run, and commands: convert, export, curves, visualize, benchmark."""
