"""The card's script runs as it stands, and encodes long prompts as the training did."""

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from support.published_run import SOURCE, change, parts, request_of, run, stages, stand_in
from trainer.model.lineage import read_lineage
from trainer.release.publish import Request, publish
from trainer.sample.drawing import find_source, load_source
from trainer.sample.sampling import encode_texts

__all__ = ["parts", "request_of", "run", "stages", "stand_in"]  # fixtures
SAMPLING = {
    "every_steps": 10, "prompts": ["1girl, smile, rating: general"], "width": 64, "height": 96,
    "num_inference_steps": 2, "negative_prompt": 'bad, "quoted", love live!',
}  # fmt: skip
LONG = "masterpiece, best quality, 1girl, love live!, " + "bird, cat, " * 60 + "love live!"


@pytest.fixture
def published(run: Path, request_of: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder under its repository's name in the working folder, where diffusers looks for it first."""
    config = run / "config.yaml"
    said = yaml.safe_load(config.read_text())
    said["sampling"] |= SAMPLING
    config.write_text(yaml.safe_dump(said))
    folder, _ = publish(change(request_of, out=tmp_path / "owner/my-model"), [SOURCE, "publish.repo_id=owner/my-model"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def scripts_of(card: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)\n```", card.read_text(encoding="utf-8"), flags=re.DOTALL)


def execute(script: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run a script as a stranger would; that a library is to lose what it calls is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        exec(compile(script, "card", "exec"), names)
    return names


def test_the_script_runs_as_it_stands(published: Path) -> None:
    first, second = scripts_of(published / "README.md")
    assert first.splitlines()[3] == 'model = "owner/my-model"  # or the path of a folder with these files'
    names = execute(first, {})
    assert names["prompt"] == "masterpiece, best quality, 1girl, smile, rating: general"
    assert names["negative_prompt"] == SAMPLING["negative_prompt"]
    with Image.open("image.png") as image:
        assert image.size == (64, 96)
    execute(second, names)
    with Image.open("image_long.png") as image:
        assert image.size == (64, 96)


def test_long_prompts_are_encoded_as_in_training(published: Path) -> None:
    """Also tokens that the second tokenizer of diffusers takes for padding ("!")."""
    first, second = scripts_of(published / "README.md")
    names = execute(first.partition("\nimage = ")[0] + second.partition("\n\n\nwith ")[0].join(["\n", "\n"]), {})
    model = load_source(find_source(str(published)), "fp32")
    for text in (LONG, "1girl, love live!", "", SAMPLING["negative_prompt"]):
        with torch.no_grad():
            ours, mine = encode_texts(model, [str(text)]), names["encode"](str(text))
        assert mine[0].shape == (1, 227, ours[0].shape[-1])
        for one, other in zip(ours, mine, strict=True):
            assert np.allclose(one.numpy(), other.numpy(), atol=1e-5)


@pytest.mark.parametrize(("tokens", "shape"), [(75, None), (150, 152), (225, 227)])
def test_as_many_tokens_as_the_training_had(
    run: Path, request_of: Request, tokens: int, shape: int | None, tmp_path: Path
) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("max_token_length: 225", f"max_token_length: {tokens}"))
    folder, _ = publish(request_of, [SOURCE])
    scripts = scripts_of(folder / "README.md")
    assert len(scripts) == (1 if shape is None else 2) and read_lineage(folder)
    assert 'model = "OWNER/NAME"' in scripts[0]
    if shape is not None:
        load = scripts[0].partition("\nprompt = ")[0].replace("OWNER/NAME", str(folder))
        encode = execute(f"{load}\n{scripts[1].partition('with torch')[0]}", {})["encode"]
        assert encode(LONG)[0].shape[1] == shape
