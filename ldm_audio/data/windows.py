"""Fixed windows of recordings, to be encoded once: a grid, and one from every downbeat.

Axes: s samples.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ldm_audio.audio.beats import Beats
from ldm_audio.audio.mixup import whole_tempo
from ldm_audio.data.beat_table import TABLE, beats_of
from ldm_audio.data.clips import Channel, Clips, Normalise
from ldm_audio.data.loader import ItemKey
from ldm_audio.data.manifest import folder_clips
from ldm_audio.errors import InputError


class Windows:
    """Items of `num_samples` samples from fixed places, with all captions of their recording.

    stride: seconds from one window of the grid to the next; a window that would begin where less than half of
    it is left is left out, unless it is the first. downbeats: also a window from every downbeat behind which
    `min_overlap` seconds remain (or a whole window, where that is less).

    Items hold `waveform` (s,), `caption`, `captions` and `window`: the file, its tempo, the start and the
    beats in seconds (these from the start on), and whether the window begins at a downbeat.
    """

    def __init__(self, clips: Clips, *, root: str | Path, stride: float, downbeats: bool, min_overlap: float):
        if not stride > 0:
            raise InputError(f"stride={stride}: expected more than 0 seconds")
        self.clips = clips
        self.root = Path(root)
        self.places: list[tuple[int, float, bool]] = []
        length = clips.num_samples / clips.sample_rate
        for index, beats in enumerate(clips.beats):
            grid = np.arange(0.0, max(beats.duration - length / 2, 0.0) or stride / 2, stride)
            self.places += [(index, float(start), False) for start in grid]
            if downbeats:
                latest = beats.duration - min(min_overlap, length)
                self.places += [(index, start, True) for start in beats.downbeats if start <= latest]

    def __len__(self) -> int:
        return len(self.places)

    def captions(self) -> list[str]:
        """Every caption of every recording."""
        return self.clips.captions()

    def __getitem__(self, key: ItemKey | int) -> dict:
        number = key if isinstance(key, int) else key.index
        index, start, is_downbeat = self.places[number]
        clip, beats = self.clips.clips[index], self.clips.beats[index]
        size, rate = self.clips.num_samples, self.clips.sample_rate
        read = self.clips.level(self.clips.track(index, 0).read(start, size))
        waveform = np.zeros(size, np.float32)
        waveform[: len(read)] = read
        inside = [round(beat - start, 4) for beat in beats.beats if 0 <= beat - start < size / rate]
        window = {
            "file": clip.path.relative_to(self.root).as_posix(),
            "start": round(start, 4),
            "downbeat": is_downbeat,
            "tempo": whole_tempo(beats),
            "beats": inside,
        }
        return {
            "waveform": torch.from_numpy(waveform),
            "caption": clip.captions[0],
            "captions": list(clip.captions),
            "window": window,
        }


def windows(
    path: str | Path,
    *,
    csv: str,
    sample_rate: int,
    num_samples: int,
    stride: float,
    downbeats: bool,
    beats: str | Path | None,
    min_overlap: float,
    normalise: Normalise,
    channel: Channel,
) -> Windows:
    """The windows of the recordings that a CSV names.

    beats: their table, `beats.jsonl` in the folder for None; not needed without windows at downbeats.
    """
    clips = folder_clips(path, csv=csv)
    found: Sequence[Beats]
    if downbeats:
        found = beats_of(beats or Path(path) / TABLE, [(clip.path, clip.info) for clip in clips], root=path)
    else:
        found = [Beats((), (), clip.info.num_samples / clip.info.sample_rate) for clip in clips]
    recordings = Clips(
        clips,
        sample_rate=sample_rate,
        num_samples=num_samples,
        seed=0,
        normalise=normalise,
        random_crop=False,
        caption="first",
        channel=channel,
        beats=found,
    )
    return Windows(recordings, root=path, stride=stride, downbeats=downbeats, min_overlap=min_overlap)
