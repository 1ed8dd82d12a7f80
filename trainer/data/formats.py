"""Which files are images: one allow-list of formats for folders, tars, posts files and tables.

A format counts by its content; by its name a file is only taken for an image. HEIC and JPEG XL are read where their
plug-ins for Pillow are installed.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from PIL import features

BUILT_IN: dict[str, tuple[str, ...]] = {  # Pillow's name of a format -> extensions that its files have
    "PNG": ("png", "apng"),
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "WEBP": ("webp",),
    "BMP": ("bmp",),
    "GIF": ("gif",),
    "TIFF": ("tif", "tiff"),
    "AVIF": ("avif",),
}


class PlugIn(NamedTuple):
    """A package that adds a format to Pillow."""

    module: str
    package: str
    kind: str  # in words
    format: str  # Pillow's name of it
    extensions: tuple[str, ...]


PLUG_INS = (
    PlugIn("pillow_heif", "pillow-heif", "HEIC", "HEIF", ("heic", "heif")),
    PlugIn("pillow_jxl", "pillow-jxl-plugin", "JPEG XL", "JXL", ("jxl",)),
)
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1")


def list_formats() -> dict[str, tuple[str, ...]]:
    """The formats that can be read here, with their extensions."""
    formats = {name: ends for name, ends in BUILT_IN.items() if name != "AVIF" or features.check("avif")}
    return formats | {each.format: each.extensions for each in PLUG_INS if find_spec(each.module)}


@cache
def image_extensions() -> tuple[str, ...]:
    """Extensions of image files, in lower case, without the dot."""
    return tuple(end for ends in list_formats().values() for end in ends)


@cache
def load_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that may be opened; plug-ins that are installed have registered theirs then."""
    for each in PLUG_INS:
        if find_spec(each.module):
            plug_in = import_module(each.module)
            if each.format == "HEIF":  # the other one registers when it is imported
                plug_in.register_heif_opener()
    return tuple(list_formats())


def suggest_plug_in(data: bytes) -> str:
    """What to install for bytes that are of a format which only a plug-in reads, or nothing."""
    found = {
        "HEIF": data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS,
        "JXL": data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")),
    }
    return "".join(f"; it is {each.kind}: pip install {each.package}" for each in PLUG_INS if found[each.format])


def is_image_name(name: str) -> bool:
    """Whether a file's name is an image's, hidden files excluded."""
    return name.rpartition(".")[2].lower() in image_extensions() and "." in name and not name.startswith(".")
