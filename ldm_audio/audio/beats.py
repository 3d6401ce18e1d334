"""Beats, downbeats and tempo of a recording, by one of three trackers of one interface.

A tracker is called with a file and returns `Beats`; its `name`, `version` and `settings` go into the table
that its results are kept in (`data/beat_table.py`). A recording without a beat (silence, noise, a hum) has
empty lists and is no error.

- `LibrosaTracker` needs no weights. librosa finds beats alone; downbeats come from a rule (`find_bars`).
- `BeatThisTracker` (Foscarin et al. 2024, package `beat_this`) finds both, with weights from a local file.
- `BeatFiles` takes what another program found: Beat Transformer's pairs of `.npy`, or `.beats` text.

The tempo is that of MusicLDM's preprocessing (arXiv 2308.01546): beats over the time that they take, which is
finer than the grid on which librosa looks for it.

Axes: s samples, n frames.
"""

from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ldm_audio.audio.io import probe, read_audio, resample
from ldm_audio.errors import InputError

PAST_THE_END = 0.1  # seconds by which a tracker's last beat may miss the end of its recording
LIBROSA_RATE = 22050
LIBROSA_HOP = 256
LIBROSA_SHORTEST = 2048  # samples, one window of its onset strength
LIBROSA_LATENESS = 0.021
"""Seconds by which librosa's beats are late at this rate and hop: the median on rendered drums (see RESULTS).
A spectral flux peaks where a drum has risen, not where it begins."""
BEAT_THIS_RATE = 22050
BEAT_THIS_SHORTEST = 1024  # samples; less does not fill its STFT's reflected margin


@dataclass(frozen=True)
class Beats:
    """Times in seconds, ascending; a recording without a beat has none. duration: of the recording.

    Raises InputError for times that are not ascending, negative, or past the end of the recording.
    """

    beats: tuple[float, ...]
    downbeats: tuple[float, ...]
    duration: float

    def __post_init__(self) -> None:
        for name, times in (("beats", self.beats), ("downbeats", self.downbeats)):
            found = np.asarray(times, dtype=np.float64)
            if not np.isfinite(found).all() or (np.diff(found) <= 0).any() or (found < 0).any():
                raise InputError(f"{name}: expected ascending seconds of 0 or more")
            if len(found) and found[-1] > self.duration + PAST_THE_END:
                raise InputError(
                    f"{name} up to {found[-1]:.2f} s in {self.duration:.2f} s of sound: of another track?"
                )

    @property
    def tempo(self) -> float:
        """Beats a minute, 0.0 where there are fewer than two."""
        if len(self.beats) < 2:
            return 0.0
        return 60.0 * (len(self.beats) - 1) / (self.beats[-1] - self.beats[0])


class Tracker(Protocol):
    """Finds the beats of a file; raises InputError for one that cannot be read."""

    name: str

    @property
    def version(self) -> str: ...
    @property
    def settings(self) -> dict[str, Any]: ...
    def __call__(self, path: Path) -> Beats: ...


def package_version(package: str, extra: str) -> str:
    """InputError that says what to install where the package is not there."""
    try:
        return version(package)
    except PackageNotFoundError as error:
        raise InputError(f"tracker {package}: not installed, pip install 'ldm_audio[{extra}]'") from error


def read_mono(path: Path, sample_rate: int) -> tuple[np.ndarray, float]:
    """The whole file as (s,) at `sample_rate`, and its seconds."""
    waveform, source_rate = read_audio(path)  # (c, s)
    return resample(waveform.mean(axis=0), source_rate, sample_rate), waveform.shape[-1] / source_rate


@dataclass(frozen=True)
class LibrosaTracker:
    """librosa's dynamic programming (Ellis 2007) on the onset strength, and what it does not have.

    bars: lengths of a bar in beats that the rule for downbeats may choose. min_contrast, min_periodicity:
    librosa finds beats in noise too; they are kept only if the onsets at them stand out this much from the
    onsets elsewhere and the onset strength correlates this much with itself a beat later (both lie between
    what noise and hums and what drum loops measure). lateness: seconds taken off every time.
    """

    bars: tuple[int, ...] = (4, 3)
    min_contrast: float = 1.7
    min_periodicity: float = 0.1
    lateness: float = LIBROSA_LATENESS
    name: str = "librosa"

    @cached_property
    def version(self) -> str:
        return package_version("librosa", "beats")

    @property
    def settings(self) -> dict[str, Any]:
        return asdict(self) | {"bars": list(self.bars)}  # as JSON has it

    def __call__(self, path: Path) -> Beats:
        return self.track(*read_mono(path, LIBROSA_RATE))

    def track(self, waveform: np.ndarray, duration: float) -> Beats:
        """(s,) at `LIBROSA_RATE` -> its beats."""
        _ = self.version  # says what to install
        import librosa

        nothing = Beats((), (), duration)
        if len(waveform) < LIBROSA_SHORTEST or not np.abs(waveform).max() > 0:
            return nothing
        rate = {"sr": LIBROSA_RATE, "hop_length": LIBROSA_HOP}
        onsets = librosa.onset.onset_strength(y=waveform, **rate)  # (n,)
        if not onsets.max() > 0:
            return nothing
        _, frames = librosa.beat.beat_track(onset_envelope=onsets, **rate)
        if len(frames) < 3 or not self.is_regular(onsets, frames):
            return nothing
        low_onsets = librosa.onset.onset_strength(y=waveform, fmax=150, n_mels=8, **rate)  # (n,)
        phase, beats_per_bar = find_bars(low_onsets, frames, self.bars)
        times = frames * LIBROSA_HOP / LIBROSA_RATE - self.lateness
        # the beat at the very beginning would come before it
        beats = tuple(np.maximum(times, 0.0).round(4).tolist())
        return Beats(beats, beats[phase::beats_per_bar], duration)

    def is_regular(self, onsets: np.ndarray, frames: np.ndarray) -> bool:
        """Whether the onsets (n,) at these beats stand out, and come again a beat later."""
        peaks = np.lib.stride_tricks.sliding_window_view(np.pad(onsets, 2), 5).max(axis=1)  # (n,)
        contrast = peaks[frames].mean() / max(peaks.mean(), 1e-12)
        centred = onsets - onsets.mean()
        lag = int(np.median(np.diff(frames)))
        correlations = [
            centred[:-shift] @ centred[shift:] / (centred @ centred)
            for shift in range(max(1, lag - 3), min(lag + 4, len(centred)))
        ]
        return contrast >= self.min_contrast and max(correlations, default=0.0) >= self.min_periodicity


