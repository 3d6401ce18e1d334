"""The log-mel front end against librosa, and its framing, precision, gradient and refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ldm_audio.audio.mel import LogMel, hann_window, mel_filterbank
from ldm_audio.errors import InputError

librosa = pytest.importorskip("librosa")

CONFIGS = Path(__file__).parents[2] / "configs" / "audio"
PRESETS = ["mel16k_64", "mel48k_256"]
NATURAL_TO_DB = 20 / np.log(10)  # a magnitude's natural logarithm in dB


def preset(name: str, **changes) -> LogMel:
    numbers = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert numbers.pop("_target_") == "ldm_audio.audio.mel.LogMel"
    return LogMel(**(numbers | changes))


def music(num_samples: int, sample_rate: int, batch: int = 2) -> np.ndarray:
    """Chirps over noise at a moderate level, then half a second of digital silence."""
    seconds = np.arange(num_samples) / sample_rate
    noise = np.random.default_rng(0).standard_normal((batch, num_samples))
    waveform = 0.3 * np.sin(2 * np.pi * (200 + 300 * seconds) * seconds) + 0.02 * noise
    waveform[:, -sample_rate // 2 :] = 0
    return waveform


def librosa_log_mel(waveform: np.ndarray, mel: LogMel) -> np.ndarray:
    margin = (mel.n_fft - mel.hop_length) // 2 if mel.framing == "hifigan" else mel.n_fft // 2
    padded = np.pad(waveform, [(0, 0), (margin, margin)], mode="reflect")
    spectrum = librosa.stft(
        padded, n_fft=mel.n_fft, hop_length=mel.hop_length, win_length=mel.win_length, center=False
    )
    bank = librosa.filters.mel(
        sr=mel.sample_rate, n_fft=mel.n_fft, n_mels=mel.n_mels, fmin=mel.fmin, fmax=mel.fmax, dtype=np.float64
    )
    frames = waveform.shape[-1] // mel.hop_length
    return np.log(np.maximum(bank @ np.abs(spectrum), 1e-5))[..., :frames]


@pytest.mark.parametrize(
    "scale,norm", [("slaney", "slaney"), ("htk", None), ("slaney", None), ("htk", "slaney")]
)
@pytest.mark.parametrize(
    "sample_rate,n_fft,n_mels,fmin,fmax",
    [
        (16000, 1024, 64, 0, 8000),
        (48000, 2048, 256, 20, 24000),
        (48000, 1024, 64, 50, 14000),
        (22050, 512, 80, 0, 8000),
    ],
)
@pytest.mark.filterwarnings("ignore:Empty filters detected")
def test_filterbank_is_bit_equal_to_librosa(scale, norm, sample_rate, n_fft, n_mels, fmin, fmax):
    ours = mel_filterbank(
        sample_rate=sample_rate, n_fft=n_fft, n_mels=n_mels, fmin=fmin, fmax=fmax, scale=scale, norm=norm
    )
    theirs = librosa.filters.mel(
        sr=sample_rate,
        n_fft=n_fft,
        n_mels=n_mels,
        fmin=fmin,
        fmax=fmax,
        htk=scale == "htk",
        norm=norm,
        dtype=np.float64,
    )
    assert ours.dtype == np.float64
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(ours.astype(np.float32), theirs.astype(np.float32))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("framing", ["hifigan", "centered"])
@pytest.mark.parametrize("surplus", [0, 1, 159])
def test_log_mel_equals_librosa_in_both_framings(name, framing, surplus):
    mel = preset(name, framing=framing)
    waveform = music(mel.sample_rate + surplus, mel.sample_rate)
    expected = librosa_log_mel(waveform, mel)
    exact = mel(torch.from_numpy(waveform))
    assert exact.dtype == torch.float64 and exact.shape == (2, mel.n_mels, mel.num_frames(waveform.shape[-1]))
    assert np.abs(exact.numpy() - expected).max() <= 1e-5
    single = mel(torch.from_numpy(waveform).float())
    assert single.dtype == torch.float32
    error_db = NATURAL_TO_DB * np.abs(single.numpy() - expected)
    near_peak = NATURAL_TO_DB * (expected.max() - expected) < 60  # deeper nulls lose float32's digits
    assert error_db[near_peak].max() <= 2e-4
    assert error_db.max() <= 1e-3


@pytest.mark.parametrize("name", PRESETS)
def test_presets_give_1024_frames_for_10_24_seconds_and_silence_is_the_floor(name):
    mel = preset(name)
    silence = mel(torch.zeros(1, round(10.24 * mel.sample_rate)))
    assert (
        silence.shape
        == (1, mel.n_mels, 1024)
        == (1, mel.n_mels, mel.num_frames(round(10.24 * mel.sample_rate)))
    )
    assert torch.allclose(silence, torch.tensor(-11.512925))


def test_framings_are_half_a_hop_apart():
    waveform = torch.from_numpy(music(16000, 16000))
    hifigan = preset("mel16k_64")(waveform[:, :-160])
    centered = preset("mel16k_64", framing="centered")(waveform[:, 80:-80])
    # frame i is at 160 i + 80 of the first and at 160 i of the second, cut to start 80 samples later
    assert torch.allclose(hifigan[..., 5:-5], centered[..., 5:-5], atol=1e-9)


def test_gradients_are_finite_on_silence_and_correct_on_noise():
    mel = LogMel(
        sample_rate=8000,
        n_fft=64,
        hop_length=16,
        win_length=48,
        n_mels=8,
        fmin=0,
        fmax=4000,
        framing="hifigan",
    )
    silence = torch.zeros(1, 160, requires_grad=True)
    mel(silence).sum().backward()
    assert torch.isfinite(silence.grad).all()
    noise = torch.randn(
        1, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    assert torch.autograd.gradcheck(mel, (noise,))


def test_constants_made_under_inference_mode_serve_training():
    mel = LogMel(
        sample_rate=8000,
        n_fft=128,
        hop_length=32,
        win_length=120,
        n_mels=6,
        fmin=0,
        fmax=4000,
        framing="centered",
    )
    waveform = torch.randn(1, 512)
    with torch.inference_mode(), torch.device("meta"):
        first = mel(waveform).clone()
    assert first.device.type == "cpu"
    waveform.requires_grad_(True)
    mel(waveform).sum().backward()
    assert waveform.grad.abs().sum() > 0


def test_autocast_and_half_precision_leave_the_mel_in_float32():
    mel, waveform = preset("mel16k_64"), torch.from_numpy(music(8000, 16000)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mel(waveform), mel(waveform))
        inside = mel(waveform)
    assert inside.dtype == torch.float32 and torch.equal(inside, mel(waveform))
    assert mel(waveform.bfloat16()).dtype == torch.float32


def test_window_is_periodic_hann():
    window = hann_window(8, torch.device("cpu"), torch.float64)
    assert torch.allclose(window, 0.5 - 0.5 * torch.cos(2 * torch.pi * torch.arange(8).double() / 8))


@pytest.mark.parametrize("shape", [(1, 432), (16000,), (1, 1, 16000), (1, 0)])
def test_a_waveform_too_short_or_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(InputError, match=r"waveform .*expected \(b, s\) with s >= 433"):
        preset("mel16k_64")(torch.zeros(shape))


@pytest.mark.parametrize(
    "changes,word",
    [
        ({"framing": "center"}, "framing='center'"),
        ({"fmax": 9000}, "fmax=9000"),
        ({"win_length": 2048}, "win_length=2048"),
        ({"hop_length": 161}, "hop_length=161"),
    ],
)
def test_wrong_numbers_are_named(changes, word):
    with pytest.raises(InputError, match=word):
        preset("mel16k_64", **changes)
