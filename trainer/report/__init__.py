"""Look before you train: what a set holds and what a run makes of it."""
