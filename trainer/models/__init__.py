"""The SDXL parts: names, text, VAE, UNet."""
