"""Fixed windows of recordings: a grid, and one from every downbeat."""

import os
from pathlib import Path

import numpy as np
import pytest

from ldm_audio.audio.io import write_wav
from ldm_audio.data.windows import Windows, windows
from ldm_audio.errors import InputError

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


@pytest.mark.skipif(DATA is None, reason="LDM_AUDIO_DATA is unset: no real recordings")
def test_real_recordings_have_windows():
    data = found(Path(DATA) / "soundbank", csv="val.csv", downbeats=False, sample_rate=16000, stride=2.0)
    assert len(data) >= 26 and data[0]["waveform"].abs().max() > 0
