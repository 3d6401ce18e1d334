"""The forms that layers take in inference on the CPU equal the plain ones."""

import weakref

import pytest
import torch
import toys
from torch import nn

from ldm_audio import layers
from ldm_audio.layers import PackedNarrowConv, UpsampleConv, pack_linears
from ldm_audio.models.hifigan import HiFiGAN
from ldm_audio.models.unet import UNet
from ldm_audio.pipelines.text_to_audio import pack_unet


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(10, 12), (9, 12), (10, 11), (9, 11)])
@pytest.mark.parametrize("last", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_upsampling_in_one_convolution_equals_repeating_then_convolving(size, last):
    layer = toys.randomise(UpsampleConv(8)).to(memory_format=last)
    x = randn(2, 8, 5, 6).to(memory_format=last)
    repeated = nn.functional.interpolate(x, size=size, mode="nearest")
    expected = nn.functional.conv2d(repeated, layer.weight, layer.bias, padding=1)
    assert (layer(x, size) - expected).abs().max() < 1e-5
    layer.weight.mul_(2)  # as an optimiser does: what was kept of the old weight must not be used
    layer.bias.mul_(2)
    assert (layer(x, size) - 2 * expected).abs().max() < 1e-5


def test_upsampling_passes_gradients():
    layer = toys.randomise(UpsampleConv(4))
    layer(randn(1, 4, 4, 4), (8, 8)).sum().backward()
    assert layer.weight.grad.abs().min() > 0


@pytest.mark.parametrize("bins", [1, 2])
@torch.no_grad()
def test_a_narrow_convolution_as_a_product_equals_the_convolution(bins):
    conv = toys.randomise(nn.Conv2d(8, 6, 3, padding=1))
    x = randn(2, 8, 9, bins)
    assert (PackedNarrowConv(conv, bins)(x) - conv(x)).abs().max() < 1e-5


@pytest.mark.parametrize("bins", [16, 4, 2])
@pytest.mark.parametrize("frames", [16, 7])
@torch.no_grad()
def test_a_packed_unet_equals_itself(bins, frames):
    unet = toys.randomise(UNet(**toys.arguments(toys.UNET_RECIPE))).eval()
    inputs = randn(2, 4, frames, bins), torch.tensor([3, 700]), randn(2, 12)
    expected = unet(*inputs)
    pack_unet(unet.to(memory_format=torch.channels_last), bins)
    assert (unet(*inputs) - expected).abs().max() < 1e-5 * expected.abs().max()
    packed = [name for name, module in unet.named_modules() if isinstance(module, PackedNarrowConv)]
    assert len(packed) == (0 if bins == 16 else 2 * (1 + 2 + 2))


@torch.no_grad()
def test_a_packed_clap_equals_itself():
    clap = toys.randomise(toys.clap()).eval()
    waveform, tokens = toys.waveforms(torch.arange(2)), toys.tokenizer()(["a dog", "rain"])
    expected = clap.embed_audio(waveform), clap.embed_text(*tokens)
    pack_linears(clap)
    assert (clap.embed_audio(waveform) - expected[0]).abs().max() < 1e-5
    assert (clap.embed_text(*tokens) - expected[1]).abs().max() < 1e-5


@torch.no_grad()
def test_a_wide_vocoder_with_channels_last_equals_itself(monkeypatch):
    vocoder = toys.randomise(HiFiGAN(**toys.arguments(toys.VOCODER_RECIPE) | {"channels": 256})).eval()
    mel = randn(2, 16, 11)
    quick = vocoder(mel)
    monkeypatch.setattr("ldm_audio.models.hifigan.is_plain_cpu", lambda x: False)
    plain, exact = vocoder(mel), vocoder.double()(mel.double())
    assert not torch.equal(quick, plain) and exact.std() > 1e-3
    assert max((quick - exact).abs().max(), (plain - exact).abs().max()) < 2e-5  # alike: weights are large


def test_the_quick_forms_are_for_plain_inference_alone():
    x = randn(1)
    assert not layers.is_plain_cpu(x)
    with torch.no_grad():
        assert layers.is_plain_cpu(x) and not layers.is_plain_cpu(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert not layers.is_plain_cpu(x)


def test_packing_keeps_no_weight_that_it_replaced(monkeypatch):
    network = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4)) for _ in range(4)])
    replaced = [weakref.ref(module) for module in network.modules() if isinstance(module, nn.Linear)]
    left = []

    class Counting(layers.PackedLinear):
        def __init__(self, weight, bias):
            left.append(sum(module() is not None for module in replaced))
            super().__init__(weight, bias)

    monkeypatch.setattr(layers, "PackedLinear", Counting)
    pack_linears(network)
    assert left in ([4, 3, 2, 1], [])  # none where this torch cannot pack
