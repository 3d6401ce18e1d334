"""Windowed denoising: a network that knows clips of one length predicts latents of any length.

MultiDiffusion (arXiv 2302.08113): overlapping windows are denoised side by side and averaged where they meet,
at every call of the network. The average of predictions is the average of next latents for every sampler
whose step is linear in the prediction. Departure: the windows fade at their ends instead of weighing the same
everywhere, so that no seam is left where one begins.

Axes: b batch, c channels, t latent frames, f latent mel bins.
"""

import math

import torch
from torch import Tensor

from ldm_audio.diffusion.guidance import Model
from ldm_audio.errors import InputError


def windowed(model: Model, *, window: int, overlap: int) -> Model:
    """`model` on windows of `window` latent frames, at least `overlap` of them shared; whole if that short.

    One window is in the network at a time: memory does not grow with the length.
    Raises InputError for an overlap that is not below the window.
    """
    if not 0 <= overlap < window:
        raise InputError(f"overlap of {overlap} latent frames: expected 0 to {window - 1}")

    def predict(zt: Tensor, timestep: Tensor, embed: Tensor) -> Tensor:
        """(b, c, t, f), (b,), (b, d) -> (b, c, t, f)."""
        if zt.shape[2] <= window:
            return model(zt, timestep, embed)
        fade = fade_weights(window, overlap).to(zt)[:, None]  # (window, 1)
        total, weight = torch.zeros_like(zt), zt.new_zeros(zt.shape[2], 1)
        for start in window_starts(zt.shape[2], window, overlap):
            part = slice(start, start + window)
            total[:, :, part] += fade * model(zt[:, :, part].contiguous(), timestep, embed)
            weight[part] += fade
        return total / weight

    return predict


def window_starts(length: int, window: int, overlap: int) -> list[int]:
    """Where evenly spread windows begin that cover `length` frames, each pair sharing `overlap` or more."""
    count = 1 + math.ceil(max(length - window, 0) / (window - overlap))
    return [round(i * (length - window) / max(count - 1, 1)) for i in range(count)]


def fade_weights(window: int, overlap: int) -> Tensor:
    """(window,) above 0: 1 in the middle, falling in a straight line over `overlap` frames at both ends."""
    place = torch.arange(1, window + 1)
    return (torch.minimum(place, place.flip(0)) / (overlap + 1)).clamp(max=1.0)
