"""scripts/new_run.py looks at the data, the model and the machine, and writes a config that every command reads."""

import json
import runpy
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from support.paths import REPOSITORY
from trainer.config.load import load_config
from trainer.config.schema import Config, SourceConfig
from trainer.data.index import open_index
from trainer.data.plan import build_plan
from trainer.prepare.data_guess import DataGuess, guess_data
from trainer.prepare.draft import Machine, choose_batch, choose_extended, choose_least_unit, choose_unit, make_draft
from trainer.prepare.draft_file import as_yaml, read_name, write_draft
from trainer.prepare.model_guess import SDXL_TOKENIZERS, ModelGuess, guess_model
from trainer.prepare.prepare import prepare

POSTS = [json.loads(line) for line in (REPOSITORY / "demo/posts.jsonl").read_text().splitlines()]
NewRun = Callable[..., str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return tmp_path


@pytest.fixture
def new_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> NewRun:
    """Run scripts/new_run.py; what it printed, or what it refused."""

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["new_run.py", *words])
        try:
            runpy.run_path(str(REPOSITORY / "scripts/new_run.py"), run_name="__main__")
        except SystemExit as ended:
            assert ended.code == 2
            return capsys.readouterr().err
        return "".join(capsys.readouterr())

    return run


def make_images(folder: Path, count: int, captions: str | None = "txt") -> list[dict]:
    """Drawings of the demo with captions beside them; their posts."""
    folder.mkdir(parents=True)
    for post in POSTS[:count]:
        image = folder / post["file"]
        shutil.copy(REPOSITORY / "demo/images" / post["file"], image)
        if captions == "txt":
            image.with_suffix(".txt").write_text(post["tag_string_general"].replace(" ", ", "))
        elif captions == "json":
            image.with_name(f"{image.name}.json").write_text(json.dumps(post))
    return POSTS[:count]


# --- the whole command


def test_images_with_captions_and_the_tiny_model(new_run: NewRun, here: Path, tiny_base: Path) -> None:
    make_images(here / "pics", 8)
    next((here / "pics").glob("*.txt")).unlink()
    printed = new_run("my.yaml", "--data", "pics", "--model", str(tiny_base))
    assert (
        "data: pics: images with captions or posts beside them; 8 images, 7 captions (.txt), 1 without a caption"
        in printed
    )
    assert "a tiny model like the demo's, which predicts the noise (epsilon), as SDXL does" in printed
    assert "a small curated set refines" not in printed and "to refine it later on a small curated set" in printed
    for command in (
        "build_shards.py my.yaml",
        "train.py my.yaml",
        "export.py my.yaml",
        "sample.py my.yaml --prompt TEXT",
    ):
        assert command in printed
    text = (here / "my.yaml").read_text()
    assert "8 images, 7 captions (.txt), 1 without a caption" in text and max(map(len, text.splitlines())) < 140
    config = load_config(["my.yaml"])
    assert (config.run.name, config.run.output_dir, config.run.stage) == ("my", "runs", "1, feature alignment")
    assert (config.data.images, config.data.posts, config.data.shards) == ("pics", None, "shards/my")
    assert (config.model.pretrained, config.model.vae) == (str(tiny_base), None)
    assert config.precision.vae == "fp32"
    demo = load_config([REPOSITORY / "configs/demo_stage1.yaml"])
    assert config.optim == demo.optim and config.buckets == demo.buckets
    assert config.data.global_batch_size == 16 and config.data.bucket_batch_size == 8
    assert f"{config.schedule.epochs:,} epochs, 500 steps" in printed and "# 500 steps: at least 500" in text
    assert config.schedule.max_steps is None
    assert len(config.sampling.prompts) == 3 and config.sampling.negative_prompt == ""
    # it is prepared without another word: the one image without a caption is allowed for
    prepare(load_config(["my.yaml"], ["data.decode_processes=0"], preparing=True))
    # and as long as was said
    plan = build_plan(open_index("shards/my"), config.run.seed, config.data)
    assert plan.steps_for_epochs(config.schedule.epochs) == 500
    assert len((here / "shards/my/quarantine.jsonl").read_text().splitlines()) == 1


