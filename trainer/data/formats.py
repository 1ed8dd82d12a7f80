"""Which files are images: one allow-list of formats for folders, tars, posts files and tables.

A format counts by its content; by its name a file is only taken for an image. HEIC and JPEG XL are read where their
plug-ins for Pillow are installed.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec

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
PLUG_INS: dict[str, dict[str, tuple[str, ...]]] = {  # the package's module -> what it adds to Pillow
    "pillow_heif": {"HEIF": ("heic", "heif")},
    "pillow_jxl": {"JXL": ("jxl",)},
}
PACKAGES = {"HEIC": "pillow-heif", "JPEG XL": "pillow-jxl-plugin"}


def list_formats() -> dict[str, tuple[str, ...]]:
    """The formats that can be read here, with their extensions."""
    formats = {name: ends for name, ends in BUILT_IN.items() if name != "AVIF" or features.check("avif")}
    for module, added in PLUG_INS.items():
        if find_spec(module):
            formats |= added
    return formats


@cache
def image_extensions() -> tuple[str, ...]:
    """Extensions of image files, in lower case, without the dot."""
    return tuple(end for ends in list_formats().values() for end in ends)


@cache
def load_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that may be opened; plug-ins that are installed have registered theirs then."""
    for module in PLUG_INS:
        if find_spec(module):
            plug_in = import_module(module)
            if hasattr(plug_in, "register_heif_opener"):
                plug_in.register_heif_opener()
    return tuple(list_formats())


def suggest_plug_in(data: bytes) -> str:
    """What to install for bytes that are of a format which only a plug-in reads, or nothing."""
    kind = "JPEG XL" if data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")) else ""
    kind = "HEIC" if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"heim", b"heis", b"mif1") else kind
    return f"; it is {kind}: pip install {PACKAGES[kind]}" if kind else ""


def is_image_name(name: str) -> bool:
    """Whether a file's name is an image's, hidden files excluded."""
    return name.rpartition(".")[2].lower() in image_extensions() and "." in name and not name.startswith(".")
