"""HiFi-GAN generator (Kong et al. 2020, arXiv 2010.05646, section 2.2): log-mel in, waveform out.

Must match, key for key and sample for sample, the vocoders inside AudioLDM and MusicLDM checkpoints
(16 kHz, 64 mel bins) and transformers' `SpeechT5HifiGan` with `normalize_before=False`.

`high_resolution=True` is the padding rule of the 48 kHz, 256-bin variant, which makes the output exactly
`hop_length * n` samples long. Its parameter names follow the 16 kHz model; neither they nor its shapes have
been compared with a released 48 kHz file.

Departs from the original in that a new generator carries no weight norm: training adds it, and released
inference weights have it folded in already.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from ldm_audio.layers import is_plain_cpu

WIDE = 32  # channels from which on convolutions with channels last are the quicker ones on the CPU
NARROW = 256  # channels up to which a plain convolution upsamples quicker than a transposed one there
LEAK = 0.1
FINAL_LEAK = 0.01  # the original forgot to pass its slope at the last activation; released weights need it


class HiFiGAN(nn.Module):
    """Upsampling by transposed convolutions, each followed by the mean of several residual blocks.

    Args:
        n_mels: mel bins of the input.
        channels: width after the first convolution; every upsampling stage halves it.
        upsample_rates: stride of each stage; their product is `hop_length`.
        upsample_kernels: kernel of each stage.
        resblock_kernels: kernels of the residual blocks that run side by side in each stage.
        resblock_dilations: dilations within each of those blocks.
        high_resolution: padding rule of the upsamplers, see `upsample_padding`.
        init_gain: see `init_weights`.
    """

    def __init__(
        self,
        *,
        n_mels: int,
        channels: int,
        upsample_rates: Sequence[int],
        upsample_kernels: Sequence[int],
        resblock_kernels: Sequence[int],
        resblock_dilations: Sequence[Sequence[int]],
        high_resolution: bool,
        init_gain: float | None = None,
    ):
        super().__init__()
        self.hop_length = math.prod(upsample_rates)
        self.context_frames = context_frames(
            upsample_rates=upsample_rates,
            upsample_kernels=upsample_kernels,
            resblock_kernels=resblock_kernels,
            resblock_dilations=resblock_dilations,
        )
        self.conv_pre = nn.Conv1d(n_mels, channels, kernel_size=7, padding=3)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        widths = [channels // 2**stage for stage in range(len(upsample_rates) + 1)]
        for stage, (rate, kernel) in enumerate(zip(upsample_rates, upsample_kernels, strict=True)):
            wide_in, wide_out = widths[stage : stage + 2]
            padding, extra = upsample_padding(rate=rate, kernel=kernel, high_resolution=high_resolution)
            self.ups.append(
                nn.ConvTranspose1d(
                    wide_in, wide_out, kernel, stride=rate, padding=padding, output_padding=extra
                )
            )
            self.resblocks.extend(
                ResBlock(channels=wide_out, kernel=resblock_kernel, dilations=dilations)
                for resblock_kernel, dilations in zip(resblock_kernels, resblock_dilations, strict=True)
            )
        self.conv_post = nn.Conv1d(widths[-1], 1, kernel_size=7, padding=3)
        self.init_weights(init_gain)

    def init_weights(self, gain: float | None) -> None:
        """Normal weights behind the first convolution, gain / sqrt(inputs of an output) wide; None: 0.01.

        That is the released width, which suits wide layers and a million steps; in narrow ones the signal
        fades away.
        """
        for module in self.convolutions()[1:]:
            if gain is None:
                nn.init.normal_(module.weight, std=0.01)
                continue
            inputs = module.in_channels * module.kernel_size[0]
            if isinstance(module, nn.ConvTranspose1d):
                inputs //= module.stride[0]
            nn.init.normal_(module.weight, std=gain / inputs**0.5)

    def forward(self, mel: Tensor) -> Tensor:
        """(b, f, n) natural-log mel -> (b, 1, s) waveform in [-1, 1].

        s is the raw length: 160 n + 32 for the 16 kHz model, `hop_length` * n with `high_resolution`.
        """
        x = self.conv_pre(mel)  # (b, c, n)
        blocks_per_stage = len(self.resblocks) // len(self.ups)
        for i, up in enumerate(self.ups):
            x = F.leaky_relu(x, LEAK)
            x = upsample(up, x)  # (b, c / 2, n * rate), a little longer without high_resolution
            first, *others = self.resblocks[i * blocks_per_stage : (i + 1) * blocks_per_stage]
            total = first(x)
            for block in others:
                total += block(x)
            x = total / blocks_per_stage
        return self.conv_post(F.leaky_relu(x, FINAL_LEAK)).tanh()  # (b, 1, s)

    def add_weight_norm(self) -> None:
        """Split every convolution's weight into norm and direction, for training; outputs stay the same."""
        for convolution in self.convolutions():
            if not parametrize.is_parametrized(convolution, "weight"):
                weight_norm(convolution)

    def convolutions(self) -> list[nn.Module]:
        """All convolutions, the same order in every copy."""
        return [module for module in self.modules() if isinstance(module, nn.Conv1d | nn.ConvTranspose1d)]


