import pytest
import torch

from ldm_audio.errors import InputError
from ldm_audio.models.discriminators import (
    PatchDiscriminator,
    PeriodDiscriminator,
    ScaleDiscriminator,
    WaveDiscriminator,
)

TOY_SCALES = [4, 4, 6, 8, 8, 8, 8]


def toy(**changes) -> WaveDiscriminator:
    arguments = {
        "periods": [2, 3],
        "period_channels": [3, 5, 4],
        "scale_channels": TOY_SCALES,
        "num_scales": 2,
    }
    return WaveDiscriminator(**{**arguments, **changes})


def test_full_size_has_the_layers_of_the_paper():
    with torch.device("meta"):
        model = WaveDiscriminator(
            periods=[2, 3, 5, 7, 11],
            period_channels=[32, 128, 512, 1024, 1024],
            scale_channels=[128, 128, 256, 512, 1024, 1024, 1024],
            num_scales=3,
        )
        judgements = model(torch.zeros(2, 1, 8192))
    assert [conv.groups for conv in model.scales[0].convs] == [1, 4, 16, 16, 16, 16, 1]
    assert [tuple(f.shape) for f in judgements[0][1]] == [
        (2, 32, 1366, 2),
        (2, 128, 456, 2),
        (2, 512, 152, 2),
        (2, 1024, 51, 2),
        (2, 1024, 51, 2),
        (2, 1, 51, 2),
    ]
    assert [f.shape[1:] for f in judgements[5][1]] == [
        (128, 8192),
        (128, 4096),
        (256, 2048),
        (512, 512),
        (1024, 128),
        (1024, 128),
        (1024, 128),
        (1, 128),
    ]
    assert [logits.shape[1] for logits, _ in judgements] == [102, 102, 105, 105, 110, 128, 65, 33]


def test_the_first_scale_is_spectrally_normed_and_hears_the_raw_wave():
    torch.manual_seed(0)
    model = toy()
    names = [
        type(scale.convs[0].parametrizations.weight[0]).__name__.strip("_").lower() for scale in model.scales
    ]
    assert names == ["spectralnorm", "weightnorm"]
    model.eval()
    waveform = torch.randn(1, 1, 64)
    averaged = torch.nn.functional.avg_pool1d(waveform, 4, 2, 2)
    judgements = model(waveform)
    assert torch.equal(judgements[2][0], model.scales[0](waveform)[0])
    assert torch.equal(judgements[3][0], model.scales[1](averaged)[0])


def test_a_period_discriminator_keeps_the_columns_of_the_fold_apart():
    torch.manual_seed(0)
    model = PeriodDiscriminator(period=3, channels=[4, 4])
    waveform = torch.randn(1, 1, 30)
    changed = waveform.clone()
    changed[..., 1::3] += 1
    logits, other = (model(x)[0].unflatten(1, (-1, 3)) for x in (waveform, changed))
    assert torch.equal(logits[..., 0], other[..., 0]) and torch.equal(logits[..., 2], other[..., 2])
    assert not torch.allclose(logits[..., 1], other[..., 1])


def test_a_waveform_that_does_not_fill_the_last_row_is_mirrored():
    torch.manual_seed(0)
    model = PeriodDiscriminator(period=5, channels=[4, 4])
    waveform = torch.randn(1, 1, 18)
    mirrored = torch.cat([waveform, waveform[..., [16, 15]]], dim=-1)
    assert torch.equal(model(waveform)[0], model(mirrored)[0])


def test_logits_end_the_features_and_every_parameter_has_a_gradient():
    torch.manual_seed(0)
    model = toy()
    loss = 0
    for logits, features in model(torch.randn(2, 1, 300)) + model(torch.randn(2, 1, 300)):
        assert torch.equal(features[-1].flatten(1), logits)
        loss = loss + logits.square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_groups_divide_any_widths():
    model = ScaleDiscriminator(channels=[3, 6, 10, 7, 4, 12, 5], spectral=False)
    assert [conv.groups for conv in model.convs] == [1, 1, 2, 1, 1, 4, 1]


def test_without_scale_widths_there_is_no_scale_part():
    assert len(toy(scale_channels=[])(torch.randn(1, 1, 40))) == 2


def test_a_wrong_number_of_scale_widths_is_refused():
    with pytest.raises(InputError, match="2 to 7 widths"):
        toy(scale_channels=[4] * 8)


def test_fewer_scale_layers_keep_the_first_and_the_last():
    model = ScaleDiscriminator(channels=[4, 4, 8, 8, 8], spectral=True)
    assert [conv.kernel_size[0] for conv in model.convs] == [15, 41, 41, 41, 5]
    assert [conv.stride[0] for conv in model.convs] == [1, 2, 2, 4, 1]


def test_patch_discriminator_has_the_published_size_and_names():
    with torch.device("meta"):
        model = PatchDiscriminator(in_channels=1, channels=64, num_layers=3)
        assert model(torch.zeros(2, 1, 1024, 64)).shape == (2, 1, 126, 6)
    assert sum(p.numel() for p in model.parameters()) == 2_763_585
    weights = {name for name in model.state_dict() if name.endswith(".weight")}
    assert weights == {f"main.{i}.weight" for i in (0, 2, 3, 5, 6, 8, 9, 11)}
    assert model.main[2].bias is None and model.main[11].bias is not None


def test_patch_discriminator_starts_at_std_002_and_judges_70_by_70_patches():
    torch.manual_seed(0)
    model = PatchDiscriminator(in_channels=1, channels=8, num_layers=3).eval()
    assert model.main[5].weight.std().item() == pytest.approx(0.02, rel=0.05)
    mel = torch.randn(1, 1, 160, 96, requires_grad=True)
    model(mel)[0, 0, 8, 5].backward()
    seen = mel.grad[0, 0].abs() > 0
    assert (seen.any(dim=1).sum().item(), seen.any(dim=0).sum().item()) == (70, 70)
