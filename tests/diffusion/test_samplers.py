"""Against diffusers' schedulers on a small network, and against the exact flow of a Gaussian."""

from functools import partial

import diffusers
import pytest
import torch

from ldm_audio.diffusion.samplers import ddim, ddpm, dpm_solver, half_log_snr, pndm, timestep_grid, unipc
from ldm_audio.diffusion.schedule import Schedule
from ldm_audio.errors import InputError
from ldm_audio.randomness import RowRandom

BETAS = {"beta_start": 0.0015, "beta_end": 0.0195}
PEER = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear"} | BETAS
torch.set_num_threads(1)

THEIRS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
PLMS = partial(pndm, runge_kutta=False)
RUNGE_KUTTA = partial(pndm, runge_kutta=True)
ALL_SAMPLERS = {
    "ddim": partial(ddim, eta=0.0),
    "ddim_eta": partial(ddim, eta=0.7),
    "ddpm": partial(ddpm, variance="small"),
    "ddpm_large": partial(ddpm, variance="large"),
    "plms": PLMS,
    "runge_kutta": RUNGE_KUTTA,
    "dpm_solver": dpm_solver,
    "dpm_solver_sde": partial(dpm_solver, stochastic=True),
    "unipc": unipc,
}
SPACINGS = ["leading", "linspace", "trailing", "log_snr"]


def make_schedule(prediction="eps"):
    return Schedule(num_timesteps=1000, kind="scaled_linear", prediction=prediction, **BETAS)


def network(prediction="eps"):
    """A smooth, bounded guess of the clean latents that mixes channels and places, as a `prediction`."""
    schedule = make_schedule("x0")
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) / 8

    def model(zt, t):
        mixed = torch.einsum("bctf,dc->bdtf", zt + 0.5 * zt.roll(1, -1), weight.to(zt))
        guess = torch.tanh(mixed + t.to(zt)[:, None, None, None] / 1000)
        x0, eps = schedule.to_x0_eps(guess, zt, t)
        if prediction == "v":
            signal, sigma = schedule.rates(t, zt)
            return signal * eps - sigma * x0
        return eps if prediction == "eps" else x0

    return model


def start():
    return torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(2))


def make_peer(name, **settings):
    """A diffusers scheduler on our float64 alphas, so that only the arithmetic of the steps is compared."""
    peer = getattr(diffusers, name)(**PEER, **settings)
    peer.alphas_cumprod = make_schedule().alphas_cumprod
    peer.final_alpha_cumprod = peer.alphas_cumprod[0]
    return peer


def run_peer(scheduler, model, z, **step_arguments):
    for t in scheduler.timesteps:
        step = {name: draw() for name, draw in step_arguments.items()}
        z = scheduler.step(model(z, torch.full((len(z),), int(t))), t, z, **step).prev_sample
    return z


def draws():
    """Two equal streams of step noise, ours and the peer's."""
    shape = start().shape[1:]
    ours, theirs = (RowRandom([(0, 0), (0, 1)]) for _ in range(2))
    return ours.randn, lambda: theirs.randn(*shape).double()


# The grid


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_step_count_gives_a_descending_grid_inside_the_schedule(spacing):
    for num_steps in range(1, 1001):
        grid = timestep_grid(num_steps, make_schedule(), spacing)
        assert grid.dtype == torch.int64 and grid.shape == (num_steps,)
        assert (grid.diff() < 0).all() and 0 <= grid[-1] <= grid[0] < 1000


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_grids_equal_diffusers_wherever_it_has_one(spacing):
    peer = diffusers.DDIMScheduler(**PEER, steps_offset=1, timestep_spacing=spacing)
    for num_steps in range(2, 1000):
        peer.set_timesteps(num_steps)
        theirs = peer.timesteps[peer.timesteps >= 0]  # its trailing grid sometimes ends in a surplus -1
        assert torch.equal(timestep_grid(num_steps, make_schedule(), spacing), theirs), num_steps


