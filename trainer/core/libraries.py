"""What libraries print that says nothing about the user's work: silenced by name, here and nowhere else.

Only commands call this. Each line stands for one message, or for one kind of them; warnings and errors of other kinds
are shown as ever.
"""

import logging
import os
import warnings


def silence_libraries(*, quiet: bool = False) -> None:
    """Before they are imported; ``quiet``: what they say at their end too."""
    if quiet:
        os.environ.setdefault("WANDB_SILENT", "true")
    # transformers asks for torchvision at import, which nothing here uses
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # bitsandbytes looks for a CPU kernel of 4-bit matrices, which nothing here uses
    no_message("bitsandbytes.backends.cpu.ops", "gemm_4bit_forward")
    # Accelerate knows DDP's setting by its old name only
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)


def no_message(logger: str, words: str) -> None:
    """Drop a logger's messages that have these words."""
    logging.getLogger(logger).addFilter(lambda record: words not in str(record.msg))