def test_nothing_is_overwritten(new_run: NewRun, here: Path, tiny_base: Path) -> None:
    make_images(here / "pics", 4)
    words = ("--data", "pics", "--model", str(tiny_base))
    (here / "my.yaml").write_text("mine")
    assert "my.yaml is there already, and nothing is overwritten" in new_run("my.yaml", *words)
    (here / "link.yaml").symlink_to("nowhere")
    assert "link.yaml is there already" in new_run("link.yaml", *words)
    assert "a config's name ends in .yaml" in new_run("my.txt", *words)
    assert "none is not a folder" in new_run("none/my.yaml", *words)
    (here / "runs/two").mkdir(parents=True)
    (here / "runs/two/run.json").write_text("{}")
    assert "runs/two is a run already, which would be resumed" in new_run("two.yaml", *words)
    assert (here / "my.yaml").read_text() == "mine" and not (here / "two.yaml").exists()


@pytest.mark.parametrize("name", ["a \"b\" 'c'", "with: colon #1", "${oc.env:HOME}", "木, 2024", "- a", "2024", "no"])
def test_any_name_of_a_folder_is_read_back(new_run: NewRun, here: Path, tiny_base: Path, name: str) -> None:
    make_images(here / name / "pics", 4)
    printed = new_run("x y.yaml", "--data", name, "--model", str(tiny_base), "--stage", "2")
    assert "build_shards.py 'x y.yaml'" in printed
    config = load_config(["x y.yaml"])
    assert (config.data.images, config.run.name) == (name, "x_y") and config.run.stage.startswith("2")


# --- kinds of data


