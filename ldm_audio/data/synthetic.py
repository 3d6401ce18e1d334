"""Captioned sounds whose attributes can be measured back from the waveform (see `measure.py`).

A small world of two kinds of clips that needs no download and no learned judge. A *sound* is one tone with a
fast vibrato or one band of noise in one of three registers, steady, pulsing or fading, level or gliding; a
*beat* is a drum-like pulse train whose beats and downbeats are known exactly. `ATTRIBUTES` is the whole
table. A clip's attributes say what is fixed; everything else (exact frequency and width, phases, lengths,
decay, level) is drawn.

Tempo and pulse rate are numbers on a fine scale, so that there are many more combinations than a model can
learn one by one: with three tempos and two rates, CLAP and UNet took an unseen combination for a trained one
that differs in the attribute learnt last. A number counts as heard within two steps, see `fits`.

The world keeps clear of what a small vocoder with a hop of 10 ms blurs. It answers a constant mel with the
harmonics of 100 Hz, and a log-mel distance lets it keep silent about what is narrower than a few mel bands:
so a tone swings over about six, noise fills a whole register, there is none in the low one, pulses leave gaps
of at least 75 ms, and the registers do not touch (up to 510 Hz, 690 to 2400 Hz, 2.8 to 7.7 kHz). Any length
renders; the slowest metre can be heard in 2.5 s.

Axes: s samples.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations as choose
from itertools import permutations, product
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch

from ldm_audio.data.loader import ItemKey
from ldm_audio.errors import InputError

Attributes = dict[str, str]  # "kind" and, in the order of the table, that kind's attributes
Split = Literal["train", "val", "held_out", "all"]
T = TypeVar("T")

PULSE_RATES = {f"pulse{rate:g}": rate for rate in (2, 2.2, 2.5, 2.8, 3.1, 3.5, 4, 4.5, 5)}  # Hz
TEMPOS = tuple(str(round(100 * 1.04**step)) for step in range(15))  # beats a minute
ATTRIBUTES: dict[str, dict[str, tuple[str, ...]]] = {
    "sound": {
        "register": ("low", "middle", "high"),
        "texture": ("tone", "noise"),
        "envelope": ("steady", *PULSE_RATES, "fade"),
        "motion": ("level", "rising", "falling"),
    },
    "beat": {
        "tempo": TEMPOS,  # no bar of one lasts as long as a beat of another
        "metre": ("two", "three"),  # beats from one downbeat to the next
        "drum": ("clap", "hat"),  # what sounds on the other beats
    },
}
VALUES = {"kind": tuple(ATTRIBUTES)} | {n: v for table in ATTRIBUTES.values() for n, v in table.items()}
SCALES = (TEMPOS, tuple(PULSE_RATES))  # of numbers, in steps of about 4 % and about 12 %
STEPS_OFF = 2  # on its scale a number that is heard may be
BEATS_PER_BAR = {"two": 2, "three": 3}
SPLITS: tuple[Split, ...] = ("train", "val", "held_out", "all")
HELD_OUT_FRACTION = 0.25
MIN_SAMPLE_RATE = 16000
BACKGROUND = 2e-3  # white noise about 48 dB below the peak: recordings have some, digital silence is odd
EDGE = 0.03  # seconds over which a clip fades in and out
VIBRATO = 0.13  # of the frequency to each side, of `VIBRATO_FROM` below that: three mel bands
VIBRATO_FROM = 950.0  # Hz


# --- combinations ------------------------------------------------------------------------------------------


def combinations() -> list[Attributes]:
    """Every valid combination, kind after kind; low sounds are level tones, and noise does not glide."""
    every = [
        {"kind": kind, **dict(zip(table, values))}
        for kind, table in ATTRIBUTES.items()
        for values in product(*table.values())
    ]
    return [row for row in every if row["kind"] == "beat" or _is_valid(row)]


def _is_valid(sound: Attributes) -> bool:
    if sound["texture"] == "noise":
        return sound["register"] != "low" and sound["motion"] == "level"
    return sound["register"] != "low" or sound["motion"] == "level"


def pairs(attributes: Attributes) -> set[tuple[tuple[str, str], ...]]:
    """All pairs of (attribute, value) that occur together in `attributes`."""
    return set(choose(attributes.items(), 2))


@lru_cache(maxsize=1)
def _split_combinations() -> tuple[list[Attributes], list[Attributes]]:
    """(training, held out). Of each kind `HELD_OUT_FRACTION` is held out, one combination after the other: of
    those without which every pair of values is still trained, the one whose pairs were held out least so
    far, lest one value foretell another in training; a hash, the same on every machine, decides between
    equals."""
    training = combinations()
    held: list[Attributes] = []
    left = Counter(pair for row in training for pair in pairs(row))
    out: Counter = Counter()

    def held_share(row: Attributes) -> float:
        """The share of each pair of values that would be held out, squared and summed."""
        shares = [((out[pair] + 1) / (out[pair] + left[pair])) ** 2 for pair in pairs(row)]
        return math.fsum(shares)  # the same in any order

    def tie(row: Attributes) -> str:
        return hashlib.blake2b(json.dumps(row).encode(), digest_size=8).hexdigest()

    for kind in ATTRIBUTES:
        rows = [row for row in training if row["kind"] == kind]
        for _ in range(round(HELD_OUT_FRACTION * len(rows))):
            spare = [row for row in rows if row not in held and all(left[pair] > 1 for pair in pairs(row))]
            chosen = min(spare, key=lambda row: (held_share(row), tie(row)))
            training.remove(chosen)
            held.append(chosen)
            left.subtract(pairs(chosen))
            out.update(pairs(chosen))
    return training, held


def fits(wanted: str, heard: str | None) -> bool:
    """Whether a measured value counts as the one asked for: of numbers one within `STEPS_OFF` steps (a tempo
    within 8 %, a pulse rate within about a quarter), else the same. None, what was not measured, never."""
    for scale in SCALES:
        if wanted in scale and heard in scale:
            return abs(scale.index(wanted) - scale.index(heard)) <= STEPS_OFF
    return wanted == heard


def split_combinations(split: Split) -> list[Attributes]:
    """The combinations of a split: `train` and `val` share theirs, `held_out` has the rest, `all` both."""
    if split not in SPLITS:
        raise InputError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
    training, held = _split_combinations()
    rows = combinations() if split == "all" else held if split == "held_out" else training
    return [dict(row) for row in rows]


# --- captions ----------------------------------------------------------------------------------------------

REGISTER_WORDS = {
    "low": ("low", "deep", "low-pitched"),
    "middle": ("middle", "mid-range", "medium-pitched"),
    "high": ("high", "high-pitched", "treble"),
}
TEXTURE_NOUNS = {"tone": ("a tone", "a note"), "noise": ("noise", "a hiss", "static")}
# Each an adjective before the noun, or (participle, finite verb) after it.
ENVELOPE_ADJECTIVES = {"steady": ("steady", "constant", "continuous"), "fade": ("fading", "decaying")}
ENVELOPE_VERBS = {
    "steady": (
        ("holding an even volume", "holds an even volume"),
        ("going on without a break", "goes on without a break"),
    ),
    "fade": (("fading away", "fades away"), ("dying out", "dies out")),
    **{
        name: tuple(
            (f"{participle} {rate:g} times a second", f"{verb} {rate:g} times a second")
            for participle, verb in (
                ("pulsing", "pulses"),
                ("beating", "beats"),
                ("switching on and off", "switches on and off"),
            )
        )
        for name, rate in PULSE_RATES.items()
    },
}
MOTION_ADJECTIVES = {"level": ("", "level"), "rising": ("rising",), "falling": ("falling",)}
MOTION_VERBS = {
    "level": (("holding its pitch", "holds its pitch"),),
    "rising": (("rising in pitch", "rises in pitch"), ("gliding upwards", "glides upwards")),
    "falling": (("falling in pitch", "falls in pitch"), ("gliding downwards", "glides downwards")),
}
BEAT_NOUNS = ("a drum beat", "a drum pattern", "drums", "a kick drum")
TEMPO_CLAUSES = ("at {} beats per minute", "at {} bpm", "with a tempo of {} bpm")
METRE_CLAUSES = {
    "two": ("in two", "in duple metre", "with two beats to the bar"),
    "three": ("in three", "in waltz time", "with three beats to the bar"),
}
DRUM_CLAUSES = {
    "clap": ("with claps", "with hand claps between the kicks", "with clapping"),
    "hat": ("with hi-hats", "with hi-hats between the kicks", "with a bright hi-hat"),
}


def _pick(rng: np.random.Generator | None, options: Sequence[T]) -> T:
    """One of the options; the first without a generator."""
    return options[0] if rng is None else options[int(rng.integers(len(options)))]


def caption(attributes: Attributes, rng: np.random.Generator | None) -> str:
    """A phrase that names every attribute, its words and their order drawn from `rng`; a sound of which no
    motion is said is level."""
    return (_beat_caption if attributes["kind"] == "beat" else _sound_caption)(attributes, rng)


def canonical_caption(attributes: Attributes) -> str:
    """The one plain caption of a combination, such as "a high rising tone pulsing 5 times a second"."""
    return caption(attributes, None)


def _sound_caption(attributes: Attributes, rng: np.random.Generator | None) -> str:
    adjectives = [_pick(rng, REGISTER_WORDS[attributes["register"]])]
    verbs = []
    for value, before, after in (
        (attributes["envelope"], ENVELOPE_ADJECTIVES, ENVELOPE_VERBS),
        (attributes["motion"], MOTION_ADJECTIVES, MOTION_VERBS),
    ):
        if value in before and _pick(rng, (True, False)):
            adjectives.append(_pick(rng, before[value]))
        else:
            verbs.append(_pick(rng, after[value]))

    article, _, noun = _pick(rng, TEXTURE_NOUNS[attributes["texture"]]).rpartition(" ")
    words = [article, *_pick(rng, list(permutations(adjectives))), noun]
    if len(verbs) == 2:
        (first, first_verb), (second, second_verb) = _pick(rng, list(permutations(verbs)))
        patterns = (f"{first} and {second}", f"that {first_verb} and {second_verb}")
        words.append(_pick(rng, (*patterns, f"{first} while {second}", f"that {first_verb} while {second}")))
    elif verbs:
        participle, verb = verbs[0]
        words.append(_pick(rng, (participle, f"that {verb}")))
    return " ".join(word for word in words if word)


def _beat_caption(attributes: Attributes, rng: np.random.Generator | None) -> str:
    clauses = (
        _pick(rng, TEMPO_CLAUSES).format(attributes["tempo"]),
        _pick(rng, METRE_CLAUSES[attributes["metre"]]),
        _pick(rng, DRUM_CLAUSES[attributes["drum"]]),
    )
    ordered = _pick(rng, list(permutations(clauses)))
    return f"{_pick(rng, BEAT_NOUNS)} {_pick(rng, (' ', ', ')).join(ordered)}"


# --- rendering ---------------------------------------------------------------------------------------------


class Clip(NamedTuple):
    """A rendered waveform with the times of its beats; both lists are empty for a sound."""

    waveform: np.ndarray  # float32 (s,)
    beats: list[float]  # seconds, ascending
    downbeats: list[float]  # seconds, a subset of the beats


def render(
    attributes: Attributes, rng: np.random.Generator, *, sample_rate: int, num_samples: int
) -> np.ndarray:
    """float32 (num_samples,) waveform with these attributes and a peak of 0.4 to 0.6.

    Raises InputError for a sample rate below `MIN_SAMPLE_RATE`.
    """
    return render_clip(attributes, rng, sample_rate=sample_rate, num_samples=num_samples).waveform


def render_clip(
    attributes: Attributes, rng: np.random.Generator, *, sample_rate: int, num_samples: int
) -> Clip:
    """As `render`, with the beats."""
    if sample_rate < MIN_SAMPLE_RATE:
        raise InputError(f"sample_rate={sample_rate}: synthetic clips need at least {MIN_SAMPLE_RATE} Hz")
    clip = (_render_beat if attributes["kind"] == "beat" else _render_sound)(
        attributes, rng, sample_rate, num_samples
    )
    waveform = clip.waveform * _edges(sample_rate, num_samples)
    waveform *= rng.uniform(0.4, 0.6) / max(float(np.abs(waveform).max()), 1e-9)
    waveform += BACKGROUND * rng.standard_normal(num_samples, dtype=np.float32)
    return clip._replace(waveform=waveform.astype(np.float32))


@lru_cache(maxsize=8)
def _edges(sample_rate: int, num_samples: int) -> np.ndarray:
    """float32 (s,) gain that fades in and out: a clip cut hard would click where its mel reflects it."""
    size = min(int(EDGE * sample_rate), num_samples // 2)
    ramp = (np.sin(0.5 * np.pi * np.arange(size) / max(size, 1)) ** 2).astype(np.float32)
    gain = np.ones(num_samples, np.float32)
    gain[:size], gain[num_samples - size :] = ramp, ramp[::-1]
    return gain


def _cos(cycles: np.ndarray) -> np.ndarray:
    """Cosine of a phase in cycles; wrapped first, for float32 cosines are fast but lose large phases."""
    return np.cos((2 * np.pi * (cycles - np.floor(cycles))).astype(np.float32))


def _render_sound(
    attributes: Attributes, rng: np.random.Generator, sample_rate: int, num_samples: int
) -> Clip:
    duration = num_samples / sample_rate
    time = np.arange(num_samples) / sample_rate
    if attributes["texture"] == "noise":
        waveform = _noise_band(attributes["register"], rng, sample_rate, num_samples)
    else:
        start, end = _frequencies(attributes, rng)
        frequency = start * (end / start) ** (time / duration)  # from start to end evenly in octaves
        swing = rng.uniform(35, 45) * time + rng.random()  # in cycles
        swing = 4 * np.abs(swing - np.round(swing)) - 1  # a triangle from -1 to 1: no frequency is dwelt upon
        frequency += VIBRATO * np.maximum(frequency, VIBRATO_FROM) * swing
        waveform = _cos(np.cumsum(frequency) / sample_rate + rng.random())
    return Clip(waveform * _gain(attributes["envelope"], rng, time, duration), [], [])


def _frequencies(attributes: Attributes, rng: np.random.Generator) -> tuple[float, float]:
    """(frequency at the start, at the end) of a tone in Hz."""
    if attributes["register"] == "low":
        center = rng.uniform(230, 380)
        return center, center
    bottom, top = {
        "middle": ((880, 950), (1850, 2000)),
        "high": ((3350, 3550), (6300, 6550)),
    }[attributes["register"]]
    low, high = rng.uniform(*bottom), rng.uniform(*top)
    if attributes["motion"] == "level":
        center = low * (high / low) ** rng.random()
        return center, center
    return (low, high) if attributes["motion"] == "rising" else (high, low)


def _noise_band(register: str, rng: np.random.Generator, sample_rate: int, num_samples: int) -> np.ndarray:
    """float32 (s,) flat Gaussian noise over most of a register."""
    bottom, top = {
        "middle": ((690, 740), (2250, 2400)),
        "high": ((2800, 2950), (7400, 7700)),
    }[register]
    edges = np.array([rng.uniform(*bottom), rng.uniform(*top)]) * num_samples / sample_rate
    start, stop = edges.astype(int)
    stop = max(stop, start + 1)
    spectrum = np.zeros(num_samples // 2 + 1, np.complex64)
    values = rng.standard_normal((2, stop - start), dtype=np.float32)
    spectrum[start:stop] = values[0] + 1j * values[1]
    return np.fft.irfft(spectrum, num_samples)


def _gain(envelope: str, rng: np.random.Generator, time: np.ndarray, duration: float) -> np.ndarray | float:
    """(s,) gain from 0 to 1, float32."""
    if envelope == "steady":
        return 1.0
    if envelope == "fade":
        hold, drop = rng.uniform(0, 0.15), rng.uniform(28, 36)  # share of the clip, dB
        decibels = -drop / (1 - hold) * np.maximum(time / duration - hold, 0).astype(np.float32)
        return np.exp(decibels * np.float32(np.log(10) / 20))
    rate, on = PULSE_RATES[envelope], rng.uniform(0.4, 0.55)  # Hz, share of a period
    ramp = 0.015  # seconds from off to on
    gate = (_cos(rate * time + rng.random()) - np.cos(np.pi * on)) / (2 * np.pi * rate * ramp)
    gate = np.clip(gate + 0.5, 0, 1)
    return gate * gate * (3 - 2 * gate)


def _render_beat(
    attributes: Attributes, rng: np.random.Generator, sample_rate: int, num_samples: int
) -> Clip:
    period = 60.0 / float(attributes["tempo"])
    per_bar = BEATS_PER_BAR[attributes["metre"]]
    first = rng.uniform(0.03, 0.2)  # the clip begins shortly before a bar
    times = np.arange(first, num_samples / sample_rate, period)

    drums = {True: _kick(rng, sample_rate), False: _tick(attributes["drum"], rng, sample_rate)}
    waveform = np.zeros(num_samples, np.float32)
    for index, beat in enumerate(times):
        begin = round(beat * sample_rate)
        piece = drums[index % per_bar == 0][: num_samples - begin]
        waveform[begin : begin + len(piece)] += piece
    return Clip(waveform, times.tolist(), times[::per_bar].tolist())


def _kick(rng: np.random.Generator, sample_rate: int) -> np.ndarray:
    """A thump that starts an octave or so higher than it ends."""
    time = np.arange(int(0.3 * sample_rate)) / sample_rate
    cycles = rng.uniform(80, 110) * time + rng.uniform(1, 2) * -np.expm1(-time / 0.02)
    return _struck(_cos(cycles - 0.25), time, decay=rng.uniform(0.05, 0.07))


def _tick(drum: str, rng: np.random.Generator, sample_rate: int) -> np.ndarray:
    """A burst of noise, in the middle register for a clap and in the high one for a hat."""
    low, high = (800, 2000) if drum == "clap" else (4000, 7500)
    size = int(0.2 * sample_rate)
    frequency = np.fft.rfftfreq(size, 1 / sample_rate)
    spectrum = np.fft.rfft(rng.standard_normal(size)) * ((frequency > low) & (frequency < high))
    burst = _struck(np.fft.irfft(spectrum, size), np.arange(size) / sample_rate, rng.uniform(0.035, 0.05))
    return burst / np.abs(burst).max() * rng.uniform(0.8, 1.0)


def _struck(waveform: np.ndarray, time: np.ndarray, decay: float) -> np.ndarray:
    """The waveform under a 2 ms attack and an exponential decay (seconds to 1 / e) that ends in silence."""
    return waveform * np.minimum(time / 0.002, 1) * np.exp(-time / decay) * (1 - time / time[-1])


# --- data set ----------------------------------------------------------------------------------------------


class Synthetic:
    """`size` clips of a split, each combination equally often, or twice as often if its kind is named twice.

    The index fixes attributes and caption, the epoch varies how they sound.

    Items hold `waveform` float32 (s,), `caption`, `attributes` (a JSON object as a string), `beats` and
    `downbeats` (lists of seconds) and `tempo` (beats a minute; 0 and empty lists for a sound).

    Raises InputError for a split, a kind or a sample rate that the world does not have.
    """

    def __init__(
        self,
        *,
        sample_rate: int,
        num_samples: int,
        size: int,
        seed: int,
        split: Split,
        kinds: Sequence[str] = tuple(ATTRIBUTES),
    ):
        if not kinds or not set(kinds) <= set(ATTRIBUTES):
            raise InputError(f"kinds={list(kinds)}: expected some of {', '.join(ATTRIBUTES)}")
        if sample_rate < MIN_SAMPLE_RATE:
            raise InputError(f"sample_rate={sample_rate}: synthetic clips need at least {MIN_SAMPLE_RATE} Hz")
        if min(size, num_samples) < 1 or seed < 0:
            raise InputError(
                f"size={size} num_samples={num_samples} seed={seed}: expected at least 1, 1 and 0"
            )
        rows = split_combinations(split)
        self.sample_rate = sample_rate
        self.num_samples = num_samples
        self.size = size
        self.key = (seed, SPLITS.index(split))
        self.rows = [row for kind in kinds for row in rows if row["kind"] == kind]

    def __len__(self) -> int:
        return self.size

    def attributes(self, index: int) -> Attributes:
        """The attributes of clip `index`."""
        return self._describe(index)[0]

    def captions(self) -> list[str]:
        """The caption of every clip."""
        return [self._describe(index)[1] for index in range(self.size)]

    def __getitem__(self, key: ItemKey | int) -> dict:
        epoch, index, _ = (0, key, key) if isinstance(key, int) else key
        attributes, text = self._describe(index)
        rng = np.random.default_rng([*self.key, 1, epoch, index])
        clip = render_clip(attributes, rng, sample_rate=self.sample_rate, num_samples=self.num_samples)
        return {
            "waveform": torch.from_numpy(clip.waveform),
            "caption": text,
            "attributes": json.dumps(attributes),
            "beats": clip.beats,
            "downbeats": clip.downbeats,
            "tempo": float(attributes.get("tempo", 0)),
        }

    def _describe(self, index: int) -> tuple[Attributes, str]:
        if not 0 <= index < self.size:
            raise IndexError(f"clip {index} of {self.size}")
        rng = np.random.default_rng([*self.key, 0, index])
        attributes = _pick(rng, self.rows)
        return dict(attributes), caption(attributes, rng)
