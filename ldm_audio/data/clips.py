"""Captioned recordings as training items: a window of each, at one sample rate, mono, of one length.

Prepares the waveform as AudioLDM's training code does (arXiv 2301.12503): a random segment, no more silent
than it has to be; resampled; mean removed; scaled to a peak of one half; zeros on the right. Departures: all
channels are mixed where the original keeps the first (`channel="first"` does), resampling is soxr's, and
what is drawn depends on (seed, epoch, index) alone, so that an item is the same in any worker and any run.

Axes: c channels, s samples.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ldm_audio.audio.beats import Beats
from ldm_audio.audio.io import AudioInfo, read_audio, resample
from ldm_audio.audio.mixup import Mixup, whole_tempo
from ldm_audio.data.beat_table import TABLE, beats_of
from ldm_audio.data.loader import ItemKey
from ldm_audio.data.manifest import Clip, audiocaps_clips, folder_clips, hours
from ldm_audio.data.mixing import Mixed, Track, mixed
from ldm_audio.errors import InputError

Normalise = Literal["peak_half", "none"]
CaptionChoice = Literal["random", "first"]
Channel = Literal["mix", "first"]
ReadMono = Callable[[int, int], tuple[np.ndarray, int]]
"""(start, number of samples) -> mono (s,) and its sample rate."""

CROP_TRIES = 10
SILENCE = 1e-4  # a crop whose peak is no higher is drawn again
AUDIOCAPS_PATTERNS = ("{youtube_id}_{start_time}", "Y{youtube_id}")


class Preparation:
    """How recordings become items of `num_samples` samples at `sample_rate`, wherever they are read from.

    normalise: `peak_half` removes the mean and scales to a peak of 0.5, `none` leaves the recording's level.
    random_crop: where a longer recording is cut; False takes its beginning. caption: which of a clip's
    captions. channel: `mix` averages them, `first` takes the left one. Raises InputError for other values.
    """

    def __init__(
        self,
        *,
        sample_rate: int,
        num_samples: int,
        seed: int,
        normalise: Normalise,
        random_crop: bool,
        caption: CaptionChoice,
        channel: Channel,
    ):
        for name, value, choices in (
            ("normalise", normalise, ("peak_half", "none")),
            ("caption", caption, ("random", "first")),
            ("channel", channel, ("mix", "first")),
        ):
            if value not in choices:
                raise InputError(f"{name}={value!r}: expected {' or '.join(choices)}")
        for name, value, least in (
            ("sample_rate", sample_rate, 1),
            ("num_samples", num_samples, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise InputError(f"{name}={value}: expected {least} or more")
        self.sample_rate = sample_rate
        self.num_samples = num_samples
        self.seed = seed
        self.normalise = normalise
        self.random_crop = random_crop
        self.caption = caption
        self.channel = channel

    def choose_caption(self, captions: Sequence[str], rng: np.random.Generator) -> str:
        return captions[rng.integers(len(captions)) if self.caption == "random" else 0]

    def segment(self, read: ReadMono, info: AudioInfo, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """Mono (s,) at the recording's own rate, just long enough, and that rate."""
        length = -(-self.num_samples * info.sample_rate // self.sample_rate)
        surplus = info.num_samples - length
        if surplus <= 0 or not self.random_crop:
            return read(0, length)
        for _ in range(CROP_TRIES):
            segment = read(int(rng.integers(surplus + 1)), length)
            if np.abs(segment[0]).max() > SILENCE:
                break
        return segment

    def mono(self, samples: np.ndarray) -> np.ndarray:
        """(c, s) -> (s,)."""
        return samples[0] if self.channel == "first" else samples.mean(axis=0)

    def level(self, waveform: np.ndarray) -> np.ndarray:
        """(s,) as `normalise` says."""
        return peak_half(waveform) if self.normalise == "peak_half" else waveform

    def fitted(self, source: np.ndarray, source_rate: int) -> torch.Tensor:
        """A segment (s,) at its own rate -> the item's waveform (num_samples,)."""
        waveform = self.level(resample(source, source_rate, self.sample_rate)[: self.num_samples])
        padded = np.zeros(self.num_samples, dtype=np.float32)
        padded[: len(waveform)] = waveform
        return torch.from_numpy(padded)


class Clips(Preparation):
    """Items with a caption and the file's name, of recordings that each lie in a file.

    beats: of every clip, for mixing them in time; None where that is not to happen. The other settings are
    those of `Preparation`. Reading raises InputError for a file that has become unreadable or holds NaN, and
    names it.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        *,
        sample_rate: int,
        num_samples: int,
        seed: int,
        normalise: Normalise,
        random_crop: bool,
        caption: CaptionChoice,
        channel: Channel,
        beats: Sequence[Beats] | None = None,
    ):
        super().__init__(
            sample_rate=sample_rate, num_samples=num_samples, seed=seed, normalise=normalise,
            random_crop=random_crop, caption=caption, channel=channel,
        )  # fmt: skip
        self.clips = list(clips)
        self.beats = beats

    def __len__(self) -> int:
        return len(self.clips)

    def captions(self) -> list[str]:
        """Every caption of every clip."""
        return [caption for clip in self.clips for caption in clip.captions]

    def describe(self) -> str:
        """The size in one line."""
        return f"{len(self.clips)} clips, {len(self.captions())} captions, {hours(self.clips):.2f} hours"

    def __getitem__(self, key: ItemKey | int) -> dict:
        """`waveform` float32 (s,), `caption`, `file_name` (the whole path)."""
        epoch, index, _ = (0, key, key) if isinstance(key, int) else key
        clip = self.clips[index]
        rng = np.random.default_rng([self.seed, epoch, index])
        caption = self.choose_caption(clip.captions, rng)
        segment = self.segment(partial(self.read_mono, clip), clip.info, rng)
        return {"waveform": self.fitted(*segment), "caption": caption, "file_name": str(clip.path)}

    def read_mono(self, clip: Clip, start: int, num_samples: int) -> tuple[np.ndarray, int]:
        samples, sample_rate = read_audio(clip.path, start=start, num_samples=num_samples)  # (c, s)
        return self.mono(samples), sample_rate

    def tempos(self) -> list[float]:
        """Whole beats a minute by index, 0 for a clip without beats."""
        return [float(whole_tempo(beats)) for beats in self.beats]

    def track(self, index: int, epoch: int) -> Track:
        """The whole recording, to be cut and mixed."""
        clip = self.clips[index]
        rng = np.random.default_rng([self.seed, epoch, index])
        caption = self.choose_caption(clip.captions, rng)
        rate = clip.info.sample_rate

        def read(start: float, count: int) -> np.ndarray:
            source, _ = self.read_mono(clip, round(start * rate), -(-count * rate // self.sample_rate))
            return resample(source, rate, self.sample_rate)[:count]

        return Track(self.beats[index], caption, read)


def peak_half(waveform: np.ndarray) -> np.ndarray:
    """(s,) without its mean and with a peak of 0.5; silence, and any constant, stays silent."""
    centred = waveform - waveform.mean(dtype=np.float64)
    return (0.5 * centred / (np.abs(centred).max() + 1e-8)).astype(np.float32)


def folder(
    path: str | Path,
    *,
    csv: str = "metadata.csv",
    file_column: str = "file_name",
    caption_column: str = "caption",
    report: str | Path | None = None,
    sample_rate: int,
    num_samples: int,
    seed: int,
    normalise: Normalise = "peak_half",
    random_crop: bool = True,
    caption: CaptionChoice = "random",
    channel: Channel = "mix",
    mixup: Mixup | None = None,
    beats: str | Path | None = None,
) -> Clips | Mixed:
    """The recordings that a CSV in the folder `path` names; see `manifest.folder_clips`.

    mixup: mixes them; beats: the table of their beats, `beats.jsonl` in the folder for None.
    """
    clips = folder_clips(path, csv=csv, file_column=file_column, caption_column=caption_column, report=report)
    return mixed_clips(
        clips,
        mixup=mixup,
        beats=beats or Path(path) / TABLE,
        root=path,
        sample_rate=sample_rate,
        num_samples=num_samples,
        seed=seed,
        normalise=normalise,
        random_crop=random_crop,
        caption=caption,
        channel=channel,
    )


def audiocaps(
    csv: str | Path,
    audio_root: str | Path,
    *,
    patterns: Sequence[str] = AUDIOCAPS_PATTERNS,
    report: str | Path | None = None,
    sample_rate: int,
    num_samples: int,
    seed: int,
    normalise: Normalise = "peak_half",
    random_crop: bool = True,
    caption: CaptionChoice = "random",
    channel: Channel = "mix",
    mixup: Mixup | None = None,
    beats: str | Path | None = None,
) -> Clips | Mixed:
    """What is there of AudioCaps; see `manifest.audiocaps_clips`, and `folder` for `mixup` and `beats`."""
    clips = audiocaps_clips(csv, audio_root, patterns=patterns, report=report)
    return mixed_clips(
        clips,
        mixup=mixup,
        beats=beats or Path(audio_root) / TABLE,
        root=audio_root,
        sample_rate=sample_rate,
        num_samples=num_samples,
        seed=seed,
        normalise=normalise,
        random_crop=random_crop,
        caption=caption,
        channel=channel,
    )


def mixed_clips(
    clips: Sequence[Clip], *, mixup: Mixup | None, beats: str | Path, root: str | Path, **settings: object
) -> Clips | Mixed:
    """The clips, mixed where `mixup` says so; plain mixup, which aligns nothing, needs no table of beats."""
    if mixup is None or mixup.prob == 0:
        return Clips(clips, **settings)
    if mixup.align == "none" and mixup.tempo_width is None:
        found = [Beats((), (), clip.info.num_samples / clip.info.sample_rate) for clip in clips]
    else:
        found = beats_of(beats, [(clip.path, clip.info) for clip in clips], root=root)
    return mixed(Clips(clips, **settings, beats=found), mixup)
