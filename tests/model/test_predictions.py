"""What a base predicts is read from wherever files say it, and is never trained as something else by accident."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from support.tiny_model import TINY, random_parts, write_folder
from trainer.config.schema import DiffusionConfig
from trainer.core.errors import UserError
from trainer.model.base import CONFIGS_KEY, find_base, read_config, read_predictions
from trainer.model.diffusion import Prediction, check_prediction
from trainer.model.single_file import to_single_file

PARTS = random_parts(seed=3)
EPSILON, V, V_ZERO = Prediction(), Prediction("v_prediction"), Prediction("v_prediction", True)
UNSAID = Prediction("v_prediction", None)  # ModelSpec has a word for the type only
EMPTY = torch.tensor([])


def read_file(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> list[Prediction]:
    save_file(to_single_file(PARTS, TINY) | tensors, path, metadata or None)
    return list(read_predictions(find_base(str(path))).values())


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        ({}, {}, [EPSILON]),
        ({"v_pred": EMPTY}, {}, [V]),
        ({"v_pred": EMPTY, "ztsnr": EMPTY}, {}, [V_ZERO]),
        ({"ztsnr": EMPTY}, {}, [Prediction("epsilon", True)]),
        ({}, {"modelspec.prediction_type": "v"}, [UNSAID]),
        ({}, {"modelspec.prediction_type": "epsilon"}, [Prediction("epsilon", None)]),
        ({"v_pred": EMPTY}, {"modelspec.prediction_type": "epsilon"}, [V, Prediction("epsilon", None)]),
    ],
)
def test_a_single_file_says_it_by_markers_or_modelspec(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], said: list[Prediction]
) -> None:
    assert read_file(tmp_path / "base.safetensors", tensors, metadata) == said


def test_modelspecs_word_reaches_the_scheduler(tmp_path: Path) -> None:
    """So that samples are drawn as the file says."""
    path = tmp_path / "base.safetensors"
    read_file(path, {}, {"modelspec.prediction_type": "v"})
    assert read_config(find_base(str(path)), "scheduler")["prediction_type"] == "v_prediction"


def test_a_file_of_ours_says_it_by_the_scheduler_it_carries(tmp_path: Path) -> None:
    configs = TINY | {"scheduler": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}}
    said = read_file(tmp_path / "base.safetensors", {}, {CONFIGS_KEY: json.dumps(configs)})
    assert said == [V_ZERO]


def test_an_unknown_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"base\.safetensors: its modelspec\.prediction_type is 'rectified_flow'"):
        read_file(tmp_path / "base.safetensors", {}, {"modelspec.prediction_type": "rectified_flow"})


def write_scheduler(folder: Path, **changes: Any) -> Path:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, EPSILON),
        ({"prediction_type": "v_prediction"}, V),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, V_ZERO),
        ({"_class_name": "DDIMScheduler", "trained_betas": None, "num_train_timesteps": 1000}, EPSILON),
    ],
)
def test_a_folder_says_it_in_its_scheduler(tmp_path: Path, changes: dict[str, Any], said: Prediction) -> None:
    base = find_base(str(write_scheduler(write_folder(tmp_path / "base", PARTS), **changes)))
    assert list(read_predictions(base).values()) == [said]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "sample"}, "says prediction_type 'sample'"),
        ({"prediction_type": "flow_prediction"}, "says prediction_type 'flow_prediction'"),
        ({"_class_name": "EDMEulerScheduler"}, "scheduler is EDMEulerScheduler: EDM predicts neither"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching predicts neither"),
        ({"beta_end": 0.02}, r"says beta_end 0\.02, SDXL's noise schedule has 0\.012"),
        ({"beta_schedule": "linear"}, "says beta_schedule linear"),
    ],
)
def test_another_schedule_than_sdxls_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    base = find_base(str(write_scheduler(write_folder(tmp_path / "base", PARTS), **changes)))
    with pytest.raises(UserError, match=message):
        read_predictions(base)


def config(prediction: Prediction, convert: bool = False) -> DiffusionConfig:
    zero = bool(prediction.zero_terminal_snr)
    return DiffusionConfig(prediction.prediction_type, zero_terminal_snr=zero, convert_prediction=convert)


@pytest.mark.parametrize(("base", "wanted"), [(V, EPSILON), (EPSILON, V), (V_ZERO, V), (V, V_ZERO), (V_ZERO, EPSILON)])
def test_another_prediction_is_refused_naming_both_unless_it_is_meant(base: Prediction, wanted: Prediction) -> None:
    with pytest.raises(UserError) as caught:
        check_prediction("my/base", {"by a marker": base}, config(wanted))
    message = str(caught.value)
    assert f"config trains {wanted}," in message and f"predicts something else: {base} by a marker" in message
    assert "diffusion.convert_prediction=true" in message
    assert check_prediction("my/base", {"by a marker": base}, config(wanted, convert=True)) == base


@pytest.mark.parametrize("wanted", [V, V_ZERO])
def test_the_same_prediction_is_fine_and_needs_no_conversion(wanted: Prediction) -> None:
    for said in (wanted, UNSAID):
        assert check_prediction("my/base", {"by a marker": said}, config(wanted)) == said
        with pytest.raises(UserError, match="convert_prediction has no effect"):
            check_prediction("my/base", {"by a marker": said}, config(wanted, convert=True))


def test_a_file_that_says_two_things_is_refused() -> None:
    said = {"by v_pred": V, "by modelspec.prediction_type": Prediction("epsilon", None)}
    for wanted in (V, EPSILON):
        with pytest.raises(UserError, match=r"v_prediction by v_pred; epsilon by modelspec\.prediction_type"):
            check_prediction("my/base", said, config(wanted))
    assert check_prediction("my/base", said, config(V, convert=True)) == V
