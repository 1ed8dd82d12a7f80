"""The recipe's section 6: its golden numbers, and equality with diffusers where both compute the same."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from trainer.config.schema import DiffusionConfig
from trainer.core.rng import rng
from trainer.data import loader
from trainer.data.loader import Stratum, draw_noise, draw_sample_timestep, draw_strata
from trainer.data.plan import Plan
from trainer.model.diffusion import add_noise, alphas_cumprod, loss_weights, make_target, sample_losses, signal_to_noise

EPSILON = DiffusionConfig()
V_PREDICTION = DiffusionConfig(prediction_type="v_prediction")
ALL_TIMESTEPS = torch.arange(1000)


def diffusers_schedule(**more: object) -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **more
    )


def random_pair(samples: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, samples, 4, 6, 5, generator=generator)
    return latents, noise


# --- schedule


def test_golden_alphas_and_snr() -> None:
    cumulative = alphas_cumprod()
    assert cumulative.dtype == torch.float32 and cumulative.shape == (1000,)
    assert cumulative[0].item() == pytest.approx(0.99915, abs=5e-8)
    assert cumulative[-1].item() == pytest.approx(0.0046601, abs=5e-8)
    snr = signal_to_noise(cumulative)
    assert snr.dtype == torch.float32
    # as fp32 gives it; float64 gives 1175.47 at t = 0
    assert f"{snr[0].item():.2f}" == "1175.44"
    assert f"{snr[500].item():.5f}" == "0.38185"
    assert f"{snr[999].item():.7f}" == "0.0046819"
    exact = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    assert f"{exact[0] / (1 - exact[0]):.2f}" == "1175.47"
    np.testing.assert_allclose(cumulative.numpy(), exact, rtol=1e-4)
    assert (cumulative.diff() < 0).all() and (snr.diff() < 0).all()


def test_the_schedule_is_diffusers_bit_by_bit() -> None:
    scheduler = diffusers_schedule()
    assert torch.equal(alphas_cumprod(), scheduler.alphas_cumprod)
    torch.testing.assert_close(
        signal_to_noise(alphas_cumprod()), compute_snr(scheduler, ALL_TIMESTEPS), rtol=1e-3, atol=0
    )
    # the very schedule that the exported folder samples with
    sampler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert torch.equal(alphas_cumprod(), sampler.alphas_cumprod)


def test_zero_terminal_snr_is_diffusers() -> None:
    ours = alphas_cumprod(zero_terminal_snr=True)
    theirs = diffusers_schedule(rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=1e-7)
    assert ours[-1] == 0 and signal_to_noise(ours)[-1] == 0
    assert ours[0].item() == pytest.approx(alphas_cumprod()[0].item(), abs=1e-7)
    assert (ours.diff() < 0).all()
    assert (ours[1:-1] < alphas_cumprod()[1:-1]).all()


# --- noising and target


def test_noising_is_diffusers() -> None:
    latents, noise = random_pair(1000)
    ours = add_noise(latents, noise, ALL_TIMESTEPS, alphas_cumprod())
    theirs = diffusers_schedule().add_noise(latents, noise, ALL_TIMESTEPS)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    # and for other timesteps than the sample's own number
    mixed = torch.tensor([999, 0, 500, 0])
    torch.testing.assert_close(
        add_noise(latents[:4], noise[:4], mixed, alphas_cumprod()),
        diffusers_schedule().add_noise(latents[:4], noise[:4], mixed),
        rtol=1e-6,
        atol=1e-6,
    )


def test_noising_is_done_in_fp32() -> None:
    """The original noised in fp16: sigma was wrong by 7 % at t = 0 and 1."""
    cumulative = alphas_cumprod()
    latents, noise = torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1, 1)
    timesteps = torch.tensor([0, 1])
    sigma = add_noise(latents.half(), noise, timesteps, cumulative)
    assert sigma.dtype == torch.float32
    exact = np.sqrt(1 - np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))[:2]
    np.testing.assert_allclose(sigma.flatten().numpy(), exact, rtol=2e-5)
    half = (1 - cumulative[:2].half()) ** 0.5
    error = np.abs(half.float().numpy() / exact - 1)
    assert 0.06 < error.max() < 0.08
    # fp16 latents as stored are noised as their fp32 values
    stored, drawn = random_pair(2)
    assert torch.equal(
        add_noise(stored.half(), drawn, timesteps, cumulative),
        add_noise(stored.half().float(), drawn, timesteps, cumulative),
    )


def test_targets() -> None:
    latents, noise = random_pair(1000)
    cumulative = alphas_cumprod()
    assert torch.equal(make_target(latents, noise, ALL_TIMESTEPS, cumulative, EPSILON), noise)
    velocity = make_target(latents, noise, ALL_TIMESTEPS, cumulative, V_PREDICTION)
    theirs = diffusers_schedule(prediction_type="v_prediction").get_velocity(latents, noise, ALL_TIMESTEPS)
    torch.testing.assert_close(velocity, theirs, rtol=1e-6, atol=1e-6)
    # from z_t and v both the image and the noise come back
    alpha = cumulative.view(-1, 1, 1, 1)
    noisy = add_noise(latents, noise, ALL_TIMESTEPS, cumulative)
    torch.testing.assert_close(alpha.sqrt() * noisy - (1 - alpha).sqrt() * velocity, latents, rtol=0, atol=1e-5)
    torch.testing.assert_close((1 - alpha).sqrt() * noisy + alpha.sqrt() * velocity, noise, rtol=0, atol=1e-5)


def test_at_zero_snr_the_velocity_is_the_image() -> None:
    latents, noise = random_pair(1)
    last, cumulative = torch.tensor([999]), alphas_cumprod(zero_terminal_snr=True)
    assert torch.equal(add_noise(latents, noise, last, cumulative), noise)
    assert torch.equal(make_target(latents, noise, last, cumulative, V_PREDICTION), -latents)


# --- noise and timesteps


def test_noise_offset_adds_one_constant_a_channel() -> None:
    shape = (4, 16, 24)
    for key in ("a", "b", "c"):
        plain = draw_noise(shape, 0.0, rng("noise", 42, 0, key))
        with_offset = draw_noise(shape, 0.0357, rng("noise", 42, 0, key))
        assert plain.dtype == with_offset.dtype == np.float32 and plain.shape == with_offset.shape == shape
        shift = with_offset - plain
        constants = shift.mean(axis=(1, 2), keepdims=True)
        np.testing.assert_allclose(shift, np.broadcast_to(constants, shape), atol=1e-6)
        assert len(np.unique(constants.round(6))) == 4  # another one for each channel
        assert 0 < np.abs(constants).max() < 0.0357 * 5
        double = draw_noise(shape, 2 * 0.0357, rng("noise", 42, 0, key))
        np.testing.assert_allclose(double - plain, 2 * shift, atol=1e-6)


def test_the_noises_variance_is_the_recipes() -> None:
    """1.00127 = 1 + 0.0357^2. The share of the offset is told from the channels' means, where it is not drowned."""
    assert f"{1 + 0.0357**2:.5f}" == "1.00127"
    pixels = 256
    draws = np.stack([draw_noise((4, 16, 16), 0.0357, rng("noise", 1, 0, str(key))) for key in range(2000)])
    assert abs(draws.var() - 1.00127) < 4 * (2 / draws.size) ** 0.5
    means = draws.mean(axis=(2, 3))
    expected = 1 / pixels + 0.0357**2
    assert abs(means.var() / expected - 1) < 4 * (2 / means.size) ** 0.5
    assert expected / (1 / pixels) - 1 > 2 * 4 * (2 / means.size) ** 0.5  # this test would notice a missing offset
    assert abs(draws.mean()) < 4 * (expected / means.size) ** 0.5


