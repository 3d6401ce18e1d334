"""CLAP's front end against transformers' and the originals' own building blocks."""

import foreign
import numpy as np
import pytest
import torch

from ldm_audio.audio.clap_mel import ClapMel
from ldm_audio.errors import InputError

LENGTHS = [100000, 479999, 480000, 480001, 480479, 480480, 960000]
SMALL = {
    "sample_rate": 16000,
    "n_fft": 512,
    "hop_length": 160,
    "n_mels": 64,
    "fmin": 50,
    "fmax": 8000,
    "max_samples": 16000,
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def released(*, fusion: bool, quantize: bool = False, filling: str = "repeatpad") -> ClapMel:
    return ClapMel(
        sample_rate=48000,
        n_fft=1024,
        hop_length=480,
        n_mels=64,
        fmin=50,
        fmax=14000,
        max_samples=480000,
        fusion=fusion,
        filling=filling,
        quantize=quantize,
    )


def small(*, fusion: bool, filling: str = "repeatpad") -> ClapMel:
    return ClapMel(**SMALL, fusion=fusion, filling=filling)


def sound(num_samples: int) -> np.ndarray:
    """A rising tone in noise, float64."""
    noise = np.random.default_rng(num_samples).standard_normal(num_samples)
    time = np.arange(num_samples) / 48000
    return 0.1 * noise + 0.1 * np.sin(2 * np.pi * (200 + 300 * time) * time)


@pytest.mark.parametrize("fusion", [False, True])
@pytest.mark.parametrize("num_samples", LENGTHS)
def test_equals_transformers_at_every_length(num_samples, fusion, monkeypatch):
    waveform = sound(num_samples)
    expected = foreign.clap_features(waveform, monkeypatch, fusion=fusion)
    exact, is_longer = released(fusion=fusion)(torch.from_numpy(waveform)[None])
    single, _ = released(fusion=fusion)(torch.from_numpy(waveform)[None].float())
    assert exact.shape == single.shape == expected.shape == (1, 4 if fusion else 1, 1001, 64)
    assert (exact.float() - expected).abs().max() <= 1e-5  # dB
    assert (single - expected).abs().max() <= 2e-4
    assert is_longer.tolist() == [num_samples >= 480480 if fusion else num_samples > 480000]


@pytest.mark.parametrize("filling", ["repeatpad", "repeat", "pad"])
def test_fillings_equal_transformers(filling, monkeypatch):
    waveform = sound(150000)
    expected = foreign.clap_features(waveform, monkeypatch, fusion=False, filling=filling)
    mel, _ = released(fusion=False, filling=filling)(torch.from_numpy(waveform)[None])
    assert (mel.float() - expected).abs().max() <= 1e-5


def test_unfused_front_end_equals_the_original_layers():
    from torchlibrosa.stft import LogmelFilterBank, Spectrogram

    spectrogram = Spectrogram(n_fft=1024, hop_length=480, freeze_parameters=True)
    logmel = LogmelFilterBank(
        sr=48000, n_fft=1024, n_mels=64, fmin=50, fmax=14000, ref=1.0, amin=1e-10, top_db=None
    )
    waveform = torch.from_numpy(sound(480000))[None].float()
    mel, _ = released(fusion=False)(waveform)
    assert (mel - logmel(spectrogram(waveform))).abs().max() <= 2e-4


def test_silence_is_minus_100_decibels():
    for fusion in (False, True):
        mel, _ = small(fusion=fusion)(torch.zeros(1, 8000))
        assert (mel == -100).all()


def test_chunks_of_a_long_clip_are_its_front_middle_and_end():
    front_end = small(fusion=True)
    waveform = torch.randn(1, 16000 * 3, generator=torch.Generator().manual_seed(0))
    mel, is_longer = front_end(waveform)
    everything = front_end.decibels(waveform)[0]
    assert is_longer.all()
    assert torch.equal(mel[0, 1], everything[:101])
    assert torch.equal(mel[0, 2], everything[100:201])
    assert torch.equal(mel[0, 3], everything[-101:])


@pytest.mark.parametrize("extra", [160, 320, 480, 1600])
def test_random_chunks_equal_transformers_choices(extra, monkeypatch):
    """With the same starts: the thirds, the empty ones among them, are cut alike."""
    from transformers import ClapFeatureExtractor

    front_end = small(fusion=True)
    starts = front_end.chunk_starts(101 + extra // 160, torch.Generator().manual_seed(3))
    drawn = iter(starts)
    thirds = []

    def choice(third):
        thirds.append(list(third))
        return next(drawn)

    monkeypatch.setattr(np.random, "choice", choice)
    extractor = ClapFeatureExtractor(
        sampling_rate=16000,
        hop_length=160,
        fft_window_size=512,
        max_length_s=1,
        frequency_min=50,
        frequency_max=8000,
    )
    waveform = np.random.default_rng(0).standard_normal(16000 + extra)
    expected = extractor(waveform, sampling_rate=16000, return_tensors="pt")["input_features"]
    mel, _ = front_end(torch.from_numpy(waveform)[None], generator=torch.Generator().manual_seed(3))
    assert all(start in third for start, third in zip(starts, thirds))
    assert (mel.float() - expected).abs().max() <= 1e-5


def test_a_clip_less_than_a_hop_too_long_is_not_long():
    mel, is_longer = small(fusion=True)(torch.randn(2, 16159))
    assert not is_longer.any()
    assert torch.equal(mel[:, 0], mel[:, 3])
    assert small(fusion=True)(torch.randn(2, 16160))[1].all()


def test_crops_are_the_start_unless_a_generator_is_given():
    for fusion in (False, True):
        front_end = small(fusion=fusion)
        waveform = torch.randn(3, 40000)
        mel, _ = front_end(waveform)
        assert torch.equal(mel, front_end(waveform)[0])
        drawn = [front_end(waveform, generator=torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1)]
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], mel)
    assert torch.equal(small(fusion=False)(waveform)[0], small(fusion=False)(waveform[:, :16000])[0])


