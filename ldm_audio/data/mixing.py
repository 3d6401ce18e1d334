"""Items mixed in time with others: BAM in the data set, and the aligned pairs that BLM mixes in the step.

Which two, from where on and how much of each comes from `audio/mixup.py`, with a generator of
(seed, epoch, index): the same mix for any batch, worker and rank. Of two recordings no more is read than an
item holds.

Axes: s samples.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np
import torch

from ldm_audio.audio.beats import Beats
from ldm_audio.audio.mixup import Mix, Mixup, TempoGroups, mix_caption, mix_waveforms, plan_mix
from ldm_audio.data.loader import ItemKey

MIXING = 1  # this stream's last key: an item's own draws come from (seed, epoch, index)


class Track(NamedTuple):
    """A recording to cut from. read: (start in seconds, number of samples) -> (s,), shorter at the end."""

    beats: Beats
    caption: str
    read: Callable[[float, int], np.ndarray]


class MixSource(Protocol):
    """A data set whose items can be cut elsewhere; `level` is what it does to a waveform at last."""

    sample_rate: int
    num_samples: int
    seed: int

    def __len__(self) -> int: ...
    def captions(self) -> list[str]: ...
    def __getitem__(self, key: ItemKey | int) -> dict: ...
    def tempos(self) -> list[float]: ...
    def track(self, index: int, epoch: int) -> Track: ...
    def level(self, waveform: np.ndarray) -> np.ndarray: ...


class Mixed:
    """The items of `source`, some of them mixed.

    With `space="audio"` a mixed item's `waveform` is the mix. With `latent` it is the anchor from its start
    on, and `partner` (s,) is the other one, each at its level. `mix_ratio` is lambda, 1 where nothing was
    mixed; `partner_caption` is "" there.
    """

    def __init__(self, source: MixSource, mixup: Mixup):
        self.source = source
        self.mixup = mixup
        self.groups = TempoGroups(source.tempos(), mixup)

    def __len__(self) -> int:
        return len(self.source)

    def captions(self) -> list[str]:
        """Every caption of every clip."""
        return self.source.captions()

    def plan(self, key: ItemKey | int) -> Mix | None:
        """How an item is mixed, or None."""
        epoch, index, _ = (0, key, key) if isinstance(key, int) else key
        return self.plan_with(lambda other: self.source.track(other, epoch), epoch, index)

    def plan_with(self, track: Callable[[int], Track], epoch: int, index: int) -> Mix | None:
        source = self.source
        rng = np.random.default_rng([source.seed, epoch, index, MIXING])
        window = source.num_samples / source.sample_rate
        return plan_mix(
            self.mixup, self.groups, index, lambda other: track(other).beats, window=window, rng=rng
        )

    def __getitem__(self, key: ItemKey | int) -> dict:
        epoch, index, _ = (0, key, key) if isinstance(key, int) else key
        track = cache(lambda other: self.source.track(other, epoch))  # planned with, then cut
        mix = self.plan_with(track, epoch, index)
        if mix is None:
            whole = self.source[key]
            item = {"waveform": whole["waveform"], "caption": whole["caption"]}
            item |= {"mix_ratio": torch.tensor(1.0), "partner_caption": ""}
            if self.mixup.space == "latent":
                item["partner"] = torch.zeros_like(item["waveform"])
            return item
        anchor, partner = track(index), track(mix.partner)
        count = round(mix.seconds * self.source.sample_rate)
        pair = anchor.read(mix.start, count), partner.read(mix.partner_start, count)
        if self.mixup.premix == "peak" or self.mixup.space == "latent":
            pair = tuple(self.source.level(waveform) for waveform in pair)
        item = {
            "caption": mix_caption(self.mixup, anchor.caption, partner.caption, mix.ratio),
            "partner_caption": partner.caption,
            "mix_ratio": torch.tensor(mix.ratio, dtype=torch.float32),
        }
        if self.mixup.space == "latent":
            return item | {"waveform": self.padded(pair[0]), "partner": self.padded(pair[1])}
        return item | {"waveform": self.padded(self.source.level(mix_waveforms(*pair, mix.ratio)))}

    def padded(self, waveform: np.ndarray) -> torch.Tensor:
        """(s,) with zeros on the right."""
        whole = np.zeros(self.source.num_samples, dtype=np.float32)
        whole[: len(waveform)] = waveform
        return torch.from_numpy(whole)


def mixed(source: MixSource, mixup: Mixup) -> MixSource | Mixed:
    """The source itself where nothing is to be mixed."""
    return Mixed(source, mixup) if mixup.prob > 0 else source
