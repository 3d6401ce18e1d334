"""Discriminators: HiFi-GAN's multi-period and multi-scale ones on waveforms, PatchGAN's on mel spectrograms.

`WaveDiscriminator` implements Kong et al. 2020 (arXiv 2010.05646, section 2.3) with the kernels, strides and
norms of its published recipe. `PatchDiscriminator` implements the 70 x 70 discriminator of Isola et al. 2017
(arXiv 1611.07004) as AudioLDM's autoencoder uses it.

Departs from the originals in that a discriminator judges one waveform at a time, real or made: the objective
decides which pairs it compares. Batch norm takes its statistics from the batch of all ranks.
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from ldm_audio.distributed import BatchNorm2d
from ldm_audio.errors import InputError

LEAK = 0.1

# kernel, stride, groups of the seven convolutions of a scale discriminator at full width
SCALE_LAYERS = ((15, 1, 1), (41, 2, 4), (41, 2, 16), (41, 4, 16), (41, 4, 16), (41, 1, 16), (5, 1, 1))

# What one discriminator says of a batch: its logits (b, n), and the features of all its layers, logits last.
Judgement = tuple[Tensor, list[Tensor]]


class WaveDiscriminator(nn.Module):
    """Several views of one waveform: folded by each period, and averaged down by 1, 2, 4, ...

    Args:
        periods: lengths in samples by which the waveform is folded; [2, 3, 5, 7, 11] in the paper.
        period_channels: widths of each period discriminator; [32, 128, 512, 1024, 1024] in the paper.
        scale_channels: widths of each scale discriminator; [128, 128, 256, 512, 1024, 1024, 1024] in the
            paper, empty for none.
        num_scales: number of scale discriminators; 3 in the paper.
    """

    def __init__(
        self,
        *,
        periods: Sequence[int],
        period_channels: Sequence[int],
        scale_channels: Sequence[int],
        num_scales: int,
    ):
        super().__init__()
        self.periods = nn.ModuleList(
            PeriodDiscriminator(period=period, channels=period_channels) for period in periods
        )
        # Spectral norm on the raw waveform, weight norm on its averages, as in the original.
        self.scales = nn.ModuleList(
            ScaleDiscriminator(channels=scale_channels, spectral=scale == 0)
            for scale in range(num_scales if scale_channels else 0)
        )

    def forward(self, waveform: Tensor) -> list[Judgement]:
        """(b, 1, s) waveform -> [(logits (b, n), features), ...]: periods, then scales, fine to coarse."""
        judgements = [period(waveform) for period in self.periods]
        for scale in self.scales:
            judgements.append(scale(waveform))
            waveform = F.avg_pool1d(waveform, kernel_size=4, stride=2, padding=2)
        return judgements


class PeriodDiscriminator(nn.Module):
    """Convolutions along time on a waveform folded into rows of `period` samples, which never mix columns."""

    def __init__(self, *, period: int, channels: Sequence[int]):
        super().__init__()
        self.period = period
        strides = [3] * (len(channels) - 1) + [1]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(wide_in, wide_out, (5, 1), (stride, 1), padding=(2, 0)))
            for wide_in, wide_out, stride in zip([1, *channels[:-1]], channels, strides, strict=True)
        )
        self.conv_post = weight_norm(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, waveform: Tensor) -> Judgement:
        """(b, 1, s) waveform -> logits (b, n) and features (b, c, n / period, period)."""
        short = -waveform.shape[-1] % self.period
        padded = F.pad(waveform, (0, short), mode="reflect") if short else waveform
        folded = rearrange(padded, "b c (n period) -> b c n period", period=self.period)
        return _judge(folded, self.convs, self.conv_post)


class ScaleDiscriminator(nn.Module):
    """Strided, grouped convolutions on the waveform.

    The paper has seven; with fewer widths the later of the middle ones are left out. The groups of the
    paper's widths are 1, 4, 16, 16, 16, 16, 1; at other widths a layer uses the greatest common divisor of
    that number and its two widths.
    """

    def __init__(self, *, channels: Sequence[int], spectral: bool):
        super().__init__()
        if not 2 <= len(channels) <= len(SCALE_LAYERS):
            raise InputError(f"scale_channels must be empty or 2 to 7 widths, got {list(channels)}")
        layers = (*SCALE_LAYERS[: len(channels) - 1], SCALE_LAYERS[-1])
        norm = spectral_norm if spectral else weight_norm
        self.convs = nn.ModuleList(
            norm(
                nn.Conv1d(
                    wide_in,
                    wide_out,
                    kernel,
                    stride,
                    padding=(kernel - 1) // 2,
                    groups=math.gcd(groups, wide_in, wide_out),
                )
            )
            for wide_in, wide_out, (kernel, stride, groups) in zip(
                [1, *channels[:-1]], channels, layers, strict=True
            )
        )
        self.conv_post = norm(nn.Conv1d(channels[-1], 1, kernel_size=3, padding=1))

    def forward(self, waveform: Tensor) -> Judgement:
        """(b, 1, s) waveform -> logits (b, n) and features (b, c, n)."""
        return _judge(waveform, self.convs, self.conv_post)


def _judge(x: Tensor, convs: nn.ModuleList, conv_post: nn.Module) -> Judgement:
    features = []
    for conv in convs:
        x = F.leaky_relu(conv(x), LEAK)
        features.append(x)
    logits = conv_post(x)
    return rearrange(logits, "b ... -> b (...)"), [*features, logits]


class PatchDiscriminator(nn.Module):
    """4 x 4 convolutions with batch norm; each logit judges one patch (70 x 70 with three layers).

    Args:
        in_channels: 1 for a mel spectrogram.
        channels: width of the first layer, doubled by each further one up to eight times; 64 in AudioLDM.
        num_layers: number of strided layers; 3 in AudioLDM.
    """

    def __init__(self, *, in_channels: int, channels: int, num_layers: int):
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(num_layers + 1)]
        strides = [2] * (num_layers - 1) + [1]
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for wide_in, wide_out, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            layers += [
                nn.Conv2d(wide_in, wide_out, 4, stride=stride, padding=1, bias=False),
                BatchNorm2d(wide_out),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
            elif isinstance(layer, BatchNorm2d):
                nn.init.normal_(layer.weight, mean=1.0, std=0.02)

    def forward(self, mel: Tensor) -> Tensor:
        """(b, 1, n, f) log-mel -> (b, 1, n', f') logits, about an eighth of each side with three layers."""
        return self.main(mel)
