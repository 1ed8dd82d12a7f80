"""A checkpoint -> a single file in Stability's layout and a diffusers folder.

    python scripts/export.py runs/NAME [--out DIR] [--dtype fp16|bf16|fp32]
    python scripts/export.py runs/NAME/checkpoints/step-00001000

Writes the formats of the config's publish.formats into RUN/export, and overwrites nothing there.
"""

import argparse

from trainer.core.errors import run_command
from trainer.core.files import home_path


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a run's newest checkpoint, or the given one.")
    parser.add_argument("source", type=home_path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--out", type=home_path, metavar="DIR", help="where to write; default: RUN/export")
    parser.add_argument("--dtype", choices=["fp16", "bf16", "fp32"], help="default: the config's publish.dtype")
    arguments = parser.parse_args()
    from trainer.model.base import find_base  # torch takes seconds to import
    from trainer.release.export import export, has_sdxl_shapes

    for path in export(arguments.source, arguments.out, arguments.dtype):
        if path.is_dir():
            print(f"diffusers folder: {path}")
            print(f'  for StableDiffusionXLPipeline.from_pretrained("{path}"), or model.pretrained of the next stage')
        else:
            print(f"single file: {path}")
            if has_sdxl_shapes(find_base(str(path))):
                print("  for ComfyUI, Forge and others: put it into their checkpoints folder")


if __name__ == "__main__":
    run_command(main)
