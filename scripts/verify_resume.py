"""Try resume on your own config, data and machine, before weeks of GPU.

A few steps straight, the same with a kill and a resume, with another micro-batch and another number of processes; and
samples, captions, losses, weights and optimizer states compared.

    python scripts/verify_resume.py my.yaml [key=value ...] [--steps N] [--processes N]

Each trial is a run of train.py in a new folder under run.output_dir, which is deleted at the end if all is as promised.
It takes four to six launches and that many times N steps; a smaller data.global_batch_size makes it shorter, and shows
the same.
"""

from trainer.config.command_line import config_parser, finish_command_line
from trainer.config.load import load_config
from trainer.core.commands import config_words
from trainer.core.console import Result
from trainer.core.errors import UserError, run_command

LEAST, MOST = 4, 50  # steps: two before the kill and two after it; what the black box holds


def main() -> Result:
    parser = config_parser("Kill and resume short runs of a config, and compare them bit by bit.")
    parser.add_argument("--steps", type=int, default=6, metavar="N", help=f"of each run, {LEAST} to {MOST}; default: 6")
    parser.add_argument("--processes", type=int, metavar="N", help="default: one for each GPU, one on the CPU")
    parser.add_argument("--keep", action="store_true", help="keep what the runs wrote, and name the folder")
    arguments = finish_command_line(parser)
    if not LEAST <= arguments.steps <= MOST:
        raise UserError(f"--steps {arguments.steps}: at least {LEAST} and at most {MOST}")
    config = load_config(arguments.config, arguments.overrides)
    import torch

    from trainer.core.distributed import uses_cpu
    from trainer.train.verify_resume import verify_resume

    on_cpu = uses_cpu()
    processes = arguments.processes or config.run.num_processes or (1 if on_cpu else torch.cuda.device_count())
    most = max(2, processes) if on_cpu else torch.cuda.device_count()
    others = [number for number in range(most, 0, -1) if number != processes]
    words = config_words(arguments.config, arguments.overrides)
    return verify_resume(config, words, steps=arguments.steps, processes=processes, others=others, on_cpu=on_cpu,
                         keep=arguments.keep)  # fmt: skip


if __name__ == "__main__":
    run_command(main)
