"""Numbers and dates as sites, dumps and tables write them; tags by category, whatever separates them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.fields import Note, is_missing, parse_whole, parse_year
from trainer.data.tag_fields import read_tags


@pytest.mark.parametrize(
    ("value", "number"),
    [(5, 5), (5.0, 5), (-3.0, -3), ("5", 5), (" -12 ", -12), ("+7", 7), ("5.0", 5), ("5.", 5), (2**40, 2**40)],
)
def test_whole_numbers(value: Any, number: int) -> None:
    assert parse_whole(value) == number


@pytest.mark.parametrize(
    "value", [True, 5.5, "5.5", "five", "1e3", "0x10", "٣", "1_000", float("inf"), [], {}, "9" * 9999]
)
def test_no_whole_numbers(value: Any) -> None:
    with pytest.raises(ValueError):
        parse_whole(value)


@pytest.mark.parametrize("value", [None, float("nan"), "", "  ", "NaN", "nan", "None", "null", "NULL"])
def test_missing(value: Any) -> None:
    assert is_missing(value) and not is_missing(0) and not is_missing("0") and not is_missing(False)


@pytest.mark.parametrize(
    ("value", "year"),
    [
        ("2022-03-04T05:06:07.890-05:00", 2022),
        ("2005-05-24 03:35:31 UTC", 2005),
        ("2008-07-15 08:32:57.34205 UTC", 2008),  # danbooru2021
        ("2008-06-12 15:29:13", 2008),  # gallery-dl's date
        ("20210417", 2021),
        ("Sat Apr 17 11:59:39 -0500 2021", 2021),  # gelbooru
        ("Sat Nov 04 00:46:07 +0000 2023", 2023),
        (1220000000, 2008),  # moebooru
        ("1220000000", 2008),
        (1650000000.0, 2022),
        ("1.65E9", 2022),  # BigQuery
        (1650000000000, 2022),
        ("1612111410123", 2021),  # ISO 8601 could be the year 1612
        (1650000000 * 10**6, 2022),
        (1650000000 * 10**9, 2022),
        ({"json_class": "Time", "s": 1220000000, "n": 0}, 2008),
    ],
)
def test_dates(value: Any, year: int) -> None:
    assert parse_year(value) == year


@pytest.mark.parametrize(
    "value", ["soon", "2021", 2021, 0, -5, True, [], {}, 10**11 - 1, 10**30, float("inf"), "9" * 999]
)
def test_no_dates(value: Any) -> None:
    with pytest.raises(ValueError):
        parse_year(value)


def tags_of(**record: Any) -> tuple[dict[str, str], list[Note]]:
    notes: list[Note] = []
    return {name: tags for name, tags in read_tags(record, notes).items() if tags is not None}, notes


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("1girl solo long_hair", "1girl solo long_hair"),
        (" 1girl  solo ", " 1girl  solo "),  # as it is: the index of old sets has it so
        ("1girl, solo, long hair", "1girl solo long_hair"),
        ("1girl,solo,long_hair", "1girl solo long_hair"),
        ("1girl ,solo ,long hair", "1girl solo long_hair"),
        ("1girl,\nsolo,\tlong  hair,", "1girl solo long_hair"),
        ("1girl,", "1girl"),
        (", ,", ""),
        ("long hair", "long hair"),  # two tags: nothing says otherwise
        ('["1girl", "long hair"]', "1girl long_hair"),
        (["1girl", "long hair", " blue  eyes "], "1girl long_hair blue_eyes"),
        (["1girl, long hair", "solo"], "1girl long_hair solo"),
        (["", None, "solo"], "solo"),
        ([{"name": "オリジナル", "translated_name": "original"}], "オリジナル"),  # pixiv's own
        ([], ""),
        ("", ""),
    ],
)
@pytest.mark.parametrize("field", ["tags", "tag_string", "tags_general", "tag_string_general"])
def test_tags_with_commas_and_spaces(field: str, text: Any, tags: str) -> None:
    assert tags_of(**{field: text}) == ({"general": tags}, [])


def test_a_comma_inside_a_tag_is_kept_and_noted() -> None:
    tags, (note,) = tags_of(tag_string_character="a,b c d,e")
    assert tags == {"character": "a,b c d,e"}
    assert note == ("comma inside a tag", "tag_string_character: 'a,b d,e'")
    tags, (note,) = tags_of(tags_artist=["a,b", "c"])
    assert tags == {"artist": "a,b c"} and note == ("comma inside a tag", "tags_artist: 'a,b'")


def test_every_site_s_categories() -> None:
    names = ("general", "species", "genre", "character", "copyright", "studio", "artist", "circle", "contributor",
             "meta", "metadata", "medium", "faults", "lore")  # fmt: skip
    want = {"general": "general species genre", "character": "character", "copyright": "copyright studio",
            "artist": "artist circle contributor", "meta": "meta metadata medium faults lore"}  # fmt: skip
    for spell in ("tags_{}", "tag_string_{}"):
        assert tags_of(tags="x", **{spell.format(name): name for name in names}) == (want, [])
    assert tags_of(tags={name: [name] for name in names}) == (want, [])


def test_tags_of_an_unknown_category_are_counted() -> None:
    tags, (one, other) = tags_of(tags={"general": ["a"], "invalid": ["b"], "empty": []}, tags_mood="sad \ud800")
    assert tags == {"general": "a"}
    assert one == ("tags of an unknown category: invalid", "tags.invalid: ['b']")
    assert other.kind == "tags of an unknown category: mood" and other.detail.encode()


def test_tags_with_numbers_for_categories() -> None:
    """As the dumps of Danbooru to 2021 have them."""
    numbers = {"0": "1girl", "4": "hatsune_miku", "3": "vocaloid", "1": "someone", "5": "highres", "7": "x"}
    for convert in (str, int):
        listed = [{"id": "1", "name": name, "category": convert(number)} for number, name in numbers.items()]
        tags, (note,) = tags_of(tags=[*listed, {"id": "2", "name": "solo", "category": convert("0")}])
        assert tags == {"general": "1girl solo", "character": "hatsune_miku", "copyright": "vocaloid",
                        "artist": "someone", "meta": "highres"}  # fmt: skip
        assert note == ("tags of an unknown category: 7", "tags.7: ['x']")


@given(st.lists(st.from_regex(r"[a-z0-9_^()]{1,12}", fullmatch=True), min_size=2, max_size=6))
def test_every_way_to_write_tags_is_the_same(tags: list[str]) -> None:
    want = {"general": " ".join(tags)}
    spaced = [tag.strip("_").replace("_", " ") or tag for tag in tags]
    for value in (" ".join(tags), ", ".join(tags), ",".join(tags), tags, '["' + '", "'.join(tags) + '"]'):
        assert tags_of(tags_general=value) == (want, [])
    assert tags_of(tags=", ".join(spaced)) == tags_of(tags=spaced)
