"""Beat trackers: what they find in drums, and that they find nothing where there is nothing."""

import numpy as np
import pytest
import torch

from ldm_audio.audio.beats import (
    LIBROSA_RATE,
    BeatFiles,
    Beats,
    BeatThisTracker,
    LibrosaTracker,
    find_bars,
)
from ldm_audio.audio.io import resample, write_wav
from ldm_audio.data.synthetic import render_clip
from ldm_audio.errors import InputError

DRUMS = {"kind": "beat", "tempo": "130", "metre": "two", "drum": "clap"}


def drums(seconds: int = 12, **changes: str):
    rng = np.random.default_rng(3)
    return render_clip(DRUMS | changes, rng, sample_rate=16000, num_samples=16000 * seconds)


def test_the_tempo_counts_periods_and_not_beats():
    assert Beats((1.0, 1.5, 2.0, 2.5), (), 3.0).tempo == 120.0
    assert Beats((1.0,), (1.0,), 3.0).tempo == Beats((), (), 3.0).tempo == 0.0


@pytest.mark.parametrize(
    "times, told",
    [
        ((1.0, 1.0), "ascending"),
        ((2.0, 1.0), "ascending"),
        ((-0.1,), "ascending"),
        ((float("nan"),), "ascending"),
        ((3.2,), r"up to 3\.20 s in 3\.00 s of sound: of another track\?"),
    ],
)
def test_times_that_cannot_be_beats_are_refused(times, told):
    with pytest.raises(InputError, match=told):
        Beats(times, (), 3.0)
    with pytest.raises(InputError, match="downbeats"):
        Beats((), times, 3.0)


def test_librosas_beats_lie_on_those_of_rendered_drums_without_a_bias():
    clip = drums()
    found = LibrosaTracker().track(resample(clip.waveform, 16000, LIBROSA_RATE), 12.0)
    expected = np.array(clip.beats)
    late = np.array([time - expected[np.abs(expected - time).argmin()] for time in found.beats])
    assert len(found.beats) >= len(expected) - 2
    assert np.abs(late).max() < 0.03 and abs(np.median(late)) < 0.005
    assert found.tempo == pytest.approx(130.0, abs=1.0)
    # bars of four by the rule: a downbeat of these bars of two begins each
    downbeats = np.array(clip.downbeats)
    assert found.downbeats and all(np.abs(downbeats - time).min() < 0.03 for time in found.downbeats)


@pytest.mark.parametrize("kind", ["silence", "noise", "hum", "short", "empty"])
def test_librosa_finds_no_beats_where_there_are_none(kind):
    seconds = np.arange(8 * LIBROSA_RATE) / LIBROSA_RATE
    waveform = {
        "silence": np.zeros_like(seconds),
        "noise": 0.1 * np.random.default_rng(0).standard_normal(len(seconds)),
        "hum": 0.3 * np.sin(2 * np.pi * 110 * seconds)
        + 0.01 * np.random.default_rng(1).standard_normal(len(seconds)),
        "short": np.ones(100),
        "empty": np.zeros(0),
    }[kind].astype(np.float32)
    found = LibrosaTracker().track(waveform, len(waveform) / LIBROSA_RATE)
    assert found.beats == found.downbeats == ()


def test_the_bar_begins_at_the_beats_that_rise_most_in_the_bass():
    low = np.zeros(100)
    frames = np.arange(5, 95, 8)
    low[frames] = 1.0
    low[frames[2::3] + 1] = 4.0  # a frame late still counts
    assert find_bars(low, frames, (4, 3)) == (2, 3)
    low[frames[1::2]] = 9.0
    assert find_bars(low, frames, (4, 3)) == (1, 4)  # a bar of two is half of one of four


def test_beats_of_other_programs_are_read(tmp_path):
    (tmp_path / "music").mkdir()
    for name in ("a", "b"):
        write_wav(tmp_path / "music" / f"{name}.wav", np.zeros(16000 * 3), 16000)
    (tmp_path / "found" / "music").mkdir(parents=True)
    (tmp_path / "found" / "music" / "a.beats").write_text("0.5\t3\n1.0\t1\n1.5\t2\n")
    np.save(tmp_path / "found" / "b_beat_pred.npy", np.array([0.25, 0.75]))
    np.save(tmp_path / "found" / "b_downbeat_pred.npy", np.array([0.75]))
    tracker = BeatFiles(folder=str(tmp_path / "found"), root=str(tmp_path))
    assert tracker(tmp_path / "music" / "a.wav") == Beats((0.5, 1.0, 1.5), (1.0,), 3.0)
    assert tracker(tmp_path / "music" / "b.wav") == Beats((0.25, 0.75), (0.75,), 3.0)


def test_beats_of_another_track_or_form_are_refused_by_name(tmp_path):
    write_wav(tmp_path / "a.wav", np.zeros(16000), 16000)
    tracker = BeatFiles(folder=str(tmp_path), root=str(tmp_path))
    with pytest.raises(InputError, match=r"a\.wav: neither a\.beats nor a_beat_pred\.npy"):
        tracker(tmp_path / "a.wav")
    np.save(tmp_path / "a_beat_pred.npy", np.array([0.5, 31.0]))
    with pytest.raises(InputError, match=r"a_downbeat_pred\.npy: no such file"):
        tracker(tmp_path / "a.wav")
    np.save(tmp_path / "a_downbeat_pred.npy", np.array([0.5]))
    with pytest.raises(InputError, match=r"a_beat_pred\.npy: beats up to 31\.00 s in 1\.00 s.*another track"):
        tracker(tmp_path / "a.wav")
    (tmp_path / "a_beat_pred.npy").write_bytes(b"no array")
    with pytest.raises(InputError, match=r"a_beat_pred\.npy: expected an array of seconds"):
        tracker(tmp_path / "a.wav")
    (tmp_path / "a.beats").write_text("0.5\t1\nsoon\n")
    with pytest.raises(InputError, match=r"a\.beats: line 2: expected seconds and beat number"):
        tracker(tmp_path / "a.wav")


def test_beat_this_runs_from_a_local_checkpoint_and_downloads_nothing(tmp_path, monkeypatch):
    """A small network with random weights in the layout of the released checkpoints."""
    from beat_this.model.beat_tracker import BeatThis

    def refuse(*arguments, **settings):
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    torch.manual_seed(0)
    sizes = {"spect_dim": 128, "transformer_dim": 32, "n_layers": 1, "head_dim": 16, "stem_dim": 16}
    state = {f"model.{name}": tensor for name, tensor in BeatThis(**sizes).state_dict().items()}
    weights = tmp_path / "toy.ckpt"
    torch.save({"hyper_parameters": sizes | {"lr": 0.1}, "state_dict": state}, weights)
    write_wav(tmp_path / "a.wav", drums(4).waveform, 16000)
    write_wav(tmp_path / "short.wav", np.zeros(100), 16000)

    tracker = BeatThisTracker(weights=str(weights))
    found = tracker(tmp_path / "a.wav")
    assert set(found.downbeats) <= set(found.beats) and found.duration == 4.0
    assert tracker(tmp_path / "short.wav").beats == ()
    assert tracker.version.startswith("1.") and len(tracker.version.split()[1]) == 16
    with pytest.raises(InputError, match=r"weights=final0: no such file"):
        _ = BeatThisTracker(weights="final0").version
    weights.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"toy2?\.ckpt: not a checkpoint of beat_this"):
        BeatThisTracker(weights=str(weights.rename(tmp_path / "toy2.ckpt")))(tmp_path / "a.wav")
