"""Fixed windows of recordings: a grid, and one from every downbeat."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import toys

from ldm_audio.audio.beats import Beats
from ldm_audio.audio.io import probe, write_wav
from ldm_audio.data.clips import Clips
from ldm_audio.data.latents import Latents
from ldm_audio.data.loader import ItemKey, make_loader
from ldm_audio.data.manifest import Clip
from ldm_audio.data.synthetic import render_clip, split_combinations
from ldm_audio.data.windows import Windows, windows
from ldm_audio.errors import InputError
from ldm_audio.pipelines.encode import Encoder, encode

RATE = 8000
DATA = os.environ.get("LDM_AUDIO_DATA")


def found(path: Path, **changes) -> Windows:
    settings = {
        "csv": "metadata.csv", "sample_rate": RATE, "num_samples": 4 * RATE, "stride": 4.0, "downbeats": True,
        "beats": None, "min_overlap": 2.0, "normalise": "none", "channel": "mix",
    }  # fmt: skip
    return windows(path, **settings | changes)


@pytest.fixture
def music(tmp_path, command) -> Path:
    """Ten seconds and one second of a ramp, with a bar of 2 s from 0.25 s on."""
    for name, seconds in (("long", 10), ("short", 1)):
        write_wav(tmp_path / f"{name}.wav", np.arange(seconds * RATE) / (10 * RATE), RATE, subtype="FLOAT")
        times = np.arange(0.25, seconds, 0.5)
        (tmp_path / f"{name}.beats").write_text("".join(f"{t}\t{i % 4 + 1}\n" for i, t in enumerate(times)))
    (tmp_path / "metadata.csv").write_text(
        "file_name,caption\nlong.wav,a ramp\nlong.wav,a slope\nshort.wav,a step\n"
    )
    assert command("ldm_audio.cli", "beats", tmp_path, "--tracker", "files", "--files", tmp_path) == 0
    return tmp_path


def test_the_grid_covers_a_recording_and_downbeats_have_windows_of_their_own(music):
    data = found(music)
    starts = [
        (item["window"]["file"], item["window"]["start"], item["window"]["downbeat"])
        for item in data_items(data)
    ]
    assert starts == [
        ("long.wav", 0.0, False), ("long.wav", 4.0, False),
        *(("long.wav", start, True) for start in (0.25, 2.25, 4.25, 6.25)),
        ("short.wav", 0.0, False),
    ]  # fmt: skip
    assert len(found(music, downbeats=False)) == 3 and len(found(music, min_overlap=0.5)) == 9


def data_items(data: Windows) -> list[dict]:
    return [data[index] for index in range(len(data))]


def test_a_window_begins_where_it_says_and_knows_its_captions_and_beats(music):
    item = data_items(found(music))[3]
    assert item["window"]["start"] == 2.25 and item["window"]["tempo"] == 120
    assert item["waveform"][0].item() == pytest.approx(0.225, abs=1e-4) and item["waveform"].shape == (
        4 * RATE,
    )
    assert item["captions"] == ["a ramp", "a slope"] and item["caption"] == "a ramp"
    assert item["window"]["beats"] == [0.5 * i for i in range(8)]
    padded = data_items(found(music))[-1]["waveform"]
    assert padded[RATE - 1] > 0.09 and not padded[RATE:].any()


def test_the_table_is_needed_for_downbeats_alone(music):
    (music / "beats.jsonl").unlink()
    assert len(found(music, downbeats=False)) == 3
    with pytest.raises(InputError, match=r"beats\.jsonl: no such file"):
        found(music)
    with pytest.raises(InputError, match="stride=0"):
        found(music, downbeats=False, stride=0)


def drums(folder: Path) -> Windows:
    """Windows of 2.56 s at the downbeats of rendered drums of one tempo, each behind its own silence."""
    rate, clips, beats = toys.RATE, [], []
    rows = [row for row in split_combinations("all") if row.get("tempo") == "132"]
    for number, (row, lead) in enumerate(zip(rows, (0.11, 0.42, 0.257, 0.638))):
        clip = render_clip(row, np.random.default_rng(number), sample_rate=rate, num_samples=6 * rate)
        times = [tuple(lead + time for time in found) for found in (clip.beats, clip.downbeats)]
        path = folder / f"{number}.wav"
        write_wav(path, np.concatenate([np.zeros(round(lead * rate)), clip.waveform]), rate)
        clips.append(Clip(path, ("drums",), probe(path)))
        beats.append(Beats(*times, clips[-1].info.num_samples / rate))
    recordings = Clips(
        clips, sample_rate=rate, num_samples=round(2.56 * rate), seed=0, normalise="peak_half",
        random_crop=False, caption="first", channel="mix", beats=beats,
    )  # fmt: skip
    return Windows(recordings, root=folder, stride=2.56, downbeats=True, min_overlap=2.56)


def rises(z: torch.Tensor) -> np.ndarray:
    """(c, t, f) -> how far each latent frame is from the one before it, (t - 1,), without their mean."""
    change = (z[:, 1:] - z[:, :-1]).square().sum(dim=(0, 2)).sqrt().numpy()
    return change - change.mean()


def lag_in_frames(one: torch.Tensor, other: torch.Tensor, reach: int = 8) -> int:
    """Latent frames by which `other` comes after `one`, where their changes agree best."""
    one, other = rises(one), np.pad(rises(other), reach)
    return int(np.argmax([one @ other[k : k + len(one)] for k in range(2 * reach + 1)])) - reach


def test_latents_from_the_cache_are_mixed_in_time_within_one_of_their_frames(tmp_path):
    """Latent frames are 20 ms long and beats 23 of them apart: what is off by two is found."""
    data = drums(tmp_path)
    encoder = Encoder(
        mel=toys.mel(), vae=toys.randomise(toys.vae()).eval(), clap=toys.randomise(toys.clap()).eval(),
        vocoder=None, tokenizer=toys.tokenizer(), mixup=toys.mixup(prob=0.0), device="cpu",
    )  # fmt: skip

    def read(ranges: list[range]):
        return make_loader(data, [[ItemKey(0, i, i) for i in items] for items in ranges], num_workers=0)

    encode(
        read, len(data), tmp_path / "latents", encoder=encoder, made_by={"vae": "v"}, batch_size=8,
        shard_items=64, part=0, parts=1, progress=lambda done: None,
    )  # fmt: skip
    mixed = Latents(path=str(tmp_path / "latents"), seed=0, mixup=toys.mixup(space="latent"))
    lags = []
    for index in range(len(data)):
        item = mixed[ItemKey(0, index, index)]
        assert item["mix_ratio"] < 1
        lags.append(lag_in_frames(item["z_mean"], item["partner_z_mean"]))
    assert len(lags) >= 12 and max(map(abs, lags)) <= 1, lags
    assert lag_in_frames(item["z_mean"][:, 2:], item["partner_z_mean"][:, :-2]) in (1, 2, 3)


@pytest.mark.skipif(DATA is None, reason="LDM_AUDIO_DATA is unset: no real recordings")
def test_real_recordings_have_windows():
    data = found(Path(DATA) / "soundbank", csv="val.csv", downbeats=False, sample_rate=16000, stride=2.0)
    assert len(data) >= 26 and data[0]["waveform"].abs().max() > 0
