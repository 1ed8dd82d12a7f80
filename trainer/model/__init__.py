"""SDXL and what is known of it: weights from anywhere, encoders, VAE, diffusion, checkpoints, lineage."""
