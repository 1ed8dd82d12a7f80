"""Settings and words of prompts that would have no effect: refused, or named as the plain text that they are here."""

import re
import secrets
from collections.abc import Iterable, Iterator, Mapping

from trainer.config.schema import NEGATIVE_PROMPT, SamplingConfig
from trainer.core.errors import UserError

# What sd-scripts reads at the end of a prompt, by what it is called here: on the command line, and in a config.
OF_COMMAND = {
    "n": "--negative", "w": "--size", "h": "--size", "d": "--seed", "l": "--guidance", "s": "--steps",
}  # fmt: skip
OF_CONFIG = {
    "n": "sampling.negative_prompt", "w": "sampling.width", "h": "sampling.height", "d": "run.seed",
    "l": "sampling.guidance_scale", "s": "sampling.num_inference_steps",
}  # fmt: skip
OPTION = re.compile(r"(?<!\S)--([A-Za-z]+)(?!\S)")
SYNTAX = (  # of other programs
    r"\([^()]*[^()\s]\s*:\s*-?(?:\d+\.?\d*|\.\d+)\s*\)",  # (smile:1.3), which (:3) is not
    r"\(\([^()]+\)\)",
    r"\[[^\[\]]*[:|][^\[\]]*\]",  # [cat:dog:0.5], [cat|dog]
    r"<(?:lora|lyco|hypernet)[:\w][^<>]*>",
    r"\bembedding:[^\s,]+",
    r"(?<![A-Za-z])(?:BREAK|AND)(?![A-Za-z])",
    r"\{[^{}]*\|[^{}]*\}",  # {red|blue} hair
    r"(?<!\w)__[\w/-]+__(?!\w)",
    r"\\[()]",  # parentheses are not escaped here
)
PLAIN = re.compile("|".join(SYNTAX))
MAX_SHOWN_WORDS = 8


def check_config_prompts(sampling: SamplingConfig) -> str | None:
    """What to say of the samples that are drawn while training; None where there is nothing to say.

    Raises:
        UserError: for settings without effect.
    """
    if sampling.guidance_scale == 1 and sampling.negative_prompt not in ("", NEGATIVE_PROMPT):
        raise UserError("sampling.negative_prompt has no effect: sampling.guidance_scale is 1; set it to ''")
    return check_prompts(sampling.prompts, sampling.negative_prompt, "sampling.prompts", OF_CONFIG)


def check_prompts(prompts: Iterable[str], negative: str, where: str, options: Mapping[str, str]) -> str | None:
    """One note of what in the prompts other programs take for more than text; None where there is nothing.

    Args:
        where: what messages call the prompts.
        options: what sd-scripts' options of prompts are called here.

    Raises:
        UserError: for such options, which would be drawn as words.
    """
    texts = [*prompts, negative]
    for text in texts:
        if letters := dict.fromkeys(OPTION.findall(text)):
            ways = [f"--{letter} is {options[letter]} here" for letter in letters if letter in options]
            raise UserError(
                f"{where}: {text[:60]!r} holds options of other programs, which would be read as words: "
                f"{', '.join(f'--{letter}' for letter in letters)}. Take them out"
                + (f"; {', '.join(ways)}" if ways else "")
            )
    found = list(dict.fromkeys(find_syntax(texts)))
    if not found:
        return None
    more = f" and {len(found) - MAX_SHOWN_WORDS} more" if len(found) > MAX_SHOWN_WORDS else ""
    return f"{where}: plain text here as in the captions, not a command: {'  '.join(found[:MAX_SHOWN_WORDS])}{more}"


def find_syntax(texts: Iterable[str]) -> Iterator[str]:
    """The parts of prompts that weigh, mix, split or load something in other programs."""
    for text in texts:
        for match in PLAIN.finditer(text):
            yield match[0]


def read_seed(seed: int) -> int:
    """The seed of the first image; -1 asks for a random one.

    Raises:
        UserError: for other negative numbers.
    """
    if seed < -1:
        raise UserError(f"--seed {seed}: a whole number from 0 on, or -1 for a random one")
    return secrets.randbelow(2**31) if seed == -1 else seed


def read_negative(given: str | None, sampling: SamplingConfig) -> str:
    """The negative prompt; none at guidance 1, where it could have no effect.

    Raises:
        UserError: where one is given all the same.
    """
    if sampling.guidance_scale > 1:
        return sampling.negative_prompt if given is None else given
    if given:
        raise UserError("--negative has no effect at --guidance 1: leave it out, or raise the guidance")
    return ""
