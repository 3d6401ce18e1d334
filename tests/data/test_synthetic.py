"""The measurable world: what is rendered is what is measured, and held-out combinations stay out."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_audio.audio.mel import LogMel, mel_filterbank
from ldm_audio.data.measure import NOTHING, band_power, measure, score
from ldm_audio.data.synthetic import (
    ATTRIBUTES,
    BEATS_PER_BAR,
    VALUES,
    Synthetic,
    canonical_caption,
    caption,
    combinations,
    fits,
    pairs,
    render,
    render_clip,
    split_combinations,
)
from ldm_audio.errors import InputError
from ldm_audio.evaluation.attributes import chance

SAMPLE_RATE = 16000
NUM_SAMPLES = 40960


def rendered(repeats, *, seed=0, sample_rate=SAMPLE_RATE, num_samples=NUM_SAMPLES):
    """Every combination `repeats` times: [(attributes, waveform)]."""
    rng = np.random.default_rng(seed)
    return [
        (row, render(row, rng, sample_rate=sample_rate, num_samples=num_samples))
        for _ in range(repeats)
        for row in combinations()
    ]


def some(number):
    """As `rendered`, of that many combinations."""
    clips = rendered(1)
    return [clips[i] for i in np.random.default_rng(9).permutation(len(clips))[:number]]


def accuracy(clips, sample_rate=SAMPLE_RATE):
    """Attribute -> share of the clips that have it."""
    results = defaultdict(list)
    for attributes, waveform in clips:
        for name, right in score(attributes, waveform, sample_rate).items():
            results[name].append(right)
    return {name: np.mean(right) for name, right in results.items()}


def with_noise(waveform, decibels, rng):
    """White noise below the waveform's power."""
    level = np.sqrt((waveform**2).mean()) * 10 ** (-decibels / 20)
    return waveform + (level * rng.standard_normal(len(waveform))).astype(np.float32)


LOG_MEL = LogMel(
    sample_rate=SAMPLE_RATE,
    n_fft=1024,
    hop_length=160,
    win_length=1024,
    n_mels=64,
    fmin=0,
    fmax=8000,
    framing="centered",
)
FILTERBANK = mel_filterbank(
    sample_rate=SAMPLE_RATE, n_fft=1024, n_mels=64, fmin=0, fmax=8000, scale="slaney", norm="slaney"
)


def griffin_lim(waveform, iterations=32):
    """The waveform through its log-mel and back by Griffin-Lim from random phases."""
    mel = LOG_MEL(torch.from_numpy(waveform)[None])[0].exp()  # (f, n)
    inverse = torch.from_numpy(np.linalg.pinv(FILTERBANK)).float()
    magnitude = (inverse @ mel).clamp(min=0)  # (k, n)
    window = torch.hann_window(1024)
    phase = 2 * np.pi * torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(0))
    spectrum = torch.polar(magnitude, phase)
    for step in range(iterations + 1):
        guess = torch.istft(spectrum, 1024, 160, window=window)
        if step < iterations:
            angle = torch.stft(guess, 1024, 160, window=window, return_complex=True).angle()
            spectrum = torch.polar(magnitude, angle)
    return guess.numpy()


def buzz(waveform, rng):
    """What a vocoder of constant period makes of the mel: harmonics of 100 Hz as strong as it says."""
    mel = LOG_MEL(torch.from_numpy(waveform)[None])[0].exp().numpy()  # (f, n)
    area = FILTERBANK.sum(1)
    centers = FILTERBANK @ np.arange(513) / area * SAMPLE_RATE / 1024
    harmonics = np.arange(100, 8000, 100)
    between = np.stack([np.interp(harmonics, centers, one) for one in np.eye(64)], axis=1)
    strength = np.exp(between @ np.log(mel / area[:, None]))  # (harmonics, n)
    audible = strength.max(1) > 1e-3 * strength.max()
    time = np.arange(len(waveform)) / SAMPLE_RATE
    out = np.zeros(len(waveform))
    for frequency, row in zip(harmonics[audible], strength[audible]):
        gain = np.interp(time, np.arange(len(row)) / 100, row)
        out += gain * np.cos((2 * np.pi * ((frequency * time + rng.random()) % 1)).astype(np.float32))
    return with_noise((out / np.abs(out).max() / 2).astype(np.float32), 30, rng)


# --- combinations and captions -----------------------------------------------------------------------------


def test_training_and_held_out_combinations_are_disjoint_and_complete():
    training, held = split_combinations("train"), split_combinations("held_out")
    assert all(row not in training for row in held)
    assert Counter(map(canonical_caption, training + held)) == Counter(map(canonical_caption, combinations()))
    assert split_combinations("val") == training
    assert split_combinations("all") == combinations()
    assert 1 / 5 < len(held) / len(combinations()) < 1 / 3


def test_every_pair_of_values_is_trained():
    trained = set().union(*map(pairs, split_combinations("train")))
    assert set().union(*map(pairs, combinations())) == trained


