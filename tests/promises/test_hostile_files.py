"""P12, and P4: what files of strangers may be beside what they say: pipes, devices, links, bombs, and names of runs."""

import gzip
import io
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from trainer.config.load import load_config
from trainer.config.schema import BucketsConfig, CaptionsConfig
from trainer.core.errors import UserError
from trainer.core.json_text import BrokenJson, decode_json, read_json
from trainer.core.layout import CHECKPOINT_FILE, piece_name
from trainer.data.buckets import fit_image
from trainer.data.images import BadImage, read_image_header, read_pixels
from trainer.data.manifest import find_manifest_problems
from trainer.data.sources.record_files import iterate_records
from trainer.data.tag_maps import follow_aliases, read_tag_maps
from trainer.data.tokens import EOS_TOKEN, load_tokenizer
from trainer.model.checkpoint import DamagedCheckpoint, read_train_state, seal
from trainer.model.weights_file import LazyFile
from trainer.release.licence import read_terms


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """What hangs is ended."""
    signal.alarm(20)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("how", ["pipe", "device"])
def test_no_pipe_is_waited_for(tmp_path: Path, how: str) -> None:
    for name in ("config.json", "model.safetensors", "p.parquet"):
        os.mkfifo(tmp_path / name) if how == "pipe" else (tmp_path / name).symlink_to("/dev/zero")
    for read in (
        lambda: read_json(tmp_path / "config.json"),
        lambda: LazyFile(tmp_path / "model.safetensors"),
        lambda: list(iterate_records(tmp_path / "p.parquet")),
        lambda: read_tag_maps(CaptionsConfig(tag_removals=str(tmp_path / "config.json"))),
    ):
        with pytest.raises(UserError, match="regular file"):
            read()


def test_a_key_twice_among_many() -> None:
    with pytest.raises(BrokenJson, match="twice"):
        decode_json("{" + "".join(f'"k{n}":0,' for n in range(200_000)) + '"k199999":0}')


def test_long_chains_of_tags(tmp_path: Path) -> None:
    chain = {f"t{n}": f"t{n + 1}" for n in range(20_000)}
    assert set(follow_aliases(chain).values()) == {"t20000"}
    with pytest.raises(UserError, match="circle"):
        follow_aliases(chain | {"t20000": "t5"})
    table = tmp_path / "i.csv"
    table.write_text("antecedent_name,consequent_name\n" + "".join(f"{a},{b}\n" for a, b in chain.items()))
    with pytest.raises(UserError, match="implies more than"):
        read_tag_maps(CaptionsConfig(tag_implications=str(table)))


@pytest.mark.parametrize("text", [
    "a: " + "[" * 5000 + "]" * 5000, "run: {seed: !!int x}", "run: {seed: !!bool x}", "run: {name: !!timestamp x}",
    f"schedule: {{max_steps: {'9' * 5000}}}", f"optim: {{unet_lr: {'9' * 400}}}",
    "data: {shards: !!python/object/apply:pathlib.PosixPath [{}]}", "extends: a.yaml", "extends: [b.yaml, b.yaml]",
    "extends: " + "a" * 5000,
])  # fmt: skip
def test_configs_that_make_no_sense(tmp_path: Path, text: str) -> None:
    for number in range(18):
        (tmp_path / f"{number}.yaml").write_text(f"extends: [{number + 1}.yaml, {number + 1}.yaml]\n")
    (tmp_path / "18.yaml").write_text("run: {name: a}\n")
    (tmp_path / "b.yaml").write_text("extends: 0.yaml\n")
    (tmp_path / "a.yaml").symlink_to("a.yaml")
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(UserError):
        load_config([tmp_path / "my.yaml"])


def test_a_row_of_many_lines_is_bounded(tmp_path: Path) -> None:
    """Of a small compressed file, whose one cell goes on over line after line."""
    with gzip.open(tmp_path / "posts.csv.gz", "wt") as file:
        file.write('id,tags\n1,"')
        for _ in range(40):
            file.write(("a" * 1_000_000 + "\n") * 10)
        file.write('"\n')
    with pytest.raises(UserError, match="a row is longer than"):
        list(iterate_records(tmp_path / "posts.csv.gz"))


def test_scans_of_an_image_are_bounded() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, format="JPEG", progressive=True)
    scan = buffer.getvalue()
    place = scan.index(b"\xff\xda")
    data = scan[:place] + scan[place:-2] * 600
    with pytest.raises(BadImage, match="more than 500 scans"):
        read_pixels(data, fit_image(read_image_header(data), **asdict(BucketsConfig())))


def test_a_set_of_many_shards_is_looked_at_at_once() -> None:
    shard = {"name": "shard-00000.tar", "size": 1, "samples": 1, "sha256": "ab"}
    shards = [{**shard, "name": f"shard-{number:05d}.tar"} for number in range(60_000)]
    found = list(find_manifest_problems({"latents": {}, "shards": [*shards, shards[7]]}))
    assert "shards lists shard-00007.tar twice" in found


@pytest.mark.parametrize(
    "entry", [{}, [], 7, {"sha256": "ab"}, {"sha256": 5, "size": 1}, {"sha256": "ab", "size": "1"}]
)
def test_a_checkpoint_says_hash_and_size_of_its_files(tmp_path: Path, entry: object) -> None:
    files = {piece_name(kind, 1): entry for kind in ("model", "optimizer")}
    record = {"format_version": 2, "name": "step-00000001", "step": 1, "files": files}
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / CHECKPOINT_FILE).write_bytes(seal(record))
    with pytest.raises(DamagedCheckpoint, match="it says no hash and size of model-00001"):
        read_train_state(tmp_path / "step-00000001")


def test_no_text_of_others_is_taken_for_a_licence(tmp_path: Path) -> None:
    (tmp_path / "private.txt").write_text("mine")
    base = tmp_path / "base"
    base.mkdir()
    (base / "LICENSE.md").symlink_to(tmp_path / "private.txt")
    with pytest.raises(UserError, match=r"is a link to .*private\.txt, which is not the model's"):
        read_terms(base, "x")
    (base / "LICENSE.md").unlink()
    with (base / "LICENSE.md").open("wb") as file:
        file.truncate(2**32)
    with pytest.raises(UserError, match="is no licence's text: it has 4,294,967,296 bytes"):
        read_terms(base, "x")
    blobs, snapshot = tmp_path / "models--o--n/blobs", tmp_path / "models--o--n/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "1").write_text("terms")
    (snapshot / "LICENSE.md").symlink_to("../../blobs/1")
    assert read_terms(snapshot, "x").texts == {"LICENSE.md": "terms"}


def test_ids_of_tokens_that_no_embedding_has_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    """As many as the encoder knows, but one of them lies beyond: on a GPU that would be an assertion of a kernel."""
    folder = Path(shutil.copytree(tiny_base / "tokenizer", tmp_path / "tokenizer"))
    vocab = json.loads((folder / "vocab.json").read_text())
    word = next(token for token, number in vocab.items() if 10 < number < len(vocab) - 10)
    (folder / "vocab.json").write_text(json.dumps(vocab | {word: vocab[word] + len(vocab)}))
    with pytest.raises(UserError, match=r"has the id [0-9]+, but its text encoder knows"):
        load_tokenizer(folder, len(vocab), EOS_TOKEN)
    (folder / "vocab.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab, "merges": 5}}))
    with pytest.raises(UserError, match="must be pairs of tokens"):
        load_tokenizer(folder, len(vocab), EOS_TOKEN)
