"""The convolutional VAE of AudioLDM (arXiv 2301.12503): log-mels to latents and back.

Matches the `AutoencoderKL` of the AudioLDM repositories and of diffusers, whose convolutions run on maps with
frames before mel bins. Halving pads one zero on the right and at the bottom only, unlike the UNet's. The loss
and its discriminator are an objective's business. Axis letters: b batch, c channels, f mel bins, n mel
frames, t latent frames.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm_audio.layers import Level, ResBlock, UpsampleConv

NORM_EPS = 1e-6


class Posterior(NamedTuple):
    """The diagonal Gaussian of latents that the encoder sees in a mel; each field (b, c, t, f)."""

    mean: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        """(b, c, t, f) standard deviation."""
        return (0.5 * self.logvar).exp()

    def sample(self, noise: Tensor) -> Tensor:
        """Standard normal noise (b, c, t, f) -> latent (b, c, t, f)."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """(b,) KL divergence from N(0, I), averaged over the latent's elements (not summed)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).mean(dim=(1, 2, 3))


class MapAttention(nn.Module):
    """Single-head self-attention over all positions of a feature map, as a residual branch."""

    def __init__(self, *, channels: int, norm_groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, t, f) -> (b, c, t, f)."""
        h = rearrange(self.norm(x), "b c t f -> b 1 (t f) c")
        out = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))  # (b, 1, t·f, c)
        return x + rearrange(self.to_out(out), "b 1 (t f) c -> b c t f", f=x.shape[-1])


def _res_block(in_channels: int, out_channels: int, *, norm_groups: int, dropout: float) -> ResBlock:
    return ResBlock(
        in_channels=in_channels,
        out_channels=out_channels,
        embed_dim=None,
        norm_groups=norm_groups,
        norm_eps=NORM_EPS,
        dropout=dropout,
    )


def _middle(channels: int, *, norm_groups: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        _res_block(channels, channels, norm_groups=norm_groups, dropout=dropout),
        MapAttention(channels=channels, norm_groups=norm_groups),
        _res_block(channels, channels, norm_groups=norm_groups, dropout=dropout),
    )


class Encoder(nn.Module):
    """A mel map to the moments of its latent; every level but the last halves both axes."""

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int,
        channel_mults: Sequence[int],
        num_res_blocks: int,
        latent_channels: int,
        norm_groups: int,
        dropout: float,
    ):
        super().__init__()
        width = channels
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down = nn.ModuleList()
        for level, mult in enumerate(channel_mults):
            blocks = []
            for _ in range(num_res_blocks):
                blocks.append(_res_block(width, channels * mult, norm_groups=norm_groups, dropout=dropout))
                width = channels * mult
            resample = nn.Conv2d(width, width, 3, stride=2) if level < len(channel_mults) - 1 else None
            self.down.append(Level(blocks=blocks, resample=resample))
        self.mid = _middle(width, norm_groups=norm_groups, dropout=dropout)
        self.norm_out = nn.GroupNorm(norm_groups, width, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(width, 2 * latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, n, f) -> (b, 2 · latent_channels, t, f')."""
        h = self.conv_in(x)
        for level in self.down:
            for block in level.blocks:
                h = block(h)
            if level.resample is not None:
                h = level.resample(F.pad(h, (0, 1, 0, 1)))
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """A latent to its mel map: the encoder's levels in reverse, with one more res block each."""

    def __init__(
        self,
        *,
        out_channels: int,
        channels: int,
        channel_mults: Sequence[int],
        num_res_blocks: int,
        latent_channels: int,
        norm_groups: int,
        dropout: float,
    ):
        super().__init__()
        width = channels * channel_mults[-1]
        self.conv_in = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.mid = _middle(width, norm_groups=norm_groups, dropout=dropout)
        self.up = nn.ModuleList()  # deepest level first, as it runs
        for level in range(len(channel_mults) - 1, -1, -1):
            blocks = []
            for _ in range(num_res_blocks + 1):
                out_width = channels * channel_mults[level]
                blocks.append(_res_block(width, out_width, norm_groups=norm_groups, dropout=dropout))
                width = out_width
            resample = UpsampleConv(width) if level > 0 else None
            self.up.append(Level(blocks=blocks, resample=resample))
        self.norm_out = nn.GroupNorm(norm_groups, width, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(b, latent_channels, t, f') -> (b, out_channels, n, f)."""
        h = self.mid(self.conv_in(z))
        for level in self.up:
            for block in level.blocks:
                h = block(h)
            if level.resample is not None:
                h = level.resample(h, (2 * h.shape[2], 2 * h.shape[3]))
        return self.conv_out(F.silu(self.norm_out(h)))


class VAE(nn.Module):
    """Mel autoencoder; `downsample` (mel frames per latent frame) is 2^(levels - 1) on both axes.

    With `in_channels` above 1 the mel is cut into that many contiguous bands, which become the channels
    (the original's `subband`; 1 in every released model).
    """

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int,
        channel_mults: Sequence[int],
        num_res_blocks: int,
        latent_channels: int,
        norm_groups: int,
        dropout: float,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.latent_channels = latent_channels
        self.downsample = 2 ** (len(channel_mults) - 1)
        self.encoder = Encoder(
            in_channels=in_channels,
            channels=channels,
            channel_mults=channel_mults,
            num_res_blocks=num_res_blocks,
            latent_channels=latent_channels,
            norm_groups=norm_groups,
            dropout=dropout,
        )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(
            out_channels=in_channels,
            channels=channels,
            channel_mults=channel_mults,
            num_res_blocks=num_res_blocks,
            latent_channels=latent_channels,
            norm_groups=norm_groups,
            dropout=dropout,
        )

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight, at which VQGAN's adaptive weight compares gradients."""
        return self.decoder.conv_out.weight

    def latent_shape(self, mel: Tensor) -> tuple[int, int, int]:
        """(c, t, f') of the latent of each mel in (b, f, n)."""
        bins, frames = mel.shape[-2] // self.in_channels, mel.shape[-1]
        return self.latent_channels, frames // self.downsample, bins // self.downsample

    def encode(self, mel: Tensor) -> Posterior:
        """(b, f, n) log-mel -> posterior over (b, c, t, f') latents, t = n / downsample.

        Raises ValueError where f (per band) or n is not divisible by `downsample`.
        """
        bins, frames = mel.shape[-2:]
        if frames % self.downsample:
            raise ValueError(f"{frames} mel frames are not divisible by {self.downsample}")
        if bins % (self.in_channels * self.downsample):
            raise ValueError(f"{bins} mel bins are not divisible by {self.in_channels * self.downsample}")
        maps = rearrange(mel, "b (c f) n -> b c n f", c=self.in_channels)
        mean, logvar = self.quant_conv(self.encoder(maps)).chunk(2, dim=1)
        return Posterior(mean=mean, logvar=logvar.clamp(-30, 20))

    def decode(self, z: Tensor) -> Tensor:
        """(b, c, t, f') latent, not multiplied by `latent_scale` -> (b, f, n) log-mel, n = t · downsample."""
        return rearrange(self.decoder(self.post_quant_conv(z)), "b c n f -> b (c f) n")

    def forward(self, mel: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
        """(b, f, n) log-mel, standard normal noise (b, c, t, f') -> (b, f, n) reconstruction, posterior."""
        posterior = self.encode(mel)
        return self.decode(posterior.sample(noise)), posterior
