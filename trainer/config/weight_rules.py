"""Rules between the values of ``data.weights`` and ``data.subset_rules``: each of their rules says of which images."""

from collections.abc import Iterator

from trainer.config.schema import Config, ImageRule, WeightRule

COUNT_FIELDS = ("artist_count_below", "character_count_below", "copyright_count_below")
COLUMN_LIMITS = ("above", "below", "equals")  # of a column
MOST_WEIGHT = 1000  # of a weight: an image that is seen so often in an epoch is no data set


def weight_rules(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    data = config.data
    if data.max_weight > MOST_WEIGHT:
        yield ("data.max_weight",), f"must be at most {MOST_WEIGHT}, not {data.max_weight}"
    if data.min_weight > data.max_weight:
        yield ("data.min_weight", "data.max_weight"), f"is above data.max_weight {data.max_weight}"
    for name, rules in (("weights", data.weights), ("subset_rules", data.subset_rules)):
        for number, rule in enumerate(rules):
            key = f"data.{name}.{number}"
            yield from ((tuple(f"{key}.{field}" for field in fields), said) for fields, said in find_faults(rule))


def find_faults(rule: ImageRule) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong with one rule, by the names of its fields."""
    if isinstance(rule, WeightRule) and not 0 <= rule.factor <= MOST_WEIGHT:
        yield ("factor",), f"must lie between 0 and {MOST_WEIGHT}, not {rule.factor}"
    if isinstance(rule, WeightRule) and rule.factor == 1:
        yield ("factor",), "has no effect: it is 1"
    yield from find_faults_of_images(rule, "factor" if isinstance(rule, WeightRule) else "tag")


def find_faults_of_images(rule: ImageRule, blamed: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong with how a rule says of which images it is; ``blamed`` is the field where it says nothing."""
    limits = [name for name in COLUMN_LIMITS if getattr(rule, name) is not None]
    if limits and rule.column is None:
        yield (limits[0], "column"), "of which column? Set column beside it"
    if rule.column is not None and not limits:
        yield ("column",), "says nothing yet: set above, below or equals beside it"
    if rule.equals is not None and len(limits) > 1:
        yield ("equals", limits[0]), f"needs no {limits[0]} beside it"
    if rule.above is not None and rule.below is not None and rule.above >= rule.below:
        yield ("above", "below"), f"no number is above {rule.above} and below {rule.below}"
    for name in ("tag", "column"):
        if (text := getattr(rule, name)) is not None and not text.strip():
            yield (name,), "must be some text, or null"
    for name in COUNT_FIELDS:
        if (count := getattr(rule, name)) is not None and count < 2:
            yield (name,), f"must be at least 2, not {count}: a tag of an image has that image"
    if not (limits or any(getattr(rule, name) is not None for name in ("tag", "rating", "column", *COUNT_FIELDS))):
        yield (blamed,), "of which images? Set tag, rating, column or a count beside it"