def test_each_kind_is_found(here: Path) -> None:
    posts = make_images(here / "plain/images", 5, captions=None)
    (here / "plain/posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts))
    make_images(here / "gallery", 5, captions="json")
    make_images(here / "captions", 5)
    with tarfile.open(here / "0.tar", "w") as tar:
        for path in sorted((here / "captions").iterdir()):
            tar.add(path, path.name)
    meta = {post["file"]: {"tags": post["tag_string_general"]} for post in posts}
    (here / "meta_lat.json").write_text(json.dumps(meta))
    shutil.copytree(here / "plain/images", here / "old")
    cases = {
        "plain/posts.jsonl": ("posts", "plain/images", "5 images, 5 posts with tags"),
        "plain": ("posts", "plain/images", "5 images, 5 posts with tags"),
        "gallery": ("folder", None, "5 images, 5 posts with tags (.json)"),
        "captions": ("folder", None, "5 images, 5 captions (.txt)"),
        "0.tar": ("tars", None, "5 images, 5 captions"),
    }
    for path, (kind, images, said) in cases.items():
        guess = guess_data(Path(path))
        assert (guess.source.kind, guess.source.images, guess.describe()) == (kind, images, said), path
    guess = guess_data(Path("meta_lat.json"), Path("old"))
    assert (guess.source.kind, guess.source.images, guess.describe()) == ("kohya", "old", "5 images, 5 captions")


def test_a_saved_dataset_is_found(here: Path) -> None:
    datasets = pytest.importorskip("datasets")
    posts = make_images(here / "images", 3, captions=None)
    rows = {"image": [str(here / "images" / post["file"]) for post in posts], "text": ["1girl", "a", "b"]}
    saved = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    saved = saved.map(lambda row: {"image": row["image"]})
    saved.save_to_disk(str(here / "saved"))
    guess = guess_data(Path("saved"))
    assert (guess.source.kind, guess.describe()) == ("dataset", "3 images, 3 captions")


def test_what_is_not_used_is_said(new_run: NewRun, here: Path, tiny_base: Path) -> None:
    posts = make_images(here / "pics", 6)
    (here / "pics/some.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts[:2]))
    (here / "pics/notes.psd").write_text("")
    (here / "pics/10_girl").mkdir()
    printed = new_run("my.yaml", "--data", "pics", "--model", str(tiny_base))
    assert "also there, and not used: posts pics/some.jsonl" in printed
    assert "1 unread file: .psd" in printed and "the number in 10_girl is not read as repeats" in printed


def test_many_images_without_a_caption_are_warned_of(new_run: NewRun, here: Path, tiny_base: Path) -> None:
    make_images(here / "pics", 6)
    for file in sorted((here / "pics").glob("*.txt"))[:3]:
        file.unlink()
    printed = new_run("my.yaml", "--data", "pics", "--model", str(tiny_base))
    assert "warning: 3 of 6 inputs would be set aside, so that build_shards.py stops" in printed
    assert load_config(["my.yaml"]).data.max_bad_fraction == 0.01
    for file in (here / "pics").glob("*.txt"):
        file.write_text(" ")
    printed = new_run("my2.yaml", "--data", "pics", "--model", str(tiny_base))
    assert "warning: 3 of 3 posts have neither a caption nor tags" in printed


def test_data_that_cannot_be_used(new_run: NewRun, here: Path, tiny_base: Path) -> None:
    (here / "empty").mkdir()
    posts = make_images(here / "pics", 2, captions=None)
    (here / "apart").mkdir()
    (here / "apart/posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts))
    words = ("--model", str(tiny_base))
    assert "--data gone: there is no such file" in new_run("my.yaml", "--data", "gone", *words)
    assert "empty holds no images" in new_run("my.yaml", "--data", "empty", *words)
    first = Path(posts[0]["file"]).stem
    said = new_run("my.yaml", "--data", "pics", *words)
    assert f"2 images, and none has a caption ({first}.txt beside {first}.png) or a post ({first}.json)" in said
    assert "tar" not in said and "posts file" not in said and len(said.splitlines()) == 1
    said = new_run("my.yaml", "--data", "apart", *words)
    assert "apart/posts.jsonl with images in apart: 2 whose image is not there, such as posts.jsonl line 1: " in said
    assert "data.sources" not in said and len(said.splitlines()) == 1
    (here / "apart/0.tar").write_bytes(b"")
    assert "0.tar" in new_run("my.yaml", "--data", "apart/0.tar", *words)
    assert not (here / "my.yaml").exists()
    assert "2 posts with tags" in new_run("my.yaml", "--data", "apart", "--images", "pics", *words)


def test_images_that_cannot_be_read_are_refused_at_once(new_run: NewRun, here: Path, tiny_base: Path) -> None:
    make_images(here / "pics", 3)
    first, *others = sorted((here / "pics").glob("*.png"))
    for image in others:
        image.write_bytes(b"none")
    words = ("--data", "pics", "--model", str(tiny_base))
    printed = new_run("one.yaml", *words)
    assert "1 image, 1 caption (.txt), 2 not an image" in printed
    first.write_bytes(b"")
    said = new_run("my.yaml", *words)
    assert f"--data pics: none of the 3 images can be read: {first.name}: 0 bytes" in said
    assert not (here / "my.yaml").exists()


def test_a_posts_file_among_its_images_is_read(new_run: NewRun, here: Path, tiny_base: Path) -> None:
    posts = make_images(here / "pics", 4, captions=None)
    (here / "pics/posts.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts))
    (here / "pics/other.jsonl").write_text("")
    printed = new_run("my.yaml", "--data", "pics", "--model", str(tiny_base))
    assert "4 posts with tags" in printed and "not read: 1 unread file: .jsonl" in printed  # the other one
    (here / "pics/other.jsonl").unlink()
    assert "not read" not in new_run("my2.yaml", "--data", "pics", "--model", str(tiny_base))


def test_few_images_of_many_sizes_need_few_forwards(here: Path) -> None:
    """A step of sixteen samples is no sixteen forwards, and the file says why images repeat."""
    sizes = [(64 + 8 * number, 200 - 8 * number) for number in range(12)]
    data = DataGuess(SourceConfig("folder", "pics"), captions=12, sizes=sizes)
    tiny = ModelGuess("tiny", "a folder", is_small=True)
    draft = make_draft(Path("my.yaml"), 2, data, tiny, Machine())
    text = write_draft(draft, choose_extended(2, tiny), "pics")
    Path("my.yaml").write_text(text)
    chosen = load_config(["my.yaml"]).data
    assert (chosen.global_batch_size, chosen.bucket_batch_size, chosen.micro_batch_size) == (16, 8, 8)
    assert any("of which some repeat where few are" in line for line in draft.said)


# --- models


def test_models_are_looked_at_where_they_lie(here: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = guess_model(str(tiny_base))
    assert (found.is_small, found.has_vae, found.tokenizer) == (True, True, None)
    shutil.copytree(tiny_base, here / "v")
    scheduler = here / "v/scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    shutil.rmtree(here / "v/tokenizer")
    found = guess_model("v")
    assert found.prediction is not None and found.prediction.prediction_type == "v_prediction"
    assert found.tokenizer == SDXL_TOKENIZERS and "model.tokenizer is" in found.notes[-1]
    config = drafted(found, Machine())
    assert config.diffusion.prediction_type == "v_prediction" and config.model.tokenizer == SDXL_TOKENIZERS
    checkpoint = here / "runs/tiny/checkpoints/step-00000900"
    checkpoint.mkdir(parents=True)
    for file in (checkpoint / "train_state.json", here / "runs/tiny/run.json"):
        file.write_text("{}")
    for step in (900, 1000):
        shutil.copytree(tiny_base, here / f"runs/tiny/export/tiny-step-{step:08d}-fp16")
    said = "a checkpoint, of whose step 900 the export is tiny-step-00000900-fp16, "
    assert guess_model("runs/tiny/checkpoints/step-00000900").said.startswith(said)
    for word in ("runs/tiny", "tiny/latest", "runs/tiny/latest"):
        assert guess_model(word).said.startswith("a run, whose newest export is tiny-step-00001000-fp16, ")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert guess_model("someone/model").said.startswith("a hub id; the hub could not be asked")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("v/tiny", "--model v/tiny is not there; in v there is: model.ckpt"),
        ("v/model.ckpt", "model.ckpt"),
        ("v", "v is not a diffusers folder"),
        ("gone", "gone does not exist, and is not a hub id"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_now(new_run: NewRun, here: Path, model: str, said: str) -> None:
    make_images(here / "pics", 2)
    (here / "v").mkdir()
    (here / "v/model.ckpt").write_text("")
    assert said in new_run("my.yaml", "--data", "pics", "--model", model)
    assert not (here / "my.yaml").exists()


# --- sizes and the machine


def drafted(model: ModelGuess, machine: Machine, images: int = 2000, stage: int = 1) -> Config:
    """The config that is written for so many square images."""
    data = DataGuess(SourceConfig("folder", "pics"), captions=images, sizes=[(1024, 1024)] * 100)
    text = write_draft(make_draft(Path("my.yaml"), stage, data, model, machine), choose_extended(stage, model), "pics")
    Path("drafted.yaml").write_text(text)
    return load_config(["drafted.yaml"])


HUB = ModelGuess("owner/name", "a hub id")
GB = 10**9


@pytest.mark.parametrize(
    ("machine", "stage", "name", "micro"),
    [
        (Machine("H", 80 * GB, 1, True), 1, "adamw", 16),
        (Machine("A", 48 * GB, 1, True), 1, "adamw8bit", 4),
        (Machine("A", 48 * GB, 1, False), 1, "adafactor", 4),
        (Machine("B", 24 * GB, 1, True), 1, "adafactor", 1),
        (Machine("B", 32 * GB, 1, True), 2, "adafactor", 1),
        (Machine("C", 36 * GB, 1, True), 2, "adamw8bit", 1),
        (Machine("H", 80 * GB, 1, True), 2, "adamw", 8),
    ],
)
def test_the_optimizer_is_the_best_that_fits(machine: Machine, stage: int, name: str, micro: int) -> None:
    config = drafted(HUB, machine, stage=stage)
    assert (config.optim.name, config.data.micro_batch_size) == (name, micro)
    assert config.precision.compute == "fp16"
    if name == "adafactor":
        assert (config.optim.betas, config.optim.weight_decay, config.schedule.warmup_steps) == (None, 0, 100)


def test_a_recipe_sized_set_is_the_recipe(here: Path) -> None:
    config = drafted(HUB, Machine("H", 80 * GB, 1, True), images=100_000)
    recipe = load_config([REPOSITORY / "configs/stage1_feature_alignment.yaml"])
    assert (config.data.global_batch_size, config.data.bucket_batch_size, config.schedule) == (96, 48, recipe.schedule)
    assert config.optim == recipe.optim and config.model.vae == recipe.model.vae
    small = drafted(HUB, Machine())
    assert small.precision.compute == small.precision.frozen == small.precision.vae == "fp32"
    assert small.sampling.every_steps is None and not small.sampling.prompts


@pytest.mark.parametrize(("images", "batch"), [(1, 1), (3, 3), (20, 4), (40, 4), (130, 12), (500, 48), (10**6, 96)])
def test_a_step_holds_a_tenth_of_the_images(images: int, batch: int) -> None:
    assert choose_batch(images, 96) == batch


def test_a_unit_is_what_buckets_can_fill() -> None:
    assert choose_unit(Counter({(1, 1): 90, (1, 2): 10}), 96, 48) == 48
    assert choose_unit(Counter({(1, 1): 80, (1, 2): 20}), 96, 48) == 16
    assert choose_unit(Counter({(1, number): 1 for number in range(9)}), 8, 8) == 1
    assert choose_unit(Counter(), 8, 8) == 8


@pytest.mark.parametrize(("batch", "forward", "unit"), [(16, 16, 8), (4, 16, 2), (96, 4, 4), (16, 1, 1), (3, 8, 1)])
def test_a_step_sees_two_buckets_however_few_images_they_hold(batch: int, forward: int, unit: int) -> None:
    assert choose_least_unit(batch, forward) == unit


def test_names_and_values() -> None:
    assert [read_name(Path(f"{name}.yaml")) for name in ("a b", "木", ".x", "-1", "ok_1.2")] == [
        "a_b", "_", "x", "1", "ok_1.2",
    ]  # fmt: skip
    assert [as_yaml(value) for value in ("a", "no", "a: b", None, 1.0, "x ${y}")] == [
        "a", "'no'", "'a: b'", "null", "1.0", "x \\${y}",
    ]  # fmt: skip


@pytest.mark.slow
def test_from_images_to_a_drawing(here: Path, tiny_base: Path) -> None:
    """The commands that it prints, one after the other, with a short training."""
    make_images(here / "pics", 40)

    def run(*words: str) -> str:
        command = [sys.executable, *(str(REPOSITORY / word) if word.endswith(".py") else word for word in words)]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = run("scripts/new_run.py", "my.yaml", "--data", "pics", "--model", str(tiny_base))
    lines = [line.split() for line in printed.splitlines() if ".py my.yaml" in line and line.startswith("  ")]
    assert [Path(line[1]).stem for line in lines] == [
        "build_shards", "inspect_shards", "train", "export", "sample", "publish",
    ]  # fmt: skip
    for _, script, *words in lines[:-1]:
        words += ["schedule.epochs=null", "schedule.max_steps=2"] if Path(script).name == "train.py" else []
        run(script, *["1girl" if word == "TEXT" else word for word in words])
    assert list((here / "runs/my/export").glob("*/*.png")) and list((here / "runs/my/samples").iterdir())
