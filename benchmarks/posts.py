"""What the benchmarks share. Made-up posts: index rows with tags as a large site has them, few common and many rare.

Common tags are the demo's own and some of Danbooru's, odd ones included; the rare ones, and the names of characters,
copyrights and artists, are made of syllables. All follow Zipf's law, so that a cache meets what it would meet.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.data.shards import SCHEMA
from trainer.data.tokens import TextTokenizer, load_tokenizers, read_bpe

DEMO_POSTS = Path(__file__).parent.parent / "demo" / "posts.jsonl"
GENERAL, CHARACTERS, COPYRIGHTS, ARTISTS = 20_000, 50_000, 5_000, 100_000  # distinct names of each kind
TAGS_A_POST = 30  # general ones on average
SYLLABLES = "ka ki ku ke ko sa shi su ta chi tsu te to na ni no ha hi fu ma mi mu me mo ya yu yo ra ri ru re ro wa"
COMMON = """1girl solo long_hair highres blush looking_at_viewer breasts short_hair smile open_mouth bangs blue_eyes
multiple_girls blonde_hair brown_hair skirt hat thighhighs black_hair shirt dress hair_ornament red_eyes gloves
1boy long_sleeves white_background simple_background brown_eyes hair_between_eyes holding black_eyes 2girls bow ribbon
animal_ears jewelry bare_shoulders very_long_hair sitting twintails school_uniform green_eyes standing jacket blue_hair
purple_eyes navel :d ponytail flower hair_ribbon white_shirt hair_bow ^_^ >_< o_o :3 ;) =_= \\m/ @_@ +_+ !? !! ... ?
cat_ears tail closed_eyes weapon pleated_skirt white_hair pink_hair sailor_collar sweat heart yellow_eyes star_(symbol)
bow_(bow) sword_(weapon) don't_say_"lazy" jack-o'-lantern rock'n'roll 3d 4koma 80s_(style) 69 m/ o3o 0_0 ?_? u_u
pokemon_(creature) cup_(object) saber_(fate) fate/stay_night love_live! k-on! re:zero nier:automata idolm@ster
bang_dream! girls'_frontline kaguya-sama_wa_kokurasetai_~tensai-tachi_no_renai_zunousen~ steins;gate fate/grand_order
café_au_lait nyantype pokémon_(anime) one's_own_hand she's_not_here <o>_<o> \\(^o^)/ 6+girls 5girls 2boys male_focus"""


@cache
def demo_tags() -> list[str]:
    """The distinct tags of the demo's drawings."""
    posts = [json.loads(line) for line in DEMO_POSTS.read_text(encoding="utf-8").splitlines()]
    fields = [post[name] for post in posts for name in post if name.startswith("tag_string")]
    return sorted({tag for field in fields for tag in field.split()})


@cache
def make_names(kind: str, count: int) -> np.ndarray:
    """So many distinct names, the common ones first."""
    generator = np.random.default_rng([len(kind), count])
    first = [*COMMON.split(), *demo_tags()] if kind == "general" else []
    names, syllables = dict.fromkeys(first), SYLLABLES.split()
    while len(names) < count:
        words = ["".join(generator.choice(syllables, generator.integers(2, 5))) for _ in range(2)]
        suffix = generator.choice(["", "", "", f"_({words[0]})", f"_{generator.integers(10)}", "!"])
        names["_".join(words) + suffix] = None
    return np.array(list(names), dtype=object)


def draw_names(kind: str, count: int, size: int | np.integer, generator: np.random.Generator) -> list[str]:
    """Names after Zipf's law: the n-th with a probability in proportion to 1 / (n + 3)."""
    ranks = np.exp(generator.random(size) * np.log(count + 3)).astype(np.int64) - 1
    return list(dict.fromkeys(make_names(kind, count)[ranks.clip(0, count - 1)]))


def make_rows(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Index rows of square images, without where a sample lies."""
    generator = np.random.default_rng(seed)
    whole = dict.fromkeys(SCHEMA.names)
    for number in range(count):
        yield whole | {
            "key": str(1_000_000 + 7 * number), "source": "posts.jsonl", "content_hash": f"{number:064x}",
            "bucket_width": 1024, "bucket_height": 1024, "original_width": 2048, "original_height": 2048,
            "crop_left": 0, "crop_top": 0,
            "rating": str(generator.choice(list("gsqe"))), "score": int(generator.integers(-20, 300)),
            "year": int(generator.integers(2005, 2024)),
            "tags_general": " ".join(draw_names("general", GENERAL, generator.poisson(TAGS_A_POST), generator)),
            "tags_character": " ".join(draw_names("character", CHARACTERS, generator.integers(0, 3), generator)),
            "tags_copyright": " ".join(draw_names("copyright", COPYRIGHTS, generator.integers(1, 3), generator)),
            "tags_artist": " ".join(draw_names("artist", ARTISTS, 1, generator)),
            "tags_meta": "highres absurdres" if number % 2 else "highres",
        }  # fmt: skip


def plain_config() -> Config:
    """The recipe's defaults."""
    words = ["run.name=x", "run.stage=x", "model.pretrained=x", "data.shards=x", "optim.unet_lr=1", "schedule.epochs=1"]
    return load_config([], words)


def load_base_tokenizers(base: Path) -> tuple[TextTokenizer, TextTokenizer]:
    """Both tokenizers of a base model's folder, whatever its text encoders."""
    folders = base / "tokenizer", base / "tokenizer_2"
    sizes = [len(read_bpe(folder)[0]) for folder in folders]
    return load_tokenizers(*folders, (sizes[0], sizes[1]))


def find_tokenizer_base(given: Path | None, folder: Path) -> Path:
    """The base model whose tokenizers are used: the given one, or else a tiny one, made in ``folder``."""
    if given is not None:
        return given
    subprocess.run([sys.executable, "scripts/make_tiny_base.py", str(folder / "base")], check=True)
    return folder / "base"


def print_rates(title: str, unit: str, rates: dict[str, list[float]]) -> None:
    """A table of rates by round: medians, and the median of each round's ratio to the first line."""
    first = next(iter(rates.values()))
    print(f"| {title:<52} | {unit} | ratio |\n|---|---|---|")
    for name, own in rates.items():
        ratio = statistics.median(a / b for a, b in zip(own, first, strict=True))
        print(f"| {name:<52} | {statistics.median(own):10.0f} | {ratio:5.2f} |")
