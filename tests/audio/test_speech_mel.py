"""The 22.05 kHz front end against transformers' ClvpFeatureExtractor, and its crops."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_audio.audio.io import read_audio, resample
from ldm_audio.audio.speech_mel import SpeechMel, read_norms
from ldm_audio.errors import InputError

NORMS = [-7.0 + 0.05 * i for i in range(80)]
SETTINGS = {
    "sample_rate": 22050, "n_fft": 1024, "hop_length": 256, "n_mels": 80, "fmin": 0, "fmax": 8000,
    "reference_samples": 132300, "norms": NORMS,
}  # fmt: skip
DATA = os.environ.get("LDM_AUDIO_DATA")
real = pytest.mark.skipif(not DATA, reason="no real recordings: LDM_AUDIO_DATA is unset")


def sweep(num_samples: int) -> np.ndarray:
    seconds = np.arange(num_samples) / 22050
    rng = np.random.default_rng(0)
    return 0.4 * np.sin(2 * np.pi * (200 + 900 * seconds) * seconds) + 0.03 * rng.standard_normal(num_samples)


def their_mel(waveform: np.ndarray, norms: list[float] | None) -> torch.Tensor:
    from transformers import ClvpFeatureExtractor

    peer = ClvpFeatureExtractor(mel_norms=norms)
    return torch.from_numpy(np.stack(peer(waveform, sampling_rate=22050)["input_features"]))


@pytest.mark.parametrize("num_samples", [50000, 140000])
@pytest.mark.parametrize("norms", [None, NORMS])
def test_a_reference_clip_equals_transformers(num_samples, norms):
    mel = SpeechMel(**SETTINGS | {"norms": norms})
    waveform = sweep(num_samples).astype(np.float32)
    expected = their_mel(waveform, norms)
    assert expected.shape == (1, 80, 517)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-4)):
        ours = mel.reference(torch.from_numpy(waveform)[None].to(dtype))
        assert (ours - expected).abs().max() <= tolerance


@real
def test_a_recording_with_the_published_norms_equals_transformers():
    norms = read_norms(Path(DATA) / "tortoise" / "mel_norms.pth")
    assert len(norms) == 80 and abs(norms[0] + 7.0094604) < 1e-6
    waveform, rate = read_audio(Path(DATA) / "speech_digits" / "7_theo_3.wav")
    waveform = resample(waveform[0], rate, 22050)
    ours = SpeechMel(**SETTINGS | {"norms": norms}).reference(torch.from_numpy(waveform)[None].double())
    assert (ours - their_mel(waveform, norms)).abs().max() <= 1e-5


def test_the_beginning_is_taken_unless_a_generator_draws():
    mel = SpeechMel(**SETTINGS | {"reference_samples": 20000})
    waveform = torch.from_numpy(sweep(60000)).float()[None].expand(2, -1)
    start = mel.reference(waveform)
    assert torch.equal(start, mel(waveform[:, :20000])) and torch.equal(start, mel.reference(waveform))
    drawn = [mel.reference(waveform, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*drawn)
    assert not torch.allclose(drawn[0][0], drawn[0][1], atol=0.1)  # each row its own place
    assert not torch.allclose(drawn[0], start, atol=0.1)


def test_the_way_back_gives_the_power_of_each_bin():
    mel = SpeechMel(**SETTINGS)
    waveform = torch.from_numpy(sweep(9000))[None]
    plain = SpeechMel(**SETTINGS | {"norms": None})
    assert torch.allclose(mel.power(mel(waveform)), plain(waveform).exp())
    assert mel(waveform).shape[-1] == mel.num_frames(9000) == 36


def test_norms_and_waveforms_that_do_not_fit_are_refused(tmp_path):
    for norms in (NORMS[:79], [0.0, *NORMS[1:]]):
        with pytest.raises(InputError, match="norms: expected 80 numbers other than 0"):
            SpeechMel(**SETTINGS | {"norms": norms})
    mel = SpeechMel(**SETTINGS)
    for bad in (torch.zeros(1, 512), torch.zeros(9000)):
        with pytest.raises(InputError, match=r"expected \(b, s\) with s >= 513"):
            mel(bad)
    with pytest.raises(InputError, match="no such file, expected mel_norms"):
        read_norms(tmp_path / "none.pth")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="expected one tensor of a number a mel bin"):
        read_norms(tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"not a tensor")
    with pytest.raises(InputError, match="not a readable torch file"):
        read_norms(tmp_path / "broken.pth")
