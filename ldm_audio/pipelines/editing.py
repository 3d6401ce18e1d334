"""Edits of a recording: the zero-shot manipulations of AudioLDM (arXiv 2301.12503, section 3.5).

`TextToAudio(..., edit=StyleTransfer(path=..., strength=0.5))`. The algorithms are the original's: style
transfer noises the recording's latents and denoises the rest of the schedule under the prompt; inpainting and
super-resolution put the noised recording into the part to keep before each step. What is left out of the
original: that it ends style transfer 0.12 s early, inpaints clips of 10 s only, fails at strength 1, and
returns the kept part through VAE and vocoder. Here the kept part is the recording itself: outside a time mask
sample for sample, below a cut-off in frequency as far as a filter can.

The networks hear the recording with the peak of 0.5 that they were trained on; the result is brought back.

Axes: b batch, c channels, f latent mel bins, s samples, t latent frames.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_audio.audio.io import read_audio, resample
from ldm_audio.audio.mel import hz_to_mel
from ldm_audio.errors import InputError
from ldm_audio.pipelines.text_to_audio import Source, TextToAudio
from ldm_audio.randomness import generator_for

TRAINED_PEAK = 0.5
CROSSFADE = 0.02  # seconds over which kept and made sound fade into each other, inside the mask
GUARD_HZ, TRANSITION_HZ = (
    60.0,
    60.0,
)  # above a cut-off: still all of the recording; then the change to the new

Interval = tuple[float, float]


class RecordingEdit(ABC):
    """What all edits share: reading the recording, encoding it, keeping a part of it.

    path: any audio file, its channels mixed, or a waveform (s,) at the pipeline's rate in its place.
    strength: the share of the schedule that is run, more than 0 and at most 1.
    latent: the posterior's `mean`, or a `sample` of it as in the original.
    """

    one_step_noisier = False

    def __init__(
        self, *, path: str | Path | Tensor, strength: float, latent: Literal["mean", "sample"] = "mean"
    ):
        if not 0 < strength <= 1:
            raise InputError(f"strength={strength}: expected more than 0 and at most 1")
        if latent not in ("mean", "sample"):
            raise InputError(f"latent={latent!r}: expected 'mean' or 'sample'")
        self.path = path
        self.strength = strength
        self.latent = latent

    def prepare(self, pipeline: TextToAudio, duration: float | None) -> Source:
        """See `text_to_audio.Edit`. Raises InputError for what cannot be read, and for masks that do not fit.

        duration: seconds of the result, from the recording's beginning; None: its length.
        """
        rate = pipeline.mel.sample_rate
        waveform = self.read(rate)
        num_samples = self.num_samples(pipeline, duration, len(waveform))
        waveform = F.pad(waveform, (0, max(0, num_samples - len(waveform))))[:num_samples]
        gain = TRAINED_PEAK / waveform.abs().max().clamp(min=1e-4).item()
        z0 = encode(pipeline, gain * waveform, latent=self.latent)
        mask = self.keep_mask(pipeline, num_samples, tuple(z0.shape[1:]))
        keep = self.keeper(waveform, rate)

        def finish(made: Tensor) -> Tensor:
            made = made / gain
            return made if keep is None else keep(made)

        return Source(
            z0=z0,
            num_samples=num_samples,
            strength=self.strength,
            keep_mask=None if mask is None else mask.to(pipeline.device),
            finish=finish,
            one_step_noisier=self.one_step_noisier,
        )

    def read(self, rate: int) -> Tensor:
        """(s,) at `rate`."""
        if isinstance(self.path, Tensor):
            return self.path.float().cpu()
        waveform, source_rate = read_audio(self.path)
        return torch.from_numpy(resample(waveform.mean(axis=0), source_rate, rate))

    def num_samples(self, pipeline: TextToAudio, duration: float | None, available: int) -> int:
        """Of the result: the recording's, or its first `duration` seconds."""
        if duration is None:
            return available
        wanted = pipeline.num_samples(duration)
        if wanted > available:
            seconds = available / pipeline.mel.sample_rate
            raise InputError(f"duration={duration}: {self.name} has {seconds:.2f} seconds")
        return wanted

    @property
    def name(self) -> str:
        """The recording's, for messages."""
        return "the waveform" if isinstance(self.path, Tensor) else str(self.path)

    @abstractmethod
    def keep_mask(self, pipeline: TextToAudio, num_samples: int, shape: tuple[int, int]) -> Tensor | None:
        """(t, f) bool, True = kept, or None where everything may change."""

    @abstractmethod
    def keeper(self, waveform: Tensor, rate: int) -> Callable[[Tensor], Tensor] | None:
        """What puts the recording (s,) back into the result (b, s), or None."""


