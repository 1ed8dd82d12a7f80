"""A two-stage SDXL fine-tuning framework that reproduces how Animagine XL 3.0 Base was trained."""

import os
import sys

if sys.platform == "win32":  # which has neither POSIX locks nor forks
    sys.exit("the trainer runs on Linux; on Windows in WSL2")

# transformers asks for torchvision at import, which nothing here uses
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

__version__ = "0.2.0"
