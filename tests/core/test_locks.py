"""One lock for runs and preparations: who holds it, who shares it, and that it ends with its process."""

from pathlib import Path

import pytest

from support.locks import held_by_another_process
from trainer.core.errors import UserError
from trainer.core.locks import hold_lock


def test_a_held_file_is_refused_with_the_caller_s_words(tmp_path: Path) -> None:
    with (
        held_by_another_process(tmp_path / "lock"),
        pytest.raises(UserError, match="busy here"),
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
