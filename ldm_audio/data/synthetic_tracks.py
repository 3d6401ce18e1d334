"""The synthetic world of `synthetic.py` as tracks with exact beats, of which items are cut and mixed.

Axes: s samples.
"""

from collections.abc import Sequence

import numpy as np

from ldm_audio.audio.beats import Beats
from ldm_audio.audio.mixup import Mixup
from ldm_audio.data.clips import peak_half
from ldm_audio.data.loader import ItemKey
from ldm_audio.data.mixing import Mixed, Track, mixed
from ldm_audio.data.synthetic import EDGE, Split, Synthetic


class SyntheticTracks(Synthetic):
    """Synthetic clips that can be mixed: the same combinations as longer tracks, with their exact beats.

    Items hold `waveform` and `caption`. A sound has no beats and is never aligned.
    """

    def __init__(
        self,
        *,
        sample_rate: int,
        num_samples: int,
        track_samples: int,
        size: int,
        seed: int,
        split: Split,
        kinds: Sequence[str],
    ):
        shared = {"sample_rate": sample_rate, "size": size, "seed": seed, "split": split, "kinds": kinds}
        super().__init__(num_samples=num_samples, **shared)
        self.seed = seed
        self.longer = Synthetic(num_samples=track_samples, **shared)

    def __getitem__(self, key: ItemKey | int) -> dict:
        item = super().__getitem__(key)
        return {"waveform": item["waveform"], "caption": item["caption"]}

    def tempos(self) -> list[float]:
        """Beats a minute by index, 0 for a sound."""
        return [float(self.attributes(index).get("tempo", 0)) for index in range(len(self))]

    def track(self, index: int, epoch: int) -> Track:
        clip = self.longer[ItemKey(epoch, index, index)]
        waveform, rate = clip["waveform"].numpy(), self.sample_rate
        beats = Beats(tuple(clip["beats"]), tuple(clip["downbeats"]), len(waveform) / rate)

        def read(start: float, count: int) -> np.ndarray:
            return waveform[round(start * rate) : round(start * rate) + count]

        return Track(beats, clip["caption"], read)

    def level(self, waveform: np.ndarray) -> np.ndarray:
        """A peak of one half, and an end that fades: a hard cut would click."""
        fade = min(round(EDGE * self.sample_rate), len(waveform))
        gain = np.ones(len(waveform), np.float32)
        gain[len(waveform) - fade :] = np.linspace(1.0, 0.0, fade)
        return peak_half(waveform) * gain


def synthetic_tracks(
    *,
    sample_rate: int,
    num_samples: int,
    track_samples: int,
    size: int,
    seed: int,
    split: Split,
    kinds: Sequence[str],
    mixup: Mixup,
) -> SyntheticTracks | Mixed:
    """`SyntheticTracks`, mixed where `mixup` says so."""
    tracks = SyntheticTracks(
        sample_rate=sample_rate,
        num_samples=num_samples,
        track_samples=track_samples,
        size=size,
        seed=seed,
        split=split,
        kinds=kinds,
    )
    return mixed(tracks, mixup)
