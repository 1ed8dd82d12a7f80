"""Every rule between a config's values is turned once, and the borders of what it allows are held."""

import ast
import inspect
import sys
import typing
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from omegaconf import OmegaConf

from trainer.config import precision_rules, rules, template_rules, weight_rules
from trainer.config.load import find_config_problems, load_config
from trainer.config.schema import Config
from trainer.core.errors import UserError

MINIMAL = [
    "run.name=tiny", "run.stage=test", "model.pretrained=base", "data.shards=shards", "optim.unet_lr=1e-6",
    "schedule.epochs=1",
]  # fmt: skip


OFF = "model.train_unet=false"
RULES: list[tuple[list[str], str, str]] = [  # words over the minimal config -> key and part of the message
    *[([f"{key}=-1"], key, "must be at least 0, not -1") for key in (
        "run.seed", "data.loader_threads", "data.decode_processes", "captions.keep_tokens",
        "captions.keep_underscore_max_length",
        "diffusion.min_timestep", "diffusion.noise_offset", "optim.text_encoder_1_lr", "optim.text_encoder_2_lr",
        "optim.weight_decay", "schedule.warmup_steps")],
    *[([f"{key}=0"], key, "must be at least 1, not 0") for key in (
        "run.num_processes", "run.max_nonfinite_in_a_row",
        "data.samples_per_shard", "data.global_batch_size", "data.bucket_batch_size",
        "data.micro_batch_size", "data.encode_batch_size", "filters.min_side",
        "filters.first_year", "filters.last_year",
        "data.prefetch_factor", "schedule.epochs", "precision.max_skipped_steps",
        "checkpoint.every_steps", "checkpoint.keep_last", "checkpoint.keep_every_steps", "logging.every_steps",
        "sampling.every_steps", "sampling.num_inference_steps")],
    (["captions.thresholds_from=a"], "captions.thresholds_from", "has no effect"),
    (["checkpoint.fork=runs/a", "checkpoint.resume=runs/b/checkpoints/step-1"], "checkpoint.fork", "has no effect"),
    (["optim.unet_lr=-1", OFF, "model.train_text_encoder_1=true", "optim.text_encoder_1_lr=1"],
     "optim.unet_lr", "must be at least 0, not -1"),
    (["schedule.epochs=null", "schedule.max_steps=0"], "schedule.max_steps", "must be at least 1, not 0"),
    (["schedule.lr=cosine_restarts", "schedule.num_cycles=0"], "schedule.num_cycles", "must be at least 1, not 0"),
    (["sampling.guidance_scale=0.5"], "sampling.guidance_scale", "must be at least 1, not 0.5"),
    *[([f"{key}={value}"], key, f"must lie between 0 and 1, not {value}")
      for key in ("data.max_bad_fraction", "data.max_substituted", "data.max_empty_captions", "captions.tag_dropout",
                  "captions.caption_dropout", "captions.frequent_tag_dropout")
      for value in (-0.1, 1.1)],
    (["schedule.lr=cosine", "schedule.min_lr_ratio=1.1"], "schedule.min_lr_ratio", "between 0 and 1, not 1.1"),
    *[([f"{key}=0"], key, "must be above 0, not 0")
      for key in ("run.stop_if_loss_above", "diffusion.min_snr_gamma", "optim.eps", "optim.max_grad_norm")],
    (["schedule.lr=cosine_restarts", "schedule.num_cycles=2", "schedule.cycle_gamma=0"],
     "schedule.cycle_gamma", "must be above 0, not 0"),
    *[([f"run.name={name}"], "run.name", "names a folder")
      for name in ("''", "a/b", "..", ".hidden", "-x", "'a b'", '"a\\n"', "ä")],
    ([OFF, "optim.unet_lr=0"], "model.train_unet", "nothing is trained"),
    *[([*words, "model.vae_revision=main"], "model.vae_revision", f"has no effect: model.vae is {what}")
      for words, what in (([], "null"), (["model.vae=."], "a local file or folder"))],
    (["model.pretrained=.", "model.revision=main"], "model.revision", "has no effect: model.pretrained is a local"),
    (["optim.unet_lr=0"], "optim.unet_lr", "must be above 0, because model.train_unet is true"),
    *[([f"model.train_{part}=true"], f"optim.{part}_lr", f"must be above 0, because model.train_{part} is true")
      for part in ("text_encoder_1", "text_encoder_2")],
    *[([f"optim.{part}_lr=1"], f"optim.{part}_lr", f"has no effect: model.train_{part} is false")
      for part in ("text_encoder_1", "text_encoder_2")],
    ([OFF, "model.train_text_encoder_1=true", "optim.text_encoder_1_lr=1"],
     "optim.unet_lr", "has no effect: model.train_unet is false"),
    (["data.global_batch_size=100"], "data.bucket_batch_size", "48 does not divide data.global_batch_size 100"),
    (["data.micro_batch_size=32"], "data.micro_batch_size", "32 does not divide data.bucket_batch_size 48"),
    (["data.loader_threads=0", "data.prefetch_factor=2"], "data.prefetch_factor",
     "has no effect: data.loader_threads is 0"),
    (["data.sources=[]"], "data.sources", "name at least one source"),
    *[([f"data.{other}", "data.sources=[{kind: folder, path: a}]"], "data.sources", "to null beside it")
      for other in ("posts=[a.jsonl]", "images=a")],
    *[([f"data.sources=[{{{source}}}]"], f"data.sources.0.{field}", part) for source, field, part in (
        ("kind: folder, path: a, repeats: 0", "repeats", "must be at least 1, not 0"),
        ("kind: folder, path: /", "name", "must be some text"),
        ("kind: folder, path: a, name: ''", "name", "must be some text"),
        ("kind: folder, path: a, images: b", "images", "has no effect: folder has no images"),
        ("kind: tars, path: a, split: train", "split", "has no effect: tars has no split"),
        ("kind: posts, path: a, images: b, revision: c", "revision", "has no effect: posts has no revision"),
        ("kind: tars, path: a, image_column: b", "image_column", "has no effect: tars has no image_column"),
        ("kind: tars, path: a, strip_prefix: b", "strip_prefix", "has no effect: tars has no strip_prefix"),
        ("kind: folder, path: a, missing_images: ignore", "missing_images", "has no effect: folder has no missing"),
        ("kind: posts, path: a, images: b, strip_prefix: ''", "strip_prefix", "must be some text, or null"),
        ("kind: kohya, path: a, images: b, caption_column: c", "caption_column", "has no effect: kohya has no"),
        ("kind: tars, path: a, more_caption_columns: [c]", "more_caption_columns", "has no effect: tars has no more"),
        ("kind: dataset, path: a, follow_links: true", "follow_links", "has no effect: dataset has no follow_links"),
        ("kind: posts, path: a", "images", "missing: posts needs the folder of its images"),
        ("kind: kohya, path: a", "images", "missing: kohya needs the folder of its images"),
        ("kind: dataset, path: ., name: here, revision: main", "revision", "has no effect: the path is a local"))],
    (["data.sources=[{kind: folder, path: x/a}, {kind: tars, path: y/a}]"],
     "data.sources.1.name", "a is the name of data.sources.0 too"),
    (["run.time_limit=soon"], "run.time_limit", "must be a time such as 11h30m"),
    (["run.step_timeout=600"], "run.step_timeout", "must be a time such as 11h30m"),
    (["data.min_weight=-1"], "data.min_weight", "must be at least 0, not -1"),
    (["data.max_weight=0"], "data.max_weight", "must be above 0, not 0"),
    (["data.max_weight=2000"], "data.max_weight", "must be at most 1000, not 2000"),
    (["data.min_weight=2", "data.max_weight=1"], "data.min_weight", "is above data.max_weight 1"),
    *[([f"data.weights=[{{{rule}}}]"], f"data.weights.0.{field}", part) for rule, field, part in (
        ("factor: -1, rating: e", "factor", "must lie between 0 and 1000, not -1"),
        ("factor: 1, rating: e", "factor", "has no effect: it is 1"),
        ("factor: 2", "factor", "of which images?"),
        ("factor: 2, above: 3", "above", "of which column?"),
        ("factor: 2, column: score", "column", "says nothing yet"),
        ("factor: 2, column: score, equals: a, below: 5", "equals", "needs no below beside it"),
        ("factor: 2, column: score, above: 5, below: 5", "above", "no number is above 5"),
        ("factor: 2, tag: ' '", "tag", "must be some text"),
        ("factor: 2, artist_count_below: 1", "artist_count_below", "must be at least 2, not 1"))],
    *[([f"data.subset_rules=[{{{rule}}}]"], f"data.subset_rules.0.{field}", part) for rule, field, part in (
        ("exclude: true", "tag", "of which images?"),
        ("column: score", "column", "says nothing yet"),
        ("column: score, above: 5, below: 5", "above", "no number is above 5"))],
    (["run.num_processes=4"], "run.num_processes", "4 processes x data.micro_batch_size 16 = 64 does not divide"),
    *[([f"captions.keep_tokens_separator='{text}'"], "captions.keep_tokens_separator", "some text without commas")
      for text in ("", "  ", "a,b")],
    *[([f"captions.{words}"], "captions.keep_tokens_separator", "occurs in the tag") for words in (
        "ratings={g: 'a ||| b'}", "quality=[{tag: 'a|||b'}]", "years=[{first: 2000, last: 2001, tag: 'a|||'}]",
        "columns=[{column: a, tag: '|||', above: 1}]", "keep_tokens_separator=nsfw")],
    (["captions.keep_tokens=1", "captions.shuffle=false"], "captions.keep_tokens", "has no effect without"),
    (["captions.ratings={general: safe}"], "captions.ratings", "is g, s, q or e, never general"),
    (["captions.quality=[{tag: a, min_score: 5}, {tag: b, min_score: 5}]"], "captions.quality", "the same min_score"),
    (["captions.quality=[{tag: a}, {tag: b}]"], "captions.quality", "the same min_score"),
    (["captions.quality=[{tag: a, above_percentile: 5}, {tag: b, above_percentile: 5}]"],
     "captions.quality", "the same min_score or above_percentile"),
    (["captions.quality=[{tag: a, above_percentile: 5}, {tag: b, min_score: 5}]"], "captions.quality", "not both"),
    *[([f"captions.quality=[{{tag: a, above_percentile: {share}}}]"], "captions.quality", "between 0 and 100")
      for share in (0, 100, -1)],
    (["captions.columns=[{column: x, tag: a, above: 1}, {column: x, tag: b, above: 1}]"],
     "captions.columns", "the same above"),
    *[([f"captions.columns=[{rules}]"], "captions.columns", said) for rules, said in (
        ("{column: x, tag: a, above: 1}, {column: x, tag: b, above_percentile: 9}", "either above or above_percentile"),
        ("{column: x, tag: a, above_percentile: 100}", "must lie between 0 and 100"),
        ("{column: x, tag: a, above_percentile: 9, rating: g}, {column: x, tag: b, above_percentile: 9}", "two tags"),
        ("{column: x, tag: a, above: 1, half_life: 3}", "half_life has no effect without"),
        ("{column: x, tag: a, above_percentile: 9, half_life: 0.5}", "half_life must be at least 1 year"),
        ("{column: x, tag: a, above_percentile: 9, half_life: 3}, {column: x, tag: b, above_percentile: 5}",
         "a column has one half_life"))],
    (["captions.template=[]"], "captions.template", "name at least one part"),
    (["captions.template=[{tag: rating}, {tag: rating}]"], "captions.template", "has 2 parts {tag: rating}"),
    *[([f"captions.template=[{{{part}}}]"], f"captions.template.0{key}", message) for part, key, message in (
        ("fixed: true", "", "needs exactly one of tags, tag, column, text and caption"),
        ("tags: meta, text: a", "", "not tags and text at once"),
        ("text: ' '", ".text", "must be some text"),
        ("tags: artist, prefix: 'a, '", ".prefix", "without commas"),
        ("tags: artist, dropout: 1.1", ".dropout", "must lie between 0 and 1, not 1.1"),
        ("tags: artist, tag_dropout: -0.1", ".tag_dropout", "must lie between 0 and 1, not -0.1"),
        ("tags: artist, max_tags: 0", ".max_tags", "must be at least 1, not 0"),
        ("tag: rating, max_tags: 1", ".max_tags", "has no effect on a part of the kind tag"),
        ("caption: natural, tag_dropout: 0.5", ".tag_dropout", "dropout leaves out a caption, which is one"))],
    (["captions.template=[{tags: general}, {column: b}]", "captions.columns=[{column: a, tag: x}]"],
     "captions.columns", "no part of captions.template is {tag: columns} or {column: a}"),
    (["captions.mix={tags: 1.1}"], "captions.mix.tags", "must lie between 0 and 1, not 1.1"),
    (["captions.mix={tags: 0.5, natural: 0.4}"], "captions.mix", "must add up to 1, not 0.9"),
    (["captions.mix={tags: 1}", "captions.template=[{caption: natural}]"], "captions.mix", "a place of its own"),
    (["captions.frequent_tag_dropout=0.5"], "captions.frequent_tag_dropout", "needs captions.frequent_tag_share"),
    (["captions.frequent_tag_share=0.5"], "captions.frequent_tag_dropout", "has no effect without it"),
    (["captions.frequent_tag_dropout=0.5", "captions.frequent_tag_share=1"],
     "captions.frequent_tag_share", "must lie between 0 and 1, not 1"),
    *[([f"captions.{name}=a"], f"captions.{name}", "nothing leaves out single tags")
      for name in ("protected_tags", "protected_tags_file")],
    (["filters.ratings=[g, safe]"], "filters.ratings", "is g, s, q or e, never safe"),
    (["filters.ratings=[]"], "filters.ratings", "an empty list removes everything"),
    (["filters.first_year=2020", "filters.last_year=2019"], "filters.first_year", "is after filters.last_year"),
    (["filters.required_tags=[a_b]", "filters.forbidden_tags=[a b]"], "filters.required_tags", "a b is required and"),
    (["captions.years=[{first: 1, last: 5, tag: a}, {first: 5, last: 6, tag: b}]"], "captions.years", "not overlap"),
    (["captions.years=[{first: 6, last: 5, tag: a}]"], "captions.years", "ends before it begins"),
    *[([f"buckets.step={step}"], "buckets.step", f"must be a multiple of 32, not {step}") for step in (0, 48, -32)],
    (["buckets.base_resolution=1000"], "buckets.base_resolution", "must be a multiple of buckets.step 64, not 1000"),
    (["buckets.min_side=500"], "buckets.min_side", "must be a multiple of buckets.step 64, not 500"),
    (["buckets.min_side=0"], "buckets.min_side", "must be a multiple of buckets.step 64, not 0"),
    (["buckets.max_side=2050"], "buckets.max_side", "must be a multiple of buckets.step 64, not 2050"),
    (["buckets.min_side=1088"], "buckets.base_resolution", "must lie between buckets.min_side and buckets.max_side"),
    (["buckets.max_side=960"], "buckets.base_resolution", "must lie between buckets.min_side and buckets.max_side"),
    (["diffusion.max_timestep=1001"], "diffusion.max_timestep", "must be at most 1000, not 1001"),
    (["diffusion.min_timestep=5", "diffusion.max_timestep=5"], "diffusion.min_timestep", "must be below"),
    (["diffusion.zero_terminal_snr=true"], "diffusion.zero_terminal_snr", "needs prediction_type v_prediction"),
    (["optim.name=adafactor", "optim.eps=null"], "optim.betas", "has no effect with adafactor"),
    (["optim.name=adafactor", "optim.betas=null"], "optim.eps", "has no effect with adafactor"),
    (["optim.betas=null"], "optim.betas", "adamw needs it"),
    (["optim.name=adamw8bit", "optim.eps=null"], "optim.eps", "adamw8bit needs it"),
    *[([f"optim.betas={betas}"], "optim.betas", "two numbers from 0 to below 1")
      for betas in ([0.9], [0.9, 1.0], [-0.1, 0.9], [0.9, 0.9, 0.9], [])],
    (["optim.weight_decay=0", "optim.decay_norms_and_biases=false"],
     "optim.decay_norms_and_biases", "has no effect: optim.weight_decay is 0"),
    (["precision.compute=fp32"], "precision.frozen", "must be fp32 where precision.compute is"),
    (["precision.gradients=bf16"], "precision.gradients", "bf16 has no effect: with autocast"),
    (["precision.compute=fp32", "precision.weights=master"], "precision.weights", "master has no effect"),
    (["precision.weights=stochastic"], "precision.weights", "stochastic needs precision.compute bf16, not fp16"),
    (["precision.weights=master", "precision.gradients=bf16"], "precision.gradients", "must be fp32 where"),
    (["precision.compute=bf16", "precision.weights=master"], "precision.frozen", "must be bf16, as precision.compute"),
    (["schedule.max_steps=5"], "schedule.epochs", "set exactly one of"),
    (["schedule.epochs=null"], "schedule.epochs", "set exactly one of"),
    (["schedule.min_lr_ratio=0.1"], "schedule.min_lr_ratio", "has no effect with a constant rate"),
    (["schedule.num_cycles=2"], "schedule.num_cycles", "has no effect with schedule.lr constant"),
    (["schedule.lr=cosine", "schedule.cycle_gamma=0.9"], "schedule.cycle_gamma", "no effect with schedule.lr cosine"),
    (["schedule.lr=cosine_restarts", "schedule.cycle_gamma=0.9"], "schedule.cycle_gamma", "schedule.num_cycles is 1"),
    (["checkpoint.keep_every_steps=1500"], "checkpoint.keep_every_steps", "a multiple of checkpoint.every_steps 1000"),
    (["sampling.every_steps=100"], "sampling.prompts", "sampling.every_steps is set, but there are no prompts"),
    (["sampling.prompts=[a]"], "sampling.every_steps", "sampling.prompts have no effect"),
    *[([f"sampling.{name}={side}"], f"sampling.{name}", f"must be a multiple of 32, not {side}")
      for name in ("width", "height") for side in (1000, 0, -32)],
    (["publish.formats=[]"], "publish.formats", "name at least one of"),
    *[([f"publish.repo_id={name}"], "publish.repo_id", f"must be owner/name on the Hub, not {name}")
      for name in ("name", "a/b/c", "-a/b", "https://huggingface.co/a/b")],
    (["publish.private=false"], "publish.private", "has no effect: publish.repo_id is null"),
    *[([f"publish.{name}='{address}'"], f"publish.{name}", "must be an https address without a name or")
      for name in ("source_url", "license_link")
      for address in ("example.org", "http://example.org", "https://me:secret@example.org", "https://a.b/c d")],
    *[([f"publish.{name}='see <script>'"], f"publish.{name}", "holds '<script>', which pages neither run nor show")
      for name in ("notes", "acknowledgements")],
]  # fmt: skip


