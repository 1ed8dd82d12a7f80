"""Pages: what a set holds and what a run makes of it, what a run has done, runs side by side."""
