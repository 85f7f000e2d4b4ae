"""Diffusion constants of the original 50-step schedule, from the protocol's tables."""

import pytest
import torch
from diffusers import DDPMScheduler

from mgd3.backbones.schedule import NoiseSchedule, linear_alphas_cumprod, respaced_timesteps
from mgd3.runtime.errors import UserError

TIMESTEPS = [
    0, 20, 41, 61, 82, 102, 122, 143, 163, 183, 204, 224, 245, 265, 285, 306, 326, 347, 367, 387,
    408, 428, 449, 469, 489, 510, 530, 550, 571, 591, 612, 632, 652, 673, 693, 714, 734, 754, 775,
    795, 816, 836, 856, 877, 897, 917, 938, 958, 979, 999,
]  # fmt: skip


@pytest.fixture
def schedule():
    return NoiseSchedule(alphas_cumprod=linear_alphas_cumprod()).respaced(50)


def test_timesteps():
    assert respaced_timesteps(1000, 50) == TIMESTEPS


@pytest.mark.parametrize(
    ("step", "abar", "x0", "x_t", "sigma_min", "sigma_max"),
    [
        (49, 0.00004, 0.00256, 0.81864, 0.57428, 0.57429),
        (40, 0.00116, 0.01172, 0.84241, 0.53809, 0.53822),
        (30, 0.02207, 0.03892, 0.87430, 0.47326, 0.47482),
        (26, 0.05691, 0.05334, 0.88739, 0.43257, 0.43566),
        (25, 0.07024, 0.06064, 0.88321, 0.43345, 0.43738),
        (10, 0.64556, 0.18916, 0.80717, 0.25952, 0.28290),
        (1, 0.99374, 0.98409, 0.01591, 0.00992, 0.07852),
        (0, 0.99990, 1.0, 0.0, 0.00992, 0.01000),
    ],
)
def test_constants(schedule, step, abar, x0, x_t, sigma_min, sigma_max):
    assert schedule.abar[step] == pytest.approx(abar, abs=5e-6)
    assert schedule.x0_coefficient[step] == pytest.approx(x0, abs=5e-6)
    assert schedule.x_t_coefficient[step] == pytest.approx(x_t, abs=5e-6)
    low = (0.5 * schedule.log_variance(torch.tensor(-1.0), step)).exp()
    high = (0.5 * schedule.log_variance(torch.tensor(1.0), step)).exp()
    assert low == pytest.approx(sigma_min, abs=5e-6)
    assert high == pytest.approx(sigma_max, abs=5e-6)
    assert (0.5 * schedule.log_variance(None, step)).exp() == pytest.approx(sigma_min, abs=5e-6)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_spacings_are_those_of_diffusers(spacing):
    for steps in (10, 50, 250):
        scheduler = DDPMScheduler(timestep_spacing=spacing, steps_offset=1)
        scheduler.set_timesteps(steps)
        ours = NoiseSchedule(alphas_cumprod=linear_alphas_cumprod(), spacing=spacing, offset=1)
        assert ours.timesteps(steps) == scheduler.timesteps.flip(0).tolist()


@pytest.mark.parametrize(("steps", "better"), [(400, 500), (600, 500), (1000, 500)])
def test_steps_that_would_not_start_in_noise_are_refused(steps, better):
    leading = NoiseSchedule(alphas_cumprod=linear_alphas_cumprod(), spacing="leading", offset=1)
    with pytest.raises(UserError, match=rf"sampler\.steps={steps} would start.*steps={better}"):
        leading.respaced(steps)


def test_zero_terminal_snr_is_refused():
    abar = linear_alphas_cumprod()
    abar[-1] = 0
    with pytest.raises(UserError, match="zero terminal SNR"):
        NoiseSchedule(alphas_cumprod=abar).respaced(50)
