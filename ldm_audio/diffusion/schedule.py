"""The forward process of diffusion, and what a network may be asked to predict of it.

`zt = signal z0 + sigma noise` with `signal**2 = alphas_cumprod[t]` and `sigma**2 = 1 - alphas_cumprod[t]`
(DDPM, arXiv 2006.11239, equation 4). Betas and their product are float64, as AudioLDM's original makes them
(diffusers: float32, some 1e-6 apart). This is the one place where the three predictions `eps`, `v` (arXiv
2202.00512, appendix D) and `x0` are told apart: objectives ask for `target`, samplers for `to_x0_eps`.

Axes: b batch; latents have any shape (b, ...).
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ldm_audio.errors import InputError

Kind = Literal["scaled_linear", "linear", "cosine"]
Prediction = Literal["eps", "v", "x0"]

COSINE_OFFSET = 0.008
COSINE_MAX_BETA = 0.999


class Schedule:
    """How much signal is left at each of `num_timesteps` time steps; 0 is almost clean.

    kind: betas from `beta_start` to `beta_end`, evenly spaced (`linear`) or with evenly spaced square roots
    (`scaled_linear`, which AudioLDM's files call linear); `cosine` (arXiv 2102.09672, equation 17) needs
    neither and ignores them. prediction: what the network puts out.
    `alphas_cumprod` is a (num_timesteps,) float64 tensor on the CPU.
    Raises InputError for unknown names and for betas outside 0 < beta_start <= beta_end < 1.
    """

    def __init__(
        self,
        *,
        num_timesteps: int,
        beta_start: float | None,
        beta_end: float | None,
        kind: Kind,
        prediction: Prediction,
    ):
        if num_timesteps < 1:
            raise InputError(f"schedule.num_timesteps={num_timesteps}: expected 1 or more")
        if prediction not in ("eps", "v", "x0"):
            raise InputError(f"schedule.prediction={prediction!r}: expected 'eps', 'v' or 'x0'")
        self.num_timesteps = num_timesteps
        self.prediction = prediction
        betas = make_betas(num_timesteps=num_timesteps, beta_start=beta_start, beta_end=beta_end, kind=kind)
        self.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas))
        self._rates: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def add_noise(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Clean latents (b, ...), noise (b, ...), time steps (b,) -> noisy latents (b, ...)."""
        signal, sigma = self.rates(t, z0)
        return signal * z0 + sigma * noise

    def target(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should put out for `add_noise(z0, noise, t)`, (b, ...)."""
        if self.prediction == "eps":
            return noise
        if self.prediction == "x0":
            return z0
        signal, sigma = self.rates(t, z0)
        return signal * noise - sigma * z0

    def to_x0_eps(self, prediction: Tensor, zt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """A network's output at (zt (b, ...), t (b,)) -> the clean latents and the noise that it means."""
        signal, sigma = self.rates(t, zt)
        if self.prediction == "eps":
            return (zt - sigma * prediction) / signal, prediction
        if self.prediction == "x0":
            return prediction, (zt - signal * prediction) / sigma
        return signal * zt - sigma * prediction, signal * prediction + sigma * zt

    def rates(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and sigma at the time steps t (b,), (b, 1, ...) of the dtype and on the device of `like`."""
        place = (like.device, like.dtype)
        if place not in self._rates:
            # Outside inference mode: a table first made while sampling must serve training too.
            with torch.inference_mode(False):
                tables = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
                self._rates[place] = tuple(table.to(like.dtype).to(like.device) for table in tables)
        rows = (-1,) + (1,) * (like.ndim - 1)
        signal, sigma = self._rates[place]
        t = t.to(like.device)
        return signal[t].reshape(rows), sigma[t].reshape(rows)


def make_betas(
    *, num_timesteps: int, beta_start: float | None, beta_end: float | None, kind: Kind
) -> np.ndarray:
    """(num_timesteps,) float64: the share of variance that each step of the forward process replaces."""
    if kind == "cosine":
        edges = np.linspace(0, 1, num_timesteps + 1)
        signal = np.cos((edges + COSINE_OFFSET) / (1 + COSINE_OFFSET) * np.pi / 2) ** 2
        return np.minimum(1 - signal[1:] / signal[:-1], COSINE_MAX_BETA)
    if kind not in ("scaled_linear", "linear"):
        raise InputError(f"schedule.kind={kind!r}: expected 'scaled_linear', 'linear' or 'cosine'")
    if beta_start is None or beta_end is None or not 0 < beta_start <= beta_end < 1:
        raise InputError(
            f"schedule.beta_start={beta_start} beta_end={beta_end}: expected 0 < beta_start <= beta_end < 1"
        )
    if kind == "linear":
        return np.linspace(beta_start, beta_end, num_timesteps)
    return np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps) ** 2