def find_bars(low_onsets: np.ndarray, frames: np.ndarray, bars: tuple[int, ...]) -> tuple[int, int]:
    """(index of the first downbeat among the beats, beats in a bar), of all such rows of beats the one that
    rises most below 150 Hz against the beats beside it; the first of `bars` where two are equal.

    A rule and no more: it takes the kick drum for the beginning of a bar. low_onsets: (n,) of the low band.
    """
    peaks = np.lib.stride_tricks.sliding_window_view(np.pad(low_onsets, 3), 7).max(axis=1)[frames]
    rows = [(phase, bar) for bar in bars for phase in range(bar) if phase < len(peaks)]

    def stands_out(row: tuple[int, int]) -> float:
        others = np.delete(peaks, np.s_[row[0] :: row[1]])
        return float(peaks[row[0] :: row[1]].mean() - (others.mean() if len(others) else 0.0))

    return max(rows, key=stands_out)


@dataclass(frozen=True)
class BeatThisTracker:
    """The network of `beat_this` with a checkpoint from a local file; nothing is downloaded.

    weights: such as `final0.ckpt` or `small0.ckpt` of its authors.
    """

    weights: str
    name: str = "beat_this"

    @cached_property
    def version(self) -> str:
        installed = package_version("beat_this", "beats")
        if not Path(self.weights).is_file():
            raise InputError(f"weights={self.weights}: no such file, expected a checkpoint of beat_this")
        return f"{installed} {blake2b(Path(self.weights).read_bytes(), digest_size=8).hexdigest()}"

    @property
    def settings(self) -> dict[str, Any]:
        return {}  # the weights' hash is in the version; their path may change

    def __call__(self, path: Path) -> Beats:
        waveform, duration = read_mono(path, BEAT_THIS_RATE)
        if len(waveform) < BEAT_THIS_SHORTEST:
            return Beats((), (), duration)
        beats, downbeats = beat_this_network(self.weights)(waveform, BEAT_THIS_RATE)
        return Beats(tuple(np.round(beats, 4).tolist()), tuple(np.round(downbeats, 4).tolist()), duration)


@lru_cache(maxsize=1)
def beat_this_network(weights: str) -> Any:
    """The package's `Audio2Beats`, loaded once a process; InputError for a file of another layout."""
    from pickle import UnpicklingError

    from beat_this.inference import Audio2Beats

    try:
        return Audio2Beats(checkpoint_path=weights, device="cpu", dbn=False)
    except (UnpicklingError, RuntimeError, KeyError, ValueError, EOFError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"weights={weights}: not a checkpoint of beat_this ({reason})") from error


@dataclass(frozen=True)
class BeatFiles:
    """Beats that another program found, for the recordings below `root`, in `folder`.

    For `drums/a.wav` either `a.beats` (lines of seconds and beat number, 1 begins a bar) or Beat
    Transformer's `a_beat_pred.npy` with `a_downbeat_pred.npy`; in `folder/drums` or in `folder` itself.
    """

    folder: str
    root: str
    name: str = "files"

    @property
    def version(self) -> str:
        return "1"

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def __call__(self, path: Path) -> Beats:
        info = probe(path)
        duration = info.num_samples / info.sample_rate
        inside = path.relative_to(self.root) if path.is_relative_to(self.root) else Path(path.name)
        for folder in dict.fromkeys((Path(self.folder, inside.parent), Path(self.folder))):
            text, arrays = folder / f"{path.stem}.beats", folder / f"{path.stem}_beat_pred.npy"
            found = text if text.is_file() else arrays
            if found.is_file():
                times = read_beats_text(text) if found == text else read_beats_arrays(arrays)
                try:
                    return Beats(*times, duration)
                except InputError as error:
                    raise InputError(f"{found}: {error}") from error
        raise InputError(f"{path}: neither {path.stem}.beats nor {path.stem}_beat_pred.npy in {self.folder}")


def read_beats_text(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Beats and downbeats of lines such as `1.24<tab>1`; InputError names a line of another form."""
    beats, downbeats = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            time, place = line.split()
            beats.append(float(time))
            if int(float(place)) == 1:
                downbeats.append(float(time))
        except ValueError as error:
            raise InputError(f"{path}: line {number}: expected seconds and beat number") from error
    return tuple(beats), tuple(downbeats)


def read_beats_arrays(path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Beats and downbeats of Beat Transformer's two arrays of seconds."""
    downbeats = path.with_name(path.name.replace("_beat_pred", "_downbeat_pred"))
    times = []
    for file in (path, downbeats):
        if not file.is_file():
            raise InputError(f"{file}: no such file")
        try:
            times.append(tuple(np.load(file, allow_pickle=False).astype(np.float64).reshape(-1).tolist()))
        except (ValueError, EOFError) as error:
            raise InputError(f"{file}: expected an array of seconds ({error})") from error
    return times[0], times[1]
