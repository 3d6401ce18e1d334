"""What a clip sounds like, measured from its waveform alone: the judge of the world in `synthetic.py`.

No part is learned. All that is looked at is the power in 64 mel bands every 10 ms, through windows of 64 ms,
so that a clip which has been through a log-mel and a vocoder can be judged like a rendered one: level and
phase make no difference, nor whether a tone is a sine or a buzz of a few harmonics.

- kind: a beat has bursts in the low register and bursts above it; a sound keeps to one register.
- register: where the power is.
- texture: in how many mel bands the power is at a time; few for a tone, many for noise.
- envelope: pulses are gaps that come near one of the rates, a fade is a drop from the first quarter to the
  last.
- motion: by how many mel bands the centre of the power moves.
- tempo: the one nearest to the period at which the bursts repeat best.
- metre: in three, one tick follows another; in two, each stands between downbeats.
- drum: the register of the ticks.

Axes: s samples, n frames, f mel bands, k STFT bins.
"""

import math
from functools import lru_cache

import numpy as np

from ldm_audio.audio.mel import hz_to_mel, mel_filterbank, mel_to_hz
from ldm_audio.data.synthetic import ATTRIBUTES, MIN_SAMPLE_RATE, PULSE_RATES, TEMPOS, Attributes, fits
from ldm_audio.errors import InputError

FRAME_RATE = 100  # frames a second
WINDOW = 0.064  # seconds
NUM_BANDS = 64
TOP = 8000.0  # Hz
REGISTER_TOPS = (600.0, 2480.0, TOP)  # Hz, of low, middle, high
DRUM_REGISTERS = {"clap": 1, "hat": 2}
TOLERANCE = 0.04  # of a pulse rate, and of a beat period beyond the slowest and the fastest
NOTHING = "none"  # the kind of a silent or broken clip

# Each lies between what clips of the two sides measure, rendered and through a log-mel and back.
SILENCE = 1e-4  # peak
BEAT_BURST = 0.03  # of the loudest power: the burst in the second loudest register
TONE_BANDS = 10.0  # effective number of mel bands
PULSE_DEPTH = 0.5  # swing between on (1) and off (0) over its mean
FADE_DROP = 10.0  # dB
GLIDE = 4.5  # mel bands over the clip; above 1 kHz fifteen make an octave
TICKS_IN_A_ROW = 0.1  # of the neighbouring beats with a tick, those with two: 0 in two, 1/3 in three


def measure(waveform: np.ndarray, sample_rate: int) -> Attributes:
    """(s,) waveform -> its kind and that kind's attributes, each with one of the values in `ATTRIBUTES`.

    Silence and waveforms with NaN or Inf have the kind `NOTHING` and no attributes. The metre needs 2.5 s.
    Raises InputError below `MIN_SAMPLE_RATE` and for a waveform that is not one-dimensional.
    """
    power = _heard(waveform, sample_rate)
    if power is None:
        return {"kind": NOTHING}
    kind = _kind(power)
    return {"kind": kind, **_measure_as(kind, power)}


def score(expected: Attributes, waveform: np.ndarray, sample_rate: int) -> dict[str, bool]:
    """For every attribute of `expected`, its kind included, whether the (s,) waveform has it, as `fits` says.

    A clip that sounds like the other kind is still judged by the attributes of the expected one, so that an
    attribute's accuracy is its own, with `chance` as its floor. Silence has none of them.
    """
    power = _heard(waveform, sample_rate)
    if power is None:
        return dict.fromkeys(expected, False)
    heard = {"kind": _kind(power), **_measure_as(expected["kind"], power)}
    return {name: fits(value, heard[name]) for name, value in expected.items()}


# --- mel bands ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _filterbank(sample_rate: int, n_fft: int) -> np.ndarray:
    """float32 (k, f) triangles of peak 1."""
    matrix = mel_filterbank(
        sample_rate=sample_rate, n_fft=n_fft, n_mels=NUM_BANDS, fmin=0, fmax=TOP, scale="slaney", norm=None
    )
    return np.ascontiguousarray(matrix.T, dtype=np.float32)


