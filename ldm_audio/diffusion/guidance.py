"""Guidance: wraps a conditional network into the denoiser that samplers call.

Classifier-free guidance (arXiv 2207.12598) moves the prediction away from what the network says without
the condition. AudioLDM's "without" is the text embedding of "", a negative prompt another in its place.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm_audio.diffusion.samplers import Denoiser
from ldm_audio.errors import InputError

Model = Callable[[Tensor, Tensor, Tensor], Tensor]


def classifier_free(
    model: Model,
    embed: Tensor,
    uncond_embed: Tensor,
    guidance_scale: float,
    *,
    rescale: float = 0.0,
    interval: tuple[int, int] | None = None,
) -> Denoiser:
    """`model(zt, timestep, embed)` under `embed` (b, d), guided away from `uncond_embed` (b, d) or (1, d).

    The prediction is `uncond + guidance_scale (cond - uncond)` from one batched call [uncond; cond]. At
    scale 1 that is `cond`, and the network is called for it alone. rescale: how far, 0 to 1, to bring the
    deviation of each row back to that of its `cond` (arXiv 2305.08891, section 3.4). interval: the lowest and
    highest time step at which to guide, `cond` outside (arXiv 2404.07724); all rows of a call share theirs.
    Raises InputError for a negative scale or a rescale outside 0 to 1.
    """
    if not guidance_scale >= 0:
        raise InputError(f"guidance_scale={guidance_scale}: expected 0 or more")
    if not 0 <= rescale <= 1:
        raise InputError(f"rescale={rescale}: expected 0 to 1")
    embeds = torch.cat([uncond_embed.expand_as(embed), embed])

    def denoiser(zt: Tensor, timestep: Tensor) -> Tensor:
        if guidance_scale == 1 or not guided(timestep):
            return model(zt, timestep, embed)
        uncond, cond = model(torch.cat([zt, zt]), torch.cat([timestep, timestep]), embeds).chunk(2)
        prediction = uncond + guidance_scale * (cond - uncond)
        if rescale == 0:
            return prediction
        axes = tuple(range(1, zt.ndim))
        ratio = cond.std(axes, keepdim=True) / prediction.std(axes, keepdim=True)
        return prediction * (1 + rescale * (ratio - 1))

    def guided(timestep: Tensor) -> bool:
        return interval is None or interval[0] <= int(timestep[0]) <= interval[1]

    return denoiser
