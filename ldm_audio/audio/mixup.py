"""Beat-synchronous mixup: which recordings are mixed, from where on, and how (MusicLDM, arXiv 2308.01546).

Two recordings of like tempo are cut at a downbeat each and added, lambda of the first and 1 - lambda of the
second, lambda from Beta(5, 5): as waveforms (BAM) or as latents (BLM). The authors' data code was never
released; what is known of its behaviour is here under a name for each choice, and where that behaviour is an
accident the default departs from it: a track is not mixed with itself, one without downbeats is not mixed,
enough of both must remain behind the downbeats, and the mix begins at the downbeat, where it is in time.

Everything here is a pure function of its arguments and its generator.

Axes: b batch, c channels, t latent frames, f mel bins (of a latent), s samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

import numpy as np
import torch
from torch import Tensor

from ldm_audio.audio.beats import Beats
from ldm_audio.errors import InputError

FOLDED = (70, 140)  # beats a minute, where `octave_fold` brings every tempo


@dataclass(frozen=True, kw_only=True)
class Mixup:
    """What to mix and how; `configs/mixup/` holds the usual choices.

    name: what runs and tables call it.
    space: `audio` mixes waveforms (BAM), `latent` the VAE's latents (BLM).
    prob: share of items that are mixed, where a partner can be found.
    alpha: lambda is drawn from Beta(alpha, alpha).
    align: both start at a `downbeat`, at a downbeat or without any at a `beat`, or anywhere (`none`).
    tempo_width: beats a minute; None lets any two recordings be partners.
    tempo_match: equal `bucket` of that width, or a `tolerance` of less than it.
    octave_fold: whether half and double tempo match too.
    allow_self: whether a recording may be its own partner (upstream).
    no_beats: without the times to align, `skip` the mix, or mix `from_start` (upstream's BLM).
    last_downbeat: whether to start at the last one too (upstream never does).
    min_overlap: seconds that both must have left behind their starts, or a whole item where that is less.
    crop: the mix's `first` seconds, or `random` ones (upstream's BAM; out of time the later they are).
    premix: add the recordings at their own level (`none`, upstream's BAM) or at one `peak` (its BLM).
    text: caption of the `anchor`, of the parent that is `louder`, of `both` joined by "and", or the two
        captions' embeddings mixed like the sound (`interpolate`).
    latent: mix a `sample` of the posteriors, or their `mean`.
    renorm: `unit` divides mixed latents by sqrt(lambda^2 + (1 - lambda)^2), which mixing takes off their
        deviation; `none` as upstream.
    condition_tail: what CLAP hears of a mixed latent is cut to the item's length (`trim`), or ends in a tenth
        of silence (`silent`, upstream).
    """

    name: str
    space: Literal["audio", "latent"]
    prob: float
    alpha: float
    align: Literal["downbeat", "beat", "none"]
    tempo_width: float | None
    tempo_match: Literal["bucket", "tolerance"]
    octave_fold: bool
    allow_self: bool
    no_beats: Literal["skip", "from_start"]
    last_downbeat: bool
    min_overlap: float
    crop: Literal["first", "random"]
    premix: Literal["none", "peak"]
    text: Literal["anchor", "louder", "both", "interpolate"]
    latent: Literal["sample", "mean"]
    renorm: Literal["none", "unit"]
    condition_tail: Literal["trim", "silent"]

    def __post_init__(self) -> None:
        for field in fields(self):
            if get_origin(field.type) is Literal and getattr(self, field.name) not in get_args(field.type):
                value, choices = getattr(self, field.name), " or ".join(get_args(field.type))
                raise InputError(f"mixup.{field.name}={value!r}: expected {choices}")
        if not 0 <= self.prob <= 1:
            raise InputError(f"mixup.prob={self.prob}: expected 0 to 1")
        if not self.alpha > 0:
            raise InputError(f"mixup.alpha={self.alpha}: expected more than 0")
        if self.tempo_width is not None and not self.tempo_width > 0:
            raise InputError(
                f"mixup.tempo_width={self.tempo_width}: expected more than 0, or null for any tempo"
            )
        if self.min_overlap < 0:
            raise InputError(f"mixup.min_overlap={self.min_overlap}: expected 0 or more seconds")


def whole_tempo(beats: Beats) -> int:
    """Beats a minute, rounded half to even; 0 for fewer than two beats."""
    return round(beats.tempo)


def folded(tempo: float) -> float:
    """The tempo times a power of two that lies in `FOLDED`; 0 stays 0."""
    while 0 < tempo < FOLDED[0]:
        tempo *= 2
    while tempo >= FOLDED[1]:
        tempo /= 2
    return tempo


class TempoGroups:
    """Who may be whose partner: recordings in the order of their tempo, each with a range of places there.

    tempos: of all recordings, by index. Takes memory of a few numbers a recording; a draw is O(1).
    """

    def __init__(self, tempos: Sequence[float], mixup: Mixup):
        values = np.asarray([folded(tempo) if mixup.octave_fold else tempo for tempo in tempos], np.float64)
        self.allow_self = mixup.allow_self
        self.order = np.argsort(values, kind="stable")
        self.place = np.empty(len(values), np.int64)
        self.place[self.order] = np.arange(len(values))
        ordered = values[self.order]
        if mixup.tempo_width is None:
            lowest, highest = np.full_like(values, -np.inf), np.full_like(values, np.inf)
        elif mixup.tempo_match == "bucket":
            bucket = np.floor(values / mixup.tempo_width)
            lowest, highest = bucket * mixup.tempo_width, (bucket + 1) * mixup.tempo_width
        else:  # the neighbours of the end points, so that they lie outside
            lowest = np.nextafter(values - mixup.tempo_width, np.inf)
            highest = values + mixup.tempo_width
        self.first = np.searchsorted(ordered, lowest, side="left")
        self.stop = np.searchsorted(ordered, highest, side="left")

    def partners(self, index: int) -> list[int]:
        """All possible partners of a recording, ascending."""
        group = self.order[self.first[index] : self.stop[index]].tolist()
        return sorted(other for other in group if self.allow_self or other != index)

    def draw(self, index: int, rng: np.random.Generator) -> int | None:
        """One of them, each as likely as the others; None where there is none."""
        first, stop = int(self.first[index]), int(self.stop[index])
        if stop - first < 2:  # upstream mixes no group of one, even with itself
            return None
        place = int(rng.integers(first, stop if self.allow_self else stop - 1))
        if not self.allow_self and place >= self.place[index]:
            place += 1
        return int(self.order[place])


@dataclass(frozen=True)
class Mix:
    """lambda of the anchor from `start` on and 1 - lambda of the partner from `partner_start` on, in seconds,
    as long as both last."""

    partner: int
    start: float
    partner_start: float
    seconds: float
    ratio: float


def plan_mix(
    mixup: Mixup,
    groups: TempoGroups,
    index: int,
    beats_of: Callable[[int], Beats],
    *,
    window: float,
    rng: np.random.Generator,
) -> Mix | None:
    """How recording `index` is mixed this time, or None. window: seconds of an item."""
    if rng.random() >= mixup.prob:
        return None
    partner = groups.draw(index, rng)
    if partner is None:
        return None
    both = beats_of(index), beats_of(partner)
    starts = [choose_start(mixup, beats, window, rng) for beats in both]
    if None in starts:
        if mixup.no_beats == "skip" or any(usable_starts(mixup, beats, 0.0) for beats in both):
            return None
        starts = [0.0, 0.0]
    ratio = float(rng.beta(mixup.alpha, mixup.alpha))
    seconds = min(beats.duration - start for beats, start in zip(both, starts))
    if mixup.crop == "random" and seconds > window:
        later = rng.uniform(0.0, seconds - window)
        starts, seconds = [start + later for start in starts], seconds - later
    return Mix(partner, starts[0], starts[1], min(seconds, window), ratio)


def choose_start(mixup: Mixup, beats: Beats, window: float, rng: np.random.Generator) -> float | None:
    """Where a recording begins in a mix, in seconds; None where it cannot be aligned."""
    if mixup.align == "none":
        return float(rng.uniform(0.0, max(beats.duration - window, 0.0)))
    times = usable_starts(mixup, beats, min(mixup.min_overlap, window))
    return times[int(rng.integers(len(times)))] if times else None


def usable_starts(mixup: Mixup, beats: Beats, overlap: float) -> list[float]:
    """The times at which this recording may begin, `overlap` seconds or more before its end."""
    times = beats.downbeats or (beats.beats if mixup.align == "beat" else ())
    if not mixup.last_downbeat:
        times = times[:-1]
    return [time for time in times if beats.duration - time >= overlap]


def mix_waveforms(anchor: np.ndarray, partner: np.ndarray, ratio: float) -> np.ndarray:
    """(s,) each -> ratio * anchor + (1 - ratio) * partner, float32, as long as the shorter one."""
    length = min(len(anchor), len(partner))
    return (ratio * anchor[:length] + (1.0 - ratio) * partner[:length]).astype(np.float32)


def mix_caption(mixup: Mixup, anchor: str, partner: str, ratio: float) -> str:
    """The caption of a mix; that of the anchor where the embeddings are to be mixed instead."""
    if mixup.text == "both":
        return anchor if anchor == partner else f"{anchor} and {partner}"
    return partner if mixup.text == "louder" and ratio < 0.5 else anchor


def mix_posteriors(
    anchor: tuple[Tensor, Tensor], partner: tuple[Tensor, Tensor], ratio: Tensor, mixup: Mixup
) -> tuple[Tensor, Tensor]:
    """Mean and deviation (b, c, t, f) of ratio * z1 + (1 - ratio) * z2 for independent Gaussians z1, z2.

    ratio: (b,). So a sample of the mixed posterior is a mix of samples (BLM), exactly; with
    `mixup.latent="mean"` the deviation is 0.
    """
    share = ratio.to(anchor[0])[:, None, None, None]
    mean = share * anchor[0] + (1 - share) * partner[0]
    std = torch.hypot(share * anchor[1], (1 - share) * partner[1])
    if mixup.latent == "mean":
        std = torch.zeros_like(std)
    if mixup.renorm == "unit":
        norm = torch.hypot(share, 1 - share)
        return mean / norm, std / norm
    return mean, std


def silence_tail(waveform: Tensor) -> Tensor:
    """(b, s) whose last tenth is zero: what upstream gives CLAP of a mixed latent."""
    kept = int(0.9 * waveform.shape[-1])
    return torch.cat([waveform[..., :kept], torch.zeros_like(waveform[..., kept:])], dim=-1)