@lru_cache(maxsize=1)
def _centers() -> np.ndarray:
    """(f,) centre frequencies in Hz."""
    return mel_to_hz(np.linspace(0, hz_to_mel(TOP, "slaney"), NUM_BANDS + 2)[1:-1], "slaney")


@lru_cache(maxsize=1)
def _register_slices() -> tuple[slice, ...]:
    """The bands of each register, low to high."""
    stops = np.searchsorted(_centers(), REGISTER_TOPS)
    return tuple(slice(start, stop) for start, stop in zip((0, *stops), stops))


def band_power(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    """float32 (s,) waveform -> float32 (n, f) power, frame i centred at i / `FRAME_RATE` seconds."""
    half = round(WINDOW / 2 * sample_rate)
    window = np.hanning(2 * half + 1)[:-1].astype(np.float32)
    starts = np.arange(0, len(waveform), sample_rate / FRAME_RATE).round().astype(int)
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(waveform, half), 2 * half)[starts]
    spectrum = np.fft.rfft(frames * window)  # (n, k)
    return (spectrum.real**2 + spectrum.imag**2) @ _filterbank(sample_rate, 2 * half)


def _heard(waveform: np.ndarray, sample_rate: int) -> np.ndarray | None:
    """(n, f) power of the waveform, without its offset, at a peak of 1; None where nothing can be judged."""
    waveform = np.asarray(waveform, dtype=np.float32)
    if sample_rate < MIN_SAMPLE_RATE or waveform.ndim != 1 or not len(waveform):
        raise InputError(
            f"waveform {waveform.shape} at {sample_rate} Hz: expected (s,) at {MIN_SAMPLE_RATE} Hz or more"
        )
    if not np.isfinite(waveform).all():
        return None
    waveform = waveform - waveform.mean()
    peak = np.abs(waveform).max()
    return band_power(waveform / peak, sample_rate) if peak > SILENCE else None


def _registers(power: np.ndarray) -> np.ndarray:
    """(n, f) power -> (n, 3) power in the low, middle and high register."""
    return np.stack([power[:, bands].sum(1) for bands in _register_slices()], axis=1)


# --- kinds -------------------------------------------------------------------------------------------------


def _kind(power: np.ndarray) -> str:
    """power (n, f). Steady power is no burst, so that noise under a sound does not make it a beat."""
    registers = _registers(power)
    smooth = np.stack([np.convolve(row, np.full(5, 0.2), "same") for row in registers.T])  # (3, n)
    bursts = np.sort(smooth.max(1) - np.median(smooth, axis=1))
    return "beat" if bursts[-2] > BEAT_BURST * smooth.max() else "sound"


def _measure_as(kind: str, power: np.ndarray) -> Attributes:
    return _measure_beat(power) if kind == "beat" else _measure_sound(power)


# --- sounds ------------------------------------------------------------------------------------------------


def _measure_sound(power: np.ndarray) -> Attributes:
    """power (n, f)."""
    registers = _registers(power)
    register = int(registers.sum(0).argmax())
    bands = _register_slices()[register]
    return {
        "register": ATTRIBUTES["sound"]["register"][register],
        "texture": "tone" if _width(power[:, bands]) < TONE_BANDS else "noise",
        "envelope": _envelope(registers[:, register]),
        "motion": _motion(power[:, bands]),
    }


