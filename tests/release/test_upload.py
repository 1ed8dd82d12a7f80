"""The upload, from a process of its own, against a small Hub on loopback: all or nothing, and nothing twice."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fake_hub import TOKEN, Hub, Repo, run_hub
from support.paths import REPOSITORY

CARD = "---\nlicense: other\nlicense_name: faipl-1.0-sd\n---\n\n# A model\n"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with run_hub() as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with small files and large ones, as far as the Hub is concerned."""
    made = tmp_path / "model"
    (made / "unet").mkdir(parents=True)
    (made / "README.md").write_text(CARD)
    (made / "model.safetensors").write_bytes(b"weights" * 1000)
    (made / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"unet" * 1000)
    (made / "unet" / "config.json").write_text("{}")
    return made


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def environment(tmp_path: Path, url: str, token: str | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    kept |= {
        "HF_ENDPOINT": url,
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    return kept | ({} if token is None else {"HF_TOKEN": token})


def command(folder: Path, private: bool, replace: bool) -> list[str]:
    words = ["private" if private else "public", "replace" if replace else "keep"]
    return [sys.executable, str(REPOSITORY / "tests/support/upload_driver.py"), str(folder), "owner/model", *words]


def upload(
    folder: Path, url: str, *, token: str | None = TOKEN, private: bool = True, replace: bool = False
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(folder, private, replace), env=environment(folder.parent, url, token), capture_output=True, text=True
    )
    assert TOKEN not in done.stdout + done.stderr and "Traceback" not in done.stderr
    return done


def published(hub: Hub) -> dict[str, bytes]:
    """The repository's files but the Hub's own."""
    return {name: content for name, content in hub.repos["owner/model"].files.items() if name != ".gitattributes"}


def test_a_folder_is_published_once_and_stays_private(hub: Hub, folder: Path) -> None:
    done = upload(folder, hub.url)
    assert (done.returncode, done.stdout.strip()) == (0, f"{hub.url}/owner/model"), done.stderr
    assert published(hub) == files_of(folder)
    repo = hub.repos["owner/model"]
    assert repo.private and not repo.seen_public and len(repo.commits) == 2
    again = upload(folder, hub.url)
    assert again.returncode == 0 and len(repo.commits) == 2
    assert hub.requests.count("commit") == 1 and hub.requests.count("put") == 2 and "validate" in hub.requests


def test_it_becomes_public_only_when_it_is_whole(hub: Hub, folder: Path) -> None:
    assert upload(folder, hub.url, private=False).returncode == 0
    repo = hub.repos["owner/model"]
    assert not repo.private and repo.seen_public == [{*files_of(folder), ".gitattributes"}]


@pytest.mark.parametrize(
    "kind", ["info", "create", "tree", "validate", "preupload", "batch", "put", "commit", "settings"]
)
def test_two_failures_of_the_hub_do_not_matter(hub: Hub, folder: Path, kind: str) -> None:
    hub.failures[kind] = [500, 500]
    done = upload(folder, hub.url, private=False)
    assert done.returncode == 0 and not hub.repos["owner/model"].private, done.stderr
    assert published(hub) == files_of(folder) and len(hub.repos["owner/model"].commits) == 2


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: Hub, folder: Path) -> None:
    hub.lose_answer = True
    assert upload(folder, hub.url).returncode == 0
    assert published(hub) == files_of(folder) and len(hub.repos["owner/model"].commits) == 2


def test_a_hub_that_stays_broken_leaves_nothing_half(hub: Hub, folder: Path) -> None:
    hub.failures["commit"] = [503] * 20
    done = upload(folder, hub.url)
    assert (
        done.returncode == 2
        and "the upload to owner/model did not finish, and nothing of it is half there" in done.stderr
    )
    assert published(hub) == {}


def test_what_the_hub_refuses_is_not_tried_again(hub: Hub, folder: Path) -> None:
    """As when somebody else committed in between: the commit names its parent."""
    hub.failures["commit"] = [412]
    done = upload(folder, hub.url)
    assert done.returncode == 2 and "did not finish" in done.stderr
    assert published(hub) == {} and hub.requests.count("commit") == 1


@pytest.mark.parametrize("kind", ["put", "commit"])
def test_a_process_killed_in_the_middle_leaves_nothing_half(hub: Hub, folder: Path, kind: str) -> None:
    hub.holding = kind
    process = subprocess.Popen(
        command(folder, True, False), env=environment(folder.parent, hub.url, TOKEN), stderr=subprocess.DEVNULL
    )
    assert hub.held.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert published(hub) == {} and hub.repos["owner/model"].private
    hub.release.set()
    sent = len(hub.store)
    assert upload(folder, hub.url).returncode == 0
    assert published(hub) == files_of(folder)
    assert sent == (2 if kind == "commit" else 0)
    if kind == "commit":
        assert hub.requests.count("put") == 2  # what was there was not sent again


@pytest.mark.parametrize(("token", "part"), [("hf_" + "w" * 34, "does not let this token write"), (None, "no token")])
def test_a_wrong_or_missing_token_is_told_and_not_shown(hub: Hub, folder: Path, token: str | None, part: str) -> None:
    done = upload(folder, hub.url, token=token)
    assert done.returncode == 2 and part in done.stderr and "hf auth login" in done.stderr
    assert "w" * 34 not in done.stderr and hub.repos == {}


def test_a_repository_with_other_files_is_left_alone_unless_asked(hub: Hub, folder: Path) -> None:
    repo = hub.repos["owner/model"] = Repo(private=True)
    repo.files |= {"README.md": b"another model", "old.safetensors": b"old", "unet/config.json": b"{}"}
    before = dict(repo.files)
    done = upload(folder, hub.url)
    assert done.returncode == 2 and "holds other files already (README.md, old.safetensors)" in done.stderr
    assert repo.files == before and len(repo.commits) == 1
    assert upload(folder, hub.url, replace=True).returncode == 0
    assert published(hub) == files_of(folder) and len(repo.commits) == 2


def test_an_empty_repository_is_filled(hub: Hub, folder: Path) -> None:
    hub.repos["owner/model"] = Repo(private=True)
    assert upload(folder, hub.url).returncode == 0
    assert published(hub) == files_of(folder) and "create" not in hub.requests


def test_a_public_repository_is_not_used_for_what_should_be_private(hub: Hub, folder: Path) -> None:
    hub.repos["owner/model"] = Repo(private=False)
    done = upload(folder, hub.url)
    assert done.returncode == 2 and "owner/model is public, but publish.private is true" in done.stderr
    assert published(hub) == {}
    assert upload(folder, hub.url, private=False).returncode == 0
    assert published(hub) == files_of(folder)


def test_a_header_that_the_hub_refuses_is_told(hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text(CARD.replace("faipl-1.0-sd", "my licence!"))
    done = upload(folder, hub.url)
    assert done.returncode == 2 and "Invalid metadata in README.md" in done.stderr and published(hub) == {}


def test_offline(folder: Path) -> None:
    with run_hub() as hub:
        address = hub.url
    done = upload(folder, address)
    assert done.returncode == 2 and "the upload to owner/model did not finish" in done.stderr