def test_known_grids():
    assert timestep_grid(10, make_schedule(), "leading").tolist() == list(range(901, 0, -100))
    assert timestep_grid(7, make_schedule(), "leading").tolist() == [853, 711, 569, 427, 285, 143, 1]
    assert timestep_grid(1, make_schedule(), "leading").tolist() == [1]
    assert timestep_grid(1, make_schedule(), "linspace").tolist() == [999]
    assert timestep_grid(1, make_schedule(), "trailing").tolist() == [999]
    assert timestep_grid(1000, make_schedule(), "leading").tolist() == list(range(999, -1, -1))


def test_log_snr_steps_are_as_even_as_whole_time_steps_allow():
    """Each step's own time within half a step of its place, but at the crowded clean end."""
    schedule = make_schedule()
    log_snr = [half_log_snr(alpha) for alpha in schedule.alphas_cumprod.tolist()]
    assert timestep_grid(1, schedule, "log_snr").tolist() == [999]
    assert timestep_grid(1000, schedule, "log_snr").tolist() == list(range(999, -1, -1))
    for num_steps in (2, 5, 10, 16):
        grid = timestep_grid(num_steps, schedule, "log_snr").tolist()
        places = torch.linspace(log_snr[-1], log_snr[0], num_steps + 1)[:-1].tolist()
        for t, place in zip(grid, places):
            assert log_snr[min(t + 1, 999)] <= place + 1e-6 and place <= log_snr[t - 1] + 1e-6
    crowded = timestep_grid(200, schedule, "log_snr")
    assert crowded[-5:].tolist() == [5, 4, 3, 2, 1] and crowded[0] == 999


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_step_counts_outside_the_schedule_are_refused(num_steps):
    with pytest.raises(InputError, match=f"num_steps={num_steps}: expected 1 to 1000"):
        timestep_grid(num_steps, make_schedule(), "leading")


def test_unknown_names_and_impossible_grids_are_refused():
    with pytest.raises(InputError, match="spacing='even'"):
        timestep_grid(10, make_schedule(), "even")
    arguments = network(), start()
    for timesteps in ([], [1, 2], [5, 5], [1000, 1], [3, -1]):
        with pytest.raises(InputError, match="descending"):
            ddim(*arguments, torch.tensor(timesteps), make_schedule(), None, eta=0.0)
    with pytest.raises(InputError, match=r"eta=1\.5"):
        ddim(*arguments, timestep_grid(5, make_schedule(), "leading"), make_schedule(), None, eta=1.5)
    with pytest.raises(InputError, match="variance='learned'"):
        ddpm(
            *arguments,
            timestep_grid(5, make_schedule(), "leading"),
            make_schedule(),
            None,
            variance="learned",
        )


# Against diffusers


@pytest.mark.parametrize("num_steps", [1, 5, 7, 10, 20, 50, 200])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_equals_diffusers(num_steps, prediction, eta):
    peer = make_peer("DDIMScheduler", steps_offset=1, clip_sample=False, prediction_type=THEIRS[prediction])
    peer.set_timesteps(num_steps)
    model, (noise, variance_noise) = network(prediction), draws()
    theirs = run_peer(peer, model, start().double(), eta=lambda: eta, variance_noise=variance_noise)
    grid = timestep_grid(num_steps, make_schedule(), "leading")
    ours = ddim(model, start().double(), grid, make_schedule(prediction), noise, eta=eta)
    assert (ours - theirs).abs().max() < 1e-9


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 7, 10, 20, 50, 200])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_plms_equals_diffusers(num_steps, prediction):
    peer = make_peer("PNDMScheduler", steps_offset=1, skip_prk_steps=True)
    peer.set_timesteps(num_steps)
    theirs = run_peer(peer, network("eps"), start().double())  # it combines v itself: see the test of that
    grid = timestep_grid(num_steps, make_schedule(), "leading")
    ours = PLMS(network(prediction), start().double(), grid, make_schedule(prediction), None)
    assert (ours - theirs).abs().max() < 1e-9


