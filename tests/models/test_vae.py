import pytest
import torch
from einops import rearrange
from torch import nn

from ldm_audio.convert.diffusers import vae_arguments, vae_rules
from ldm_audio.convert.rules import apply_rules, shapes_of
from ldm_audio.models.vae import VAE, Posterior

torch.set_num_threads(1)

FULL = {
    "in_channels": 1,
    "channels": 128,
    "channel_mults": [1, 2, 4],
    "num_res_blocks": 2,
    "latent_channels": 8,
    "norm_groups": 32,
    "dropout": 0.0,
}
TOY = FULL | {"channels": 8, "latent_channels": 3, "norm_groups": 4}


def randomise(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)


def toy(**changes) -> VAE:
    vae = VAE(**TOY | changes).eval()
    randomise(vae, seed=0)
    return vae


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "changes, encoder, decoder, downsample",
    [
        ({}, 22_395_024, 32_981_505, 4),
        ({"channel_mults": [1, 2, 4, 8], "latent_channels": 16}, 90_010_272, 133_523_969, 8),
    ],
    ids=["16 kHz", "48 kHz"],
)
def test_full_sizes_are_those_of_the_originals(changes, encoder, decoder, downsample):
    with torch.device("meta"):
        vae = VAE(**FULL | changes)
    assert sum(p.numel() for p in vae.encoder.parameters()) == encoder
    assert sum(p.numel() for p in vae.decoder.parameters()) == decoder
    assert vae.downsample == downsample
    if not changes:
        assert sum(p.numel() for p in vae.parameters()) == 55_376_873
        assert len(vae.state_dict()) == 204


@pytest.mark.parametrize("widths", [[8, 16, 32], [8, 16, 16, 24], [8]], ids=["÷4", "÷8", "÷1"])
@pytest.mark.parametrize("channels", [1, 2])
def test_vae_equals_diffusers(widths, channels):
    from diffusers import AutoencoderKL

    config = {
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": 2,
        "latent_channels": 3,
        "norm_num_groups": 4,
    }
    reference = AutoencoderKL(**config).eval()
    randomise(reference, seed=0)
    vae = VAE(**vae_arguments(config)).eval()
    vae.load_state_dict(apply_rules(vae_rules(), reference.state_dict(), shapes_of(vae)))

    down = vae.downsample
    maps = noise(2, channels, 24, 16)  # (b, c, n, f)
    mel = rearrange(maps, "b c n f -> b (c f) n")
    z = noise(2, 3, 24 // down, 16 // down)
    with torch.no_grad():
        theirs = reference.encode(maps).latent_dist
        ours = vae.encode(mel)
        their_mel = rearrange(reference.decode(z).sample, "b c n f -> b (c f) n")
        our_mel = vae.decode(z)
    assert all(norm.eps == 1e-6 for norm in vae.modules() if isinstance(norm, nn.GroupNorm))
    assert all(norm.eps == 1e-6 for norm in reference.modules() if isinstance(norm, nn.GroupNorm))
    assert theirs.mean.abs().max() > 0.1 and their_mel.abs().max() > 0.1
    assert (ours.mean - theirs.mean).abs().max() <= 1e-5
    assert (ours.logvar - theirs.logvar).abs().max() <= 1e-5
    assert (ours.std - theirs.std).abs().max() <= 1e-5
    assert (our_mel - their_mel).abs().max() <= 1e-5
    mean_kl = theirs.kl() / ours.mean[0].numel()
    assert (ours.kl() - mean_kl).abs().max() <= 1e-5


def test_log_variance_is_clamped_where_the_weights_run_away():
    vae = toy()
    with torch.no_grad():
        vae.quant_conv.bias[3:].copy_(torch.tensor([-1e3, 0.0, 1e3]))
        logvar = vae.encode(noise(1, 8, 16)).logvar
    assert (logvar[:, 0] == -30).all() and (logvar[:, 2] == 20).all()
    assert logvar[:, 1].abs().max() < 20


def test_posterior_samples_and_kl_are_those_of_the_gaussian():
    posterior = Posterior(mean=torch.full((1, 2, 3, 4), 1.5), logvar=torch.full((1, 2, 3, 4), 0.8))
    assert torch.equal(posterior.sample(torch.zeros(1, 2, 3, 4)), posterior.mean)
    std = torch.exp(torch.tensor(0.4))
    torch.testing.assert_close(posterior.sample(torch.ones(1, 2, 3, 4)), posterior.mean + std)
    gaussian = torch.distributions.Normal(posterior.mean, posterior.std)
    unit = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(gaussian, unit).mean()
    torch.testing.assert_close(posterior.kl(), expected[None])
    standard = Posterior(mean=torch.zeros(2, 2, 3, 4), logvar=torch.zeros(2, 2, 3, 4))
    assert torch.equal(standard.kl(), torch.zeros(2))


@pytest.mark.parametrize("mults, downsample", [([1, 2, 4], 4), ([1, 2, 2, 2], 8), ([1], 1)])
def test_shapes_of_every_depth(mults, downsample):
    vae = toy(channel_mults=mults)
    mel = noise(2, 16, 40)
    posterior = vae.encode(mel)
    assert vae.downsample == downsample
    assert posterior.mean.shape == (2, vae.latent_channels, 40 // downsample, 16 // downsample)
    assert vae.decode(posterior.mean).shape == mel.shape


def test_forward_is_encode_sample_decode():
    vae = toy()
    mel, draw = noise(2, 16, 24), noise(2, 3, 6, 4, seed=2)
    reconstruction, posterior = vae(mel, draw)
    assert torch.equal(reconstruction, vae.decode(vae.encode(mel).sample(draw)))
    assert torch.equal(posterior.mean, vae.encode(mel).mean)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 16, 22), "22 mel frames are not divisible by 4"),
        ((1, 15, 24), "15 mel bins are not divisible by 4"),
    ],
)
def test_odd_lengths_are_refused_with_their_number(shape, message):
    with pytest.raises(ValueError, match=message):
        toy().encode(noise(*shape))


def test_bands_must_each_be_divisible():
    with pytest.raises(ValueError, match="12 mel bins are not divisible by 8"):
        toy(in_channels=2).encode(noise(1, 12, 24))


def test_rows_are_independent():
    vae = toy()
    mel = noise(3, 16, 24)
    alone = torch.cat([vae.decode(vae.encode(row[None]).mean) for row in mel])
    torch.testing.assert_close(vae.decode(vae.encode(mel).mean), alone, atol=1e-5, rtol=0)


def test_every_parameter_gets_a_gradient_and_there_are_no_buffers():
    vae = toy()
    reconstruction, posterior = vae(noise(2, 16, 24), noise(2, 3, 6, 4))
    (reconstruction.square().mean() + posterior.kl().mean()).backward()
    assert not [name for name, p in vae.named_parameters() if p.grad is None or p.grad.count_nonzero() == 0]
    assert dict(vae.named_buffers()) == {}
    assert vae.last_layer is vae.decoder.conv_out.weight
