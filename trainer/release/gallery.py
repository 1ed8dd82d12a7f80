"""Sample images as a stranger looks at them: a short caption each, their settings in a line, and one as a thumbnail."""

import base64
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from trainer.data.captions import split_caption
from trainer.sample.pictures import Sample

CAPTION_LENGTH = 44
LISTED_SIDE = 256  # ModelSpec recommends it, and a square
THUMBNAIL_PREFIX = "data:image/jpeg;base64,"


def caption_of(prompt: str, special: Iterable[str]) -> str:
    """The first tags of a prompt that say what is in the image, and ", …" where more follow.

    ``special``: tags of quality, rating and year, which are left out.
    """
    left_out = {tag.casefold() for tag in special}
    # without the backslashes of other programs: before a parenthesis the Hub takes two for a formula
    tags = [" ".join(tag.replace("\\", "").split()) for tag in split_caption(prompt)]
    telling = [tag for tag in tags if tag.casefold() not in left_out] or tags
    shown = telling[:1]
    for tag in telling[1:]:
        if len(", ".join([*shown, tag])) > CAPTION_LENGTH:
            break
        shown.append(tag)
    text = textwrap.shorten(", ".join(shown), CAPTION_LENGTH, placeholder=" …") if shown else ""
    return f"{text}, …" if len(shown) < len(telling) and not text.endswith("…") else text


def settings_line(settings: Mapping[str, Any]) -> str:
    """Sampler, steps, guidance, size and seed, as far as they are recorded."""
    words = {
        "sampler": "{}", "steps": "{} steps", "guidance": "guidance {}", "size": "{}", "seed": "seed {}",
    }  # fmt: skip
    return ", ".join(form.format(setting_text(settings[key])) for key, form in words.items() if key in settings)


def line_of_all(samples: Sequence[Sample]) -> str:
    """What all samples have in common in a line, and the sizes and seeds that there are; empty where nothing is."""
    common = {
        key: value
        for key, value in (samples[0].settings if samples else {}).items()
        if key in ("sampler", "steps", "guidance") and all(each.settings.get(key) == value for each in samples)
    }
    parts = [settings_line(common)] if common else []
    for key, one, several in (("size", "", "sizes "), ("seed", "seed ", "seeds ")):
        values = list(dict.fromkeys(setting_text(each.settings[key]) for each in samples if key in each.settings))
        if values:
            parts.append((one if len(values) == 1 else several) + ", ".join(values))
    return ", ".join(parts)


def setting_text(value: Any) -> str:
    """7.0 as 7, and 832x1216 as 832 x 1216."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    width, cross, height = text.partition("x")
    return f"{width} x {height}" if cross and width.isdigit() and height.isdigit() else text


def make_thumbnail_address(path: Path) -> str:
    """A data: address of a small square JPEG of an image, the same bytes each time.

    Of what is higher than wide the upper part is kept, in which faces are; nothing is enlarged, and nothing but the
    pixels is taken along.
    """
    with Image.open(path) as image:
        pixels = image.convert("RGB")
    side = min(LISTED_SIDE, *pixels.size)
    small = ImageOps.fit(pixels, (side, side), Image.Resampling.LANCZOS, centering=(0.5, 0.2))
    small.info.clear()  # Pillow would write a comment that it finds there
    written = io.BytesIO()
    small.save(written, format="JPEG", quality=85)
    return THUMBNAIL_PREFIX + base64.b64encode(written.getvalue()).decode()
