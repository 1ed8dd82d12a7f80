"""One lock for runs and preparations: who holds it, who shares it, and that it ends with its process."""

import errno
import fcntl
import json
from pathlib import Path
from socket import gethostname

import pytest

from support.locks import held_by_another_process
from trainer.core import locks
from trainer.core.errors import UserError
from trainer.core.locks import describe_holder, hold_lock


def test_a_held_file_is_refused_with_the_caller_s_words(tmp_path: Path) -> None:
    with (
        held_by_another_process(tmp_path / "lock") as holder,
        pytest.raises(UserError, match=rf"busy here \(held by -c, process {holder.pid} on {gethostname()}, since 20"),
        hold_lock(tmp_path / "lock", "busy here"),
    ):
        pass
    with hold_lock(tmp_path / "lock", "busy here"):
        pass


def test_shared_locks_go_together_and_keep_others_out(tmp_path: Path) -> None:
    with held_by_another_process(tmp_path / "lock", shared=True):
        with hold_lock(tmp_path / "lock", "busy", shared=True):
            pass
        with pytest.raises(UserError, match="busy"), hold_lock(tmp_path / "lock", "busy"):
            pass


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    with held_by_another_process(tmp_path / "lock") as process:
        process.kill()
        process.wait()
        with hold_lock(tmp_path / "lock", "busy"):
            pass


def test_of_another_machine_it_says_what_to_do_when_that_is_gone(tmp_path: Path) -> None:
    holder = {"host": "node7", "pid": 12, "started": "2026-01-01 10:00:00", "what": "train.py"}
    (tmp_path / "lock").write_text(json.dumps(holder))
    with (tmp_path / "lock").open("rb") as file:
        assert describe_holder(file).startswith(
            " (held by train.py, process 12 on node7, since 2026-01-01 10:00:00; if"
        )
    for text in ("", "[]", "{}", "{", '"x"', "\xff"):  # older versions, and what was cut
        (tmp_path / "lock").write_text(text, encoding="latin-1")
        with (tmp_path / "lock").open("rb") as file:
            assert describe_holder(file) == ""


def test_a_lock_that_was_given_back_says_nothing(tmp_path: Path) -> None:
    with hold_lock(tmp_path / "lock", "busy"):
        assert json.loads((tmp_path / "lock").read_text())["host"] == gethostname()
    assert (tmp_path / "lock").read_text() == ""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "no locks")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with (
        pytest.raises(UserError, match=r"cannot be locked \(no locks\).* lockd must run"),
        hold_lock(tmp_path / "a", "busy"),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "local"),
    [("rw,vers=3,nolock,addr=1.2.3.4", True), ("rw,vers=4.2,local_lock=none", False), ("rw,local_lock=all", True),
     ("rw,localflock", True), ("rw,flock", False)],
)  # fmt: skip
def test_locks_of_one_machine_only_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, local: bool
) -> None:
    device = tmp_path.stat().st_dev
    line = f"36 35 {locks.os.major(device)}:{locks.os.minor(device)} / /runs rw shared:1 - nfs server:/runs {options}\n"
    (tmp_path / "mountinfo").write_text(line)
    monkeypatch.setattr(locks, "MOUNTS", tmp_path / "mountinfo")
    assert locks.locks_are_local(tmp_path / "lock") == local
