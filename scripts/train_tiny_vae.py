"""Train the demo's tiny VAE on a folder of drawings and write its weights as fp16 safetensors.

The file explains itself: its metadata hold the `AutoencoderKL` config (`config`) and the factor that brings
the latents of the demo's drawings to unit variance (`scaling_factor`); `make_tiny_base.py` needs nothing else.
Example: `python scripts/train_tiny_vae.py demo/tiny_vae.safetensors --minutes 60`.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from trainer.core.console import CommandParser, Result
from trainer.core.errors import run_command
from trainer.core.files import home_path


def main(argv: list[str] | None = None) -> Result:
    parser = CommandParser(__doc__ or "")
    parser.add_argument("out", type=home_path, help="the weights to write, demo/tiny_vae.safetensors")
    parser.add_argument("--drawings", type=home_path, default=Path("/usr/share/openclipart/png"))
    parser.add_argument("--measure-on", type=home_path, default=Path("demo/images"), help="the demo's drawings")
    parser.add_argument("--minutes", type=float, default=60, help="wall-clock time of training")
    parser.add_argument("--save-every", type=float, default=10, help="minutes between intermediate saves")
    parser.add_argument("--short-side", type=int, default=160, help="px of drawings in memory")
    parser.add_argument("--grid", type=home_path, help="PNG to write: originals above reconstructions")
    parser.add_argument("--init", type=home_path, help="weights to start from")
    parser.add_argument(
        "--decoder-only", action="store_true", help="keep the encoder, and so all latents, as --init has it"
    )
    parser.add_argument("--favour", type=home_path, help="a posts file, whose drawings are seen ten times as often")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--remeasure", action="store_true", help="only rewrite the scaling factor")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    for path in (args.measure_on, *([] if args.remeasure else [args.drawings])):
        if not path.is_dir():
            parser.error(f"no folder {path}")
    if args.decoder_only and args.init is None:
        parser.error("--decoder-only keeps the encoder of --init, which is not given")
    from _tiny_vae import remeasure, train  # beside this file; torch takes seconds to import

    remeasure(args) if args.remeasure else train(args)
    return Result(f"weights: {args.out}", [args.out])


if __name__ == "__main__":
    run_command(main)
