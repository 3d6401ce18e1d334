"""Log-mel spectrograms as AudioLDM (arXiv 2301.12503) and MusicLDM (arXiv 2308.01546) take them.

Periodic Hann window, magnitude (not power) spectrum, Slaney mel scale with Slaney's area normalisation
(the defaults of `librosa.filters.mel`, which the filterbank here equals bit for bit in float64), natural
logarithm of `max(mel, 1e-5)`, and no normalisation by mean or deviation.

The originals frame the same waveform in two ways, 80 samples apart at 16 kHz, and both have names here:
`hifigan` is what they train with, `centered` is what their inference code uses to read an audio file.
Departure: a waveform too short for its reflected margin is refused with a message.

Axes: b batch, s samples, k STFT bins, f mel bins, n mel frames.
"""

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ldm_audio.errors import InputError

MelScale = Literal["slaney", "htk"]
Framing = Literal["hifigan", "centered"]

# Slaney's scale (Auditory Toolbox, 1998): 200/3 Hz a mel up to 1 kHz, then 27 mels for a factor of 6.4.
SLANEY_HZ_PER_MEL = 200.0 / 3
SLANEY_BREAK_HZ = 1000.0
SLANEY_BREAK_MEL = SLANEY_BREAK_HZ / SLANEY_HZ_PER_MEL
SLANEY_LOG_STEP = np.log(6.4) / 27.0

MEL_FLOOR = 1e-5  # silence is ln(1e-5) = -11.5129


def hz_to_mel(hz: float, scale: MelScale) -> float:
    """Hertz to mel."""
    if scale == "htk":
        return 2595.0 * np.log10(1.0 + hz / 700.0)
    if hz < SLANEY_BREAK_HZ:
        return hz / SLANEY_HZ_PER_MEL
    return SLANEY_BREAK_MEL + np.log(hz / SLANEY_BREAK_HZ) / SLANEY_LOG_STEP


def mel_to_hz(mel: np.ndarray, scale: MelScale) -> np.ndarray:
    """Mel to hertz."""
    if scale == "htk":
        return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
    logarithmic = SLANEY_BREAK_HZ * np.exp(SLANEY_LOG_STEP * (mel - SLANEY_BREAK_MEL))
    return np.where(mel < SLANEY_BREAK_MEL, SLANEY_HZ_PER_MEL * mel, logarithmic)


def mel_filterbank(
    *,
    sample_rate: int,
    n_fft: int,
    n_mels: int,
    fmin: float,
    fmax: float,
    scale: MelScale,
    norm: Literal["slaney"] | None,
) -> np.ndarray:
    """float64 (n_mels, n_fft // 2 + 1) triangles, `fmin` and `fmax` in Hz, evenly spaced on the mel scale.

    `norm="slaney"` scales every triangle to unit area in Hz; None leaves its peak at 1. The order of the
    operations is that of `librosa.filters.mel`, so that the results agree to the last bit.
    """
    if scale not in ("slaney", "htk"):
        raise InputError(f"scale={scale!r}: expected 'slaney' or 'htk'")
    if norm not in ("slaney", None):
        raise InputError(f"norm={norm!r}: expected 'slaney' or None")
    if not 0 <= fmin < fmax <= sample_rate / 2:
        raise InputError(f"fmin={fmin} fmax={fmax}: expected 0 <= fmin < fmax <= {sample_rate / 2} Hz")

    edges_mel = np.linspace(hz_to_mel(fmin, scale), hz_to_mel(fmax, scale), n_mels + 2)
    edges = mel_to_hz(edges_mel, scale)
    distance = np.subtract.outer(edges, np.fft.rfftfreq(n_fft, 1.0 / sample_rate))  # (f + 2, k)
    width = np.diff(edges)[:, None]
    rising = -distance[:-2] / width[:-1]
    falling = distance[2:] / width[1:]
    triangles = np.maximum(0, np.minimum(rising, falling))
    if norm is None:
        return triangles
    return triangles * (2.0 / (edges[2:] - edges[:-2]))[:, None]


# Tensors first made under inference mode could never take part in training: hence inference_mode(False).


