"""Samplers: from noise to clean latents, one function each, all of one signature.

    sampler(denoiser, z, timesteps, schedule, noise, before_step=None) -> z0

`denoiser(zt (b, ...), t (b,))` gives the network's prediction, in whatever terms the schedule names.
`z` (b, ...) is the latent at `timesteps[0]`; `timesteps` are int64 and descending (see `timestep_grid`), so
that editing starts in the middle of the schedule by passing the rest of a grid. `noise(*shape)` gives
(b, *shape) standard normal numbers for samplers that draw at each step: `RowRandom(keys).randn`.
`before_step(zt, t (b,))` may replace the latent before each step, to hold a part of it fixed.
Settings of a sampler's own are keyword arguments behind these: `functools.partial(ddim, eta=1.0)`.

The last step leads to `alphas_cumprod[0]` and not to 1, as released models are sampled, except in `ddpm`.
Each step leads to the next of `timesteps`; diffusers computes its own next one, which for spacings other than
`leading` can be another.
"""

import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ldm_audio.diffusion.schedule import Schedule
from ldm_audio.errors import InputError

Denoiser = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[..., Tensor]
BeforeStep = Callable[[Tensor, Tensor], Tensor]
Spacing = Literal["leading", "linspace", "trailing", "log_snr"]

FEW_STEPS = 15  # below this, DPM-Solver's authors make the last step first-order
RUNGE_KUTTA_STEPS = 3


def timestep_grid(num_steps: int, schedule: Schedule, spacing: Spacing) -> Tensor:
    """(num_steps,) int64, descending: at which of the schedule's time steps to call the network.

    `leading`: multiples of num_timesteps // num_steps, plus 1, as the released models are sampled (plus 0
    where every time step is used and 1 would lead past the end); `linspace`: evenly from the last to 0;
    `trailing`: evenly from the last, 0 left out (arXiv 2305.08891, table 2); `log_snr`: from the last, with
    steps that are even in the logarithm of the signal-to-noise ratio, that to the samplers' end included, as
    far as whole time steps allow (what DPM-Solver's arXiv 2206.00927, appendix C.4, calls uniform lambda).
    Raises InputError for a spacing of another name or steps outside 1 to num_timesteps.
    """
    num_timesteps = schedule.num_timesteps
    if not 1 <= num_steps <= num_timesteps:
        raise InputError(f"num_steps={num_steps}: expected 1 to {num_timesteps}")
    if spacing == "leading":
        offset = int(num_steps < num_timesteps)
        steps = np.arange(num_steps)[::-1] * (num_timesteps // num_steps) + offset
    elif spacing == "linspace":
        steps = np.linspace(0, num_timesteps - 1, max(num_steps, 2)).round()[::-1][:num_steps]
    elif spacing == "trailing":
        steps = np.arange(num_timesteps, 0, -num_timesteps / num_steps)[:num_steps].round() - 1
    elif spacing == "log_snr":
        log_snr = np.array([half_log_snr(alpha) for alpha in schedule.alphas_cumprod.tolist()])
        wanted = np.linspace(log_snr[0], log_snr[-1], num_steps + 1)[1:]  # ascending time steps, falling SNR
        steps = np.interp(-wanted, -log_snr, np.arange(num_timesteps)).round()
        # Near the clean end they crowd: each keeps the next whole number, and room for those before it.
        order = np.arange(num_steps)
        steps = np.maximum.accumulate(np.maximum(steps - order, int(num_steps < num_timesteps))) + order
        steps = np.minimum(steps, num_timesteps - num_steps + order)[::-1]
    else:
        raise InputError(f"spacing={spacing!r}: expected 'leading', 'linspace', 'trailing' or 'log_snr'")
    return torch.from_numpy(steps.astype(np.int64))


def ddim(
    denoiser: Denoiser,
    z: Tensor,
    timesteps: Tensor,
    schedule: Schedule,
    noise: Noise,
    before_step: BeforeStep | None = None,
    *,
    eta: float,
) -> Tensor:
    """DDIM (arXiv 2010.02502, equations 12 and 16): eta 0 is deterministic, 1 as noisy as DDPM.

    With eta above 0 the last step is noisy too, like AudioLDM's own.
    """
    if not 0 <= eta <= 1:
        raise InputError(f"eta={eta}: expected 0 to 1")
    for t, alpha, alpha_next in transitions(timesteps, schedule):
        zt, x0, eps = denoise(denoiser, z, t, schedule, before_step)
        sigma = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)) ** 0.5
        z = alpha_next**0.5 * x0 + (1 - alpha_next - sigma**2) ** 0.5 * eps
        if eta > 0:
            z = z + sigma * noise(*zt.shape[1:]).to(zt)
    return z