def test_no_pair_of_values_is_held_out_more_often_than_trained():
    trained, held = (
        Counter(pair for row in split_combinations(split) for pair in pairs(row))
        for split in ("train", "held_out")
    )
    assert held and all(trained[pair] >= held[pair] for pair in held)


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_every_value_is_held_out_somewhere_but_the_low_register(kind):
    """Of each pair with "low" there is one combination, and that one is trained."""
    held = [row for row in split_combinations("held_out") if row["kind"] == kind]
    for name, values in ATTRIBUTES[kind].items():
        assert {row[name] for row in held} == set(values) - {"low"}


def test_held_out_combinations_are_the_same_on_every_machine():
    held = [canonical_caption(row) for row in split_combinations("held_out")]
    assert held[-3:] == [
        "a drum beat at 148 beats per minute in two with claps",
        "a drum beat at 112 beats per minute in three with hi-hats",
        "a drum beat at 137 beats per minute in three with claps",
    ]


def test_no_caption_fits_two_combinations():
    rng = np.random.default_rng(0)
    owner = {}
    for row in combinations():
        for text in [canonical_caption(row), *(caption(row, rng) for _ in range(60))]:
            assert owner.setdefault(text, row) == row, text
    assert len(owner) > 20 * len(combinations())


def test_canonical_captions_read_plainly():
    sound = {"kind": "sound", "register": "high", "texture": "tone", "envelope": "pulse5", "motion": "rising"}
    assert canonical_caption(sound) == "a high rising tone pulsing 5 times a second"
    assert canonical_caption(combinations()[0]) == "a low steady tone"


# --- measuring ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "repeats, seconds, sample_rate", [(2, 2.56, 16000), (1, 10.24, 16000), (1, 2.56, 22050), (1, 2.56, 48000)]
)
def test_rendered_clips_measure_as_rendered(repeats, seconds, sample_rate):
    clips = rendered(repeats, sample_rate=sample_rate, num_samples=round(seconds * sample_rate))
    assert min(accuracy(clips, sample_rate).values()) >= 0.99


@pytest.mark.parametrize(
    "wanted, heard, right",
    [
        ("132", "142", True),
        ("132", "148", False),
        ("173", "160", True),
        ("173", "100", False),
        ("pulse2.5", "pulse3.1", True),
        ("pulse2.5", "pulse3.5", False),
        ("pulse5", "steady", False),
        ("steady", "pulse5", False),
        ("steady", "steady", True),
        ("132", None, False),
    ],
)
def test_numbers_are_right_within_two_steps_and_words_exactly(wanted, heard, right):
    assert fits(wanted, heard) == right


@pytest.mark.parametrize("decibels", [20, 10])
def test_white_noise_leaves_attributes_measurable(decibels):
    rng = np.random.default_rng(1)
    clips = [(row, with_noise(waveform, decibels, rng)) for row, waveform in rendered(1)]
    assert min(accuracy(clips).values()) >= 0.97


def test_level_and_offset_do_not_matter():
    for row, waveform in rendered(1):
        assert measure(0.3 * waveform + 0.2, SAMPLE_RATE) == measure(waveform, SAMPLE_RATE) == row


def test_mel_round_trip_keeps_attributes():
    clips = [(row, griffin_lim(waveform)) for row, waveform in some(24)]
    assert min(accuracy(clips).values()) >= 0.95


def test_buzz_of_a_vocoder_keeps_attributes():
    rng = np.random.default_rng(2)
    clips = [(row, buzz(waveform, rng)) for row, waveform in some(40)]
    assert min(accuracy(clips).values()) >= 0.95


def test_wrong_clips_score_about_chance():
    clips = rendered(1)
    order = np.random.default_rng(3).permutation(len(clips))
    scores = accuracy([(row, clips[other][1]) for (row, _), other in zip(clips, order)])
    floors = chance([row for row, _ in clips], VALUES, fits)
    del floors["overall"]
    assert set(scores) == set(floors)
    for name, floor in floors.items():
        if name != "kind":  # most combinations are sounds
            assert abs(scores[name] - floor) < 0.25, name


@pytest.mark.parametrize("value", [0.0, 1e-6, np.nan, np.inf])
def test_silent_and_broken_clips_have_no_attributes(value):
    waveform = np.full(NUM_SAMPLES, value, np.float32)
    assert measure(waveform, SAMPLE_RATE) == {"kind": NOTHING}
    assert not any(score(combinations()[0], waveform, SAMPLE_RATE).values())


def test_clips_shorter_than_a_frame_are_measured():
    assert measure(np.float32([0.5, 0, -0.5]), SAMPLE_RATE)["kind"] in ATTRIBUTES


def test_measure_refuses_stereo_nothing_and_low_rates():
    with pytest.raises(InputError, match=r"\(2, 40960\)"):
        measure(np.zeros((2, NUM_SAMPLES), np.float32), SAMPLE_RATE)
    with pytest.raises(InputError, match=r"\(0,\)"):
        measure(np.zeros(0, np.float32), SAMPLE_RATE)
    with pytest.raises(InputError, match="8000 Hz"):
        measure(np.zeros(NUM_SAMPLES, np.float32), 8000)