def test_random_crops_leave_the_global_generators_alone():
    state = torch.get_rng_state()
    small(fusion=True)(torch.randn(1, 40000, generator=torch.Generator().manual_seed(0)))
    small(fusion=True)(torch.ones(1, 40000), generator=torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state())


def test_quantizing_is_a_cast_to_16_bit_integers():
    waveform = np.random.default_rng(0).uniform(-1.2, 1.2, 480000)
    integers = (np.clip(waveform, -1, 1) * 32767).astype(np.int16)
    mel, _ = released(fusion=False, quantize=True)(torch.from_numpy(waveform)[None])
    expected, _ = released(fusion=False)(torch.from_numpy(integers / 32767)[None])
    assert torch.equal(mel, expected)


def test_gradients_reach_the_waveform():
    for fusion in (False, True):
        waveform = torch.randn(1, 40000, requires_grad=True)
        small(fusion=fusion)(waveform)[0].sum().backward()
        assert waveform.grad.isfinite().all() and waveform.grad[0, :16000].any()


def test_rows_of_a_batch_do_not_touch_each_other():
    for num_samples in (5000, 40000):
        waveform = torch.randn(3, num_samples)
        mel, is_longer = small(fusion=True)(waveform)
        alone = torch.cat([small(fusion=True)(row[None])[0] for row in waveform])
        assert is_longer.shape == (3,) and torch.allclose(mel, alone, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"filling": "loop"}, "filling='loop'"),
        ({"fmax": 9000}, "fmax=9000"),
        ({"max_samples": 256}, "max_samples=256"),
    ],
)
def test_impossible_settings_are_refused(change, told):
    with pytest.raises(InputError, match=told):
        ClapMel(**{**SMALL, "fusion": False, "filling": "pad", **change})


@pytest.mark.parametrize("shape", [(16000,), (1, 2, 16000), (1, 0)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(InputError, match="expected \\(b, s\\)"):
        small(fusion=False)(torch.zeros(shape))
