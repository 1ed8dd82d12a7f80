"""Show what one step sees, without a model: one JSON line per sample.

    python scripts/explain_step.py my.yaml [key=value ...] --step N
    python scripts/explain_step.py --black-box RUN [--step N]

N counts from 0. The lines are the same whatever the number of processes and threads. With --black-box they are what
the last steps of a run's attempts saw and gave, as each of its processes wrote it down.
"""

import json

from trainer.config.command_line import config_parser, explain_strange, finish_command_line
from trainer.config.load import load_config
from trainer.config.run_names import find_run_path
from trainer.core.console import Result
from trainer.core.errors import UserError, run_command


def main() -> Result:
    parser = config_parser("Show what one step sees, without a model: one JSON line per sample.")
    parser.add_argument("--step", type=int, metavar="N", help="which step, counted from 0")
    parser.add_argument("--black-box", action="store_true",
                        help="what the last steps of a run saw and gave: name the run, or its config")  # fmt: skip
    arguments = finish_command_line(parser, other="with --black-box a run")
    if arguments.step is not None and arguments.step < 0:
        raise UserError(f"--step {arguments.step}: steps are counted from 0")
    if arguments.black_box:
        from trainer.report.explain import show_black_box

        samples = list(show_black_box(find_run_path(arguments.other or arguments.config[-1]), arguments.step))
    else:
        if arguments.other is not None:
            parser.error(explain_strange([arguments.other]))
        if arguments.step is None:
            parser.error("say which step: --step N, counted from 0")
        config = load_config(arguments.config, arguments.overrides)
        from trainer.data.subset import open_chosen
        from trainer.report.explain import explain_step

        samples = list(explain_step(config, open_chosen(config.data, config.captions), arguments.step))
    return Result("\n".join(json.dumps(each, ensure_ascii=False) for each in samples), facts={"samples": samples})


if __name__ == "__main__":
    run_command(main)
