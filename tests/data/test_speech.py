"""Recordings with texts and voices: what an item holds, and what is refused."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_audio.audio.io import write_wav
from ldm_audio.data.loader import ItemKey, make_loader, sequential_batches
from ldm_audio.data.speech import Speech, folder
from ldm_audio.errors import InputError

ROWS = [("a0", "one", "anna", 0.3), ("a1", "two", "anna", 0.4), ("a2", "two", "anna", 0.2),
        ("b0", "one", "ben", 0.3), ("c0", "six", "carl", 0.9)]  # fmt: skip
SETTINGS = {
    "sample_rate": 16000, "num_samples": 8000, "num_references": 2, "reference_samples": 4000, "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("speech")
    for number, (name, _, _, seconds) in enumerate(ROWS):
        times = np.arange(round(8000 * seconds)) / 8000
        write_wav(root / f"{name}.wav", 0.2 * np.sin(2 * math.pi * (200 + 100 * number) * times), 8000)
    lines = [f"{name}.wav,{text},{speaker}" for name, text, speaker, _ in ROWS]
    (root / "metadata.csv").write_text("\n".join(["file_name,text,speaker", *lines]) + "\n")
    return root


def hertz(waveform: torch.Tensor) -> int:
    """The strongest frequency, to 100 Hz."""
    spectrum = np.abs(np.fft.rfft(waveform.numpy()))
    return round(spectrum.argmax() * 16000 / len(waveform) / 100) * 100


def test_an_item_is_a_whole_recording_with_other_clips_of_its_voice(path):
    data = folder(path, **SETTINGS)
    assert len(data) == 4 and data.captions() == ["one", "two", "two", "one"]  # carl's is too long
    item = data[0]
    assert item["waveform"].shape == (8000,) and item["num_samples"] == 4800
    assert item["waveform"][:4800].abs().max() == pytest.approx(0.5, abs=1e-3)
    assert not item["waveform"][4800:].any()
    assert (item["caption"], item["speaker"]) == ("one", "anna") and hertz(item["waveform"][:4800]) == 200
    assert item["references"].shape == (2, 4000)
    assert {hertz(clip) for clip in item["references"]} == {300, 400}  # anna's two others
    assert {hertz(clip) for clip in data[3]["references"]} == {500}  # ben has no other


def test_what_is_drawn_depends_on_epoch_and_index_alone(path):
    data = folder(path, **SETTINGS | {"num_references": 1})
    drawn = [hertz(data[ItemKey(epoch, 0, epoch)]["references"][0]) for epoch in range(20)]
    assert set(drawn) == {300, 400}
    again = folder(path, **SETTINGS | {"num_references": 1})
    assert torch.equal(again[ItemKey(7, 0, 3)]["references"], data[ItemKey(7, 0, 99)]["references"])


def test_a_batch_is_stacked(path):
    data = folder(path, **SETTINGS)
    (batch,) = make_loader(data, sequential_batches(4, 4, None), num_workers=0)
    assert batch["num_samples"].tolist() == [4800, 6400, 3200, 4800]
    assert batch["references"].shape == (4, 2, 4000) and batch["speaker"] == ["anna"] * 3 + ["ben"]


def test_speakers_are_held_out(path):
    assert set(folder(path, **SETTINGS, without_speakers=["anna"]).speakers) == {"ben"}
    assert set(folder(path, **SETTINGS, speakers=["anna"]).speakers) == {"anna"}
    assert "2 speakers" in folder(path, **SETTINGS).describe()


def test_what_cannot_be_used_is_refused(path, tmp_path):
    with pytest.raises(InputError, match=r"metadata\.csv: no speaker dora"):
        folder(path, **SETTINGS, speakers=["dora"])
    with pytest.raises(InputError, match="no recording of the speakers asked for"):
        folder(path, **SETTINGS, without_speakers=["anna", "ben", "carl"])
    with pytest.raises(InputError, match="no column voice"):
        folder(path, **SETTINGS, speaker_column="voice")
    with pytest.raises(InputError, match=r"no recording of at most 0\.01 s"):
        folder(path, **SETTINGS | {"num_samples": 160})
    with pytest.raises(InputError, match="normalise='loud'"):
        Speech([], [], **SETTINGS, normalise="loud", max_speed=1.0)


def test_an_item_is_played_faster_or_slower_with_its_references(path):
    data = folder(path, **SETTINGS, max_speed=1.5)
    plain = folder(path, **SETTINGS)[3]
    speeds = []
    for epoch in range(30):
        item = data[ItemKey(epoch, 3, epoch)]  # ben's only recording, which is its own reference
        speed = int(plain["num_samples"]) / int(item["num_samples"])
        speeds.append(speed)
        for clip in (item["waveform"][: item["num_samples"]], item["references"][0]):
            assert abs(hertz(clip) - 500 * speed) <= 55
        assert torch.equal(item["waveform"], data[ItemKey(epoch, 3, 99)]["waveform"])
    assert 1 / 1.5 <= min(speeds) < 0.8 and 1.25 < max(speeds) <= 1.5 + 1e-3
    tight = folder(path, **SETTINGS | {"num_samples": 6500}, max_speed=4.0)
    assert max(int(tight[ItemKey(epoch, 3, 0)]["num_samples"]) for epoch in range(30)) == 6500
    with pytest.raises(InputError, match=r"max_speed=0\.5: expected 1 to 4"):
        folder(path, **SETTINGS, max_speed=0.5)


def test_references_can_be_left_out(path):
    assert folder(path, **SETTINGS | {"num_references": 0})[0]["references"].shape == (0, 4000)
