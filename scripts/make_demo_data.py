"""Make the demo's images and posts from Debian's `openclipart-svg` package: real drawings, real metadata.

Each drawing named in `demo/drawings.txt` is rendered by `rsvg-convert` (Debian's `librsvg2-bin`), trimmed to
its ink and shrunk; each post holds what the SVG's RDF states, in Danbooru's field names, after the tags that
`drawings.txt` gives those of the two stages. Nothing else: no rating, no score, and a date only where the RDF has
one. The same package and renderer give the same files.
Example: `python scripts/make_demo_data.py --out demo`.
"""

from __future__ import annotations

import calendar
import contextlib
import datetime
import io
import json
import math
import re
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from PIL import Image, ImageChops

from trainer.core.console import CommandParser, Result
from trainer.core.errors import UserError, run_command
from trainer.core.files import home_path

LONG_SIDE = 272  # px
RENDER_SIDE = 1088  # px; rendered larger, trimmed, then shrunk, so that edges are smooth whatever the SVG's margins
# What the drawings of the two stages stand on, so that none is known by its size: see demo/README.md.
PAGES = ((272, 272), (162, 270))  # px, in the shapes of the demo's buckets 128 x 128 and 96 x 160
MARGIN = 0.03  # of the drawing's longer side
ALPHA_EVERY = 5  # every fifth drawing with a transparent ground keeps it, the others stand on white
MIN_PALETTE_PSNR = 40.0  # dB; a drawing that 256 colours would band stays true-colour
# Titles that name a batch of uploads instead of the drawing; the file's name says what it is.
BATCH_TITLE = re.compile(r"^(clipart by|r16 sibmission|homes clipart|etiquette icons|balloons-aj)", re.IGNORECASE)
# Left by the collection's own tools, not by people: empty hashes, the folder for what nobody sorted, links.
NO_KEYWORD = re.compile(r"^(hash(\(0x[0-9a-f]+\))?|unsorted|https?:.*|\d+)?$", re.IGNORECASE)
MONTHS = {name.lower(): number for number, name in enumerate(calendar.month_name) if name}
NS = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "cc": "http://web.resource.org/cc/",
    "dc": "http://purl.org/dc/elements/1.1/",
}
PUBLIC_DOMAIN = (
    "http://web.resource.org/cc/PublicDomain",
    "http://creativecommons.org/licenses/publicdomain/",
)
# People first, as an anime model's users would; vivid, unlike each other, and known to the tiny VAE.
STAGE_2 = (
    "blue_girl_dirk_struve.png",
    "manga_girl_dirk_struve_01.png",
    "head11.png",
    "head12.png",
    "boy_astrid_graeber.png",
    "card_figure_queen_nic_r.png",
    "happy_monkey_benji_park_01.png",
    "rubber_duck1_ganson.png",
)
STAGE_1 = (
    *STAGE_2,
    "head3.png",
    "happy_woman_dirk_struve_01.png",
    "people_juliane_krug_07b.png",
    "ladybug_01.png",
)


@dataclass(frozen=True)
class Metadata:
    """What a drawing's RDF says, as written there; empty where it says nothing."""

    title: str
    creator: str
    keywords: tuple[str, ...]
    date: str
    license: str


def read_metadata(svg: Path) -> Metadata:
    """The RDF block of an SVG file. Raises ValueError if the file holds none."""
    work = ET.parse(svg).getroot().find(".//cc:Work", NS)
    if work is None:
        raise ValueError(f"{svg}: no RDF metadata")

    def text(path: str) -> str:
        return " ".join((work.findtext(path, "", NS) or "").split())

    license_element = work.find("cc:license", NS)
    return Metadata(
        title=text("dc:title"),
        creator=text("dc:creator/cc:Agent/dc:title"),
        keywords=tuple((li.text or "").strip() for li in work.iterfind("dc:subject/rdf:Bag/rdf:li", NS)),
        date=text("dc:date"),
        license="" if license_element is None else license_element.get(f"{{{NS['rdf']}}}resource", ""),
    )