def _width(power: np.ndarray) -> float:
    """Effective number of bands at a time: (sum)^2 / (sum of squares) within 0.2 s, averaged by power."""
    pieces = np.add.reduceat(power, np.arange(0, len(power), FRAME_RATE // 5), axis=0).astype(np.float64)
    weights = pieces.sum(1)
    widths = weights**2 / np.maximum((pieces**2).sum(1), 1e-30)
    return float(np.average(widths, weights=weights))


def _envelope(power: np.ndarray) -> str:
    """power (n,) of one register."""
    on = _on(np.sqrt(power))
    depths = {name: _swing(on, rate) for name, rate in PULSE_RATES.items()}
    strongest = max(depths, key=depths.get)
    if depths[strongest] > PULSE_DEPTH:
        return strongest
    first, *_, last = (quarter.mean() for quarter in np.array_split(power, 4))
    return "fade" if 10 * np.log10(first / max(last, 1e-30)) > FADE_DROP else "steady"


def _on(amplitude: np.ndarray) -> np.ndarray:
    """(n,) from 0 in gaps to 1 in sound, by the largest amplitude within 0.25 s. So a fade does not count,
    nor the shallow dips of a vocoder whose harmonics a gliding tone passes one after the other."""
    reach = FRAME_RATE // 4
    near = np.lib.stride_tricks.sliding_window_view(np.pad(amplitude, reach, mode="edge"), 2 * reach + 1)
    return np.clip((amplitude / np.maximum(near.max(1), 1e-30) - 0.2) / 0.3, 0, 1)


def _swing(on: np.ndarray, rate: float) -> float:
    """Size of the sinusoid in `on` (n,) near `rate` Hz, over the mean; about 1 for pulses, 0 for none."""
    rates = rate * np.linspace(1 - TOLERANCE, 1 + TOLERANCE, 9)
    seconds = np.arange(len(on)) / FRAME_RATE
    waves = np.exp(-2j * np.pi * np.outer(rates, seconds))
    return float(2 * np.abs(waves @ on).max() / on.sum())


def _motion(power: np.ndarray) -> str:
    """power (n, f') of one register. A line is fitted to the centre of power against time; frames count by
    their power up to a tenth of the largest, so that the quieter part of a fade counts too."""
    squared = power.astype(np.float64) ** 2  # so that a floor of noise does not pull
    center = squared @ np.arange(power.shape[1]) / np.maximum(squared.sum(1), 1e-30)
    total = power.sum(1)
    weights = np.minimum(total, 0.1 * total.max())
    time = np.linspace(0, 1, len(power))
    time = time - np.average(time, weights=weights)
    glide = (weights * time * center).sum() / max((weights * time**2).sum(), 1e-30)
    return "level" if abs(glide) < GLIDE else "rising" if glide > 0 else "falling"


# --- beats -------------------------------------------------------------------------------------------------


def _measure_beat(power: np.ndarray) -> Attributes:
    """power (n, f)."""
    amplitude = np.sqrt(_registers(power))
    bursts = np.maximum(amplitude - np.median(amplitude, axis=0), 0)
    drum = max(DRUM_REGISTERS, key=lambda name: bursts[:, DRUM_REGISTERS[name]].max())
    kicks, ticks = (bursts[:, i] / max(bursts[:, i].max(), 1e-30) for i in (0, DRUM_REGISTERS[drum]))

    beats = kicks + ticks - (kicks + ticks).mean()
    period = _period(beats)
    lag = round(period)
    tempo = min(TEMPOS, key=lambda name: abs(math.log(float(name) * period / (60 * FRAME_RATE))))
    in_a_row = _overlap(ticks, ticks, lag)
    mixed = _overlap(ticks, kicks, lag) + _overlap(kicks, ticks, lag)
    three = in_a_row > TICKS_IN_A_ROW * (in_a_row + mixed)
    return {"tempo": tempo, "metre": "three" if three else "two", "drum": drum}


def _period(beats: np.ndarray) -> float:
    """Frames after which (n,) bursts repeat best, between those of the fastest and of the slowest tempo; a
    parabola through the best and its neighbours finds it between two frames."""
    fastest, slowest = (60 * FRAME_RATE / float(tempo) for tempo in (TEMPOS[-1], TEMPOS[0]))
    first, last = math.floor((1 - TOLERANCE) * fastest), math.ceil((1 + TOLERANCE) * slowest)
    overlaps = [_overlap(beats, beats, lag) for lag in range(first, last + 1)]
    best = int(np.argmax(overlaps[1:-1])) + 1
    before, at, after = overlaps[best - 1 : best + 2]
    curvature = 2 * at - before - after
    return first + best + (0.5 * (after - before) / curvature if at > max(before, after) else 0.0)


def _overlap(earlier: np.ndarray, later: np.ndarray, lag: int) -> float:
    """Sum of the products of two envelopes (n,), the second `lag` frames later."""
    return float(earlier[: len(later) - lag] @ later[lag:]) if lag < len(later) else 0.0
