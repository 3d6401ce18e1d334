import pytest
import torch
from torch import nn

from ldm_audio.models.hifigan import HiFiGAN, upsample, upsample_padding


def toy(*, high_resolution: bool = False) -> HiFiGAN:
    return HiFiGAN(
        n_mels=6,
        channels=16,
        upsample_rates=[5, 4, 2],
        upsample_kernels=[10, 8, 4] if high_resolution else [16, 16, 8],
        resblock_kernels=[3, 7],
        resblock_dilations=[[1, 3], [1, 5]],
        high_resolution=high_resolution,
    )


def released_16k() -> HiFiGAN:
    with torch.device("meta"):
        return HiFiGAN(
            n_mels=64,
            channels=1024,
            upsample_rates=[5, 4, 2, 2, 2],
            upsample_kernels=[16, 16, 8, 4, 4],
            resblock_kernels=[3, 7, 11],
            resblock_dilations=[[1, 3, 5]] * 3,
            high_resolution=False,
        )


def count(model: torch.nn.Module) -> tuple[int, int]:
    return sum(p.numel() for p in model.parameters()), len(list(model.parameters()))


def test_released_layout_has_the_published_size_with_and_without_weight_norm():
    model = released_16k()
    assert count(model) == (55_264_897, 194)
    model.add_weight_norm()
    assert count(model) == (55_285_762, 291)


@pytest.mark.parametrize("frames", [1, 51, 1024])
def test_16k_output_is_160_samples_a_frame_and_32_more(frames):
    model = released_16k()
    assert model.hop_length == 160
    assert model(torch.zeros(2, 64, frames, device="meta")).shape == (2, 1, 160 * frames + 32)


def test_48k_layout_has_the_published_size_and_an_exact_output_length():
    with torch.device("meta"):
        model = HiFiGAN(
            n_mels=256,
            channels=1536,
            upsample_rates=[6, 5, 4, 2, 2],
            upsample_kernels=[12, 10, 8, 4, 4],
            resblock_kernels=[3, 7, 11, 15],
            resblock_dilations=[[1, 3, 5]] * 4,
            high_resolution=True,
        )
        assert count(model) == (190_281_889, 254)
        assert model(torch.zeros(1, 256, 7)).shape == (1, 1, 480 * 7)


@pytest.mark.parametrize("rate", [2, 3, 4, 5, 6])
def test_high_resolution_padding_multiplies_the_length_exactly(rate):
    padding, extra = upsample_padding(rate=rate, kernel=2 * rate, high_resolution=True)
    up = torch.nn.ConvTranspose1d(1, 1, 2 * rate, rate, padding=padding, output_padding=extra)
    assert up(torch.zeros(1, 1, 11)).shape[-1] == 11 * rate


@pytest.mark.parametrize(
    "rate, kernel, padding, extra", [(2, 4, 1, 0), (4, 16, 6, 0), (5, 16, 5, 0), (5, 10, 3, 1)]
)
def test_inference_upsamples_as_the_transposed_convolution(rate, kernel, padding, extra):
    up = nn.ConvTranspose1d(6, 3, kernel, stride=rate, padding=padding, output_padding=extra)
    x = torch.randn(2, 6, 7)
    expected = up(x)
    with torch.no_grad():
        assert upsample(up, x).is_contiguous() != expected.is_contiguous()  # it went the other way
        assert torch.allclose(upsample(up, x), expected, atol=1e-6)


def test_weight_norm_changes_no_output_and_can_be_added_twice():
    torch.manual_seed(0)
    model = toy()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    mel = torch.randn(2, 6, 9)
    with torch.no_grad():
        plain = model(mel)
        model.add_weight_norm()
        model.add_weight_norm()
        assert all("parametrizations" in name or "bias" in name for name, _ in model.named_parameters())
        normed = model(mel)
    assert plain.std() > 0.05 and plain.abs().mean() < 0.9  # neither constant nor driven into the tanh
    torch.testing.assert_close(normed, plain, rtol=0, atol=1e-5)


def test_waveform_stays_in_range_and_every_parameter_has_a_gradient():
    torch.manual_seed(0)
    model = toy(high_resolution=True)
    waveform = model(20 * torch.randn(1, 6, 5))
    assert waveform.shape == (1, 1, 5 * 40)
    assert waveform.abs().max() <= 1
    waveform.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_all_but_the_first_convolution_start_at_std_001():
    torch.manual_seed(0)
    model = toy()
    assert model.ups[0].weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert model.resblocks[0].convs2[0].weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert model.conv_pre.weight.std().item() > 0.05