@pytest.mark.parametrize(("words", "key", "part"), RULES, ids=[" ".join(words) for words, _, _ in RULES])
def test_rules(words: list[str], key: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config([], [*MINIMAL, *words])
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert len([line for line in lines if line.startswith(f"{key}: ") and part in line]) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["optim.name=adafactor", "optim.betas=null", "optim.eps=null"],
        ["schedule.lr=cosine_restarts", "schedule.num_cycles=2", "schedule.cycle_gamma=0.9", "schedule.min_lr_ratio=1"],
        ["schedule.epochs=null", "schedule.max_steps=1", "schedule.warmup_steps=0"],
        ["diffusion.zero_terminal_snr=true", "diffusion.prediction_type=v_prediction", "diffusion.min_snr_gamma=5"],
        ["diffusion.min_timestep=999", "diffusion.max_timestep=1000", "diffusion.noise_offset=0.0357"],
        ["captions.keep_tokens=1", "captions.shuffle=false", "captions.tag_dropout=1", "captions.caption_dropout=0"],
        ["sampling.prompts=[a]", "sampling.every_steps=100", "sampling.width=832", "sampling.guidance_scale=1"],
        ["data.loader_threads=0", "run.num_processes=6", "run.seed=0"],
        ["buckets.step=32", "buckets.min_side=1024", "buckets.max_side=1024"],
        ["model.pretrained=owner/name", "model.revision=main", "run.name=_a.B-9"],
        ["model.vae=owner/name", "model.vae_revision=main"],
        ["checkpoint.keep_every_steps=3000", "optim.weight_decay=0", "optim.betas=[0, 0]"],
        ["data.sources=[{kind: folder, path: a, repeats: 1}, {kind: tars, path: a, name: b, repeats: 3}]"],
        [
            "data.sources=[{kind: folder, path: a, lines: variants, follow_links: true},"
            " {kind: dataset, path: b/c, lines: tags}]"
        ],
        [
            "data.sources=[{kind: dataset, path: owner/name, revision: main, split: test, image_column: a,"
            " caption_column: b}, {kind: posts, path: p.jsonl, images: i, missing_images: ignore, caption_column: c},"
            " {kind: kohya, path: m.json, images: i, missing_images: set_aside, strip_prefix: /old}]"
        ],
        [
            "captions.template=[{tags: artist, prefix: 'by ', dropout: 1, tag_dropout: 1, max_tags: 1},"
            " {text: a, dropout: 0.5}, {text: b}, {column: c, fixed: true}, {caption: natural, dropout: 0.5}]",
            "captions.columns=[{column: c, tag: d}]",
            "captions.protected_tags=[solo]",
        ],
        [
            "captions.mix={tags: 0.4, natural: 0.1, tags_natural: 0.25, natural_tags: 0.25}",
            "captions.frequent_tag_dropout=1",
            "captions.frequent_tag_share=0.001",
            "captions.protected_tags_file=a.txt",
        ],
        ["captions.tag_implications=a.csv", "captions.protected_tags=a", "captions.max_token_length=450"],
        [
            "data.weights=[{factor: 0, column: score, above: -3, below: 5, rating: none, tag: '2024'},"
            " {factor: 1000, artist_count_below: 2, character_count_below: 2, copyright_count_below: 9},"
            " {factor: 0.5, column: source, equals: a}]",
            "data.min_weight=1",
            "data.max_weight=1",
        ],
        ["captions.years=[]", "captions.quality=[]", "captions.ratings={}", "captions.people=[]"],
        ["publish.repo_id=owner/name", "publish.private=false", "publish.source_url=https://example.org/a/b"],
        ["publish.repo_id=Owner-1/name.v1_0", "publish.private=true", "publish.license_link=https://example.org"],
    ],
    ids=" ".join,
)
def test_the_borders_of_the_rules_are_allowed(words: list[str]) -> None:
    load_config([], [*MINIMAL, *words])


