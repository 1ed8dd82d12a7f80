"""A two-stage SDXL fine-tuning framework that reproduces how Animagine XL 3.0 Base was trained."""

import sys

if sys.platform == "win32":  # which has neither POSIX locks nor forks
    sys.exit("the trainer runs on Linux; on Windows in WSL2")

__version__ = "0.2.0"
