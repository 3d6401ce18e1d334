"""TorToise's log-mels of speech at 22.05 kHz, for the voice and for the speech tokens (arXiv 2305.07243).

Must match the original's `TorchMelSpectrogram` and transformers' `ClvpFeatureExtractor`: power spectrum of a
periodic Hann window over centred frames, HTK mel scale with Slaney's area normalisation, the natural
logarithm of max(mel, 1e-5), each bin divided by its norm. The released norms are all negative, and so is a
quiet mel: the result is mostly positive. They are published as `mel_norms.pth`.

Departure: a long reference clip is cut at its beginning, as in transformers; the original's random place
takes an explicit generator.

Axes: b batch, f mel bins, n mel frames, s samples.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_audio.audio.mel import MEL_FLOOR, centred_power, mel_matrix
from ldm_audio.errors import InputError


class SpeechMel:
    """(b, s) waveform -> (b, f, n) normalised log-mel with n = s // hop_length + 1 frames.

    reference_samples: the length of a reference clip, 132300 in the release.
    norms: what each mel bin is divided by; None leaves the logarithm as it is.

    Runs on the waveform's device, is differentiable, and computes in float32, or in float64 for a float64
    waveform; autocast does not reach inside.
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
        reference_samples: int,
        norms: Sequence[float] | None,
    ):
        if not 0 <= fmin < fmax <= sample_rate / 2:
            raise InputError(f"fmin={fmin} fmax={fmax}: expected 0 <= fmin < fmax <= {sample_rate / 2} Hz")
        if norms is not None and (len(norms) != n_mels or not all(norms)):
            raise InputError(f"norms: expected {n_mels} numbers other than 0, found {len(norms)}")
        self.sample_rate = sample_rate
        self.n_fft = n_fft
        self.hop_length = hop_length
        self.n_mels = n_mels
        self.fmin = fmin
        self.fmax = fmax
        self.reference_samples = reference_samples
        self.norms = None if norms is None else tuple(float(norm) for norm in norms)

    def settings(self) -> dict[str, Any]:
        """The arguments that make the same front end."""
        names = ("sample_rate", "n_fft", "hop_length", "n_mels", "fmin", "fmax", "reference_samples")
        norms = None if self.norms is None else list(self.norms)
        return {name: getattr(self, name) for name in names} | {"norms": norms}

    def num_frames(self, num_samples: int) -> int:
        """Mel frames of a waveform of `num_samples` samples."""
        return num_samples // self.hop_length + 1

    def reference(self, waveform: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """(b, s) clips of a voice -> (b, f, n) of `reference_samples` each.

        Shorter ones are filled with zeros on the right. Of longer ones the beginning is taken, or a place
        that `generator` (on the CPU) draws, each row its own.
        """
        surplus = waveform.shape[-1] - self.reference_samples
        if surplus <= 0:
            return self(F.pad(waveform, (0, -surplus)))
        starts = [0] * len(waveform)
        if generator is not None:
            starts = torch.randint(surplus + 1, (len(waveform),), generator=generator).tolist()
        return self(
            torch.stack([row[start : start + self.reference_samples] for row, start in zip(waveform, starts)])
        )

    def __call__(self, waveform: Tensor) -> Tensor:
        """(b, s) waveform in [-1, 1] -> (b, f, s // hop_length + 1).

        Raises InputError where the waveform is no longer than the margin to reflect.
        """
        if waveform.ndim != 2 or waveform.shape[1] <= self.n_fft // 2:
            shortest = self.n_fft // 2 + 1
            raise InputError(
                f"waveform {tuple(waveform.shape)}: expected (b, s) with s >= {shortest} samples"
            )
        device = waveform.device
        dtype = torch.float64 if waveform.dtype == torch.float64 else torch.float32
        matrix = mel_matrix(
            self.sample_rate, self.n_fft, self.n_mels, self.fmin, self.fmax, "htk", "slaney", device, dtype
        )
        with torch.autocast(device.type, enabled=False):
            power = centred_power(waveform.to(dtype), n_fft=self.n_fft, hop_length=self.hop_length)
            mel = (matrix @ power).clamp(min=MEL_FLOOR).log()  # (b, f, n)
            return mel if self.norms is None else mel / mel.new_tensor(self.norms)[:, None]

    def power(self, mel: Tensor) -> Tensor:
        """(b, f, n) normalised log-mel -> (b, f, n) power by mel bin, the way back of the last steps."""
        return (mel if self.norms is None else mel * mel.new_tensor(self.norms)[:, None]).exp()


def read_norms(path: str | Path) -> list[float]:
    """The numbers of a `mel_norms.pth`, a bare float32 tensor of one number a mel bin."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file, expected mel_norms.pth")
    try:
        norms = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file: of any kind
        raise InputError(f"{path}: not a readable torch file ({str(error).splitlines()[0]})") from error
    if not isinstance(norms, Tensor) or norms.ndim != 1 or not norms.is_floating_point():
        raise InputError(f"{path}: expected one tensor of a number a mel bin")
    return norms.tolist()
