"""Experiments: one a file, each a script (`python experiments/digits.py`) and a function (`run(Config())`)."""