class ResBlock(nn.Module):
    """A pair of convolutions for each dilation, the first dilated, the second plain, added to their input."""

    def __init__(self, *, channels: int, kernel: int, dilations: Sequence[int]):
        super().__init__()
        self.convs1 = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=(kernel - 1) * dilation // 2)
            for dilation in dilations
        )
        self.convs2 = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel, padding=(kernel - 1) // 2) for _ in dilations
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, s) -> (b, c, s)."""
        if is_plain_cpu(x) and x.shape[1] >= WIDE:
            return self.forward_in_place(x)
        x = x.contiguous()
        for dilated, plain in zip(self.convs1, self.convs2, strict=True):
            h = dilated(F.leaky_relu(x, LEAK))
            x = x + plain(F.leaky_relu(h, LEAK))
        return x

    def forward_in_place(self, x: Tensor) -> Tensor:
        """The same on the CPU, channels last and with two maps for all that lies between.

        A map of its own for each step would cost nothing but that glibc does not use one's place again for
        the next: over 200 MB in AudioLDM's vocoder.
        """
        out = x.unsqueeze(2).clone(memory_format=torch.channels_last)
        active, h = torch.empty_like(out), torch.empty_like(out)
        for dilated, plain in zip(self.convs1, self.convs2, strict=True):
            torch.ops.aten.leaky_relu.out(out, LEAK, out=active)
            add_convolved(h.zero_(), dilated, active)
            add_convolved(out, plain, F.leaky_relu_(h, LEAK))
        return out.squeeze(2)


def add_convolved(out: Tensor, conv: nn.Conv1d, x: Tensor) -> None:
    """Adds `conv(x)` to `out` in place, both (b, c, 1, s) with channels last, without a map in between."""
    torch.ops.mkldnn._convolution_pointwise_.binary(
        out, x, conv.weight.unsqueeze(2), conv.bias, (0, *conv.padding), (1, 1), (1, *conv.dilation), 1,
        "add", 1.0, None, [], None,
    )  # fmt: skip


def as_line(x: Tensor) -> Tensor:
    """(b, c, s) -> (b, c, 1, s) with channels last in memory, without a copy where they are so already."""
    return x.unsqueeze(2).contiguous(memory_format=torch.channels_last)


def upsample(up: nn.ConvTranspose1d, x: Tensor) -> Tensor:
    """`up(x)`; a narrow one on the CPU by a plain convolution that makes `rate` samples of each step."""
    if not is_plain_cpu(x) or up.out_channels > NARROW:
        return up(x)
    (rate,), (kernel,), (padding,), (extra,) = up.stride, up.kernel_size, up.padding, up.output_padding
    taps = math.ceil(kernel / rate)
    weight = F.pad(up.weight, (0, taps * rate - kernel)).unflatten(2, (taps, rate))
    weight = weight.flip(2).permute(3, 1, 0, 2).flatten(0, 1).unsqueeze(2)  # (rate * c / 2, c, 1, taps)
    y = F.conv2d(as_line(x), weight, up.bias.repeat(rate), padding=(0, taps - 1)).squeeze(2)
    y = y.mT.unflatten(2, (rate, up.out_channels)).flatten(1, 2)  # (b, rate * (s + taps - 1), c / 2)
    size = (x.shape[2] - 1) * rate - 2 * padding + kernel + extra
    return y[:, padding : padding + size].mT


def upsample_padding(*, rate: int, kernel: int, high_resolution: bool) -> tuple[int, int]:
    """(padding, output padding) of one transposed convolution.

    The 16 kHz model trims (kernel - rate) // 2 at both ends, which leaves one extra sample where
    kernel - rate is odd. The high-resolution rule expects kernel = 2 rate and then multiplies the length
    by `rate` exactly.
    """
    if high_resolution:
        return rate // 2 + rate % 2, rate % 2
    return (kernel - rate) // 2, 0


def context_frames(
    *,
    upsample_rates: Sequence[int],
    upsample_kernels: Sequence[int],
    resblock_kernels: Sequence[int],
    resblock_dilations: Sequence[Sequence[int]],
) -> int:
    """How many mel frames to either side of a frame its samples depend on, at most."""
    reach = 3  # samples of the last convolution
    widest = max(
        (kernel - 1) // 2 * sum(dilation + 1 for dilation in dilations)
        for kernel, dilations in zip(resblock_kernels, resblock_dilations, strict=True)
    )
    for rate, kernel in zip(reversed(upsample_rates), reversed(upsample_kernels), strict=True):
        reach = math.ceil((reach + widest + kernel) / rate)
    return reach + 3  # and those of the first