@lru_cache(maxsize=32)
def hann_window(win_length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(win_length,) periodic Hann window, computed in float64."""
    with torch.inference_mode(False):
        window = torch.hann_window(win_length, periodic=True, dtype=torch.float64, device="cpu")
        return window.to(device, dtype)


@lru_cache(maxsize=32)
def mel_matrix(
    sample_rate: int,
    n_fft: int,
    n_mels: int,
    fmin: float,
    fmax: float,
    scale: MelScale,
    norm: Literal["slaney"] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """`mel_filterbank` as a (n_mels, n_fft // 2 + 1) tensor, computed in float64."""
    filterbank = mel_filterbank(
        sample_rate=sample_rate, n_fft=n_fft, n_mels=n_mels, fmin=fmin, fmax=fmax, scale=scale, norm=norm
    )
    with torch.inference_mode(False):
        return torch.from_numpy(filterbank).to(device, dtype)


def centred_power(waveform: Tensor, *, n_fft: int, hop_length: int) -> Tensor:
    """(b, s) float32 or float64 -> (b, n_fft // 2 + 1, s // hop_length + 1) power spectrum.

    Periodic Hann windows of n_fft samples; frame i is centred at sample hop_length * i, both ends reflected.
    """
    spectrum = torch.stft(
        waveform,
        n_fft,
        hop_length=hop_length,
        window=hann_window(n_fft, waveform.device, waveform.dtype),
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )  # (b, k, n)
    return spectrum.real**2 + spectrum.imag**2


class LogMel:
    """(b, s) waveform -> (b, f, n) natural-log mel spectrogram with n = s // hop_length frames.

    framing: where frame i is centred. `hifigan` reflects (n_fft - hop_length) / 2 samples at both ends, so
    that frame i is centred at sample hop_length * (i + 1/2); `centered` reflects n_fft / 2, frame i is
    centred at sample hop_length * i, and a frame beyond s // hop_length is cut.

    Runs on the waveform's device, is differentiable, and computes in float32, or in float64 for a float64
    waveform; autocast does not reach inside.
    """

    def __init__(
        self,
        *,
        sample_rate: int,
        n_fft: int,
        hop_length: int,
        win_length: int,
        n_mels: int,
        fmin: float,
        fmax: float,
        framing: Framing,
    ):
        if framing not in ("hifigan", "centered"):
            raise InputError(f"framing={framing!r}: expected 'hifigan' or 'centered'")
        if not 0 < win_length <= n_fft:
            raise InputError(f"win_length={win_length}: expected 1 to n_fft={n_fft}")
        if not 0 < hop_length <= n_fft or (framing == "hifigan" and (n_fft - hop_length) % 2):
            raise InputError(f"hop_length={hop_length}: expected 1 to n_fft={n_fft}, an even number apart")
        if not 0 <= fmin < fmax <= sample_rate / 2:
            raise InputError(f"fmin={fmin} fmax={fmax}: expected 0 <= fmin < fmax <= {sample_rate / 2} Hz")
        self.sample_rate = sample_rate
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.win_length = win_length
        self.n_mels = n_mels
        self.fmin = fmin
        self.fmax = fmax
        self.framing = framing

    def num_frames(self, num_samples: int) -> int:
        """Mel frames of a waveform of `num_samples` samples."""
        return num_samples // self.hop_length

    def __call__(self, waveform: Tensor) -> Tensor:
        """(b, s) waveform in [-1, 1] -> (b, f, n) natural-log mel.

        Raises InputError where the waveform is no longer than the margin to reflect (one frame, at least).
        """
        num_samples = waveform.shape[-1]
        margin = self.n_fft // 2 if self.framing == "centered" else (self.n_fft - self.hop_length) // 2
        shortest = max(margin + 1, self.hop_length)
        if waveform.ndim != 2 or num_samples < shortest:
            raise InputError(
                f"waveform {tuple(waveform.shape)}: expected (b, s) with s >= {shortest} samples"
            )

        dtype = torch.float64 if waveform.dtype == torch.float64 else torch.float32
        with torch.autocast(waveform.device.type, enabled=False):
            padded = F.pad(rearrange(waveform.to(dtype), "b s -> b 1 s"), (margin, margin), mode="reflect")
            spectrum = torch.stft(
                rearrange(padded, "b 1 s -> b s"),
                self.n_fft,
                hop_length=self.hop_length,
                win_length=self.win_length,
                window=hann_window(self.win_length, waveform.device, dtype),
                center=False,
                return_complex=True,
            )  # (b, k, n)
            magnitude = spectrum[..., : self.num_frames(num_samples)].abs()
            matrix = mel_matrix(
                self.sample_rate,
                self.n_fft,
                self.n_mels,
                self.fmin,
                self.fmax,
                "slaney",
                "slaney",
                waveform.device,
                dtype,
            )
            return (matrix @ magnitude).clamp(min=MEL_FLOOR).log()  # (b, f, n)