@pytest.mark.parametrize("num_steps", [4, 5, 7, 10, 20, 50, 200])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_runge_kutta_equals_diffusers(num_steps, prediction):
    peer = make_peer("PNDMScheduler", steps_offset=1, skip_prk_steps=False)
    peer.set_timesteps(num_steps)
    theirs = run_peer(peer, network("eps"), start().double())
    grid = timestep_grid(num_steps, make_schedule(), "leading")
    ours = RUNGE_KUTTA(network(prediction), start().double(), grid, make_schedule(prediction), None)
    # Where the spacing is odd, diffusers moves half-way to one time step and names the network the one below.
    tolerance = 1e-9 if 1000 // num_steps % 2 == 0 else 1e-5
    assert (ours - theirs).abs().max() < tolerance


@pytest.mark.parametrize("num_steps", [1, 2, 5, 7, 14, 15, 20, 50, 200])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_dpm_solver_equals_diffusers_on_the_same_grid(num_steps, prediction):
    grid = timestep_grid(num_steps, make_schedule(), "leading")
    peer = make_peer(
        "DPMSolverMultistepScheduler", prediction_type=THEIRS[prediction], final_sigmas_type="sigma_min"
    )
    peer.set_timesteps(timesteps=grid.tolist())
    theirs = run_peer(peer, network(prediction), start().double())
    ours = dpm_solver(network(prediction), start().double(), grid, make_schedule(prediction), None)
    assert (ours - theirs).abs().max() < 1e-5  # its sigmas are float32 whatever the alphas


@pytest.mark.parametrize("num_steps", [1, 5, 7, 14, 15, 20, 50, 200])
def test_stochastic_dpm_solver_equals_diffusers_on_the_same_grid(num_steps):
    grid = timestep_grid(num_steps, make_schedule(), "leading")
    peer = make_peer(
        "DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", final_sigmas_type="sigma_min"
    )
    peer.set_timesteps(timesteps=grid.tolist())
    noise, variance_noise = draws()
    theirs = run_peer(peer, network(), start().double(), variance_noise=variance_noise)
    ours = ALL_SAMPLERS["dpm_solver_sde"](network(), start().double(), grid, make_schedule(), noise)
    assert (ours - theirs).abs().max() < 1e-5  # its sigmas and its noise are float32


@pytest.mark.parametrize("num_steps", [1, 2, 5, 7, 10, 20, 50, 200])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_unipc_equals_diffusers_on_the_same_grid(num_steps, prediction):
    grid, schedule = timestep_grid(num_steps, make_schedule(), "log_snr"), make_schedule(prediction)
    peer = make_peer(
        "UniPCMultistepScheduler", prediction_type=THEIRS[prediction], final_sigmas_type="sigma_min"
    )
    peer.set_timesteps(num_steps)
    peer.timesteps = grid
    alphas = schedule.alphas_cumprod[torch.cat([grid, torch.tensor([0])])]
    peer.sigmas = ((1 - alphas) / alphas).sqrt()
    theirs = run_peer(peer, network(prediction), start().double())
    ours = unipc(network(prediction), start().double(), grid, schedule, None)
    assert (ours - theirs).abs().max() < 1e-5  # the peer solves for its coefficients in float32


@pytest.mark.parametrize("num_steps", [1, 7, 50, 1000])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_equals_diffusers(num_steps, variance, monkeypatch):
    from diffusers.schedulers import scheduling_ddpm

    noise, peer_noise = draws()
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: peer_noise())
    peer = make_peer("DDPMScheduler", clip_sample=False, variance_type=f"fixed_{variance}")
    peer.set_timesteps(num_steps)
    theirs = run_peer(peer, network(), start().double())
    ours = ddpm(network(), start().double(), peer.timesteps, make_schedule(), noise, variance=variance)
    assert (ours - theirs).abs().max() < 1e-9


