import numpy as np
import pytest
import torch

from ldm_audio.diffusion.schedule import Schedule
from ldm_audio.errors import InputError

AUDIOLDM = {"num_timesteps": 1000, "beta_start": 0.0015, "beta_end": 0.0195, "kind": "scaled_linear"}


def make(prediction="eps", **changes):
    return Schedule(**(AUDIOLDM | {"prediction": prediction} | changes))


def test_released_schedule_has_the_originals_values():
    alphas = make().alphas_cumprod
    assert alphas.dtype == torch.float64 and alphas.device.type == "cpu" and alphas.shape == (1000,)
    assert alphas[0].item() == pytest.approx(0.9985, abs=1e-12)
    assert alphas[499].item() == pytest.approx(0.115844, abs=5e-7)
    assert alphas[999].item() == pytest.approx(1.42304e-4, abs=5e-10)


@pytest.mark.parametrize(
    "kind, theirs",
    [("scaled_linear", "scaled_linear"), ("linear", "linear"), ("cosine", "squaredcos_cap_v2")],
)
def test_every_kind_equals_diffusers(kind, theirs):
    from diffusers import DDPMScheduler

    peer = DDPMScheduler(num_train_timesteps=1000, beta_start=0.0015, beta_end=0.0195, beta_schedule=theirs)
    assert (make(kind=kind).alphas_cumprod - peer.alphas_cumprod).abs().max() < 1e-6


def test_cosine_needs_no_betas_and_falls_to_nothing():
    alphas = make(kind="cosine", beta_start=None, beta_end=None).alphas_cumprod
    assert (alphas.diff() < 0).all() and 0 < alphas[-1] < 1e-6


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("kind", ["scaled_linear", "linear", "cosine"])
def test_the_target_converts_back_to_clean_latents_and_noise(prediction, kind):
    schedule = make(prediction, kind=kind)
    generator = torch.Generator().manual_seed(0)
    z0, noise = torch.randn(2, 7, 3, 5, 2, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 1, 10, 300, 600, 900, 998])
    zt = schedule.add_noise(z0, noise, t)
    x0, eps = schedule.to_x0_eps(schedule.target(z0, noise, t), zt, t)
    assert (x0 - z0).abs().max() < 1e-9 and (eps - noise).abs().max() < 1e-9


@pytest.mark.parametrize("prediction, theirs", [("eps", "epsilon"), ("v", "v_prediction")])
def test_noising_and_targets_equal_diffusers(prediction, theirs):
    from diffusers import DDPMScheduler

    peer = DDPMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", prediction_type=theirs
    )
    schedule = make(prediction)
    generator = torch.Generator().manual_seed(0)
    z0, noise = torch.randn(2, 4, 3, 5, 2, generator=generator)
    t = torch.tensor([0, 17, 500, 999])
    assert (schedule.add_noise(z0, noise, t) - peer.add_noise(z0, noise, t)).abs().max() < 1e-6
    target = noise if prediction == "eps" else peer.get_velocity(z0, noise, t)
    assert (schedule.target(z0, noise, t) - target).abs().max() < 1e-6


def test_each_row_has_its_own_time_step():
    schedule = make()
    z0, noise = torch.ones(3, 2, 2), torch.zeros(3, 2, 2)
    t = torch.tensor([0, 500, 999])
    zt = schedule.add_noise(z0, noise, t)
    expected = schedule.alphas_cumprod[t].sqrt().float()
    assert torch.equal(zt, expected[:, None, None].expand(3, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_computation_follows_the_latents_dtype(dtype):
    schedule = make("v")
    z = torch.ones(2, 4, dtype=dtype)
    t = torch.tensor([3, 4])
    results = [schedule.add_noise(z, z, t), schedule.target(z, z, t), *schedule.to_x0_eps(z, z, t)]
    assert all(result.dtype == dtype for result in results)


def test_a_table_first_used_while_sampling_serves_training():
    schedule = make("v")
    z, t = torch.ones(2, 4), torch.tensor([3, 4])
    with torch.inference_mode():
        schedule.add_noise(z, z, t)
    weight = torch.ones(4, requires_grad=True)
    schedule.to_x0_eps(weight * z, z, t)[0].sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"num_timesteps": 0}, "num_timesteps=0"),
        ({"kind": "sigmoid"}, "kind='sigmoid'"),
        ({"prediction": "epsilon"}, "prediction='epsilon'"),
        ({"beta_start": None}, "beta_start=None"),
        ({"beta_start": 0.03}, "beta_start=0.03"),
        ({"beta_end": 1.0}, "beta_end=1.0"),
        ({"beta_start": float("nan")}, "beta_start=nan"),
    ],
)
def test_a_schedule_that_cannot_be_names_the_value(changes, named):
    with pytest.raises(InputError, match=named):
        make(**changes)


def test_betas_are_float64_all_the_way():
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=np.float64) ** 2
    assert np.array_equal(make().alphas_cumprod.numpy(), np.cumprod(1 - betas))
