"""A two-stage SDXL fine-tuning framework that reproduces how Animagine XL 3.0 Base was trained."""

import os

# transformers asks for torchvision at import, which nothing here uses
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

__version__ = "0.2.0"
