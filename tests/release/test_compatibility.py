"""Exports load in the diffusers of years ago, each in a virtual environment of its own, and draw the same images."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support.exported_run import make_run, moved_weights
from support.paths import REPOSITORY
from trainer.release.export import export

ENVIRONMENTS = REPOSITORY / "build" / "compatibility"  # kept between runs: an environment is more than a gigabyte
DRIVER = REPOSITORY / "tests/support/compatibility_driver.py"
PINS = {  # torch comes first and exactly, so that the CPU build is taken where one is offered
    "diffusers-0.35": ["diffusers==0.35.*", "transformers==4.57.*", "accelerate==1.15.*"],
    # 0.27 imports huggingface_hub's cached_download, which 0.26 took away
    "diffusers-0.27": ["diffusers==0.27.*", "transformers==4.39.*", "accelerate==1.15.*", "huggingface_hub<0.26"],
}
TORCH = "torch==2.13.0"
EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
Drawn = dict[str, np.ndarray]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def exports(tiny_base, tmp_path_factory) -> list[Path]:
    """Folders, each with its single file beside it: in fp16 as published, and v-prediction with zero terminal SNR."""
    trained = moved_weights(tiny_base)
    runs = tmp_path_factory.mktemp("runs")
    words = ["diffusion.prediction_type=v_prediction", "diffusion.zero_terminal_snr=true"]
    made = [
        export(make_run(runs / "epsilon", tiny_base, trained, "publish.dtype=fp16")),
        export(make_run(runs / "velocity", tiny_base, trained, *words)),
    ]
    return [folder for _, folder in made]


def run_driver(python: Path, out: Path, exports: list[Path], *words: str) -> Drawn:
    """What a Python draws with the exports; without the trainer, and without the network."""
    command = [str(python), str(DRIVER), str(out), *map(str, exports), *words]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=out.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(out, allow_pickle=False))


@pytest.fixture(scope="module")
def today(exports, tmp_path_factory) -> Path:
    """The images of this environment's diffusers."""
    out = tmp_path_factory.mktemp("today") / "drawn.npz"
    run_driver(Path(sys.executable), out, exports)
    return out


@pytest.fixture(scope="module", params=list(PINS))
def environment(request) -> tuple[str, Path]:
    """The name and the Python of a virtual environment, made if it is not there with these pins."""
    folder, pins = ENVIRONMENTS / request.param, [TORCH, *PINS[request.param]]
    python, mark = folder / "bin" / "python", folder / "installed.txt"
    if not mark.is_file() or mark.read_text().split() != pins:
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", TORCH],
            [str(python), "-m", "pip", "install", "--quiet", *pins],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-3000:]}"
        mark.write_text("\n".join(pins) + "\n")
    return request.param, python


def test_older_libraries_draw_the_same(exports, today, environment, tmp_path):
    """Bit for bit, but for the last bits of the text encoders of transformers 4.39.

    Those compute attention as separate products, newer ones by PyTorch's own kernel: embeddings differ by up to 1.6e-6,
    images by up to 1.5e-6. From today's prompt embeddings diffusers 0.27 draws today's bits too, and with that kernel
    put into transformers 4.39 it needs no help (measured, not tested here).
    """
    name, python = environment
    drawn = run_driver(python, tmp_path / "drawn.npz", exports, "--embeddings", str(today))
    assert drawn["versions"][0].startswith(name.removeprefix("diffusers-") + ".")
    ours = dict(np.load(today, allow_pickle=False))
    assert not np.array_equal(*(ours[f"{folder.name}/folder/image"] for folder in exports))
    for folder in exports:
        expected = ours[f"{folder.name}/folder/image"]
        assert expected.shape == (1, 64, 64, 3) and expected.std() > 0.05  # a picture, not one colour
        for form in ("folder", "file"):
            key = f"{folder.name}/{form}"
            assert np.array_equal(ours[f"{key}/image"], expected)
            assert np.array_equal(drawn[f"{key}/image_from_given"], expected)
            if name == "diffusers-0.27":
                for part in EMBEDDINGS:
                    np.testing.assert_allclose(drawn[f"{key}/{part}"], ours[f"{key}/{part}"], rtol=0, atol=1e-5)
                # a step of 8 bits is 0.004
                np.testing.assert_allclose(drawn[f"{key}/image"], expected, rtol=0, atol=1e-5)
            else:
                assert np.array_equal(drawn[f"{key}/image"], expected)
