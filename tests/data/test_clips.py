"""Recordings as items: length, level, crops, captions, determinism, broken files, and real recordings."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from ldm_audio.audio.io import probe, read_audio, write_wav
from ldm_audio.data.clips import CROP_TRIES, Clips, audiocaps, folder, peak_half
from ldm_audio.data.loader import ItemKey, StepBatches, make_loader
from ldm_audio.data.manifest import Clip
from ldm_audio.errors import InputError

DATA = os.environ.get("LDM_AUDIO_DATA")
real_data = pytest.mark.skipif(DATA is None, reason="LDM_AUDIO_DATA is unset: no real recordings")
CONFIGS = Path(__file__).parents[2] / "configs" / "data"


def clips_of(*paths: Path, captions: tuple[str, ...] = ("a sound",), **changes) -> Clips:
    settings = {
        "sample_rate": 8000,
        "num_samples": 800,
        "seed": 0,
        "normalise": "none",
        "random_crop": True,
        "caption": "random",
        "channel": "mix",
    }
    return Clips([Clip(path, captions, probe(path)) for path in paths], **(settings | changes))


def ramp(path: Path, num_samples: int, sample_rate: int = 8000) -> Path:
    """A file whose sample i is i / num_samples: a crop says where it was taken."""
    write_wav(path, np.arange(num_samples) / num_samples, sample_rate, subtype="FLOAT")
    return path


def test_a_short_recording_is_padded_on_the_right_and_a_long_one_cut(tmp_path):
    short, long = ramp(tmp_path / "short.wav", 300), ramp(tmp_path / "long.wav", 4000)
    data = clips_of(short, long)
    item = data[0]
    assert set(item) == {"waveform", "caption", "file_name"} and item["file_name"] == str(short)
    assert item["waveform"].dtype == torch.float32 and item["waveform"].shape == (800,)
    assert torch.equal(item["waveform"][:300], torch.arange(300) / 300) and not item["waveform"][300:].any()
    crop = data[1]["waveform"]
    start = round(crop[0].item() * 4000)
    assert torch.allclose(crop, torch.arange(start, start + 800) / 4000)


def test_without_random_crop_a_recording_starts_at_its_beginning(tmp_path):
    path = ramp(tmp_path / "a.wav", 4000)
    assert clips_of(path, random_crop=False)[ItemKey(7, 0, 9)]["waveform"][0] == 0


def test_crops_reach_both_ends(tmp_path):
    data = clips_of(ramp(tmp_path / "a.wav", 803))
    starts = {round(data[ItemKey(epoch, 0, 0)]["waveform"][0].item() * 803) for epoch in range(40)}
    assert starts == {0, 1, 2, 3}


def test_an_item_depends_on_seed_epoch_and_index_alone(tmp_path):
    path = ramp(tmp_path / "a.wav", 8000)
    first, again = clips_of(path, path), clips_of(path, path)
    item = first[ItemKey(3, 1, 7)]
    first[0]
    for same in (first[ItemKey(3, 1, 99)], again[ItemKey(3, 1, 7)]):
        assert torch.equal(item["waveform"], same["waveform"])
    others = [
        again[ItemKey(4, 1, 7)],
        again[ItemKey(3, 0, 7)],
        clips_of(path, path, seed=1)[ItemKey(3, 1, 7)],
    ]
    assert all(not torch.equal(item["waveform"], other["waveform"]) for other in others)
    assert torch.equal(again[1]["waveform"], again[ItemKey(0, 1, 1)]["waveform"])


def test_captions_are_drawn_or_the_first(tmp_path):
    path, captions = ramp(tmp_path / "a.wav", 100), ("one", "two", "three")
    drawn = clips_of(path, captions=captions)
    assert {drawn[ItemKey(epoch, 0, 0)]["caption"] for epoch in range(40)} == set(captions)
    first = clips_of(path, captions=captions, caption="first")
    assert {first[ItemKey(epoch, 0, 0)]["caption"] for epoch in range(10)} == {"one"}
    assert first.captions() == list(captions)
    assert clips_of(path, path, captions=captions).describe() == "2 clips, 6 captions, 0.00 hours"


def test_channels_are_mixed_or_the_first_is_taken(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.tile([[0.5, -0.25]], (900, 1)), 8000)
    assert torch.allclose(clips_of(tmp_path / "a.wav")[0]["waveform"], torch.tensor(0.125), atol=1e-4)
    left = clips_of(tmp_path / "a.wav", channel="first")[0]["waveform"]
    assert torch.allclose(left, torch.tensor(0.5), atol=1e-4)


def test_the_level_becomes_one_half_without_mean_and_silence_stays_silent():
    wave = peak_half((0.01 * np.sin(np.arange(1000)) + 0.3).astype(np.float32))
    assert (
        wave.dtype == np.float32
        and np.abs(wave).max() == pytest.approx(0.5, abs=1e-4)
        and abs(wave.mean()) < 1e-6
    )
    for constant in (0.0, 0.3):
        assert np.abs(peak_half(np.full(100001, constant, dtype=np.float32))).max() < 1e-6


def test_silent_crops_are_drawn_again_and_a_silent_file_stays_finite(tmp_path, monkeypatch):
    mostly_silent = np.zeros(8000)
    mostly_silent[2000:4000] = 0.5
    write_wav(tmp_path / "a.wav", mostly_silent, 8000)
    data = clips_of(tmp_path / "a.wav")
    heard = [data[ItemKey(epoch, 0, 0)]["waveform"].any().item() for epoch in range(100)]
    assert np.mean(heard) > 0.9  # a single draw hears something in 39 of 100
    write_wav(tmp_path / "silent.wav", np.zeros(8000), 8000)
    silent, reads = clips_of(tmp_path / "silent.wav", normalise="peak_half"), []
    monkeypatch.setattr(
        "ldm_audio.data.clips.read_audio", lambda *args, **kw: (reads.append(kw), read_audio(*args, **kw))[1]
    )
    assert torch.equal(silent[0]["waveform"], torch.zeros(800)) and len(reads) == CROP_TRIES


def test_only_the_window_is_read_and_any_rate_gives_the_length(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "ldm_audio.data.clips.read_audio", lambda *args, **kw: (asked.append(kw), read_audio(*args, **kw))[1]
    )
    for rate, window in ((44100, 4410), (192000, 19200), (11025, 1103), (4000, 400)):
        path = tmp_path / f"{rate}.wav"
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, rate)
        write_wav(path, noise, rate)
        waveform = clips_of(path)[0]["waveform"]
        assert waveform.shape == (800,) and waveform[-1] != 0
        assert asked[-1]["num_samples"] == window


def test_a_file_broken_since_the_start_is_named(tmp_path):
    path = ramp(tmp_path / "a.wav", 4000)
    data = clips_of(path)
    for damage in (
        lambda: soundfile.write(path, np.full(4000, np.nan), 8000, subtype="FLOAT"),
        lambda: path.write_text("no sound"),
        lambda: path.unlink(),
    ):
        damage()
        with pytest.raises(InputError, match=r"a\.wav: ") as caught:
            data[0]
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"normalise": "peak"}, "normalise='peak': expected peak_half or none"),
        ({"caption": "all"}, "caption='all': expected random or first"),
        ({"channel": "left"}, "channel='left': expected mix or first"),
        ({"num_samples": 0}, "num_samples=0: expected 1 or more"),
        ({"seed": -1}, "seed=-1: expected 0 or more"),
    ],
)
def test_wrong_values_are_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        clips_of(ramp(tmp_path / "a.wav", 100), **changes)


@pytest.mark.parametrize("name,target", [("folder", folder), ("audiocaps", audiocaps)])
def test_the_configs_compose_and_build(tmp_path, name, target):
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    ramp(tmp_path / "id_30.wav", 100)
    (tmp_path / "train.csv").write_text(
        "file_name,audiocap_id,youtube_id,start_time,caption\nid_30.wav,1,id,30,x\n"
    )
    (tmp_path / "val.csv").write_text((tmp_path / "train.csv").read_text())
    group = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    roots = (
        {"path": str(tmp_path)}
        if name == "folder"
        else {"csv_root": str(tmp_path), "audio_root": str(tmp_path)}
    )
    assert all(group[key] == "???" for key in roots)
    cfg = OmegaConf.create(
        {
            "audio": {"sample_rate": 16000},
            "seed": 3,
            "folder": str(tmp_path),
            "data": group | roots,
            "mixup": None,
        }
    )
    train, val = instantiate(cfg.data.train), instantiate(cfg.data.val)
    assert group["train"]["_target_"] == f"{target.__module__}.{target.__name__}"
    assert (train.num_samples, train.sample_rate, train.seed) == (163840, 16000, 3)
    assert train.random_crop and train.caption == "random" and not val.random_crop and val.caption == "first"
    assert train[0]["waveform"].shape == (163840,)
    assert name == "folder" or (tmp_path / "audiocaps_train.json").exists()


@real_data
@pytest.mark.parametrize("sample_rate,seconds", [(16000, 1.28), (48000, 10.24)])
def test_every_real_recording_gives_a_finite_item_of_the_exact_length(sample_rate, seconds):
    num_samples, seen = round(sample_rate * seconds), 0
    for csv in ("train.csv", "val.csv"):
        data = folder(
            Path(DATA, "soundbank"), csv=csv, sample_rate=sample_rate, num_samples=num_samples, seed=0
        )
        for index in range(len(data)):
            waveform = data[index]["waveform"]
            assert waveform.shape == (num_samples,) and torch.isfinite(waveform).all()
            assert waveform.abs().max().item() == pytest.approx(0.5, abs=1e-3)
            seen += 1
    assert seen == 195


@real_data
def test_real_recordings_load_in_workers_as_in_the_main_process():
    data = folder(Path(DATA, "soundbank"), csv="val.csv", sample_rate=16000, num_samples=16000, seed=0)
    steps = StepBatches(len(data), batch_size=4, seed=0, start_step=5, num_steps=3, rank=0, world_size=1)
    for alone, helped in zip(
        make_loader(data, steps, num_workers=0), make_loader(data, steps, num_workers=2), strict=True
    ):
        assert torch.equal(alone["waveform"], helped["waveform"]) and alone["caption"] == helped["caption"]
        assert torch.equal(alone["item"], helped["item"]) and alone["waveform"].shape == (4, 16000)
