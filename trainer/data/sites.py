"""What the sites' own words mean, as gallery-dl or a dump of the site writes them: one table, nothing of it elsewhere.

Danbooru's fields are what a Post knows; a row says where another site differs. Sources: the sites' API documentation
and what gallery-dl keeps of their answers (its extractors danbooru, e621, gelbooru, gelbooru_v02, moebooru, sankaku and
pixiv).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.data.fields import check_text, is_absent, is_missing, parse_whole, read_optional, show_value

# words and letters of all sites, in lower case; "safe" is what sites have that know no "general"
RATING_NAMES = {
    "general": "g", "safe": "g", "sensitive": "s", "questionable": "q", "explicit": "e", "r-18": "e", "r-18g": "e",
    "g": "g", "s": "s", "q": "q", "e": "e",
}  # fmt: skip

# our category of tags: the sites' names for it, ours first
TAG_CATEGORIES = {
    "general": ("general", "species", "genre"),  # e621; sankaku
    "character": ("character",),
    "copyright": ("copyright", "studio"),  # sankaku
    "artist": ("artist", "circle", "contributor"),  # moebooru; e621
    "meta": ("meta", "metadata", "medium", "faults", "lore"),  # gelbooru and its kin; sankaku; moebooru; e621
}
# where tags have numbers for categories: Danbooru's, as the dumps danbooru2017 to danbooru2021 have them
TAG_CATEGORY_NUMBERS = {"0": "general", "1": "artist", "3": "copyright", "4": "character", "5": "meta"}


@dataclass(frozen=True)
class Site:
    """Where a site's records differ from Danbooru's."""

    s_means: str = "s"  # its rating "s": g where it is short for safe, beside which the site has no general
    score: str | None = None  # what stands for the score where there is none
    caption_is_prose: bool = False  # `caption` is what the uploader wrote, never what an image shows
    files: str | None = None  # the field that counts the files of a post, which share its id


SAFE = Site(s_means="g")
SITES = {  # by gallery-dl's `category`
    **dict.fromkeys(("danbooru", "aibooru", "atfbooru", "booruvar", "gelbooru"), Site()),
    **dict.fromkeys(("e621", "e926", "e6ai"), SAFE),
    **dict.fromkeys(("yandere", "konachan", "sakugabooru", "lolibooru"), SAFE),  # moebooru
    **dict.fromkeys(("rule34", "safebooru", "realbooru", "tbib", "hypnohub", "xbooru"), SAFE),  # gelbooru 0.2
    **dict.fromkeys(("sankaku", "idolcomplex"), SAFE),
    "pixiv": Site(score="total_bookmarks", caption_is_prose=True, files="page_count"),
}
# of the other sites that gallery-dl knows, many have several files a post, and `caption` is the uploader's
OTHER_SITE = Site(caption_is_prose=True, files="count")


def find_site(record: Mapping[str, Any]) -> Site:
    """The site that a record is from; Danbooru where it does not say so."""
    if (site := read_site(record)) is not None:
        return SITES.get(site, OTHER_SITE)
    if isinstance(category := record.get("category"), str) and category in SITES:
        return SITES[category]
    # e621's own answers, which nest what others have at the top
    is_e621 = isinstance(record.get("file"), Mapping) and isinstance(record.get("tags"), Mapping)
    return SITES["e621"] if is_e621 else SITES["danbooru"]


def read_site(record: Mapping[str, Any]) -> str | None:
    """The site of a record that gallery-dl wrote, with a ``subcategory``: its ``category``, which may mean anything."""
    site = record.get("category")
    return site if isinstance(site, str) and "subcategory" in record else None


def read_own_id(record: Mapping[str, Any]) -> str | None:
    """The text of a record's ``id``; None where it has none, or where several files of one post share it.

    Raises:
        ValueError: when the id is neither a whole number nor text.
    """
    post_id = record.get("id")
    if is_absent(post_id):
        return None
    if isinstance(post_id, str) and post_id:
        own = check_text("id", post_id)
    else:
        try:
            own = str(parse_whole(post_id))
        except ValueError as error:
            raise ValueError(f"id must be a whole number or text, not {show_value(post_id)}") from error
    field = find_site(record).files
    count = None if field is None else read_optional(parse_whole, field, record.get(field), [])
    return own if count is None or count <= 1 else None


def image_stems(record: Mapping[str, Any]) -> list[str]:
    """What a record's image may be called, without its extension: its id, and gallery-dl's filename."""
    return [stem for stem in (read_own_id(record), record.get("filename")) if isinstance(stem, str) and stem]


def read_rating(record: Mapping[str, Any]) -> str | None:
    """g, s, q or e from a site's letter or word; None where it has none.

    Raises:
        ValueError: when it is another. A rating decides what an image may be called, so that none is guessed.
    """
    value = record.get("rating")
    if is_missing(value):
        return None
    if not isinstance(value, str):
        raise ValueError(
            f"rating must be text ({', '.join(RATING_NAMES)}), not {show_value(value)}: numbers differ between dumps"
        )
    word = value.strip().lower()
    if word not in RATING_NAMES:
        raise ValueError(f"rating {show_value(value)} is none of {', '.join(RATING_NAMES)}")
    return find_site(record).s_means if word == "s" else RATING_NAMES[word]