@pytest.mark.parametrize("num_steps", [5, 10, 50, 200])
@pytest.mark.parametrize("name", ["ddim", "plms", "runge_kutta"])
def test_float32_sampling_equals_diffusers_as_it_ships(name, num_steps):
    settings = {"steps_offset": 1, "set_alpha_to_one": False}
    if name == "ddim":
        peer = diffusers.DDIMScheduler(**PEER, **settings, clip_sample=False)
    else:
        peer = diffusers.PNDMScheduler(**PEER, **settings, skip_prk_steps=name == "plms")
    peer.set_timesteps(num_steps)
    theirs = run_peer(peer, network(), start())
    grid = timestep_grid(num_steps, make_schedule(), "leading")
    ours = ALL_SAMPLERS[name](network(), start(), grid, make_schedule(), None)
    assert ours.dtype == torch.float32 and (ours - theirs).abs().max() < 1e-5


# Against what is known of a Gaussian


def gaussian(mean, std, prediction="eps"):
    """The perfect denoiser of data from N(mean, std**2)."""
    schedule = make_schedule("x0")

    def model(zt, t):
        signal, sigma = schedule.rates(t, zt)
        centred = (zt - signal * mean) / (signal**2 * std**2 + sigma**2)
        if prediction == "v":
            return signal * sigma * (1 - std**2) * centred - sigma * mean
        return sigma * centred if prediction == "eps" else mean + signal * std**2 * centred

    return model


def flow_error(sample, grid, prediction="eps", std=0.4, mean=0.7):
    """How far `sample(denoiser, z)` ends from where N(mean, std**2)'s probability flow leads, in float64."""
    alphas = make_schedule().alphas_cumprod
    first, last = alphas[grid[0]], alphas[0]
    z = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1, 1, 1)
    spread = [(alpha * std**2 + 1 - alpha).sqrt() for alpha in (first, last)]
    exact = last.sqrt() * mean + spread[1] / spread[0] * (z - first.sqrt() * mean)
    return (sample(gaussian(mean, std, prediction), z) - exact).abs().max().item()


def our_flow_error(sampler, num_steps, prediction="eps", spacing="linspace"):
    grid, schedule = timestep_grid(num_steps, make_schedule(), spacing), make_schedule(prediction)
    return flow_error(lambda model, z: sampler(model, z, grid, schedule, None), grid, prediction)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("name", list(ALL_SAMPLERS))
@pytest.mark.parametrize("num_steps", [1, 2, 5, 37])
@pytest.mark.filterwarnings("ignore:pndm")
def test_one_point_is_found_exactly_in_any_number_of_steps(name, prediction, num_steps):
    """The clean latents are then known at once, and only the last level's noise remains."""
    schedule = make_schedule(prediction)
    grid = timestep_grid(num_steps, make_schedule(), "trailing")
    rows = RowRandom([(0, row) for row in range(9)])
    z = rows.randn(1, 1, 1).double()
    z0 = ALL_SAMPLERS[name](
        gaussian(0.7, 0.0, prediction), z, grid, schedule, lambda *shape: 0 * rows.randn(*shape)
    )
    if name.startswith("ddpm"):
        assert (z0 - 0.7).abs().max() < 1e-9
        return
    first, last = schedule.alphas_cumprod[grid[0]], schedule.alphas_cumprod[0]
    eps = (z - first.sqrt() * 0.7) / (1 - first).sqrt()
    off, remaining = z0 - last.sqrt() * 0.7, (1 - last).sqrt() * eps
    if name in ("ddim_eta", "dpm_solver_sde"):  # part of it made way for fresh noise, which is 0 here
        assert (off.abs() <= remaining.abs() + 1e-9).all()
    else:
        assert (off - remaining).abs().max() < 1e-9


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(
    "name, order", [("ddim", 1), ("plms", 2), ("runge_kutta", 2), ("dpm_solver", 2), ("unipc", 2)]
)
def test_deterministic_samplers_converge_to_the_exact_flow_at_their_order(name, order, prediction):
    """Three times the steps, an error three or nine times smaller; 333 and 999 divide the schedule evenly."""
    coarse, fine = (our_flow_error(ALL_SAMPLERS[name], n, prediction) for n in (334, 1000))
    assert fine < coarse / 3 ** (order - 0.25)
    assert fine < (5e-3 if order == 1 else 1e-3)


