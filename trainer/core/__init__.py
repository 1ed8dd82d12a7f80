"""What every folder uses: errors, files, randomness, the processes of a run."""
