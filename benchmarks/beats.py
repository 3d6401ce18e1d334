"""How well a tracker finds known beats: on looped recordings, and on rendered drums.

    python benchmarks/beats.py SOUNDBANK [--weights beat_this.ckpt]

SOUNDBANK holds train.csv and val.csv with the columns file_name, bpm, beats: a recording that is a loop of a
whole number of beats is repeated to 20 s, which gives a clip of exactly known tempo whose beats begin at 0 (a
loop is taken to begin on its first beat). Beat F-measure is mir_eval's (70 ms, the first 5 s left out); a
tempo is right within 4 %, and "with octaves" also at 2, 3, 1/2 or 1/3 of it. The last line is a JSON object.
"""

import argparse
import csv
import json
from pathlib import Path

import mir_eval
import numpy as np

from ldm_audio.audio.beats import BEAT_THIS_RATE, Beats, LibrosaTracker, beat_this_network, read_mono
from ldm_audio.audio.io import resample
from ldm_audio.data.synthetic import render_clip, split_combinations

RATE = 22050
SECONDS = 20
TEMPO_TOLERANCE = 0.04
OCTAVES = (1, 2, 3, 1 / 2, 1 / 3)
RENDER_RATE = 16000


def loops(folder: Path) -> list[tuple[str, np.ndarray, np.ndarray, float]]:
    """(name, waveform, beats, tempo) of every loop of a known number of beats, repeated."""
    found = []
    for table in ("train.csv", "val.csv"):
        for row in csv.DictReader((folder / table).open()):
            if not row["bpm"]:
                continue
            once, duration = read_mono(folder / row["file_name"], RATE)
            period = duration / int(row["beats"])
            waveform = np.tile(once, -(-SECONDS * RATE // len(once)))[: SECONDS * RATE]
            found.append((row["file_name"], waveform, np.arange(0, SECONDS, period), 60 / period))
    return found


def rendered() -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray, float]]:
    """(name, waveform, beats, downbeats, tempo) of one clip of every combination of drums."""
    found = []
    for number, row in enumerate(row for row in split_combinations("all") if row["kind"] == "beat"):
        rng = np.random.default_rng(number)
        clip = render_clip(row, rng, sample_rate=RENDER_RATE, num_samples=SECONDS * RENDER_RATE)
        waveform = resample(clip.waveform, RENDER_RATE, RATE)
        name = f"{row['tempo']} {row['metre']} {row['drum']}"
        found.append((name, waveform, np.array(clip.beats), np.array(clip.downbeats), float(row["tempo"])))
    return found


def f_measure(expected: np.ndarray, found: tuple[float, ...]) -> float:
    trimmed = (mir_eval.beat.trim_beats(np.asarray(times)) for times in (expected, found))
    return mir_eval.beat.f_measure(*trimmed)


def tempo_right(expected: float, found: float, factors: tuple[float, ...]) -> bool:
    return any(abs(found - factor * expected) <= TEMPO_TOLERANCE * factor * expected for factor in factors)


def lateness(expected: np.ndarray, found: tuple[float, ...]) -> list[float]:
    """Seconds by which each beat found is late against the nearest one, where that is within 70 ms."""
    late = [time - expected[np.abs(expected - time).argmin()] for time in found]
    return [seconds for seconds in late if abs(seconds) <= 0.07]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("soundbank", type=Path)
    parser.add_argument("--weights")
    args = parser.parse_args()

    def track(waveform: np.ndarray) -> Beats:
        if args.weights is None:
            return LibrosaTracker().track(waveform, SECONDS)
        return Beats(
            *(tuple(t.tolist()) for t in beat_this_network(args.weights)(waveform, BEAT_THIS_RATE)), SECONDS
        )

    scores, exact, octaves = [], [], []
    for name, waveform, beats, tempo in loops(args.soundbank):
        found = track(waveform)
        scores.append(f_measure(beats, found.beats))
        exact.append(tempo_right(tempo, found.tempo, (1,)))
        octaves.append(tempo_right(tempo, found.tempo, OCTAVES))
        print(f"{name:32} {tempo:6.1f} bpm, found {found.tempo:6.1f}; F {scores[-1]:.2f}")
    drums, downs, late, drum_tempo, drum_octave = [], [], [], [], []
    for name, waveform, beats, downbeats, tempo in rendered():
        found = track(waveform)
        drums.append(f_measure(beats, found.beats))
        drum_tempo.append(tempo_right(tempo, found.tempo, (1,)))
        drum_octave.append(tempo_right(tempo, found.tempo, OCTAVES))
        late += lateness(beats, found.beats)
        on_downbeat = [np.abs(downbeats - time).min() <= 0.07 for time in found.downbeats]
        downs.append(float(np.mean(on_downbeat)) if on_downbeat else 0.0)
        print(
            f"{name:32} {tempo:6.1f} bpm, found {found.tempo:6.1f}; F {drums[-1]:.2f}; downs {downs[-1]:.2f}"
        )
    print(
        json.dumps(
            {
                "loops": {
                    "count": len(scores),
                    "beat_f_measure": round(float(np.mean(scores)), 3),
                    "tempo_accuracy": round(float(np.mean(exact)), 3),
                    "tempo_accuracy_with_octaves": round(float(np.mean(octaves)), 3),
                },
                "rendered": {
                    "count": len(drums),
                    "beat_f_measure": round(float(np.mean(drums)), 3),
                    "tempo_accuracy": round(float(np.mean(drum_tempo)), 3),
                    "tempo_accuracy_with_octaves": round(float(np.mean(drum_octave)), 3),
                    "downbeats_on_a_downbeat": round(float(np.mean(downs)), 3),
                    "lateness_ms": round(1000 * float(np.median(late)), 2),
                },
            }
        )
    )


if __name__ == "__main__":
    main()
