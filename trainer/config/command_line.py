"""The words of a command that reads a config: files, ``key=value``, and ``--help-config``."""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.config.extends import EXTENDS
from trainer.config.load import SECTIONS
from trainer.config.other_names import explain_unknown, own_keys
from trainer.config.reference import explain_config
from trainer.config.run_names import RUNS, is_run_folder
from trainer.config.yaml_text import YAML_ENDINGS
from trainer.core.commands import find_python
from trainer.core.console import CommandParser, log, print_answer
from trainer.core.files import home_path, is_file
from trainer.core.layout import CONFIG_FILE


def parse_command_line(description: str, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Config files and ``key=value`` words, as every command that reads a config takes them."""
    return finish_command_line(config_parser(description), words)


def config_parser(description: str) -> argparse.ArgumentParser:
    """The parser of those words; a command adds its own options to it."""
    parser = CommandParser(description)
    parser.add_argument("words", nargs="*", metavar="FILE.yaml|key=value",
                        help="config files, later over earlier, and values over them")  # fmt: skip
    parser.add_argument("--config", action="append", nargs="+", default=[], metavar="FILE",
                        help="config files by any name")  # fmt: skip
    parser.add_argument("--help-config", action=HelpConfig, nargs="*", metavar="SECTION|SECTION.FIELD",
                        help="show what a config may hold, with meaning and default, and exit")  # fmt: skip
    return parser


class HelpConfig(argparse.Action):
    """Print what a config may hold and exit, as --help does for the command."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: object, values: Any, option: object = None) -> None:
        print_answer(explain_config(values))
        parser.exit()


def finish_command_line(
    parser: argparse.ArgumentParser, words: Sequence[str] | None = None, *, other: str | None = None
) -> argparse.Namespace:
    """Parse: ``config`` and ``overrides`` are the files and the ``key=value`` words, in the order that they stand in.

    Words may stand anywhere, even between files. ``other`` is what a single word may name in place of a config; it is
    then ``arguments.other``.
    """
    given = sys.argv[1:] if words is None else list(words)
    arguments, unknown = parser.parse_known_intermixed_args(given)
    named = [word for group in arguments.config for word in group]
    in_order = [re.sub(r"^--c[a-z]*=", "", word) for word in given]  # --config=FILE is one word
    arguments.overrides = [word for word in in_order if is_override(word) and word in (*named, *arguments.words)]
    rest = [word for word in arguments.words if word not in arguments.overrides]
    files = {word for word in (*named, *rest) if word in named or word.endswith(YAML_ENDINGS)}
    arguments.config = [word for word in in_order if word in files and word not in arguments.overrides]
    strange = [word for word in rest if word not in files]
    alone = other is not None and len(strange) == 1 and not arguments.config and not arguments.overrides
    arguments.other = strange.pop() if alone else None
    if strange or unknown:
        parser.error(explain_strange([word for word in in_order if word in (*strange, *unknown)], given))
    if not arguments.config and not alone:
        parser.error(f"name a config file, such as my.yaml{f', or {other}' if other else ''}")
    if len(arguments.config) > 1:
        first, *rest = arguments.config
        log.info("note: %s, then %s over it", first, " over it, then ".join(rest))
    return arguments


def explain_strange(words: list[str], given: Sequence[str] = ()) -> str:
    """The message for words that no command has: what those of other programs are called here.

    ``given`` is the whole command line, which is shown with a run's config where a run was named.
    """
    if (run := next((word for word in words if is_run_folder(RUNS / word)), None)) and Path(run).parts == (run,):
        own = Path(f"{run}.yaml")
        file = str(own if own.is_file() else RUNS / run / CONFIG_FILE)
        typed = [sys.argv[0], *(file if word == run else word for word in given)]
        return f"{run} is a run: {find_python()} {shlex.join(typed)}"
    lines = [f"unrecognized arguments: {' '.join(words)}"]
    for word in words:
        name = word.lstrip("-").partition("=")[0]
        if name in own_keys():
            lines.append(f"  {word}: write {name}=value, without dashes")
        elif hint := explain_unknown(name.rpartition(".")[2], ()):
            lines.append(f"  {word}: unknown word{hint}")
    return "\n".join([*lines, "a field of a config is set as section.field=value; --help-config shows all"])


def is_override(word: str) -> bool:
    """Whether a word is ``key=value`` and not a config file whose name holds "="."""
    key, equals, _ = word.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        return False
    looks, lies_here = word.endswith(YAML_ENDINGS), is_file(home_path(word))
    return not (looks and lies_here if key.partition(".")[0] in (*SECTIONS, EXTENDS) else looks or lies_here)