# --- rendering ---------------------------------------------------------------------------------------------


def test_waveforms_keep_clear_of_clipping():
    for _, waveform in rendered(1):
        assert waveform.dtype == np.float32 and waveform.shape == (NUM_SAMPLES,)
        assert 0.39 < np.abs(waveform).max() < 0.61


@pytest.mark.parametrize("register", ATTRIBUTES["sound"]["register"])
def test_a_tone_swings_over_about_six_mel_bands(register):
    row = {"kind": "sound", "register": register, "texture": "tone", "envelope": "steady", "motion": "level"}
    waveform = render(row, np.random.default_rng(4), sample_rate=SAMPLE_RATE, num_samples=NUM_SAMPLES)
    power = band_power(waveform, SAMPLE_RATE).mean(0)
    assert 5 < power.sum() ** 2 / (power**2).sum() < 7


def test_beats_are_where_they_are_said_to_be():
    rng = np.random.default_rng(5)
    for row in combinations():
        waveform, beats, downbeats = render_clip(row, rng, sample_rate=16000, num_samples=NUM_SAMPLES)
        if row["kind"] == "sound":
            assert beats == downbeats == []
            continue
        assert np.allclose(np.diff(beats), 60 / float(row["tempo"]))
        assert len(beats) >= 4 and beats[-1] < 2.56
        places = [beats.index(time) for time in downbeats]
        assert places and set(np.diff(places)) <= {BEATS_PER_BAR[row["metre"]]}
        for time in beats[:-1]:
            start = round(time * 16000)
            assert np.abs(waveform[start - 480 : start - 1]).max() < 0.05 * np.abs(waveform).max()
            assert np.abs(waveform[start : start + 480]).max() > 0.3 * np.abs(waveform).max()


@pytest.mark.parametrize("num_samples", [1, 160, 5120, 10241])
def test_any_length_renders(num_samples):
    for _, waveform in rendered(1, num_samples=num_samples):
        assert waveform.shape == (num_samples,) and np.isfinite(waveform).all()


# --- data set ----------------------------------------------------------------------------------------------


def dataset(**changes):
    arguments = {"sample_rate": 16000, "num_samples": 5120, "size": 40, "seed": 0, "split": "train"}
    return Synthetic(**arguments | changes)


def test_items_depend_on_epoch_and_index_alone():
    data = dataset()
    again = dataset()[1, 3, 99]
    assert torch.equal(data[1, 3, 7]["waveform"], again["waveform"])
    assert not torch.equal(data[2, 3, 7]["waveform"], again["waveform"])
    assert data[2, 3, 7]["caption"] == again["caption"] == data.captions()[3]
    assert json.loads(again["attributes"]) == data.attributes(3)
    assert torch.equal(data[3]["waveform"], data[0, 3, 3]["waveform"])


def test_items_are_complete():
    data = dataset(num_samples=NUM_SAMPLES)
    for index in range(len(data)):
        item = data[index]
        assert item["waveform"].dtype == torch.float32 and item["waveform"].shape == (NUM_SAMPLES,)
        attributes = json.loads(item["attributes"])
        assert item["tempo"] == float(attributes.get("tempo", 0))
        assert bool(item["beats"]) == (attributes["kind"] == "beat")
    assert {json.loads(data[i]["attributes"])["kind"] for i in range(len(data))} == set(ATTRIBUTES)


@pytest.mark.parametrize("split", ["train", "val", "held_out"])
def test_splits_draw_from_their_own_combinations(split):
    data = dataset(split=split, size=300)
    assert all(data.attributes(i) in split_combinations(split) for i in range(300))


def test_validation_has_other_clips_than_training():
    assert dataset(split="val").captions() != dataset(split="train").captions()
    assert dataset(seed=1).captions() != dataset().captions()


def test_kinds_restrict_the_world():
    data = dataset(kinds=["beat"])
    assert {data.attributes(i)["kind"] for i in range(len(data))} == {"beat"}


@pytest.mark.parametrize(
    "changes", [{"split": "test"}, {"kinds": ["song"]}, {"kinds": []}, {"sample_rate": 8000}, {"size": 0}]
)
def test_what_the_world_lacks_is_refused_by_name(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        dataset(**changes)


def test_the_shipped_config_builds_both_splits():
    omegaconf = pytest.importorskip("omegaconf")
    hydra = pytest.importorskip("hydra")
    path = Path(__file__).parents[2] / "configs" / "data" / "synthetic.yaml"
    config = omegaconf.OmegaConf.create(
        {"audio": {"sample_rate": 16000}, "seed": 0, "data": omegaconf.OmegaConf.load(path)}
    )
    for split in ("train", "val"):
        data = hydra.utils.instantiate(config.data[split])
        assert data[0]["waveform"].shape == (163840,)
