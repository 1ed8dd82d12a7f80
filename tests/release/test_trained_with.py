"""An export says of the model what it was trained to be; what changed since is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.checkpoints import change_record
from support.exported_run import Parts, make_run, moved_weights
from trainer.core.errors import UserError
from trainer.model.checkpoint import read_train_state
from trainer.release.export import export

EPSILON = {"prediction_type": "epsilon", "zero_terminal_snr": False}


@pytest.fixture(scope="module")
def trained(tiny_base: Path) -> Parts:
    return moved_weights(tiny_base)


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def record(run: Path, prediction: dict[str, Any] | None = None, **facts: Any) -> None:
    """What checkpoints record that version 0.2 did not."""
    checkpoint = run / "checkpoints" / "step-00000020"
    base = read_train_state(checkpoint)["base"]
    change_record(checkpoint, base=base | ({"prediction": prediction} if prediction else {}), **facts)


def test_a_base_that_says_something_else_now_is_refused(base: Path, trained: Parts, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", base, trained, "publish.formats=[single_file]")
    record(run, EPSILON)
    scheduler = base / "scheduler" / "scheduler_config.json"
    change(scheduler, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    with pytest.raises(UserError, match="predicts v_prediction with zero terminal SNR, and said epsilon when"):
        export(run)
    change(scheduler, prediction_type="epsilon", rescale_betas_zero_snr=False)
    assert export(run)


def test_a_checkpoint_that_does_not_record_it_is_not_compared(base: Path, trained: Parts, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", base, trained, "publish.formats=[single_file]")
    change(base / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert export(run)


def test_a_prediction_that_was_changed_in_the_runs_config_is_refused(
    base: Path, trained: Parts, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", base, trained)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("prediction_type: epsilon", "prediction_type: v_prediction"))
    with pytest.raises(UserError, match=r"trained with diffusion\.prediction_type epsilon, .* says v_prediction"):
        export(run)


def test_a_vae_with_other_numbers_is_refused(base: Path, trained: Parts, tmp_path: Path) -> None:
    scaling = json.loads((base / "vae" / "config.json").read_text())["scaling_factor"]
    run = make_run(tmp_path / "run", base, trained, "publish.formats=[single_file]")
    record(run, vae_numbers={"scaling_factor": scaling, "shift_factor": None})
    assert export(run)
    # the config of the base's own VAE is a part of the base's hash, that of a separate VAE is not
    vae = Path(shutil.copytree(base / "vae", tmp_path / "vae"))
    change(vae / "config.json", scaling_factor=0.13025)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("  vae: null", f"  vae: {vae}"))
    with pytest.raises(UserError, match=rf"other numbers .*scaling_factor {scaling} there, 0\.13025 now"):
        export(run)