def test_second_order_samplers_beat_ddim_at_equal_steps():
    error = our_flow_error(ALL_SAMPLERS["ddim"], 112)
    assert our_flow_error(dpm_solver, 112) < error
    assert all(our_flow_error(sampler, 112) < error / 4 for sampler in (PLMS, RUNGE_KUTTA))


@pytest.mark.parametrize("runge_kutta", [True, False])
def test_combining_noise_keeps_the_order_that_combining_v_loses(runge_kutta):
    """Why `pndm` differs from diffusers for v: there the error falls in proportion to the steps alone."""

    def peer_error(num_steps):
        peer = make_peer(
            "PNDMScheduler", steps_offset=1, skip_prk_steps=not runge_kutta, prediction_type="v_prediction"
        )
        peer.set_timesteps(num_steps)
        return flow_error(lambda model, z: run_peer(peer, model, z), peer.timesteps, "v")

    sampler = partial(pndm, runge_kutta=runge_kutta)
    theirs = [peer_error(n) for n in (100, 500)]
    ours = [our_flow_error(sampler, n, "v", "leading") for n in (100, 500)]
    assert theirs[0] / theirs[1] < 7
    assert ours[0] < theirs[0] / 20 and ours[1] < theirs[1] / 10


MEANS = torch.tensor([[1.2, 0.0], [-0.5, 1.1], [-0.8, -0.9]], dtype=torch.float64)
WEIGHTS, STD = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 0.3


def mixture_eps(zt, alpha):
    """The noise that the perfect network sees in points (b, 2) of three Gaussians."""
    variance = alpha * STD**2 + 1 - alpha
    offset = zt[:, None] - alpha**0.5 * MEANS
    chance = (WEIGHTS.log() - offset.square().sum(-1) / (2 * variance)).softmax(1)
    x0 = (chance[..., None] * (MEANS + alpha**0.5 * STD**2 / variance * offset)).sum(1)
    return (zt - alpha**0.5 * x0) / (1 - alpha) ** 0.5


def mixture_flow(z, schedule, num_steps=600):
    """Where the probability flow takes points from the last time step to the first, by midpoints."""
    ends = [((1 - alpha) / alpha).sqrt().log() for alpha in schedule.alphas_cumprod[[-1, 0]]]
    levels = torch.linspace(*ends, num_steps + 1, dtype=torch.float64).exp()
    y = z * (1 + levels[0] ** 2).sqrt()

    def slope(y, s):
        alpha = (1 / (1 + s**2)).item()
        return mixture_eps(alpha**0.5 * y, alpha)

    for s, h in zip(levels, levels.diff()):
        y = y + h * slope(y + h / 2 * slope(y, s), s + h / 2)
    return y / (1 + levels[-1] ** 2).sqrt()


def mixture_denoiser(schedule):
    return lambda zt, t: mixture_eps(zt, schedule.alphas_cumprod[t[0]].item())


@pytest.mark.parametrize(
    "name, order", [("ddim", 1), ("plms", 2), ("runge_kutta", 2), ("dpm_solver", 2), ("unipc", 2)]
)
def test_samplers_converge_to_the_exact_flow_of_a_mixture_at_their_order(name, order):
    schedule = make_schedule()
    z = RowRandom([(0, row) for row in range(60)]).randn(2).double()
    exact = mixture_flow(z, schedule)
    errors = []
    for num_steps in (16, 32):  # fewer than 15 make one step of lower order, more are no longer even
        grid = timestep_grid(num_steps, schedule, "log_snr")
        z0 = ALL_SAMPLERS[name](mixture_denoiser(schedule), z, grid, schedule, None)
        errors.append((z0 - exact).norm(dim=1).mean().item())
    assert errors[1] < errors[0] / 2 ** (order - 0.25)
    assert errors[1] < (0.1 if order == 1 else 0.02)