class StyleTransfer(RecordingEdit):
    """The recording's course under another prompt (SDEdit, arXiv 2108.01073), freer with more `strength`.

    start: `matched` noises the latents to the first time step that is denoised; `audioldm` to the one before
    it, as the original does. A variation of a recording is the same with its own CLAP embedding for a prompt.
    """

    def __init__(
        self,
        *,
        path: str | Path | Tensor,
        strength: float,
        start: Literal["matched", "audioldm"] = "matched",
        latent: Literal["mean", "sample"] = "mean",
    ):
        super().__init__(path=path, strength=strength, latent=latent)
        if start not in ("matched", "audioldm"):
            raise InputError(f"start={start!r}: expected 'matched' or 'audioldm'")
        self.one_step_noisier = start == "audioldm"

    def keep_mask(self, pipeline: TextToAudio, num_samples: int, shape: tuple[int, int]) -> None:
        return None

    def keeper(self, waveform: Tensor, rate: int) -> None:
        return None


class Inpainting(RecordingEdit):
    """New sound in the time intervals `mask` (seconds, any number); elsewhere the recording itself."""

    def __init__(
        self,
        *,
        path: str | Path | Tensor,
        mask: Sequence[Interval],
        strength: float = 1.0,
        latent: Literal["mean", "sample"] = "mean",
        crossfade: float = CROSSFADE,
    ):
        super().__init__(path=path, strength=strength, latent=latent)
        for interval in mask:
            if len(interval) != 2 or not 0 <= interval[0] < interval[1] < math.inf:
                raise InputError(f"mask={list(interval)}: expected [start, end] in seconds, start below end")
        if not mask:
            raise InputError("mask=[]: covers nothing; expected [[start, end], ...] in seconds")
        self.mask = [(float(start), float(end)) for start, end in mask]
        self.crossfade = crossfade

    def keep_mask(self, pipeline: TextToAudio, num_samples: int, shape: tuple[int, int]) -> Tensor:
        """Latent frames that any masked sample falls into are made anew.

        Raises InputError for a mask that begins behind the recording, or that leaves nothing of it.
        """
        rate = pipeline.mel.sample_rate
        frame = pipeline.vae.downsample * pipeline.mel.hop_length
        keep = torch.ones(shape, dtype=torch.bool)
        inside = torch.zeros(num_samples, dtype=torch.bool)
        for start, end in self.mask:
            first, last = round(start * rate), min(round(end * rate), num_samples)
            if first >= num_samples:
                seconds = num_samples / rate
                raise InputError(f"mask={[start, end]}: covers nothing of {self.name}, {seconds:.2f} seconds")
            inside[first:last] = True
            keep[first // frame : math.ceil(last / frame)] = False
        if inside.all():
            raise InputError(f"mask={self.mask}: covers all of {self.name}; nothing is left to keep")
        return keep

    def keeper(self, waveform: Tensor, rate: int) -> Callable[[Tensor], Tensor]:
        """Equal to the recording outside the mask; the cross-fades lie inside, so at the mask's ends only."""
        weight = torch.zeros(len(waveform))
        for start, end in self.mask:
            first, last = round(start * rate), min(round(end * rate), len(waveform))
            place = torch.arange(first, last)
            fade = min(round(self.crossfade * rate), (last - first) // 2) + 1
            ramp = torch.full((last - first,), 1.0)
            if first > 0:
                ramp = torch.minimum(ramp, (place - first + 1) / fade)
            if last < len(waveform):
                ramp = torch.minimum(ramp, (last - place) / fade)
            weight[first:last] = torch.maximum(weight[first:last], (1 - torch.cos(torch.pi * ramp)) / 2)

        def keep(made: Tensor) -> Tensor:
            share, kept = weight.to(made), waveform.to(made)
            return torch.where(share > 0, share * made + (1 - share) * kept, kept)

        return keep


class Continuation(Inpainting):
    """The recording, and what might come after it: the result is `duration` seconds long.

    The last hundredths of a second before the end are made anew with it: the mel there has seen the silence
    behind.
    """

    def __init__(
        self,
        *,
        path: str | Path | Tensor,
        latent: Literal["mean", "sample"] = "mean",
        crossfade: float = CROSSFADE,
    ):
        super().__init__(path=path, mask=[(0, 1)], latent=latent, crossfade=crossfade)

    def num_samples(self, pipeline: TextToAudio, duration: float | None, available: int) -> int:
        """All of `duration`, which must be longer than the recording."""
        rate = pipeline.mel.sample_rate
        wanted = available if duration is None else pipeline.num_samples(duration)
        if wanted <= available:
            raise InputError(
                f"duration={duration}: expected more than the {available / rate:.2f} seconds of {self.name}"
            )
        seen_end = pipeline.mel.n_fft // 2 + round(self.crossfade * rate)
        self.mask = [(max(0, available - seen_end) / rate, wanted / rate)]
        return wanted


class SuperResolution(RecordingEdit):
    """New sound above `cutoff` Hz; below it the recording itself (to -40 dB and better in its spectrum)."""

    def __init__(
        self,
        *,
        path: str | Path | Tensor,
        cutoff: float,
        strength: float = 1.0,
        latent: Literal["mean", "sample"] = "mean",
    ):
        super().__init__(path=path, strength=strength, latent=latent)
        self.cutoff = cutoff

    def keep_mask(self, pipeline: TextToAudio, num_samples: int, shape: tuple[int, int]) -> Tensor:
        """Latent bins with any mel bin that reaches above the cut-off are made anew.

        Raises InputError for a cut-off that leaves nothing below or nothing above, and for a VAE that takes
        bands of the mel as channels.
        """
        mel = pipeline.mel
        if pipeline.vae.in_channels != 1:
            raise InputError("super-resolution: this VAE's latents mix low and high bands in their channels")
        lowest, highest = hz_to_mel(mel.fmin, "slaney"), hz_to_mel(mel.fmax, "slaney")
        highest_cut = mel.fmax - GUARD_HZ - TRANSITION_HZ
        if not mel.fmin < self.cutoff < highest_cut:
            raise InputError(
                f"cutoff={self.cutoff}: expected more than {mel.fmin} and below {highest_cut} Hz"
            )
        # Triangle i spans the edges i to i + 2 of n_mels + 2: the first to reach above the cut-off.
        edge = (hz_to_mel(self.cutoff, "slaney") - lowest) / (highest - lowest) * (mel.n_mels + 1)
        first = max(0, math.ceil(edge) - 2)
        keep = torch.ones(shape, dtype=torch.bool)
        keep[:, first // pipeline.vae.downsample :] = False
        return keep

    def keeper(self, waveform: Tensor, rate: int) -> Callable[[Tensor], Tensor]:
        """Splits both at the cut-off by one filter and its complement, without a shift of phase."""
        size = 2 * len(waveform)  # as much silence behind it: the filter's tails must not wrap around
        hertz = torch.from_numpy(np.fft.rfftfreq(size, 1 / rate))
        rise = ((hertz - self.cutoff - GUARD_HZ) / TRANSITION_HZ).clamp(0, 1)
        high = ((1 - torch.cos(torch.pi * rise)) / 2).float()  # the share of what is made

        def keep(made: Tensor) -> Tensor:
            kept = waveform.to(made)
            change = torch.fft.rfft(made - kept, n=size) * high.to(made)
            return kept + torch.fft.irfft(change, n=size)[:, : len(kept)]

        return keep


@torch.no_grad()
def encode(pipeline: TextToAudio, waveform: Tensor, *, latent: str = "mean") -> Tensor:
    """(s,) -> (c, t, f) latents as the diffusion knows them; silence behind up to a whole latent frame."""
    _, frames, _ = pipeline.latent_shape(len(waveform))
    padded = F.pad(waveform, (0, frames * pipeline.vae.downsample * pipeline.mel.hop_length - len(waveform)))
    mel = pipeline.mel(padded[None].to(pipeline.device))
    posterior = pipeline.vae.encode(mel.to(next(pipeline.vae.parameters()).dtype))
    z = posterior.mean
    if latent == "sample":
        z = posterior.sample(torch.randn(z.shape, generator=generator_for(0)).to(z))
    return (pipeline.latent_scale * z[0]).to(pipeline.dtype)
