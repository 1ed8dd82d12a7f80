"""Pixels, raw latents, latents: the posterior's mean, both scalings, and weights that are not the config's."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils._python_dispatch import TorchDispatchMode

from support.host_reads import HostReads
from support.posts_on_disk import to_floats
from trainer.core.errors import UserError
from trainer.model.latents import read_latent_scale, scale_latents
from trainer.model.vae import build_vae, decode_latents, encode_raw_latents, pixels_to_tensor

LEVELS = {"block_out_channels": (8, 8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 4,
          "up_block_types": ("UpDecoderBlock2D",) * 4, "norm_num_groups": 4}  # fmt: skip


def make(**options: object) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**{**LEVELS, "latent_channels": 4, **options})


def test_every_byte_becomes_the_float_that_it_always_was() -> None:
    images = [np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3) for _ in range(2)]
    images[1] = images[1][::-1, :, ::-1]  # as a view
    images[1].flags.writeable = False  # as Pillow's arrays are
    tensor = pixels_to_tensor(images, torch.device("cpu"))
    expected = torch.stack([to_floats(image) for image in images])
    assert tensor.dtype == torch.float32 and torch.equal(tensor, expected)
    assert tensor.stride() == expected.stride()  # convolutions of another layout give other bits
    assert tensor[0, :, 0, 0].tolist() == [-1.0] * 3 and tensor[0, :, 15, 15].tolist() == [1.0] * 3


class OtherOperands(TorchDispatchMode):
    """A context that notes what is divided by a number of the host's, and how many bytes leave it."""

    def __init__(self) -> None:
        super().__init__()
        self.divided_by_numbers, self.sent = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_):
            self.divided_by_numbers += not (isinstance(args[1], torch.Tensor) and args[1].device == args[0].device)
        if function.overloadpacket is torch.ops.aten._to_copy and args[0].device != result.device:
            self.sent += args[0].nbytes
        return result


def test_pixels_go_to_a_device_as_bytes_and_are_divided_there() -> None:
    """CUDA would multiply by the reciprocal of a number of the host's; this is what can be seen of it on a CPU."""
    with HostReads() as reads, OtherOperands() as operands:
        tensor = pixels_to_tensor([np.zeros((8, 16, 3), np.uint8)] * 2, torch.device("meta"))
    assert tensor.shape == (2, 3, 8, 16) and tensor.is_meta and tensor.is_contiguous()
    assert (operands.divided_by_numbers, operands.sent) == (0, 2 * 8 * 16 * 3)
    assert reads.found == {}


def test_the_host_waits_for_nothing_while_it_launches_the_encoder() -> None:
    with torch.device("meta"):
        vae = make().eval().requires_grad_(False).to(torch.bfloat16)
    with HostReads() as reads:
        pixels = pixels_to_tensor([np.zeros((64, 32, 3), np.uint8)], vae.device)
        raw_latents = encode_raw_latents(vae, pixels).half()
    assert raw_latents.shape == (1, 4, 8, 4) and reads.found == {}


def test_raw_latents_are_the_posteriors_mean() -> None:
    original = make()
    vae = build_vae(original.config, original.state_dict(), torch.float32)
    pixels = torch.rand(2, 3, 32, 64) * 2 - 1
    raw_latents = encode_raw_latents(vae, pixels)
    assert raw_latents.shape == (2, 4, 4, 8) and raw_latents.dtype == torch.float32
    original.eval().requires_grad_(
        False
    )  # with trainable weights torch picks another attention kernel, even in no_grad
    assert torch.equal(raw_latents, original.encode(pixels).latent_dist.mean)
    assert not vae.training and not any(parameter.requires_grad for parameter in vae.parameters())


@pytest.mark.parametrize("shift", [None, 0.5])
def test_scaling_and_back(shift: float | None) -> None:
    original = make(scaling_factor=0.13025, shift_factor=shift)
    vae = build_vae(original.config, original.state_dict(), torch.float32)
    raw_latents = torch.randn(1, 4, 4, 4)
    latents = scale_latents(raw_latents, read_latent_scale(vae.config))
    assert torch.allclose(latents, (raw_latents - (shift or 0)) * 0.13025)
    with torch.no_grad():
        expected = original.eval().decode(raw_latents).sample
    assert torch.allclose(decode_latents(vae, latents), expected, atol=1e-5)


def test_a_lower_precision_gives_fp32_results() -> None:
    original = make()
    vae = build_vae(original.config, original.state_dict(), torch.bfloat16)
    raw_latents = encode_raw_latents(vae, torch.zeros(1, 3, 16, 16))
    assert vae.dtype == torch.bfloat16 and raw_latents.dtype == torch.float32
    assert decode_latents(vae, raw_latents).dtype == torch.float32


def test_weights_that_are_not_the_configs_are_refused() -> None:
    original = make()
    state = original.state_dict()
    missing = {name: value for name, value in state.items() if name != "quant_conv.bias"}
    for wrong in (missing, state | {"more": torch.zeros(1)}, state | {"quant_conv.bias": torch.zeros(3)}):
        with pytest.raises(UserError, match="do not fit its config"):
            build_vae(original.config, wrong, torch.float32)
    for options, said in (
        ({"latent_channels": 16}, "16 channels at 1/8"),
        ({name: value[:3] if isinstance(value, tuple) else value for name, value in LEVELS.items()}, "at 1/4"),
    ):
        other = make(**options)
        with pytest.raises(UserError, match=said):
            build_vae(other.config, other.state_dict(), torch.float32)
