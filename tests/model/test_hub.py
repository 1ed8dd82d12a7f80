"""What is fetched from the hub, what is found in the cache, and what a repository of another kind is called."""

from pathlib import Path
from typing import Any

import pytest

from support.tiny_model import random_parts, write_folder
from trainer.core.errors import UserError
from trainer.model import hub
from trainer.model.base import find_base


def offer(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    """A hub whose every repository has files of these names, and no way to download one."""

    class Api:
        def model_info(self, repository: str, revision: str | None, timeout: float | None = None) -> Any:
            return type("Info", (), {"siblings": [type("File", (), {"rfilename": name})() for name in names]})()

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("downloaded"))


def test_a_repository_of_single_files_is_told_before_anything_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, ["README.md", "anime-v3.safetensors", "anime-v3-vae.safetensors"])
    with pytest.raises(UserError, match=r"holds anime-v3-vae\.safetensors, anime-v3\.safetensors: download one"):
        find_base("someone/anime")
    offer(monkeypatch, ["README.md", "model.ckpt"])
    with pytest.raises(UserError, match=r"model_index\.json is missing.*holds no weights"):
        find_base("someone/anime")


def test_a_part_in_the_cache_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preparation fetched the VAE alone, and training begins without network."""
    whole = write_folder(tmp_path / "whole", random_parts(seed=8))
    asked: list[dict[str, Any]] = []

    def download(repository: str, **options: Any) -> str:
        asked.append(options)
        return str(whole)

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub.HfApi, "model_info", fail)
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert find_base("someone/model").path == whole and asked[-1]["local_files_only"]
    for part in ("unet", "text_encoder"):
        for path in (whole / part).glob("*.safetensors"):
            path.unlink()
    with pytest.raises(
        UserError, match=r"holds only a part of someone/model \(unet, text_encoder is missing\).*no route"
    ):
        find_base("someone/model")
    assert find_base("someone/model", parts=("vae",)).path == whole


def test_one_file_is_found_in_the_cache_without_asking_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, [])
    assert hub.find_cached("not a hub id", None, "vae/config.json") is None
    assert hub.find_cached("someone/that-nobody-fetched", None, "vae/config.json") is None
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: str(tmp_path / "config.json"))
    assert hub.find_cached("someone/model", "v1", "vae/config.json") == tmp_path / "config.json"
