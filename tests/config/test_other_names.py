"""Names of other training programs, and of other sections, are answered with ours."""

import re
from pathlib import Path

import pytest

from trainer.config.command_line import parse_command_line
from trainer.config.load import load_config
from trainer.config.other_names import OTHER_NAMES, own_keys
from trainer.core.errors import UserError

MINIMAL = [
    "run.name=tiny", "run.stage=test", "model.pretrained=base", "data.shards=shards", "optim.unet_lr=1e-6",
    "schedule.epochs=1",
]  # fmt: skip


def problem_of(word: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config([], [*MINIMAL, word])
    (line,) = str(caught.value).splitlines()[1:]
    return line.strip()


def test_every_name_leads_to_fields_that_there_are() -> None:
    for name, (keys, note) in OTHER_NAMES.items():
        assert set(keys.split()) <= set(own_keys()), name
        assert keys or note, name
        assert re.fullmatch(r"[a-z0-9_]+", name), name
        # a field of ours that is called so wins, unless it stands in a section where nobody looks for it
        ours = [key for key in own_keys() if key.endswith(f".{name}")]
        assert ours in ([], keys.split()) or name == "lr", name


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("learning_rate=1e-5", "learning_rate: unknown key, here it is optim.unet_lr, optim.text_encoder_1_lr and "
         "optim.text_encoder_2_lr (one for each part that is trained)"),
        ("optim.lr=1e-5", "optim.lr: unknown key, here it is optim.unet_lr, optim.text_encoder_1_lr and "
         "optim.text_encoder_2_lr (one for each part that is trained)"),
        ("train_batch_size=4", "train_batch_size: unknown key, here it is data.micro_batch_size (of one process; "
         "micro-batches are accumulated until data.global_batch_size samples make a step)"),
        ("data.batch_size=4", "data.batch_size: unknown key, here it is data.micro_batch_size (of one process; "
         "micro-batches are accumulated until data.global_batch_size samples make a step)"),
        ("resolution=1024,1024", "resolution: unknown key, here it is buckets.base_resolution (one side in pixels, "
         "such as 1024)"),
        ("cache_latents=true", "cache_latents: unknown key: latents are always made before, by "
         "scripts/build_shards.py: leave it out"),
        ("v_parameterization=true", "v_parameterization: unknown key, here it is diffusion.prediction_type "
         "(v_prediction)"),
        ("output_name=a", "output_name: unknown key, here it is run.name"),
        ("text_encoder_lr=1e-6", "text_encoder_lr: unknown key, here it is optim.text_encoder_1_lr and "
         "optim.text_encoder_2_lr (with model.train_text_encoder_1 and _2)"),
        ("data.sources=[{kind: folder, path: a, num_repeats: 2}]", "data.sources.0.num_repeats: unknown key, here it "
         "is data.sources (repeats of the entry; the number in a folder's name, as in 10_name, is not read)"),
        # keys of ours, in another place
        ("optim.epochs=3", "optim.epochs: unknown key, did you mean schedule.epochs?"),
        ("seed=3", "seed: unknown key, did you mean run.seed?"),
        ("unet_lr=1e-5", "unet_lr: unknown key, did you mean optim.unet_lr?"),
        ("gradient_checkpointing=true", "gradient_checkpointing: unknown key, here it is memory.policy (full, or none "
         "for none)"),
        ("noise_offset=0.03", "noise_offset: unknown key, did you mean diffusion.noise_offset?"),
        ("data.every_steps=3", "data.every_steps: unknown key, did you mean checkpoint.every_steps or "
         "logging.every_steps or sampling.every_steps?"),
        ("extends=a", "extends: unknown key: it stands at the top of a config file; on the command line several files "
         "may be given"),
        # misspelt
        ("data.shard=x", "data.shard: unknown key, did you mean shards?"),
        ("optm.unet_lr=1", "optm: unknown key, did you mean optim?"),
        ("data.zzz=1", "data.zzz: unknown key"),
    ],
)  # fmt: skip
def test_a_key_is_answered_with_ours(word: str, problem: str) -> None:
    assert problem_of(word) == problem


def test_in_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("optimizer: {type: AdamW}\nsave_every_n_steps: 5\nmodel: {pretrained_model_name_or_path: a}\n")
    with pytest.raises(UserError) as caught:
        load_config([file])
    message = str(caught.value)
    for part in (
        "optimizer: unknown key, here it is optim.name (adamw, adamw8bit or adafactor)",
        "save_every_n_steps: unknown key, here it is checkpoint.every_steps (in optimizer steps)",
        "model.pretrained_model_name_or_path: unknown key, here it is model.pretrained\n",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train_batch_size", "4"], "  --train_batch_size: unknown word, here it is data.micro_batch_size (of one"),
        (["--train_batch_size=4"], "  --train_batch_size=4: unknown word, here it is data.micro_batch_size (of one"),
        (["--max-train-steps", "4"], "  --max-train-steps: unknown word, here it is schedule.max_steps (in optimizer"),
        (["--optim.unet_lr=1e-4"], "  --optim.unet_lr=1e-4: write optim.unet_lr=value, without dashes"),
        (["--unet_lr", "1e-4"], "  --unet_lr: unknown word, did you mean optim.unet_lr?"),
        (
            ["--config_file", "x.toml"],
            "  --config_file: unknown word: config files are YAML and named without",
        ),
        (["--xformers"], "  --xformers: unknown word, here it is model.attention (xformers)"),
        (["learning_rate"], "  learning_rate: unknown word, here it is optim.unet_lr, optim."),
        (["--zzz"], "a field of a config is set as section.field=value; --help-config shows all"),
    ],
)
def test_an_option_is_answered_with_ours(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command_line("test", ["my.yaml", *words])
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and f"unrecognized arguments: {' '.join(words)}\n" in printed
    assert f"\n{said}" in printed