def ddpm(
    denoiser: Denoiser,
    z: Tensor,
    timesteps: Tensor,
    schedule: Schedule,
    noise: Noise,
    before_step: BeforeStep | None = None,
    *,
    variance: Literal["small", "large"],
) -> Tensor:
    """Ancestral sampling of DDPM (arXiv 2006.11239, algorithm 2), on any grid of time steps.

    variance of a step's noise: that of the posterior (`small`) or the step's beta (`large`).
    The last step gives the mean, that is, the clean latents which the network sees.
    """
    if variance not in ("small", "large"):
        raise InputError(f"variance={variance!r}: expected 'small' or 'large'")
    for t, alpha, alpha_next in transitions(timesteps, schedule, final_alpha=1.0):
        zt, x0, _ = denoise(denoiser, z, t, schedule, before_step)
        beta = 1 - alpha / alpha_next
        z = (alpha_next**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - alpha_next) * zt) / (1 - alpha)
        if alpha_next < 1:
            spread = beta * (1 - alpha_next) / (1 - alpha) if variance == "small" else beta
            z = z + spread**0.5 * noise(*zt.shape[1:]).to(zt)
    return z


def pndm(
    denoiser: Denoiser,
    z: Tensor,
    timesteps: Tensor,
    schedule: Schedule,
    noise: Noise,
    before_step: BeforeStep | None = None,
    *,
    runge_kutta: bool,
) -> Tensor:
    """Pseudo linear multistep (PNDM, arXiv 2202.09778, algorithm 2): the noise extrapolated from four steps.

    runge_kutta: begin with three steps of four evaluations each, as the paper does, and not with one of two
    as latent diffusion's PLMS does. Needs four time steps; with fewer it warns and begins like PLMS.
    Predictions of any kind become noise before they are combined: diffusers combines `v` as it is, which
    costs the method its order. `noise` is not used.
    """
    if runge_kutta and len(timesteps) <= RUNGE_KUTTA_STEPS:
        warnings.warn(
            f"pndm: {len(timesteps)} steps are too few for Runge-Kutta, sampling by PLMS", stacklevel=2
        )
        runge_kutta = False

    alphas = schedule.alphas_cumprod
    history: list[Tensor] = []  # of the noise, newest first

    def eps_at(zt: Tensor, t: int) -> Tensor:
        return denoise(denoiser, zt, t, schedule, None)[2]

    for i, (t, alpha, alpha_next) in enumerate(transitions(timesteps, schedule)):
        zt, _, eps = denoise(denoiser, z, t, schedule, before_step)
        history = [eps, *history[:3]]
        t_next = int(timesteps[i + 1]) if i + 1 < len(timesteps) else None
        if runge_kutta and i < RUNGE_KUTTA_STEPS:
            t_half = t_next + (t - t_next) // 2
            alpha_half = alphas[t_half].item()
            second = eps_at(transfer(zt, eps, alpha, alpha_half), t_half)
            third = eps_at(transfer(zt, second, alpha, alpha_half), t_half)
            fourth = eps_at(transfer(zt, third, alpha, alpha_next), t_next)
            eps = (eps + 2 * second + 2 * third + fourth) / 6
        elif len(history) == 1 and t_next is not None:
            eps = (eps + eps_at(transfer(zt, eps, alpha, alpha_next), t_next)) / 2
        else:
            eps = extrapolate(history)
        z = transfer(zt, eps, alpha, alpha_next)
    return z


def dpm_solver(
    denoiser: Denoiser,
    z: Tensor,
    timesteps: Tensor,
    schedule: Schedule,
    noise: Noise,
    before_step: BeforeStep | None = None,
    *,
    stochastic: bool = False,
) -> Tensor:
    """DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2): the clean latents extrapolated from two steps.

    The first step is of first order, and so is the last of fewer than 15. stochastic: solve the diffusion's
    stochastic equation instead of its flow (same paper, section 4.3), which takes noise at each step.
    """
    x0_before, h_before = None, 0.0
    for i, (t, alpha, alpha_next) in enumerate(transitions(timesteps, schedule)):
        zt, x0, _ = denoise(denoiser, z, t, schedule, before_step)
        h = half_log_snr(alpha_next) - half_log_snr(alpha)
        lower_order = x0_before is None or (i + 1 == len(timesteps) < FEW_STEPS)
        ahead = x0 if lower_order else x0 + h / (2 * h_before) * (x0 - x0_before)
        z = exponential_step(zt, ahead, alpha, alpha_next, decay=2 * h if stochastic else h)
        if stochastic:
            z = z + ((1 - alpha_next) * -np.expm1(-2 * h).item()) ** 0.5 * noise(*zt.shape[1:]).to(zt)
        x0_before, h_before = x0, h
    return z


