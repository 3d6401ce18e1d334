"""Reading, resampling and writing: any format, windows, broken files, atomic writes."""

import sys

import numpy as np
import pytest
import soundfile
import torch

from ldm_audio.audio.io import AudioInfo, probe, read_audio, resample, resample_sinc, write_wav
from ldm_audio.errors import InputError


def sine(num_samples: int, sample_rate: int, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(num_samples) / sample_rate)).astype(np.float32)


@pytest.mark.parametrize(
    "name,subtype,sample_rate,tolerance",
    [
        ("a.wav", "PCM_16", 44100, 2**-15),
        ("a.wav", "PCM_24", 192000, 2**-22),
        ("a.wav", "FLOAT", 16000, 0),
        ("a.wav", "DOUBLE", 8000, 0),
        ("a.wav", "PCM_U8", 8000, 2**-7),
        ("a.flac", "PCM_24", 96000, 2**-22),
        ("a.ogg", "VORBIS", 48000, 0.1),
        ("a.aiff", "PCM_16", 22050, 2**-15),
    ],
)
@pytest.mark.parametrize("num_channels", [1, 2])
def test_any_format_reads_whole_and_in_windows(tmp_path, name, subtype, sample_rate, tolerance, num_channels):
    path, length = tmp_path / name, sample_rate // 4
    waveform = np.stack([sine(length, sample_rate, 440 * (c + 1)) for c in range(num_channels)])
    soundfile.write(path, waveform.T, sample_rate, subtype=subtype)
    assert probe(path) == AudioInfo(sample_rate, length, num_channels)
    whole, rate = read_audio(path)
    assert rate == sample_rate and whole.dtype == np.float32 and whole.shape == waveform.shape
    assert np.abs(whole - waveform).max() <= tolerance
    window, _ = read_audio(str(path), start=100, num_samples=50)
    np.testing.assert_array_equal(window, whole[:, 100:150])
    last, _ = read_audio(path, start=length - 10, num_samples=50)
    np.testing.assert_array_equal(last, whole[:, -10:])


@pytest.mark.parametrize("suffix", ["mp3", "ogg", "flac"])
def test_windows_of_a_compressed_file_of_variable_rate_lie_where_they_should(suffix, tmp_path):
    steps = np.arange(20 * 48000)
    chirp_with_gaps = 0.5 * np.sin(steps * (0.02 + 1e-7 * steps)) * (np.sin(steps / 20000) > 0)
    soundfile.write(tmp_path / f"a.{suffix}", chirp_with_gaps, 48000)
    whole, _ = read_audio(tmp_path / f"a.{suffix}")
    for start in (1, 50000, 310001, 900000):
        window, _ = read_audio(tmp_path / f"a.{suffix}", start=start, num_samples=4000)
        np.testing.assert_allclose(window, whole[:, start : start + 4000], atol=1e-6)


def test_twenty_milliseconds_and_one_sample_read(tmp_path):
    for length in (320, 1):
        write_wav(tmp_path / "short.wav", sine(length, 16000), 16000)
        assert read_audio(tmp_path / "short.wav")[0].shape == (1, length)


def test_every_unusable_file_is_named_in_one_line(tmp_path):
    def file(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return name

    soundfile.write(tmp_path / "empty.wav", np.zeros((0, 1)), 16000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "inf.wav", np.array([0.0, np.inf]), 16000, subtype="FLOAT")
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 48000)
    soundfile.write(tmp_path / "whole.flac", noise, 48000)
    cut = (tmp_path / "whole.flac").read_bytes()[:40000]
    (tmp_path / "folder.wav").mkdir()
    expected = {
        "absent.wav": "no such file",
        "folder.wav": "no such file",
        file("text.wav", b"these are words, no sound" * 50): "not a readable audio file",
        file("nothing.wav", b""): "not a readable audio file",
        file("samples.raw", b"1234" * 50): "not a readable audio file",
        "empty.wav": "0 samples",
        "nan.wav": "NaN or infinity",
        "inf.wav": "NaN or infinity",
        file("cut.flac", cut): "broken audio",
    }
    for name, reason in expected.items():
        with pytest.raises(InputError, match=reason) as caught:
            read_audio(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_window_outside_the_file_is_refused(tmp_path):
    write_wav(tmp_path / "a.wav", sine(100, 16000), 16000)
    for start in (-1, 100):
        with pytest.raises(InputError, match=f"start {start} is outside its 100 samples"):
            read_audio(tmp_path / "a.wav", start=start)


@pytest.mark.parametrize(
    "rates", [(44100, 16000), (192000, 16000), (8000, 16000), (16000, 48000), (16000, 16000)]
)
def test_resampled_length_is_the_ceiling(rates):
    source, target = rates
    for length in (1, 2, 3, 7, 320, 441, 4801):
        expected = -(-length * target // source)
        assert resample(np.ones((2, length), dtype=np.float32), source, target).shape == (2, expected)
        assert resample_sinc(torch.ones(2, length), source, target).shape == (2, expected)


@pytest.mark.parametrize("rates", [(44100, 16000), (192000, 48000), (8000, 16000)])
def test_both_resamplers_keep_a_sine_and_agree(rates):
    source, target = rates
    by_soxr = resample(sine(source // 2, source), source, target)
    by_sinc = resample_sinc(torch.from_numpy(sine(source // 2, source)), source, target).numpy()
    middle = slice(target // 10, -target // 10)
    expected = sine(target // 2, target)
    assert np.abs(by_soxr - expected)[middle].max() < 1e-4
    assert np.abs(by_sinc - expected)[middle].max() < 5e-3


def test_resampling_removes_what_would_alias():
    above = resample(sine(48000, 48000, hz=12000), 48000, 16000)
    assert np.abs(above[1000:-1000]).max() < 1e-4


def test_equal_rates_need_no_torchaudio_and_its_absence_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)
    waveform = torch.ones(8)
    assert resample_sinc(waveform, 16000, 16000) is waveform
    with pytest.raises(
        InputError, match=r"16000 to 48000 Hz .* needs a torchaudio that imports beside torch"
    ):
        resample_sinc(waveform, 16000, 48000)


def test_sinc_resampling_is_differentiable():
    waveform = torch.randn(64, requires_grad=True)
    resample_sinc(waveform, 16000, 48000).square().sum().backward()
    assert waveform.grad.abs().min() > 0


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy, lambda w: torch.from_numpy(w).bfloat16()])
def test_written_wav_reads_back(tmp_path, make):
    waveform = np.array([0.0, 0.5, -0.5, 1.5, -1.5], dtype=np.float32)
    write_wav(tmp_path / "new" / "a.wav", make(waveform), 16000)
    read, rate = read_audio(tmp_path / "new" / "a.wav")
    assert rate == 16000 and soundfile.info(tmp_path / "new" / "a.wav").subtype == "PCM_16"
    np.testing.assert_allclose(read[0], waveform.clip(-1, 1), atol=2**-15)


def test_other_sample_formats_are_named(tmp_path):
    waveform = sine(100, 16000)
    write_wav(tmp_path / "a.wav", waveform, 16000, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav")[0][0], waveform)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    write_wav(path, sine(100, 16000), 16000)
    before = path.read_bytes()
    for bad in (np.array([0.0, np.nan]), np.zeros((2, 5)), np.zeros(0)):
        with pytest.raises(InputError, match=r"a\.wav"):
            write_wav(path, bad, 16000)
    monkeypatch.setattr(soundfile, "write", lambda file, *_, **__: (file.write_bytes(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        write_wav(path, sine(50, 16000), 16000)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.wav"]
