"""A device that is slower than the host: what it is given, and when its latents are read."""

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from support.fatal_place import KilledPath
from support.posts_on_disk import hashes, make_base, make_config, make_posts, read_jsonl, run
from trainer.config.schema import Config
from trainer.core.errors import UserError
from trainer.data.index import open_index
from trainer.data.post import ImagePlace
from trainer.prepare import encode as encoding
from trainer.prepare.decode import Decoders

POSTS = 17


class SlowDevice:
    """Latents reach the host when their event is waited for, not before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spoil: int | None = None) -> None:
        self.events: list[tuple[str, int]] = []
        self.launched, self.spoil = 0, spoil
        self.real = encoding.encode_raw_latents
        monkeypatch.setattr(encoding, "encode_raw_latents", self.encode)
        monkeypatch.setattr(encoding, "send_to_host", self.send)

    def encode(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        self.events.append(("launch", self.launched))
        return self.real(vae, pixels) * (float("nan") if self.launched == self.spoil else 1)

    def send(self, latents: torch.Tensor) -> tuple[torch.Tensor, Any]:
        number, on_host = self.launched, torch.full_like(latents, 7.0)
        self.launched += 1

        class Event:
            def synchronize(_) -> None:
                self.events.append(("read", number))
                on_host.copy_(latents)

        return on_host, Event()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Posts, one of them broken, whose set was made where the host waits for each image."""
    folder = tmp_path_factory.mktemp("whole")
    make_posts(folder / "posts", POSTS)
    (folder / "posts" / "images" / "12.png").write_text("404 not found")
    config = make_config(make_base(folder / "base"), folder / "posts", max_bad_fraction=0.2, samples_per_shard=6)
    run(config)
    return config


def elsewhere(config: Config, folder: Path, **data: Any) -> Config:
    return replace(config, data=replace(config.data, shards=str(folder / "shards"), **data))


@pytest.mark.parametrize("batch", [1, 3])
def test_latents_are_read_when_the_next_batch_is_launched(
    whole: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    usual = elsewhere(whole, tmp_path / "usual", encode_batch_size=batch)
    run(usual)
    device = SlowDevice(monkeypatch)
    config = elsewhere(whole, tmp_path / "slow", encode_batch_size=batch)
    run(config)
    assert hashes(Path(config.data.shards)) == hashes(Path(usual.data.shards))
    launches = [number for what, number in device.events if what == "launch"]
    assert [number for what, number in device.events if what == "read"] == launches == list(range(device.launched))
    ahead = [
        number for number in launches[:-1]
        if device.events.index(("launch", number + 1)) < device.events.index(("read", number))
    ]  # fmt: skip
    # all but the last of each of three chunks, and with one at a time that before the broken image
    assert len(ahead) >= device.launched - 4
    on_device = list(accumulate({"launch": 1, "read": -1}[what] for what, _ in device.events))
    assert max(on_device) == 2 and on_device[-1] == 0


def test_what_is_set_aside_stays_in_order_and_stops_a_chunk_before_it_counts(
    whole: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image before the broken one, and the last of a chunk, which is read after all images of it were looked at."""
    keys = sorted(str(number) for number in range(1, POSTS + 1))
    launched = keys.index("12") - 1  # one before it
    SlowDevice(monkeypatch, spoil=launched)
    config = elsewhere(whole, tmp_path / "order")
    assert run(config).set_aside == {"non_finite_latents": 1, "not_an_image": 1}
    listed = [line["key"] for line in read_jsonl(Path(config.data.shards) / "quarantine.jsonl")]
    assert listed == [keys[launched], "12"]
    monkeypatch.undo()
    SlowDevice(monkeypatch, spoil=4)  # the sixth image of the first chunk, one of which is broken
    config = elsewhere(whole, tmp_path / "stopped", max_bad_fraction=0.06)
    with pytest.raises(UserError, match="2 of 17 inputs are set aside"):
        run(config)
    assert list(Path(f"{config.data.shards}.unfinished", "rows").iterdir()) == []


def test_images_are_looked_at_across_the_ends_of_chunks(
    whole: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that kills its process in the next chunk costs itself alone, and all is looked at in one stretch."""
    stretches: list[int] = []
    real, read_place = Decoders.look_at, encoding.read_place

    def look_at(pool: Decoders, tasks: Any) -> Any:
        stretches.append(1)
        return real(pool, tasks)

    def read_fatal(struct: dict[str, Any]) -> ImagePlace:
        place = read_place(struct)
        return ImagePlace(KilledPath(place.path)) if place.path.stem == "14" else place  # of the second chunk

    monkeypatch.setattr(Decoders, "look_at", look_at)
    monkeypatch.setattr(encoding, "read_place", read_fatal)
    config = elsewhere(whole, tmp_path / "killed", samples_per_shard=5)
    assert run(config).set_aside == {"not_an_image": 1, "killed_decoder": 1} and stretches == [1]
    shards = open_index(config.data.shards).table.select(["key", "shard"]).to_pylist()
    expected = sorted(str(number) for number in range(1, POSTS + 1))
    assert [row["key"] for row in shards] == [key for key in expected if key not in ("12", "14")]
    assert [int(row["shard"][-5]) for row in shards] == [
        number // 5 for number, key in enumerate(expected) if key not in ("12", "14")
    ]