@pytest.mark.parametrize("name", ["ddim_eta", "ddpm", "ddpm_large", "dpm_solver_sde"])
def test_noisy_samplers_draw_from_the_mixture(name):
    """The share of each Gaussian among 4000 samples of 100 steps, within 4 standard errors."""
    schedule = make_schedule()
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 2, generator=generator, dtype=torch.float64)
    grid = timestep_grid(100, schedule, "log_snr")
    z0 = ALL_SAMPLERS[name](
        mixture_denoiser(schedule), z, grid, schedule, lambda *_: torch.randn(4000, 2, generator=generator)
    )
    nearest = (z0[:, None] - MEANS).norm(dim=-1).argmin(1)
    shares = torch.bincount(nearest, minlength=3) / 4000
    assert (shares - WEIGHTS).abs().max() < 4 * (0.25 / 4000) ** 0.5
    for number, mean in enumerate(MEANS):
        points = z0[nearest == number]
        assert (points.mean(0) - mean).abs().max() < 0.05
        assert abs(points.std(0).mean().item() - STD) < 0.05


def spread_of(sampler, denoiser, grid, schedule):
    """Standard deviation of a linear sampler's output: one row a source of noise, each switched on alone."""
    sources = len(grid) + 1
    z, switches = (
        torch.eye(sources, dtype=torch.float64)[0],
        iter(torch.eye(sources, dtype=torch.float64)[1:]),
    )
    outputs = sampler(
        denoiser, z[:, None], grid, schedule, lambda *shape: next(switches)[:, None].expand(-1, *shape)
    )
    return outputs.square().sum().sqrt().item()


def test_ancestral_sampling_of_unit_noise_keeps_its_variance_exactly():
    """On N(0, 1) the large variance is the true one (DDPM, section 3.2), whatever the grid."""
    schedule, grid = make_schedule(), timestep_grid(23, make_schedule(), "trailing")
    spread = spread_of(partial(ddpm, variance="large"), gaussian(0.0, 1.0), grid, schedule)
    assert spread == pytest.approx(schedule.alphas_cumprod[grid[-1]].sqrt().item(), abs=1e-9)


@pytest.mark.parametrize("name", ["ddim_eta", "ddpm", "ddpm_large", "dpm_solver_sde"])
def test_ancestral_sampling_reaches_the_data_spread_with_many_steps(name):
    schedule, grid = make_schedule(), timestep_grid(1000, make_schedule(), "leading")
    spread = spread_of(ALL_SAMPLERS[name], gaussian(0.0, 0.4), grid, schedule)
    assert spread == pytest.approx(0.4, abs=0.01)


def test_ddim_with_eta_1_is_ddpm_until_the_last_step():
    grid, schedule = timestep_grid(20, make_schedule(), "leading"), make_schedule()
    seen = {"ddim": [], "ddpm": []}
    for name, sampler in (("ddim", partial(ddim, eta=1.0)), ("ddpm", partial(ddpm, variance="small"))):
        noise, _ = draws()
        sampler(
            network(), start(), grid, schedule, noise, lambda zt, t, name=name: seen[name].append(zt) or zt
        )
    worst = max((a - b).abs().max() for a, b in zip(seen["ddim"], seen["ddpm"], strict=True))
    assert worst < 1e-5


# Shared behaviour


@pytest.mark.parametrize("name", list(ALL_SAMPLERS))
@pytest.mark.parametrize("num_steps", [4, 30])
def test_the_kind_of_prediction_does_not_change_the_sound(name, num_steps):
    grid = timestep_grid(num_steps, make_schedule(), "leading")
    results = []
    for prediction in ("eps", "v", "x0"):
        rows = RowRandom([(0, 0), (0, 1)])
        z = start().double()
        results.append(
            ALL_SAMPLERS[name](network(prediction), z, grid, make_schedule(prediction), rows.randn)
        )
    assert all((result - results[0]).abs().max() < 1e-8 for result in results[1:])


@pytest.mark.parametrize("name", list(ALL_SAMPLERS))
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 999, 1000])
@pytest.mark.filterwarnings("ignore:pndm")
def test_every_sampler_takes_any_number_of_steps(name, num_steps):
    rows = RowRandom([(0, 0), (0, 1)])
    grid = timestep_grid(num_steps, make_schedule(), "leading")
    z0 = ALL_SAMPLERS[name](network(), start(), grid, make_schedule(), rows.randn)
    assert z0.shape == start().shape and z0.isfinite().all()


