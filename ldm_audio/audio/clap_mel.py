"""CLAP's audio front end: waveforms of any length to log-mel spectrograms in dB of one length.

Implements the front end of LAION-CLAP (arXiv 2211.06687); must match transformers' `ClapFeatureExtractor`
with `frequency_min=50`, the value of the released files (its own default, 0, is not). Power spectrum of a
periodic Hann window over centred frames, mel, 10 log10 max(mel, 1e-10): silence is -100 dB.

Two filterbanks, as released: without fusion the Slaney scale with Slaney's area normalisation, with fusion
the HTK scale without normalisation.

Departures: what the originals crop at random is deterministic here unless a generator is passed; no clip of
an all-short batch is marked as long at random (transformers does so, which changes its embedding).

Axes: b batch, c channels, f mel bins, n mel frames, s samples.
"""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ldm_audio.audio.mel import centred_power, mel_matrix
from ldm_audio.errors import InputError

Filling = Literal["repeatpad", "repeat", "pad"]

POWER_FLOOR = 1e-10


class ClapMel:
    """(b, s) waveform -> (mel (b, c, n, f) in dB, is_longer (b,) bool), n = max_samples // hop_length + 1.

    filling: what a waveform shorter than `max_samples` is filled with: `repeatpad` repeats it as often as it
    fits and adds zeros (all released models), `repeat` repeats and cuts, `pad` adds zeros.
    fusion: whether longer waveforms give four channels (the whole squeezed to n frames, then a chunk of n
    frames each from its front, middle and back; shorter ones four times the same) or one, of a crop.
    quantize: round the waveform to 16-bit integers first, towards zero, as the original's training does.

    Runs on the waveform's device, is differentiable (unless it quantizes), and computes in float32, or (but
    for the squeezing) in float64 for a float64 waveform; autocast does not reach inside.
    """

    def __init__(
        self,
        *,
        sample_rate: int,
        n_fft: int,
        hop_length: int,
        n_mels: int,
        fmin: float,
        fmax: float,
        max_samples: int,
        fusion: bool,
        filling: Filling,
        quantize: bool = False,
    ):
        if filling not in ("repeatpad", "repeat", "pad"):
            raise InputError(f"filling={filling!r}: expected 'repeatpad', 'repeat' or 'pad'")
        if not 0 <= fmin < fmax <= sample_rate / 2:
            raise InputError(f"fmin={fmin} fmax={fmax}: expected 0 <= fmin < fmax <= {sample_rate / 2} Hz")
        if max_samples <= n_fft // 2:
            raise InputError(f"max_samples={max_samples}: expected more than n_fft / 2 = {n_fft // 2}")
        self.sample_rate = sample_rate
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.n_mels = n_mels
        self.fmin = fmin
        self.fmax = fmax
        self.max_samples = max_samples
        self.fusion = fusion
        self.filling = filling
        self.quantize = quantize

    @property
    def num_frames(self) -> int:
        """Mel frames of every output."""
        return self.max_samples // self.hop_length + 1

    def __call__(
        self, waveform: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """(b, s) waveform in [-1, 1], s > 0 -> (mel (b, c, n, f) in dB, is_longer (b,) bool).

        Of a waveform longer than `max_samples`, one channel takes the first `max_samples`; four channels
        take the chunks at the very front, around the middle and at the very end. With a `generator` (CPU)
        both draw their starts as the original does, each row its own.
        """
        if waveform.ndim != 2 or waveform.shape[1] == 0:
            raise InputError(f"waveform {tuple(waveform.shape)}: expected (b, s) with s > 0")
        waveform = waveform.to(torch.float64 if waveform.dtype == torch.float64 else torch.float32)
        if self.quantize:
            waveform = (waveform.clamp(-1, 1) * 32767).trunc() / 32767

        b, s = waveform.shape
        longer = s > self.max_samples
        if longer and self.fusion:
            mel = self.decibels(waveform)
            longer = mel.shape[1] > self.num_frames  # less than a hop too long is not long
            if longer:
                return self.fuse(mel, generator), waveform.new_ones(b, dtype=torch.bool)
        else:
            waveform = self.crop(waveform, generator) if longer else self.fill(waveform)
            mel = self.decibels(waveform)
        mel = repeat(mel, "b n f -> b c n f", c=4 if self.fusion else 1)
        return mel, waveform.new_full((b,), longer, dtype=torch.bool)

    def fill(self, waveform: Tensor) -> Tensor:
        """(b, s) no longer than `max_samples` -> (b, max_samples)."""
        times = self.max_samples // waveform.shape[1]
        if self.filling == "repeatpad":
            waveform = repeat(waveform, "b s -> b (times s)", times=times)
        elif self.filling == "repeat":
            waveform = repeat(waveform, "b s -> b (times s)", times=times + 1)[:, : self.max_samples]
        return F.pad(waveform, (0, self.max_samples - waveform.shape[1]))

    def crop(self, waveform: Tensor, generator: torch.Generator | None) -> Tensor:
        """(b, s) longer than `max_samples` -> (b, max_samples)."""
        if generator is None:
            return waveform[:, : self.max_samples]
        last = waveform.shape[1] - self.max_samples
        starts = torch.randint(last + 1, (len(waveform),), generator=generator).tolist()
        return torch.stack([row[start : start + self.max_samples] for row, start in zip(waveform, starts)])

    def decibels(self, waveform: Tensor) -> Tensor:
        """(b, s) -> (b, s // hop_length + 1, f) in dB."""
        device, dtype = waveform.device, waveform.dtype
        scale, norm = ("htk", None) if self.fusion else ("slaney", "slaney")
        matrix = mel_matrix(
            self.sample_rate, self.n_fft, self.n_mels, self.fmin, self.fmax, scale, norm, device, dtype
        )
        with torch.autocast(device.type, enabled=False):
            power = centred_power(waveform, n_fft=self.n_fft, hop_length=self.hop_length)  # (b, k, n)
            mel = 10 * (matrix @ power).clamp(min=POWER_FLOOR).log10()
        return rearrange(mel, "b f n -> b n f")

    def fuse(self, mel: Tensor, generator: torch.Generator | None) -> Tensor:
        """(b, n', f) of more than `num_frames` frames -> (b, 4, n, f): whole, front, middle, back."""
        size = (self.num_frames, self.n_mels)
        # No antialiasing, as when the released models were trained: it would change the whole by many dB.
        # Always in float32, as in the originals: its rounded positions move the result by 0.001 dB.
        squeezed = F.interpolate(mel[:, None].float(), size, mode="bilinear", align_corners=False)
        whole = squeezed.to(mel.dtype)
        rows = []
        for row in mel:
            starts = self.chunk_starts(len(row), generator)
            rows.append(torch.stack([row[start : start + self.num_frames] for start in starts]))
        return torch.cat([whole, torch.stack(rows)], dim=1)

    def chunk_starts(self, num_frames: int, generator: torch.Generator | None) -> tuple[int, int, int]:
        """First frames of the three chunks, each out of its own third of all possible ones."""
        front, middle, back = np.array_split(np.arange(num_frames - self.num_frames + 1), 3)
        middle, back = (third if len(third) else np.zeros(1, dtype=int) for third in (middle, back))
        if generator is None:
            picks = 0, len(middle) // 2, len(back) - 1
        else:
            picks = [
                int(torch.randint(len(third), (), generator=generator)) for third in (front, middle, back)
            ]
        return int(front[picks[0]]), int(middle[picks[1]]), int(back[picks[2]])
