"""The exponential moving average of weights with latent diffusion's warm-up."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm_audio.distributed import local, split_as
from ldm_audio.errors import InputError


class EMA:
    """Follows the parameters of some networks: shadow <- d * shadow + (1 - d) * parameter.

    d = min(decay, (1 + n) / (10 + n)) at the n-th update, so that the first steps are forgotten quickly.
    Where parameters are split over ranks, each rank follows its own part.
    """

    def __init__(self, networks: dict[str, nn.Module], *, decay: float):
        self.decay = decay
        self.updates = 0
        self.parameters = {
            f"{name}.{key}": p for name, network in networks.items() for key, p in network.named_parameters()
        }
        self.shadow = {key: p.detach().clone() for key, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> float:
        """One step of the average; returns the decay that was used."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        if self.shadow:
            shadows, parameters = ([local(t) for t in ts.values()] for ts in (self.shadow, self.parameters))
            torch._foreach_lerp_(shadows, parameters, 1 - decay)
        return decay

    @contextmanager
    @torch.no_grad()
    def swapped(self) -> Iterator[None]:
        """Inside, the networks hold the averaged weights; afterwards their own again."""
        own = {key: p.detach().clone() for key, p in self.parameters.items()}
        self._write(self.shadow)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for key, p in self.parameters.items():
            local(p).copy_(local(values[key]))

    def state_dict(self) -> dict:
        return {"updates": self.updates, "shadow": self.shadow}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        if state["shadow"].keys() != self.shadow.keys():
            raise InputError("the checkpoint's averaged weights belong to other networks")
        self.updates = state["updates"]
        for key, own in self.shadow.items():
            local(own).copy_(local(split_as(state["shadow"][key], own)))
