"""P12. Nothing executable: no file of a base, a set or a lineage runs code, reaches the Hub, or breaks out of a page.

A base is somebody else's. Whatever its configs, tokenizers and metadata hold, the program trains a sound model or says
what is wrong with which file, and of what it does not know nothing travels into an export or a published folder. Not
promised: that a hostile base draws well, and what other programs do with weights.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel

from support.tiny_model import TINY, random_parts, write_folder
from trainer.config.load import load_config
from trainer.config.schema import MemoryConfig, ModelConfig, PrecisionConfig
from trainer.core.errors import UserError
from trainer.data.percentiles import choose_thresholds, describe_rules
from trainer.data.tokens import hash_tokenizers, load_tokenizers
from trainer.model.base import (
    CONFIGS_KEY,
    Base,
    find_base,
    find_tokenizers,
    has_vae,
    hash_base,
    note_configs,
    read_config,
    read_predictions,
    read_vae,
    read_vocab_sizes,
)
from trainer.model.lineage import LINEAGE_KEY, read_lineage
from trainer.model.lineage_rows import format_tree
from trainer.model.sdxl import COMPONENTS, build_sdxl
from trainer.model.single_file import to_single_file
from trainer.model.vae import build_vae
from trainer.release.artefacts import write_tokenizer
from trainer.release.export import build_configs, has_sdxl_shapes
from trainer.release.licence import read_terms

Count = Callable[[str, bool], None]

HOOKS: dict[str, Any] = {
    "auto_map": {"AutoModel": "trap.Model", "AutoTokenizer": ["trap.Tokenizer", None]},
    "custom_pipelines": {"trap": {"impl": "trap.py"}},
    "custom_pipeline": "somebody/trap",
    "_attn_implementation": "somebody/trap-kernel",
    "attn_implementation": "somebody/trap-kernel",
    "_attn_implementation_internal": "somebody/trap-kernel",
    "_attn_implementation_autoset": True,
    "_experts_implementation": "somebody/trap",
    "trust_remote_code": True,
    "chat_template": "{{ ''.__class__.__mro__ }} trap",
    "code_revision": "trap",
    "_custom_hook": "trap",
    "processor_class": "trap.Processor",
    "use_safetensors": False,
    "__trap__": {"__class__": "trap"},
    "text_config": {"trap": 1},
}
FILES = {
    "unet": "unet/config.json", "text_encoder": "text_encoder/config.json", "vae": "vae/config.json",
    "text_encoder_2": "text_encoder_2/config.json", "scheduler": "scheduler/scheduler_config.json",
    "model_index": "model_index.json", "tokenizer": "tokenizer/tokenizer_config.json",
    "tokenizer's map": "tokenizer/special_tokens_map.json", "vocabulary": "tokenizer/vocab.json",
    "tokenizer_2": "tokenizer_2/tokenizer_config.json",
}  # fmt: skip
BROKEN = {
    "nothing": b"", "half": b'{"_class_name": "UNet2DCond', "lists": b"[" * 200_000, "objects": b'{"a":' * 100_000,
    "101 levels": b'{"a":' * 101 + b"1" + b"}" * 101, "not UTF-8": b'{"a": "\xff\xfe\xfd"}', "a list": b"[1, 2]",
    "a text": b'"config"', "null": b"null", "zeros": bytes(4096), "NaN": b'{"a": NaN}', "1e999": b'{"a": 1e999}',
    "a key twice": b'{"a": 1, "a": 2}', "5,000 digits": b'{"a": ' + b"9" * 5000 + b"}", "HTML": b"<html></html>",
    "a pickle": b"\x80\x04\x95\x00\x00.", "surrogates": b'{"\\ud800": "\\udfff"}', "UTF-16": "{}".encode("utf-16"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tiny_base: Path) -> Path:
    return tiny_base


@pytest.fixture
def base(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "base"))


def use(path: Path, out: Path, whole: bool = True) -> dict[str, Any]:
    """Everything that is read of a base: for a training, an export, a licence; the configs that would be exported."""
    base = find_base(str(path))
    read_predictions(base)
    note_configs(base)
    for component in COMPONENTS.values():
        read_config(base, component)
    if path.is_dir():
        folders = find_tokenizers(base, None)
        note_configs(base, folders)
        load_tokenizers(*folders, read_vocab_sizes(base))
        hash_tokenizers(*folders)
        for name, folder in zip(("tokenizer", "tokenizer_2"), folders, strict=True):
            write_tokenizer(out / name, folder, name)
    use_lineage(path)
    read_terms(path, str(path))
    vae = read_vae(None, base)
    build_vae(vae.config, vae.state, torch.float32)
    if whole:
        build_sdxl(base, ModelConfig(str(path)), PrecisionConfig(), MemoryConfig("none"))
        hash_base(base)
    has_sdxl_shapes(base)
    diffusion = load_config([], [*WORDS, f"model.pretrained={path}"]).diffusion
    configs = build_configs(base, vae.config, diffusion, "fp32")
    for name, config in configs.items():
        (out / f"{name}.json").write_text(json.dumps(config))
    return configs


WORDS = ["run.name=x", "run.stage=x", "data.shards=x", "schedule.max_steps=1", "optim.unet_lr=1e-3"]


def use_lineage(path: Path) -> None:
    lineage = read_lineage(path)
    if lineage is not None:
        format_tree(lineage)


def attempt(path: Path, out: Path, named: str, whole: bool = True) -> str | None:
    """What is said of a base; None where it is taken. Only a UserError that names its file may come."""
    out.mkdir(exist_ok=True)
    try:
        use(path, out, whole)
    except UserError as error:
        told = str(error)
        assert len(told) < 2000 and named in told, told
        return told
    return None


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


def texts(folder: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.mark.parametrize("what", [name for name in FILES if name != "vocabulary"])
def test_hooks_do_not_travel(base: Path, tmp_path: Path, what: str, count_try: Count) -> None:
    """Left out with a note, and what is written beside it is as if they had never been there."""
    attempt(base, tmp_path / "before", "nothing", whole=False)
    hooks = {key: said for key, said in HOOKS.items() if what != "vae" or key not in VAE_REFUSED}
    edit(base / FILES[what], lambda said: hooks | said)
    notes = "\n".join(note_configs(find_base(str(base)), find_tokenizers(find_base(str(base)), None)))
    assert attempt(base, tmp_path / "after", "nothing") is None
    assert "auto_map" in notes and FILES[what] in notes
    written = texts(tmp_path / "after")
    held = "trap" not in written and "auto_map" not in written and "implementation" not in written
    held = held and json_of(tmp_path / "after") == json_of(tmp_path / "before")
    count_try("a hook in a config of a base is left out of what is trained and exported", held)
    assert held


# what a VAE's config says beside what is known may change latents
VAE_REFUSED = {
    "custom_pipeline",
    "trust_remote_code",
    "chat_template",
    "code_revision",
    "processor_class",
    "text_config",
}


def json_of(folder: Path) -> dict[str, Any]:
    return {
        path.relative_to(folder).as_posix(): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.json"))
    }


def test_an_encoder_never_asks_the_hub_for_a_kernel(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count_try: Count
) -> None:
    """transformers takes ``owner/name`` for the name of a kernel: see what it does with a config as it stands."""
    asked: list[str] = []
    original = PreTrainedModel._check_and_adjust_attn_implementation

    def spy(self: Any, implementation: Any, *rest: Any, **more: Any) -> Any:
        if implementation is not None and "/" in str(implementation):
            asked.append(str(implementation))
        return original(self, implementation, *rest, **more)

    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", spy)
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        for component in ("text_encoder", "text_encoder_2"):
            edit(base / FILES[component], lambda said, key=key: said | {key: "somebody/trap-kernel"})  # type: ignore[misc]
    config = json.loads((base / FILES["text_encoder"]).read_text())
    with pytest.raises((ImportError, OSError, ValueError)):  # the trap is one: unfiltered, the library goes for it
        CLIPTextModel(CLIPTextConfig(**config))
    assert asked
    asked.clear()
    attempt(base, tmp_path / "out", "nothing")
    count_try("a base's attention implementation is never looked for", not asked)
    assert not asked


REFUSED: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "a VAE with more": ("vae", lambda said: said | {"text_config": {"a": 1}}, "not known here"),
    "a quantised UNet": ("unet", lambda said: said | {"quantization_config": {"load_in_8bit": True}}, "quantised"),
    "a quantised encoder": ("text_encoder", lambda said: said | {"quantization_config": {"a": 1}}, "quantised"),
    "a quantised VAE": ("vae", lambda said: said | {"quantization_config": {"a": 1}}, "quantised"),
    "another UNet": ("unet", lambda said: said | {"_class_name": "UNetTrap"}, "another model"),
    "another encoder": ("text_encoder_2", lambda said: said | {"model_type": "trap"}, "another model"),
    "another VAE": ("vae", lambda said: said | {"_class_name": "TrapVAE"}, "not the AutoencoderKL"),
    "another scheduler": ("scheduler", lambda said: said | {"_class_name": "TrapScheduler"}, "TrapScheduler"),
    "a scheduler by path": ("scheduler", lambda said: said | {"_class_name": "a/b.py"}, "_class_name must be a name"),
    "a UNet of its own": ("model_index", lambda said: said | {"unet": ["trap", "TrapUNet"]}, "none of the classes"),
    "an encoder of its own": (
        "model_index", lambda said: said | {"text_encoder": ["transformers", "TrapModel"]}, "none of the classes"),
    "a UNet that is text": ("model_index", lambda said: said | {"unet": "trap.py"}, "none of the classes"),
    "an activation": ("text_encoder", lambda said: said | {"hidden_act": "trap"}, "describes no model"),
    "a block": ("unet", lambda said: said | {"mid_block_type": "Trap"}, "describes no model"),
    "a million layers": ("text_encoder", lambda said: said | {"num_hidden_layers": 10**6}, "num_hidden_layers must be"),
    "a trillion channels": ("unet", lambda said: said | {"block_out_channels": [10**12] * 2}, "must be a list of"),
    "no channels": ("unet", lambda said: {k: v for k, v in said.items() if k != "block_out_channels"}, "lacks"),
    "channels as text": ("unet", lambda said: said | {"block_out_channels": "320"}, "block_out_channels must be"),
    "a padding that is none": ("tokenizer's map", lambda said: said | {"pad_token": [1]}, "pad_token must be"),
    "a vocabulary of text": ("vocabulary", lambda said: said | {"a": "b"}, "whole numbers"),
    "two tokens of an id": ("vocabulary", lambda said: {**said, "trap": 0}, "the same id"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_change_the_model_is_refused(base: Path, tmp_path: Path, what: str, count_try: Count) -> None:
    component, change, said = REFUSED[what]
    edit(base / FILES[component], change)
    told = attempt(base, tmp_path / "out", "")
    held = told is not None and said in told
    count_try("what would change the model, or run code of its own, is refused with the file", held)
    assert held, told


@pytest.mark.parametrize("what", [*FILES, "lineage", "README"])
def test_broken_json_is_a_message(base: Path, tmp_path: Path, what: str, count_try: Count) -> None:
    """Deep, cut, of another encoding, with NaN or keys that are there twice, in any file of a base."""
    file = base / {**FILES, "lineage": "lineage.json", "README": "README.md"}[what]
    for name, content in BROKEN.items():
        file.write_bytes(content if what != "README" else b"---\n" + content + b"\n---\n")
        named = {"README": "README.md", "lineage": "lineage"}.get(what, file.name)
        told = attempt(base, tmp_path / "out", named, whole=False)
        # what is JSON says too little to be a config, or nothing at all
        held = told is not None or what == "README" or (name, what) in TAKEN
        count_try("broken JSON in a file of a base is a message with the file", held)
        assert held, name


TAKEN = {("null", "lineage")}


def values(generator: np.random.Generator) -> Any:
    """Something that a config may say by mistake or by intent."""
    choices: list[Any] = [
        None, True, False, 0, -1, 1, 3, 2**31, 10**30, 0.5, -1e308, "", "trap", "somebody/trap", "../../etc", "1",
        "\x00\n|", [], [1], [[1]], [None], ["trap"], [1, 2, 3, 4, 5] * 10, {}, {"a": 1}, {"content": 1},
        {"trap": {"trap": []}},
    ]  # fmt: skip
    return choices[generator.integers(len(choices))]


def mutate(said: Any, generator: np.random.Generator) -> Any:
    """One value changed, taken out or added, somewhere near the top."""
    if isinstance(said, dict) and said and generator.random() < 0.9:
        key = list(said)[generator.integers(len(said))]
        if isinstance(said[key], dict | list) and said[key] and generator.random() < 0.4:
            return said | {key: mutate(said[key], generator)}
        if generator.random() < 0.15:
            return {name: value for name, value in said.items() if name != key}
        return said | {key: values(generator)}
    if isinstance(said, list) and said and generator.random() < 0.8:
        place = generator.integers(len(said))
        return [*said[:place], mutate(said[place], generator), *said[place + 1 :]]
    return values(generator)


@pytest.mark.faults
@pytest.mark.parametrize("what", FILES)
def test_any_value_in_any_config(base: Path, sound: Path, tmp_path: Path, what: str, count_try: Count) -> None:
    generator = np.random.default_rng(len(what))
    sane = json.loads((sound / FILES[what]).read_text(encoding="utf-8"))
    for _ in range(120):
        said = mutate(sane, generator)
        (base / FILES[what]).write_text(json.dumps(said), encoding="utf-8")
        attempt(base, tmp_path / "out", "")
        # of a token any text is a token, and a single word is no more than a name
        held = what.startswith("tokenizer") or "somebody/trap" not in texts(tmp_path / "out")
        count_try("any value in any config of a base is a model or a message", held)
        assert held, said


@pytest.fixture(scope="module")
def parts() -> dict[str, dict[str, torch.Tensor]]:
    return random_parts(seed=3)


def carried(configs: dict[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """Metadata of single files."""
    yield "hooks", {CONFIGS_KEY: json.dumps({name: HOOKS | said for name, said in configs.items() if name != "vae"}
                                            | {"vae": configs["vae"] | {"auto_map": HOOKS["auto_map"]}})}  # fmt: skip
    for name, content in BROKEN.items():
        if name not in ("not UTF-8", "UTF-16", "zeros", "a pickle"):  # which no header can hold
            yield f"configs: {name}", {CONFIGS_KEY: content.decode()}
            yield f"lineage: {name}", {CONFIGS_KEY: json.dumps(configs), LINEAGE_KEY: content.decode()}
    for name in configs:
        yield f"{name} as list", {CONFIGS_KEY: json.dumps(configs | {name: [configs[name]]})}
    generator = np.random.default_rng(9)
    for number in range(30):
        yield f"mutation {number}", {CONFIGS_KEY: json.dumps(mutate(mutate(configs, generator), generator))}


def test_metadata_of_a_single_file(tmp_path: Path, parts: Any, count_try: Count) -> None:
    tensors = to_single_file(parts, TINY)
    for what, metadata in carried(TINY):
        path = tmp_path / "model.safetensors"
        save_file(tensors, path, metadata)
        told = attempt(path, tmp_path / "out", "", whole=what == "hooks")
        held = told is None if what == "hooks" else told is None or len(told) < 1000
        held = held and "somebody/trap" not in texts(tmp_path / "out")
        count_try("any metadata of a single file is a model or a message", held)
        assert held, (what, told)


def test_headers_of_single_files(tmp_path: Path, count_try: Count) -> None:
    """The header itself, before there are any tensors."""
    path = tmp_path / "model.safetensors"
    for content in BROKEN.values():
        path.write_bytes(len(content).to_bytes(8, "little") + content)
        with pytest.raises(UserError, match=r"model\.safetensors"):
            find_base(str(path))
        count_try("a broken header of a single file is a message", True)
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        find_base(str(path))


def test_thresholds_of_a_hostile_lineage(count_try: Count) -> None:
    """They would become caption rules of the run."""
    by_percentile = "captions.quality=[{tag: best, above_percentile: 90},{tag: rest}]"
    rules = load_config([], [*WORDS, "model.pretrained=x", by_percentile]).captions
    described = json.loads(json.dumps(describe_rules(rules)))
    table = pa.table({"rating": pa.array(["g"]), "score": pa.array([1], pa.int32())})
    rule = {"tag": "a", "min_score": 1, "above_percentile": None, "rating": None}
    for resolved in ("text", 1, [1], [{}], [rule | {"trap": 1}], [rule | {"tag": 1}], [rule | {"min_score": "1"}],
                     [rule | {"rating": ["g"]}], {"a": rule}):  # fmt: skip
        with pytest.raises(UserError, match="are damaged"):
            choose_thresholds(rules, table, base={"rules": described, "resolved": resolved})
        count_try("hostile thresholds of a lineage are a message", True)
    for strange in ("text", 1, [1]):
        choose_thresholds(rules, table, base=strange)  # type: ignore[arg-type]


def test_sharded_weights_with_a_hostile_index(base: Path, count_try: Count) -> None:
    file = base / "unet/diffusion_pytorch_model.safetensors"
    file.rename(base.parent / "outside.safetensors")
    index = base / "unet/diffusion_pytorch_model.safetensors.index.json"
    for said in ({}, [], {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}, {"weight_map": {"a": ["b"]}},
                 {"weight_map": {"a": "../../outside.safetensors"}}, {"weight_map": {"a": "/etc/passwd"}}):  # fmt: skip
        index.write_text(json.dumps(said))
        with pytest.raises(UserError, match="unet"):
            find_base(str(base))
        count_try("a hostile index of weights reads nothing elsewhere", True)


def test_a_sound_base_loses_nothing(tmp_path: Path, sound: Path, parts: Any) -> None:
    """What real files say is all kept, so that an export is as it was."""
    for path in (sound, write_folder(tmp_path / "written", parts)):
        base = find_base(str(path))
        assert note_configs(base, find_tokenizers(Base("", sound, None), None)) == [] and has_vae(base)
        for component in ("unet", "text_encoder", "text_encoder_2", "vae"):
            assert read_config(base, component) == json.loads((path / FILES[component]).read_text())
