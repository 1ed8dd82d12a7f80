"""Run by test_compatibility with another Python: draw with exports as its diffusers and transformers load them.

``compatibility_driver.py OUT.npz FOLDER [FOLDER ...] [--embeddings TODAY.npz]``; beside each folder lies the single
file of its name. Writes the prompt embeddings and the images of each, and with ``--embeddings`` images from those of
another run too. Knows nothing of the trainer, and only calls that diffusers has had from 0.27 to today.
"""

import argparse
import json
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file
from transformers import CLIPTokenizer

NAMES = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
Pipeline = StableDiffusionXLPipeline


def load_folder(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(str(folder), local_files_only=True, torch_dtype=torch.float32)


def load_single_file(folder: Path) -> Pipeline:
    file = folder.with_name(folder.name + ".safetensors")
    if diffusers.__version__ >= "0.28":
        options = {"config": str(folder), "local_files_only": True, "torch_dtype": torch.float32}
        return Pipeline.from_single_file(str(file), **options)
    return convert_single_file(file, folder)


def convert_single_file(file: Path, folder: Path) -> Pipeline:
    """Diffusers 0.27's own converters, one by one, strict.

    Its ``from_single_file`` takes no configs: it knows SDXL's full widths alone and fetches the encoders' from the hub.
    """
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in load_file(file).items()}
    configs = {name: json.loads((folder / name / "config.json").read_text()) for name in ("unet", "vae")}
    unet, vae = UNet2DConditionModel.from_config(configs["unet"]), AutoencoderKL.from_config(configs["vae"])
    unet.load_state_dict(single_file_utils.convert_ldm_unet_checkpoint(dict(state), configs["unet"]))
    vae.load_state_dict(single_file_utils.convert_ldm_vae_checkpoint(dict(state), configs["vae"]))
    encoder_1 = single_file_utils.create_text_encoder_from_ldm_clip_checkpoint(
        str(folder / "text_encoder"), dict(state), local_files_only=True
    )
    encoder_2 = single_file_utils.create_text_encoder_from_open_clip_checkpoint(
        str(folder / "text_encoder_2"), dict(state), prefix="conditioner.embedders.1.model.", has_projection=True,
        local_files_only=True,
    )  # fmt: skip
    return Pipeline(
        vae=vae.eval(), unet=unet.eval(), text_encoder=encoder_1.eval(), text_encoder_2=encoder_2.eval(),
        tokenizer=CLIPTokenizer.from_pretrained(str(folder / "tokenizer")),
        tokenizer_2=CLIPTokenizer.from_pretrained(str(folder / "tokenizer_2")),
        scheduler=EulerDiscreteScheduler.from_pretrained(str(folder / "scheduler")),
    )  # fmt: skip


def draw(pipeline: Pipeline, embeddings: dict[str, torch.Tensor]) -> np.ndarray:
    """Four steps with guidance, from the same noise; (1, 64, 64, 3) in 0..1."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        **embeddings, num_inference_steps=4, guidance_scale=3.0, height=64, width=64, output_type="np",
        generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--embeddings", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    made = {"versions": np.array([diffusers.__version__, transformers.__version__, torch.__version__])}
    given = dict(np.load(arguments.embeddings, allow_pickle=False)) if arguments.embeddings else {}
    for folder in arguments.folders:
        for form, load in (("folder", load_folder), ("file", load_single_file)):
            pipeline = load(folder)
            # libraries may leave weights in a mapped file, at any address, on which the last bits of products depend
            for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
                state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
                module.load_state_dict(state, assign=True)
            with torch.no_grad():
                encoded = pipeline.encode_prompt("bird, solo", negative_prompt="tree", do_classifier_free_guidance=True)
            embeddings = dict(zip(NAMES, encoded, strict=True))
            key = f"{folder.name}/{form}"
            made |= {f"{key}/{name}": tensor.numpy() for name, tensor in embeddings.items()}
            made[f"{key}/image"] = draw(pipeline, embeddings)
            if given:
                theirs = {name: torch.from_numpy(given[f"{key}/{name}"]) for name in NAMES}
                made[f"{key}/image_from_given"] = draw(pipeline, theirs)
    np.savez(arguments.out, **made)


if __name__ == "__main__":
    main()
