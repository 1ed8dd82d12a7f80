"""The README's examples: they parse, they name what exists, and, in the slow test, they run."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import REPOSITORY
from trainer.config.load import load_config
from trainer.config.schema import CaptionsConfig
from trainer.data.captions import compose_caption
from trainer.data.post import ImagePlace, read_post

README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


def config_words(command: list[str]) -> tuple[list[str], list[str]] | None:
    """The config files and ``key=value`` words of a command."""
    if "--config" not in command:
        return None
    rest = command[command.index("--config") + 1 :]
    return [word for word in rest if word.endswith(".yaml")], [word for word in rest if "=" in word]


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (REPOSITORY / link).exists(), link


def test_commands_name_what_exists() -> None:
    assert len(commands()) >= 8
    for command in commands():
        if command[0] == "make":
            assert f"\n{command[1]}:" in (REPOSITORY / "Makefile").read_text()
        for word in command:
            if word.endswith(".py"):
                assert (REPOSITORY / word).exists(), word
        if words := config_words(command):
            load_config([REPOSITORY / file for file in words[0]], words[1])


def test_the_table_holds_the_configs_values() -> None:
    stage1, stage2 = (
        load_config([REPOSITORY / f"configs/{name}.yaml"])
        for name in ("stage1_feature_alignment", "stage2_refine_unet")
    )
    rows = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:4]] for row in README.splitlines()
            if row.startswith("| ") and row.count("|") == 4}  # fmt: skip
    assert [stage1.data.global_batch_size, stage2.data.global_batch_size] == [
        int(cell) for cell in rows["samples per optimizer step"]
    ]
    assert rows["learning rates"] == ["7.5e-6, encoders 3.75e-6", "2e-6"]
    assert (stage1.optim.unet_lr, stage1.optim.text_encoder_1_lr, stage1.optim.text_encoder_2_lr) == (
        7.5e-6, 3.75e-6, 3.75e-6,
    )  # fmt: skip
    assert stage2.optim.unet_lr == 2e-6 and not stage2.model.train_text_encoder_1
    assert rows["noise offset"] == ["none", str(stage2.diffusion.noise_offset)] and stage1.diffusion.noise_offset == 0
    assert [int(cell) for cell in rows["epochs"]] == [stage1.schedule.epochs, stage2.schedule.epochs]
    for config in (stage1, stage2):
        assert config.optim.name == "adamw" and config.optim.betas == [0.9, 0.99] and config.optim.weight_decay == 0.1
        assert config.schedule.lr == "constant" and config.optim.max_grad_norm == 1.0
        assert config.precision.compute == "fp16" and config.captions.max_token_length == 225


def test_the_example_post_is_read() -> None:
    post = read_post(json.loads(blocks("json")[0]), source="README", image=ImagePlace(Path("1.png")))
    record = {name: getattr(post, name) for name in ("caption", "rating", "score", "year")} | {"extra": None}
    record |= {f"tags_{kind}": getattr(post, f"tags_{kind}")
               for kind in ("general", "character", "copyright", "artist", "meta")}  # fmt: skip
    assert compose_caption(record, CaptionsConfig()) == (
        "1girl, hatsune miku, vocaloid, someone ||| rating: general, solo, smile, newest, highres, best quality"
    )


@pytest.mark.slow
def test_the_three_steps_run(tiny_base: Path, tmp_path: Path) -> None:
    """Every command of the three steps, on one drawing and the tiny model, in the README's order."""
    for name in ("configs", "scripts", "train.py"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "my/images").mkdir(parents=True)
    (tmp_path / "my/posts.jsonl").write_text(blocks("json")[0])
    drawing = next((REPOSITORY / "demo/images").glob("*.png"))
    shutil.copy(drawing, tmp_path / "my/images/1.png")
    overlay = (REPOSITORY / "configs/demo.yaml").read_text().replace("demo_run/runs", "runs")
    (tmp_path / "overlay.yaml").write_text(overlay)
    stage1 = [f"model.pretrained={tiny_base}", "optim.text_encoder_1_lr=1e-3", "optim.text_encoder_2_lr=1e-3"]
    steps = [command for command in commands() if command[0] != "make"]
    assert [Path(next(word for word in command if word.endswith(".py"))).stem for command in steps] == [
        "build_shards", "explain_step", "inspect_shards", "verify_shards", "train", "export", "train", "export",
        "sample", "sample", "lineage",
    ]  # fmt: skip
    (tmp_path / "my/prompts.txt").write_text("1girl, solo\n")
    for number, command in enumerate(steps):
        words = command[next(i for i, word in enumerate(command) if word.endswith(".py")) :]
        words = [word.replace("step-00000521", "step-00000002") for word in words]
        words += ["--steps", "1"] if words[0] == "scripts/sample.py" else []
        if "--config" in words:
            place = words.index("--config") + 2
            words = [*words[:place], "overlay.yaml", *words[place:], "schedule.max_steps=2"]
            words += stage1 if "configs/stage1_feature_alignment.yaml" in words else ["data.shards=my/shards"]
        run = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        assert run.returncode == 0, f"step {number}: {' '.join(words)}\n{run.stderr[-3000:]}"
    exported = [path.name for path in (tmp_path / "runs/stage2_refine_unet/export").iterdir()]
    assert sorted(exported) == [
        "comparison", "samples",
        *(f"stage2_refine_unet-step-00000002-fp16{kind}" for kind in ("", ".safetensors", ".sha256")),
    ]  # fmt: skip