def test_runge_kutta_with_too_few_steps_says_so_and_samples_by_plms():
    grid, schedule = timestep_grid(3, make_schedule(), "leading"), make_schedule()
    with pytest.warns(UserWarning, match="3 steps are too few for Runge-Kutta"):
        z0 = RUNGE_KUTTA(network(), start(), grid, schedule, None)
    assert torch.equal(z0, PLMS(network(), start(), grid, schedule, None))


@pytest.mark.parametrize(
    "name, calls", [("ddim", 20), ("plms", 21), ("runge_kutta", 29), ("dpm_solver", 20), ("unipc", 20)]
)
def test_number_of_network_calls(name, calls):
    count = 0

    def counting(zt, t):
        nonlocal count
        count += 1
        assert t.shape == (2,) and t.dtype == torch.int64
        return network()(zt, t)

    ALL_SAMPLERS[name](
        counting, start(), timestep_grid(20, make_schedule(), "leading"), make_schedule(), None
    )
    assert count == calls


@pytest.mark.parametrize("name", ["ddim", "ddim_eta", "ddpm"])
def test_editing_may_start_in_the_middle(name):
    """The rest of a grid from the latent in the middle gives the end of the whole run."""
    grid, schedule, rows = (
        timestep_grid(12, make_schedule(), "leading"),
        make_schedule(),
        RowRandom([(5,), (6,)]),
    )
    latents = []
    stream = [rows.randn(*start().shape[1:]) for _ in grid]
    whole, rest = iter(stream), iter(stream[5:])
    sampler = ALL_SAMPLERS[name]
    z0 = sampler(
        network(), start(), grid, schedule, lambda *_: next(whole), lambda zt, t: latents.append(zt) or zt
    )
    assert torch.equal(sampler(network(), latents[5], grid[5:], schedule, lambda *_: next(rest)), z0)


@pytest.mark.parametrize("name", list(ALL_SAMPLERS))
def test_before_step_decides_what_the_network_sees(name):
    known = torch.full((2, 4, 3, 5), 0.3)
    grid, schedule = timestep_grid(10, make_schedule(), "leading"), make_schedule()
    rows = RowRandom([(0, 0), (0, 1)])
    times = []

    def hold(zt, t):
        times.append(t[0].item())
        noised = schedule.add_noise(known, torch.zeros_like(known), t)
        return torch.cat([noised, zt[:, :, 3:]], dim=2)

    def watched(zt, t):
        if t[0].item() in times and len(seen) < len(times):
            seen.append(zt[:, :, :3])
        return network()(zt, t)

    seen = []
    ALL_SAMPLERS[name](watched, start(), grid, schedule, rows.randn, hold)
    assert times == grid.tolist()
    for t, held in zip(grid, seen, strict=True):
        assert torch.equal(held, schedule.add_noise(known, torch.zeros_like(known), t.expand(2)))


@pytest.mark.parametrize("name", list(ALL_SAMPLERS))
def test_a_row_does_not_depend_on_its_neighbours(name):
    grid, schedule = timestep_grid(10, make_schedule(), "leading"), make_schedule()
    keys = [(7, 0), (7, 1), (7, 2)]

    def sample(keys):
        rows = RowRandom(keys)
        return ALL_SAMPLERS[name](network(), rows.randn(4, 6, 5), grid, schedule, rows.randn)

    together = sample(keys)
    for row, key in enumerate(keys):
        assert (sample([key])[0] - together[row]).abs().max() < 1e-5


@pytest.mark.parametrize("name", list(ALL_SAMPLERS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_latents_keep_their_dtype(name, dtype):
    rows = RowRandom([(0, 0), (0, 1)])
    grid = timestep_grid(5, make_schedule(), "leading")
    z0 = ALL_SAMPLERS[name](network(), start().to(dtype), grid, make_schedule(), rows.randn)
    assert z0.dtype == dtype
