"""A checkpoint -> a single file in Stability's layout and a diffusers folder.

    python scripts/export.py NAME [--out DIR] [--dtype fp16|bf16|fp32]
    python scripts/export.py runs/NAME/checkpoints/step-00001000

NAME is runs/NAME where no such path lies here; a config, such as my.yaml, stands for its run.
Writes the formats of the config's publish.formats into RUN/export, and overwrites nothing there.
"""

import argparse
from pathlib import Path

from trainer.config.run_names import find_run_path
from trainer.core.errors import run_command
from trainer.core.files import home_path


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a run's newest checkpoint, or the given one.")
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run's name, folder or config, or a checkpoint")
    parser.add_argument("--out", type=home_path, metavar="DIR", help="where to write; default: RUN/export")
    parser.add_argument("--dtype", choices=["fp16", "bf16", "fp32"], help="default: the config's publish.dtype")
    arguments = parser.parse_args()
    source = Path(find_run_path(arguments.source))
    from trainer.model.base import find_base  # torch takes seconds to import
    from trainer.release.export import export, has_sdxl_shapes

    for path in export(source, arguments.out, arguments.dtype):
        if path.is_dir():
            print(f"diffusers folder: {path}")
            print(f'  for StableDiffusionXLPipeline.from_pretrained("{path}"), or model.pretrained of the next stage')
        else:
            print(f"single file: {path}")
            if has_sdxl_shapes(find_base(str(path))):
                print("  for ComfyUI, Forge and others: put it into their checkpoints folder")


if __name__ == "__main__":
    run_command(main)