def test_noise_is_standard_normal() -> None:
    draws = np.stack([draw_noise((4, 16, 16), 0.0, rng("noise", 1, 0, str(key))) for key in range(200)])
    assert abs(draws.var() - 1) < 4 * (2 / draws.size) ** 0.5
    assert abs(draws.mean()) < 4 / draws.size**0.5
    assert abs((draws**4).mean() - 3) < 4 * (96 / draws.size) ** 0.5
    assert abs((np.abs(draws) < 1).mean() - math.erf(0.5**0.5)) < 4 * (0.22 / draws.size) ** 0.5


def test_timesteps_are_uniform_over_their_range() -> None:
    draws = np.array([draw_sample_timestep(str(key), 0, 1, EPSILON) for key in range(5000)])
    counts = np.bincount(draws, minlength=1000)
    assert len(counts) == 1000 and draws.min() <= 2 and draws.max() >= 997
    tenths = counts.reshape(10, 100).sum(axis=1)
    assert np.abs(tenths - 500).max() < 4 * (500 * 0.9) ** 0.5
    narrow = DiffusionConfig(min_timestep=10, max_timestep=13)
    assert {draw_sample_timestep(str(key), 0, 1, narrow) for key in range(60)} == {10, 11, 12}
    assert type(draw_sample_timestep("x", 0, 1, EPSILON)) is int


