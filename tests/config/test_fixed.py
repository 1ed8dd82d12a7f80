"""What may change on resume stands beside each field; checkpoints of older versions lack the fields that came later."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from trainer.config.fixed import describe_fixed, fixed_values
from trainer.config.load import load_config
from trainer.config.schema import Config, free
from trainer.core.errors import UserError
from trainer.train.resume import GUARDED, REMEDY, check_config, check_inputs

WORDS = ["run.name=a", "run.stage=s", "model.pretrained=x", "data.shards=s", "optim.unet_lr=1e-3", "schedule.epochs=2",
         "data.global_batch_size=4", "data.bucket_batch_size=4", "data.micro_batch_size=2"]  # fmt: skip
SOURCES = "data.sources=[{kind: folder, path: one}, {kind: tars, path: two, name: t}]"


def config_of(*words: str) -> Config:
    return load_config([], [*WORDS, *words])


def state_of(config: Config, **changes: Any) -> dict[str, Any]:
    return {"config": config.written, "fixed": describe_fixed(config)} | changes


def check(before: dict[str, Any], *words: str) -> None:
    check_config(Path("c"), before, describe_fixed(config_of(*words)))


FREE_WORDS = [
    "run.output_dir=elsewhere", "run.stage=t", "run.num_processes=2", "model.pretrained=y", "model.revision=main",
    "model.vae=v", "model.tokenizer=t", "model.attention=xformers", "model.compile=true",
    "data.shards=moved", "data.posts=[p.jsonl]", "data.images=i", "data.max_bad_fraction=0.5",
    "data.micro_batch_size=1", "data.loader_threads=9", "data.decode_processes=9", "data.prefetch_factor=3",
    "schedule.epochs=3", "memory.policy=none",
    "checkpoint.every_steps=7", "logging.every_steps=1", "sampling.num_inference_steps=3", "publish.title=t",
    "publish.base_only=true", "publish.notes=n", "publish.acknowledgements=a",
]  # fmt: skip
FIXED_WORDS = {
    "run.seed=2": "run.seed: 42 in the checkpoint, 2 now",
    "data.global_batch_size=8": "data.global_batch_size: 4 in the checkpoint, 8 now",
    "schedule.lr=cosine": "schedule.lr: 'constant' in the checkpoint, 'cosine' now",
    "optim.unet_lr=2e-3": "optim.unet_lr: 0.001 in the checkpoint, 0.002 now",
    "captions.tag_dropout=0.1": "captions.tag_dropout: 0.0 in the checkpoint, 0.1 now",
}


@pytest.mark.parametrize("word", FREE_WORDS)
def test_what_may_change(word: str) -> None:
    now = describe_fixed(config_of(*(["data.images=i"] if word.startswith("data.posts") else []), word))
    check_config(Path("c"), state_of(config_of()), now)


@pytest.mark.parametrize("word", FIXED_WORDS)
def test_what_may_not_change_is_named_with_both_values(word: str) -> None:
    with pytest.raises(UserError) as error:
        check(state_of(config_of()), word)
    assert FIXED_WORDS[word] in str(error.value)


def test_where_a_source_lies_is_free_and_what_it_is_is_not() -> None:
    before = state_of(config_of(SOURCES))
    check(before, "data.sources=[{kind: folder, path: moved, name: o}, {kind: tars, path: to}]")
    with pytest.raises(UserError, match=r"data\.sources"):
        check(before, "data.sources=[{kind: folder, path: one, repeats: 2}, {kind: tars, path: two, name: t}]")


def test_the_length_is_fixed_where_the_rate_depends_on_it() -> None:
    with pytest.raises(UserError, match=r"schedule.epochs: 2 in the checkpoint, 3 now"):
        check(state_of(config_of("schedule.lr=cosine")), "schedule.lr=cosine", "schedule.epochs=3")


def test_a_field_that_an_older_version_lacked_has_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field is taken out of the old config in turn, as if this version had brought it."""
    written = config_of().written
    for section, values in written.items():
        for name in values:
            old = copy.deepcopy(written)
            field = Config.__dataclass_fields__[section].type.__dataclass_fields__[name]
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required or values[name] != vars(getattr(config_of(), section))[name]:
                continue
            del old[section][name]
            if fixed_values(old) != fixed_values(written):  # then this run sets it to another value than the default
                with pytest.raises(UserError, match=name):
                    check({"config": old})
            else:
                check({"config": old})


def test_a_key_that_is_no_longer_fixed_is_not_compared() -> None:
    before = state_of(config_of())
    before["fixed"]["values"]["model.pretrained"] = "as another version recorded it"
    check(before)


def test_another_environment_is_noticed_without_storing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    word = "captions.keep_tokens_separator=${oc.env:SEPARATOR}"
    monkeypatch.setenv("SEPARATOR", "first-secret")
    before = state_of(config_of(word))
    assert "first-secret" not in str(before)
    check(before, word)
    monkeypatch.setenv("SEPARATOR", "second")
    with pytest.raises(UserError, match=r"environment variable.*captions\.keep_tokens_separator"):
        check(before, word)


def test_a_free_path_may_come_from_another_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISK", "one")
    before = state_of(config_of("data.shards=${oc.env:DISK}"))
    assert before["fixed"]["digest"] is None
    monkeypatch.setenv("DISK", "two")
    check(before, "data.shards=${oc.env:DISK}")


def test_a_length_and_a_rate_that_come_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["schedule.lr=${oc.env:RATE}", "schedule.epochs=${oc.decode:${oc.env:EPOCHS}}"]
    monkeypatch.setenv("RATE", "constant")
    monkeypatch.setenv("EPOCHS", "2")
    before = state_of(config_of(*words))
    monkeypatch.setenv("EPOCHS", "3")  # under a constant rate the length is free
    check(before, *words)
    monkeypatch.setenv("RATE", "cosine")
    with pytest.raises(UserError, match="schedule"):
        check(before, *words)


def test_what_the_run_reads_is_compared_by_hashes() -> None:
    facts = {"index_fingerprint": "i", "base": {"sha256": "b"}, "vae_sha256": "v", "tokenizers_sha256": "t"}
    check_inputs(Path("c"), facts, facts, GUARDED, REMEDY)
    check_inputs(
        Path("c"), {key: value for key, value in facts.items() if key != "tokenizers_sha256"}, facts, GUARDED, REMEDY
    )
    changes = {"index_fingerprint": "j", "base": {"sha256": "c"}, "vae_sha256": "w", "tokenizers_sha256": "u"}
    for key, other in changes.items():
        with pytest.raises(UserError, match="was made with another"):
            check_inputs(Path("c"), facts, facts | {key: other}, GUARDED, REMEDY)


def test_free_fields_are_fields() -> None:
    assert free(3).default == 3 and free().default is dataclasses.MISSING