def test_every_rule_has_a_case() -> None:
    """Each ``yield`` of the rules is reached by one of RULES: a rule without a case fails here."""
    paths = [inspect.getfile(module) for module in (rules, precision_rules, template_rules, weight_rules)]
    trees = {path: ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))) for path in paths}
    yields = {(path, node.lineno) for path, nodes in trees.items() for node in nodes if isinstance(node, ast.Yield)}
    reached: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        if frame.f_code.co_filename not in paths:
            return None
        reached.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    before = sys.gettrace()
    for words, _, _ in RULES:
        resolved: Any = OmegaConf.to_container(OmegaConf.from_dotlist([*MINIMAL, *words]))
        sys.settrace(trace)
        try:
            list(find_config_problems(resolved))
        finally:
            sys.settrace(before)
    assert len(yields) > 30
    assert yields - reached == set()


def test_every_number_of_the_schema_has_a_range() -> None:
    """Each field that is a number is refused somewhere: an unbounded knob fails here, as does a range without case."""
    numbers = {
        f"{section}.{name}"
        for section, hint in typing.get_type_hints(Config).items() if section != "written"
        for name, field in typing.get_type_hints(hint).items() if {int, float} & {field, *typing.get_args(field)}
    }  # fmt: skip
    ranged = {key for *_, keys in rules.RANGES for key in keys.split()}
    told = {key for _, key, part in RULES if part.startswith(("must", "between"))}
    free = {"captions.max_token_length", "filters.min_score"}  # a Literal; any whole number
    assert ranged <= numbers and len(numbers) > 40
    assert numbers - told - free == set()
