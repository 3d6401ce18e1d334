"""Audio files in and out, and resampling.

Reads what libsndfile reads (wav, flac, ogg, mp3, aiff, ... at any rate, depth and number of channels), a
window at a time and without FFmpeg. Two resamplers: soxr for data, and torchaudio's windowed sinc where a
number must agree with the original AudioLDM and CLAP code, which use it.

Axes: c channels, s samples.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from ldm_audio.errors import InputError


@dataclass(frozen=True)
class AudioInfo:
    """What a file's header says; `num_samples` counts each channel."""

    sample_rate: int
    num_samples: int
    num_channels: int


def probe(path: str | Path) -> AudioInfo:
    """Reads the header only. Raises InputError for a file that is missing, not audio, or without samples."""
    with open_audio(path) as file:
        return AudioInfo(file.samplerate, file.frames, file.channels)


def read_audio(path: str | Path, *, start: int = 0, num_samples: int | None = None) -> tuple[np.ndarray, int]:
    """float32 (c, s) and its sample rate: `num_samples` from `start` on, or all up to the end of the file.

    A window that reaches past the end comes back shorter. Integer formats are scaled to [-1, 1], float
    formats are returned as they are. An mp3 is decoded from its beginning up to the window: exact, at some
    millisecond of processor time and 200 kB a second of sound and channel, so that long ones, whose windows
    are read again and again, are better converted to flac or ogg, where seeking is exact.

    Raises InputError for a file that is missing, not audio, broken, or holds NaN or infinity, and for a
    window without a sample.
    """
    with open_audio(path) as file:
        if not 0 <= start < file.frames:
            raise InputError(f"{path}: start {start} is outside its {file.frames} samples")
        try:
            waveform = read_window(file, start, num_samples).T
        except soundfile.SoundFileError as error:
            raise InputError(f"{path}: broken audio ({one_line(error)})") from error
        sample_rate = file.samplerate
    if waveform.shape[-1] == 0:
        raise InputError(f"{path}: no samples from {start} on; the file ends before its header says")
    if not np.isfinite(waveform).all():
        raise InputError(f"{path}: holds NaN or infinity")
    return np.ascontiguousarray(waveform), sample_rate


def open_audio(path: str | Path) -> soundfile.SoundFile:
    """An open file of at least one sample, or InputError."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        file = soundfile.SoundFile(path)
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: headerless .raw needs a rate
        raise InputError(f"{path}: not a readable audio file ({one_line(error)})") from error
    if file.frames <= 0:
        file.close()
        raise InputError(f"{path}: empty, 0 samples")
    return file


def read_window(file: soundfile.SoundFile, start: int, num_samples: int | None) -> np.ndarray:
    """float32 (s, c) of a newly opened file."""
    # An mp3 is decoded in a single read from its beginning: seeking in one (soundfile does so after every
    # read, too) misses by up to half a second where its bit rate varies.
    ahead = start if file.format == "MP3" else 0
    file.seek(start - ahead)
    frames = -1 if num_samples is None else ahead + num_samples
    return file.read(frames, dtype="float32", always_2d=True)[ahead:]


def one_line(error: Exception) -> str:
    """The library's own reason, without the path it repeats."""
    return " ".join(str(error).split(": ")[-1].split()).rstrip(".")


def resample(waveform: np.ndarray, source_rate: int, target_rate: int) -> np.ndarray:
    """(..., s) -> float32 (..., ceil(s * target_rate / source_rate)) by soxr at its high quality."""
    waveform = np.asarray(waveform, dtype=np.float32)
    if source_rate == target_rate:
        return waveform
    num_samples = -(-waveform.shape[-1] * target_rate // source_rate)
    # soxr rounds the length down; zeros behind the end are what it assumes there anyway
    zeros = np.zeros((*waveform.shape[:-1], 2 * (source_rate // target_rate + 1)), dtype=np.float32)
    rows = np.concatenate([waveform, zeros], axis=-1).reshape(-1, waveform.shape[-1] + zeros.shape[-1])
    resampled = [soxr.resample(row, source_rate, target_rate)[:num_samples] for row in rows]
    return np.stack(resampled).reshape(*waveform.shape[:-1], num_samples)


def resample_sinc(waveform: Tensor, source_rate: int, target_rate: int) -> Tensor:
    """(..., s) -> (..., ceil(s * target_rate / source_rate)) as the originals do, on the waveform's device.

    torchaudio's Hann-windowed sinc, width 6, rolloff 0.99; InputError where torchaudio does not import.
    """
    if source_rate == target_rate:
        return waveform
    try:
        from torchaudio.functional import resample as sinc
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(
            f"resampling {source_rate} to {target_rate} Hz as the originals do needs a torchaudio that "
            f"imports beside torch {torch.__version__}: install the matching release ({one_line(error)})"
        ) from error
    return sinc(waveform, source_rate, target_rate, lowpass_filter_width=6, rolloff=0.99)


def write_wav(
    path: str | Path, waveform: np.ndarray | Tensor, sample_rate: int, *, subtype: str = "PCM_16"
) -> None:
    """Writes a mono (s,) waveform in [-1, 1] as wav; what lies outside is clipped in integer formats.

    The file appears whole or not at all; its folder is made. `subtype` is libsndfile's name of the sample
    format (`PCM_16`, `PCM_24`, `FLOAT`). Raises InputError for another shape, no samples, NaN or infinity.
    """
    path = Path(path)
    samples = (
        waveform.detach().float().cpu().numpy() if isinstance(waveform, Tensor) else np.asarray(waveform)
    )
    if samples.ndim != 1 or samples.size == 0:
        raise InputError(
            f"{path}: cannot write a waveform of shape {samples.shape}, expected (s,) with s >= 1"
        )
    if not np.isfinite(samples).all():
        raise InputError(f"{path}: not written, the waveform holds NaN or infinity")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        soundfile.write(temporary, samples, sample_rate, subtype=subtype, format="WAV")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
