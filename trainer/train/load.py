"""The model and its optimizer at the start of a run: each weight is read once, and put where and as it stays.

Nothing holds the model a second time: memory is laid out first, on the device and in the dtypes of training, and the
base's weights come into it one tensor at a time. What a checkpoint brings is not read from the base.
"""

from typing import Any

from torch.optim import Optimizer

from trainer.config.schema import MemoryConfig
from trainer.model.restore import restore_checkpoint
from trainer.model.sdxl import SDXL, give_memory, load_base, outline_sdxl, put_weights, use_kernels
from trainer.train.launch import RunInputs
from trainer.train.narrow import NarrowOptimizer
from trainer.train.optim import build_optimizer
from trainer.train.resume import restore_scaler


def load_model(inputs: RunInputs) -> tuple[Any, SDXL, Optimizer]:
    """The model with Accelerate's wrappers and without, and the optimizer, as the base or a checkpoint has them."""
    config, accelerator, resumed = inputs.config, inputs.accelerator, inputs.resumed
    memory = MemoryConfig(inputs.facts["memory"]["policy"])
    sdxl = outline_sdxl(inputs.base, config.model, config.precision, memory)
    optimizer: Optimizer
    if config.precision.weights == "autocast":
        give_memory(sdxl, accelerator.device)
        load_base(sdxl, inputs.base, trained=resumed is None)
        use_kernels(sdxl, config.model)
        model = accelerator.prepare_model(sdxl)
        sdxl = accelerator.unwrap_model(model, keep_fp32_wrapper=True)
        optimizer, put = build_optimizer(sdxl, config.optim), put_weights
    else:  # neither autocast nor DDP: what is 16-bit is so, and the optimizer averages the gradients
        give_memory(sdxl, accelerator.device, trained=False)
        model, seed = sdxl, config.run.seed
        optimizer = NarrowOptimizer(sdxl, config.optim, config.precision, seed, accelerator.device, filled=False)
        put = optimizer.weights.put
        load_base(sdxl, inputs.base, put, trained=resumed is None)
        use_kernels(sdxl, config.model)
    if resumed is not None:
        restore_checkpoint(resumed.folder, sdxl, optimizer, put)
        restore_scaler(accelerator.scaler, resumed.state["loss_scaler"])
    return model, sdxl, optimizer