def parse_date(text: str) -> str | None:
    """ISO date (YYYY-MM-DD) where the text can be read as exactly one day; None for anything else.

    "2005/06/21", "19 08 2005", "6/24/2005" and "May 3, 2005" are one day each, "03/04/2005" may be two.
    """
    words = re.findall(r"[A-Za-z]+|\d+", text)
    named = [MONTHS[word.lower()] for word in words if word.lower() in MONTHS]
    numbers = [int(word) for word in words if word.isdigit()]
    if len(words) != 3 or len(named) + len(numbers) != 3 or max(numbers) < 1900:
        return None
    if named:
        readings = {(max(numbers), named[0], min(numbers))}
    elif numbers[0] >= 1900:
        readings = {(numbers[0], numbers[1], numbers[2])}
    else:
        readings = {(numbers[2], numbers[0], numbers[1]), (numbers[2], numbers[1], numbers[0])}
    dates = set()
    for reading in readings:
        with contextlib.suppress(ValueError):  # one RDF has a 39th of August
            dates.add(datetime.date(*reading).isoformat())
    return dates.pop() if len(dates) == 1 else None


def to_tag(text: str) -> str:
    """Danbooru's spelling: lower case, an underscore for a run of spaces; commas would split a caption."""
    return re.sub(r"[\s,;|]+", "_", text.strip().lower()).strip("_")


def compose_tags(metadata: Metadata, stem: str) -> str:
    """General tags: the keywords, then the drawing's name, since many drawings share their keywords."""
    artist = to_tag(metadata.creator)
    name = stem if BATCH_TITLE.match(metadata.title) or not metadata.title else metadata.title
    words = [k for k in metadata.keywords if not NO_KEYWORD.match(k)]
    tags = dict.fromkeys(to_tag(word) for word in [*words, name])
    return " ".join(tag for tag in tags if tag and tag != artist)


def render(svg: Path) -> Image.Image:
    """RGBA drawing with LONG_SIDE px on its longer side, trimmed to its ink and a margin."""
    command = [
        "rsvg-convert",
        "--keep-aspect-ratio",
        "-w",
        str(RENDER_SIDE),
        "-h",
        str(RENDER_SIDE),
        str(svg),
    ]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise UserError(f"rsvg-convert cannot render {svg}: {done.stderr.decode().strip()}")
    image = Image.open(io.BytesIO(done.stdout)).convert("RGBA")
    box = flatten_difference(image).getbbox()
    if box is None:
        raise UserError(f"{svg} renders to an empty page")
    border = round(MARGIN * max(box[2] - box[0], box[3] - box[1]))
    image = image.crop((box[0] - border, box[1] - border, box[2] + border, box[3] + border))
    scale = LONG_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Pillow premultiplies alpha while it resizes, so no dark fringe appears.
    return image.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.LANCZOS)


