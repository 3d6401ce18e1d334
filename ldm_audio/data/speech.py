"""Recordings of speech with their texts and other clips of the same voice, as TorToise trains on them.

A folder with a CSV of `file_name,text,speaker`. An item is a whole recording, for a part of it would not say
its text; what is longer than an item has room for is left out and counted. What is drawn (the reference clips
and their places, how fast a recording is played) depends on (seed, epoch, index) alone.

Axes: r reference clips, s samples.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ldm_audio.audio.io import read_audio, resample
from ldm_audio.data.clips import Normalise, peak_half
from ldm_audio.data.loader import ItemKey
from ldm_audio.data.manifest import Clip, folder_clips, hours
from ldm_audio.errors import InputError

logger = logging.getLogger(__name__)

Speaker = str


class Speech:
    """Items with `waveform` (s,), of which `num_samples` are no padding, `references` (r, s') and `caption`.

    The references are other recordings of the same speaker, or the same one where there are no others, each
    of `reference_samples`. normalise: as for `clips.Clips`. max_speed: an item, its references with it, is
    played up to so many times as fast or as slow, which makes more voices of few; 1 leaves it as it is.

    Reading raises InputError for a file that has become unreadable or holds NaN, and names it.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        speakers: Sequence[Speaker],
        *,
        sample_rate: int,
        num_samples: int,
        num_references: int,
        reference_samples: int,
        seed: int,
        normalise: Normalise,
        max_speed: float,
    ):
        if not 1 <= max_speed <= 4:
            raise InputError(f"max_speed={max_speed}: expected 1 to 4")
        if normalise not in ("peak_half", "none"):
            raise InputError(f"normalise={normalise!r}: expected peak_half or none")
        longest = num_samples / sample_rate
        fitting = [clip.info.num_samples / clip.info.sample_rate <= longest for clip in clips]
        if not any(fitting):
            raise InputError(f"no recording of at most {longest:.2f} s")
        if left_out := len(fitting) - sum(fitting):
            logger.warning("%d of %d recordings are too long and left out", left_out, len(fitting))
        self.clips = [clip for clip, fits in zip(clips, fitting) if fits]
        self.speakers = [speaker for speaker, fits in zip(speakers, fitting) if fits]
        self.sample_rate = sample_rate
        self.num_samples = num_samples
        self.num_references = num_references
        self.reference_samples = reference_samples
        self.seed = seed
        self.normalise = normalise
        self.max_speed = max_speed
        self.by_speaker: dict[Speaker, list[int]] = {}
        for index, speaker in enumerate(self.speakers):
            self.by_speaker.setdefault(speaker, []).append(index)

    def __len__(self) -> int:
        return len(self.clips)

    def captions(self) -> list[str]:
        """Every text of every recording."""
        return [text for clip in self.clips for text in clip.captions]

    def describe(self) -> str:
        """The size in one line."""
        return f"{len(self)} recordings, {len(self.by_speaker)} speakers, {hours(self.clips):.2f} hours"

    def __getitem__(self, key: ItemKey | int) -> dict:
        """`waveform`, `num_samples`, `references`, `caption`, `speaker`, `file_name` (the whole path)."""
        epoch, index, _ = (0, key, key) if isinstance(key, int) else key
        rng = np.random.default_rng([self.seed, epoch, index])
        waveform = self.read(index)
        speed = 1.0
        if self.max_speed > 1:  # as slow as it fits
            speed = max(self.max_speed ** rng.uniform(-1, 1), len(waveform) / self.num_samples)
        waveform = self.play(waveform, speed)
        others = [i for i in self.by_speaker[self.speakers[index]] if i != index] or [index]
        chosen = rng.choice(others, self.num_references, replace=len(others) < self.num_references)
        references = [self.cut(self.play(self.read(int(i)), speed), rng) for i in chosen]
        shape = (self.num_references, self.reference_samples)
        padded = np.zeros(self.num_samples, dtype=np.float32)
        padded[: len(waveform)] = waveform
        clip = self.clips[index]
        return {
            "waveform": torch.from_numpy(padded),
            "num_samples": torch.tensor(len(waveform)),
            "references": torch.from_numpy(np.reshape(references, shape).astype(np.float32)),
            "caption": clip.captions[rng.integers(len(clip.captions))],
            "speaker": self.speakers[index],
            "file_name": str(clip.path),
        }

    def read(self, index: int) -> np.ndarray:
        """A whole recording, mono (s,)."""
        waveform, rate = read_audio(self.clips[index].path)
        waveform = resample(waveform.mean(axis=0), rate, self.sample_rate)[: self.num_samples]
        return peak_half(waveform) if self.normalise == "peak_half" else waveform

    def play(self, waveform: np.ndarray, speed: float) -> np.ndarray:
        """(s,) -> (s / speed,), at most what an item has room for: faster and higher, or slower and lower."""
        return resample(waveform, round(self.sample_rate * speed), self.sample_rate)[: self.num_samples]

    def cut(self, waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(s,) -> (reference_samples,), a random place, or zeros on the right."""
        surplus = len(waveform) - self.reference_samples
        if surplus <= 0:
            return np.pad(waveform, (0, -surplus))
        start = int(rng.integers(surplus + 1))
        return waveform[start : start + self.reference_samples]


def folder(
    path: str | Path,
    *,
    csv: str = "metadata.csv",
    file_column: str = "file_name",
    text_column: str = "text",
    speaker_column: str = "speaker",
    speakers: Sequence[Speaker] | None = None,
    without_speakers: Sequence[Speaker] = (),
    sample_rate: int,
    num_samples: int,
    num_references: int,
    reference_samples: int,
    seed: int,
    normalise: Normalise = "peak_half",
    max_speed: float = 1.0,
) -> Speech:
    """The recordings that a CSV in `path` names, of some speakers (all for None) or without some.

    Raises InputError for what `manifest.folder_clips` refuses, a CSV without speakers, and a speaker who is
    asked for and not there.
    """
    clips = folder_clips(path, csv=csv, file_column=file_column, caption_column=text_column)
    if any(speaker_column not in clip.extra for clip in clips):
        raise InputError(f"{Path(path) / csv}: no column {speaker_column}")
    told = [clip.extra[speaker_column] for clip in clips]
    if unknown := sorted({*(speakers or ()), *without_speakers} - set(told)):
        raise InputError(f"{Path(path) / csv}: no speaker {', '.join(unknown)}")
    kept = [
        (clip, speaker)
        for clip, speaker in zip(clips, told)
        if (speakers is None or speaker in speakers) and speaker not in without_speakers
    ]
    if not kept:
        raise InputError(f"{Path(path) / csv}: no recording of the speakers asked for")
    return Speech(
        *zip(*kept),
        sample_rate=sample_rate,
        num_samples=num_samples,
        num_references=num_references,
        reference_samples=reference_samples,
        seed=seed,
        normalise=normalise,
        max_speed=max_speed,
    )
