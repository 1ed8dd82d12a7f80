"""A run: launch, loop, step, saving and resuming."""