def put_on_page(image: Image.Image) -> Image.Image:
    """The whole drawing, centred on the transparent page whose shape is nearest to its own."""
    aspect = image.width / image.height
    page = Image.new("RGBA", min(PAGES, key=lambda size: abs(size[0] / size[1] - aspect)))
    scale = min(page.width / image.width, page.height / image.height, 1.0)
    size = (round(image.width * scale), round(image.height * scale))
    drawing = image.resize(size, Image.Resampling.BOX) if scale < 1 else image
    page.paste(drawing, ((page.width - size[0]) // 2, (page.height - size[1]) // 2))
    return page


def flatten(image: Image.Image) -> Image.Image:
    """RGBA -> RGB on white."""
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    return canvas.convert("RGB")


def flatten_difference(image: Image.Image) -> Image.Image:
    """Where the drawing differs from a white page: a white rectangle behind a drawing is margin, too."""
    page = flatten(image)
    return ImageChops.difference(page, Image.new("RGB", page.size, "white"))


def palette_psnr(image: Image.Image, quantised: Image.Image) -> float:
    """dB between an RGB image and its palette version, peak 255."""
    histogram = ImageChops.difference(image, quantised.convert("RGB")).histogram()
    squares = sum(count * (index % 256) ** 2 for index, count in enumerate(histogram))
    mean = squares / (3 * image.width * image.height)
    return 99.0 if mean == 0 else 10 * math.log10(255**2 / mean)


def encode(image: Image.Image, keep_alpha: bool) -> bytes:
    """Optimised PNG: RGBA, or on white in a palette where 256 colours are enough, or true-colour."""
    if not keep_alpha:
        image = flatten(image)
        quantised = image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        if palette_psnr(image, quantised) >= MIN_PALETTE_PSNR:
            image = quantised
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def read_drawings(path: Path) -> list[tuple[str, list[str]]]:
    """A drawing a line: its path in the package, then tags given by eye."""
    return [(words[0], words[1:]) for line in path.read_text(encoding="utf-8").splitlines() if (words := line.split())]


def make_posts(root: Path, drawings: list[tuple[str, list[str]]], images: Path) -> Iterator[dict[str, object]]:
    """Write each drawing into the folder `images`; yields its post, numbered from 1 in the list's order."""
    for number, (relative, seen) in enumerate(drawings, 1):
        svg = root / relative
        if not svg.is_file() or svg.is_symlink():
            raise UserError(f"no drawing {svg}; install Debian's openclipart-svg 0.18, or give --svg")
        metadata = read_metadata(svg)
        if metadata.license not in PUBLIC_DOMAIN:
            raise UserError(f"{svg} is not in the public domain by its RDF: {metadata.license!r}")
        image = render(svg)
        name = re.sub(r"[^a-z0-9-]+", "_", svg.stem.lower()).strip("_") + ".png"
        transparent = 0 in image.getchannel("A").tobytes()
        if name in STAGE_1:
            image = put_on_page(image)
        (images / name).write_bytes(encode(image, keep_alpha=transparent and number % ALPHA_EVERY == 0))
        yield {
            "id": number,
            "file": name,
            "file_ext": "png",
            "image_width": image.width,
            "image_height": image.height,
            **describe_drawing(metadata, relative, seen),
        }


def describe_drawing(metadata: Metadata, relative: str, seen: Sequence[str] = ()) -> dict[str, object]:
    """A post's fields that come from the tags given by eye, the drawing's RDF and its path in the package."""
    date = parse_date(metadata.date)
    return {
        **({"created_at": date} if date else {}),
        "tag_string_general": " ".join([*seen, compose_tags(metadata, PurePath(relative).stem)]),
        "tag_string_character": "",
        "tag_string_copyright": relative.split("/")[0],
        "tag_string_artist": to_tag(re.sub(r"\s*[(\[<]\S+@\S+[)\]>]", "", metadata.creator)),  # no addresses
        "tag_string_meta": "",
        "source": f"openclipart-svg/svg/{relative}",
    }


def write_posts(path: Path, posts: list[dict[str, object]]) -> None:
    """One post a line."""
    path.write_text("".join(json.dumps(post, ensure_ascii=False) + "\n" for post in posts), encoding="utf-8")


def main(argv: list[str] | None = None) -> Result:
    parser = CommandParser(__doc__ or "", formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--svg", type=home_path, default=Path("/usr/share/openclipart/svg"), help="the package's drawings"
    )
    parser.add_argument("--out", type=home_path, default=Path("demo"), help="folder for images/ and posts.jsonl")
    parser.add_argument(
        "--drawings", type=home_path, default=Path("demo/drawings.txt"), help="which: a path and tags a line"
    )
    args = parser.parse_args(argv)
    if shutil.which("rsvg-convert") is None:
        parser.error("rsvg-convert is missing; install Debian's librsvg2-bin")
    if not args.drawings.is_file():
        parser.error(f"no list {args.drawings}; start in the repository, or give --drawings")
    drawings = read_drawings(args.drawings)
    args.out.mkdir(parents=True, exist_ok=True)
    # Made beside the old files and moved in whole: a run that fails leaves them as they were.
    with tempfile.TemporaryDirectory(dir=args.out, prefix=".making-") as folder:
        images = Path(folder) / "images"
        images.mkdir()
        posts = list(make_posts(args.svg, drawings, images))
        files = [str(post["file"]) for post in posts]
        if len(set(files)) != len(files):
            raise UserError("two drawings share a file name")
        chosen = {"posts": files, "stage1": STAGE_1, "stage2": STAGE_2}
        for name, wanted in chosen.items():
            write_posts(Path(folder) / f"{name}.jsonl", [post for post in posts if post["file"] in wanted])
        shutil.rmtree(args.out / "images", ignore_errors=True)
        images.rename(args.out / "images")
        for name in chosen:
            (Path(folder) / f"{name}.jsonl").replace(args.out / f"{name}.jsonl")
    size = sum(path.stat().st_size for path in (args.out / "images").iterdir())
    said = f"{len(posts)} drawings, {size / 1e6:.2f} MB, in {args.out / 'images'}, posts beside them"
    return Result(said, [args.out / "images"], {"drawings": len(posts), "bytes": size})


if __name__ == "__main__":
    run_command(main)