@pytest.mark.parametrize(("low", "high"), [(0, 1000), (10, 13), (0, 7), (300, 1000)])
def test_stratified_timesteps_are_uniform_over_many_steps(low: int, high: int) -> None:
    """Each place of the batch has the whole range; within a step each stratum of it is taken once."""
    config = DiffusionConfig(min_timestep=low, max_timestep=high, timestep_sampling="stratified")
    plan = Plan(np.array([[64, 64]] * 50), seed=3, bucket_batch_size=5, global_batch_size=10)
    draws = []
    for step in range(2000):
        strata = draw_strata(plan, step, config)
        assert sorted(strata) == [(number, 10) for number in range(10)]  # type: ignore[type-var]
        draws.append([draw_sample_timestep(f"{step} {place}", 0, 3, config, one) for place, one in enumerate(strata)])
    found = np.array(draws)
    assert low <= found.min() and found.max() < high
    for part in (found.ravel(), *found.T):  # all together, and each place of the batch by itself
        counts = np.histogram(part, bins=min(10, high - low), range=(low, high))[0]
        expected = len(part) / len(counts)
        assert np.all(np.abs(counts - expected) < 5 * expected**0.5 + len(part) / (high - low))
    # the mean of a step varies less than that of timesteps which are drawn each for itself
    assert found.mean(axis=1).std() < 0.5 * (high - low) / 12**0.5 / 10**0.5 or high - low < 10


def test_the_last_stratum_stays_below_the_end() -> None:
    config = DiffusionConfig(timestep_sampling="stratified")

    class Highest:
        def integers(self, end: int) -> int:
            return end - 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "rng", lambda *names: Highest())
        assert draw_sample_timestep("x", 0, 1, config, Stratum(95, 96)) == 999


# --- weights and loss


def test_min_snr_weights() -> None:
    cumulative = alphas_cumprod()
    assert loss_weights(ALL_TIMESTEPS, cumulative, EPSILON) is None
    epsilon = loss_weights(ALL_TIMESTEPS, cumulative, DiffusionConfig(min_snr_gamma=5.0))
    velocity = loss_weights(
        ALL_TIMESTEPS, cumulative, DiffusionConfig(min_snr_gamma=5.0, prediction_type="v_prediction")
    )
    assert epsilon is not None and velocity is not None and epsilon.dtype == torch.float32
    assert f"{epsilon[0].item():.7f}" == "0.0042537"
    assert f"{epsilon[100].item():.6f}" == "0.591445"
    # the recipe rounds float64 here, 0.5288826; fp32 gives 0.5288842
    assert velocity[100].item() == pytest.approx(0.528883, abs=1.5e-6)
    snr = signal_to_noise(cumulative)
    assert (epsilon[snr < 5] == 1).all() and (epsilon[snr > 5] < 1).all()
    torch.testing.assert_close(velocity, epsilon * snr / (snr + 1))
    some = loss_weights(torch.tensor([100, 0]), cumulative, DiffusionConfig(min_snr_gamma=5.0))
    assert some is not None and torch.equal(some, epsilon[[100, 0]])
    strict = loss_weights(ALL_TIMESTEPS, cumulative, DiffusionConfig(min_snr_gamma=1.0))
    assert strict is not None and (strict <= epsilon).all() and strict[100] < epsilon[100]


def test_weights_follow_the_rescaled_schedule() -> None:
    config = DiffusionConfig(min_snr_gamma=5.0, prediction_type="v_prediction", zero_terminal_snr=True)
    rescaled = loss_weights(ALL_TIMESTEPS, alphas_cumprod(True), config)
    plain = loss_weights(ALL_TIMESTEPS, alphas_cumprod(False), config)
    assert rescaled is not None and plain is not None
    assert rescaled.isfinite().all() and rescaled[-1] == 0 < plain[-1]


def test_loss_is_the_mean_square_over_channels_and_pixels_of_each_sample() -> None:
    prediction, target = random_pair(3)
    losses = sample_losses(prediction, target, None)
    assert losses.shape == (3,) and losses.dtype == torch.float32
    expected = ((prediction - target).double().numpy() ** 2).reshape(3, -1).mean(axis=1)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-6)
    # of all samples together the mean is the plain mean squared error
    assert losses.mean().item() == pytest.approx(torch.nn.functional.mse_loss(prediction, target).item(), rel=1e-6)
    weights = torch.tensor([0.0, 1.0, 2.0])
    assert torch.equal(sample_losses(prediction, target, weights), losses * weights)


def test_a_loss_of_half_precision_predictions_is_computed_in_fp32() -> None:
    prediction = torch.full((1, 4, 64, 64), 300.0, dtype=torch.float16)  # 300^2 is above fp16's 65,504
    losses = sample_losses(prediction, torch.zeros(1, 4, 64, 64), None)
    assert losses.dtype == torch.float32 and losses.item() == 90_000
    assert sample_losses(prediction.bfloat16(), torch.zeros(1, 4, 64, 64), None).dtype == torch.float32
