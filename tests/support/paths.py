"""Where the repository lies, and the licence's text beside it."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LICENCE_TEXT = REPOSITORY.parent / "shared/licenses/faipl-1.0-sd.md"
