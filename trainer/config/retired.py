"""Keys of older versions: what they said is carried over, or can be left out by now; either is said in a note."""

from typing import Any

# old key -> the keys of the same section that took its place, each of which gets its value
RENAMED = {"data.num_workers": ("data.loader_threads", "data.decode_processes")}
# old key -> the key of the same section that took its place, and what each value is called there
REWORDED = {"memory.gradient_checkpointing": ("memory.policy", {True: "full", False: "none"})}
# a key that is gone -> the only value that it could have to any use
ONLY_VALUES = {"publish.license_name": "faipl-1.0-sd"}


def carry_over(layer: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """One layer of a config, a file or a ``key=value`` word, with today's keys; and a note for each old one.

    A new key of the same layer wins over the old one. A key that is gone stays where it has another value than the one
    that it could have: it is refused as an unknown key is.
    """
    notes = []
    for old, new in RENAMED.items():
        section, _, name = old.partition(".")
        values = layer.get(section)
        if isinstance(values, dict) and name in values:
            carried = {key.partition(".")[2]: values[name] for key in new}
            rest = {key: value for key, value in values.items() if key != name}
            layer = layer | {section: carried | rest}
            notes.append(f"{old} is {' and '.join(new)} now: write these in its place")
    for old, (key_now, values_of) in REWORDED.items():
        section, _, name = old.partition(".")
        values = layer.get(section)
        if isinstance(values, dict) and isinstance(value := values.get(name), bool):
            rest = {key: each for key, each in values.items() if key != name}
            layer = layer | {section: {key_now.partition(".")[2]: values_of[value]} | rest}
            notes.append(f"{old}: {str(value).lower()} is {key_now}: {values_of[value]} now: write that in its place")
    for old, only in ONLY_VALUES.items():
        section, _, name = old.partition(".")
        values = layer.get(section)
        if isinstance(values, dict) and values.get(name) == only:
            layer = layer | {section: {key: value for key, value in values.items() if key != name}}
            notes.append(f"{old} is always {only}: leave it out")
    return layer, notes