def unipc(
    denoiser: Denoiser,
    z: Tensor,
    timesteps: Tensor,
    schedule: Schedule,
    noise: Noise,
    before_step: BeforeStep | None = None,
) -> Tensor:
    """UniPC of order 2 (arXiv 2302.04867, B2): DPM-Solver++ 2M, each step of which is corrected afterwards.

    The correction takes what the network says at the step's end, which the next step needs anyway: it costs
    no call. The first and the last step are of first order. `noise` is not used.
    """
    last: tuple[Tensor, Tensor, float, float, Tensor | None] | None = None  # what the last step went by
    h_before = 0.0
    for i, (t, alpha, alpha_next) in enumerate(transitions(timesteps, schedule)):
        zt, x0, _ = denoise(denoiser, z, t, schedule, before_step)
        h = half_log_snr(alpha_next) - half_log_snr(alpha)
        slope = None
        if last is not None:
            z_from, x0_from, alpha_from, h_from, slope_from = last
            ahead = x0_from + unipc_correction(x0 - x0_from, slope_from, h_from, h_before)
            zt = zt + exponential_step(z_from, ahead, alpha_from, alpha, decay=h_from) - z
            slope, h_before = (x0 - x0_from) / h_from, h_from
        if i + 1 == len(timesteps):
            slope = None
        z = exponential_step(zt, x0 if slope is None else x0 + h / 2 * slope, alpha, alpha_next, decay=h)
        last = zt, x0, alpha, h, slope
    return z


def unipc_correction(change: Tensor, slope: Tensor | None, h: float, h_before: float) -> Tensor:
    """What to add to the clean latents of a step's start now that `change`, their way to its end, is known.

    slope: their change per unit of half the log-SNR in the step before, or None after a step of first order;
    h, h_before: both steps in that unit. UniPC's algorithm 1 with its two conditions solved by hand.
    """
    if slope is None:
        return change / 2
    phi1 = np.expm1(-h).item()
    phi2 = -phi1 / h - 1
    phi3 = -phi2 / h - 0.5
    first, second = phi2 / phi1, 2 * phi3 / phi1
    weight = (first - second) / (1 + h_before / h)
    return weight * h * slope + (first - weight) * change


def transitions(
    timesteps: Tensor, schedule: Schedule, final_alpha: float | None = None
) -> Iterator[tuple[int, float, float]]:
    """Each time step with its `alphas_cumprod` and the next one's; behind the last comes `final_alpha`.

    Raises InputError for time steps that are not descending or not the schedule's.
    """
    grid = timesteps.tolist()
    descending = bool(grid) and all(a > b for a, b in pairwise(grid))
    if not descending or not 0 <= grid[-1] <= grid[0] < schedule.num_timesteps:
        raise InputError(f"timesteps {grid}: expected descending numbers below {schedule.num_timesteps}")
    alphas = [schedule.alphas_cumprod[t].item() for t in grid]
    last = schedule.alphas_cumprod[0].item() if final_alpha is None else final_alpha
    return zip(grid, alphas, [*alphas[1:], last])


def denoise(
    denoiser: Denoiser, z: Tensor, t: int, schedule: Schedule, before_step: BeforeStep | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One look at the latent: what it is after `before_step`, and the clean latents and noise seen in it."""
    timestep = torch.full((len(z),), t, device=z.device)
    zt = z if before_step is None else before_step(z, timestep)
    return zt, *schedule.to_x0_eps(denoiser(zt, timestep), zt, timestep)


def transfer(zt: Tensor, eps: Tensor, alpha: float, alpha_next: float) -> Tensor:
    """The step without noise from one level to another, with `eps` for the whole way (PNDM, equation 11)."""
    x0 = (zt - (1 - alpha) ** 0.5 * eps) / alpha**0.5
    return alpha_next**0.5 * x0 + (1 - alpha_next) ** 0.5 * eps


def extrapolate(history: list[Tensor]) -> Tensor:
    """Adams-Bashforth: the mean over the coming step from up to four values, newest first."""
    weights = {
        1: (1,),
        2: (3 / 2, -1 / 2),
        3: (23 / 12, -16 / 12, 5 / 12),
        4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    }
    return sum(weight * value for weight, value in zip(weights[len(history)], history))


def exponential_step(zt: Tensor, x0: Tensor, alpha: float, alpha_next: float, *, decay: float) -> Tensor:
    """The step of DPM-Solver++ with `x0` for the whole way: the old latent fades by `decay`, `x0` fills up.

    decay: the step in half the log-SNR along the flow, twice that for the stochastic equation.
    """
    flow = half_log_snr(alpha_next) - half_log_snr(alpha)
    kept = ((1 - alpha_next) / (1 - alpha)) ** 0.5 * np.exp(flow - decay).item()
    return kept * zt - alpha_next**0.5 * np.expm1(-decay).item() * x0


def half_log_snr(alpha: float) -> float:
    """DPM-Solver's lambda: the logarithm of signal over sigma."""
    return 0.5 * float(np.log(alpha / (1 - alpha)))
