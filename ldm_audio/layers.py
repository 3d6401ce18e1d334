"""Layers that two or more networks share: time embedding, attention, feed-forward, res block, level.

All but `SelfAttention` match the blocks of latent diffusion (arXiv 2112.10752) as AudioLDM uses them. Axis
letters: b batch, c channels, d width, h heads, i queries, j keys, t latent frames, f mel bins.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

NARROW = 4  # mel bins of a map below which oneDNN's transposed convolution is the slower one
PACKED_ROWS = 16  # what a packed weight is ordered for; as fast for one row


def zero_init(module: Module) -> Module:
    """Set every parameter of `module` to zero, so that the residual branch it ends starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """(b,) time steps, integer or not -> (b, dim) float32: cosines, then sines, of periods 2π to 20000π.

    The order (cosine first) and the frequencies 10000^(-k / (dim / 2)) are those of latent diffusion.
    """
    half = dim // 2
    order = torch.arange(half, device=timestep.device, dtype=torch.float32)
    angles = timestep.float()[:, None] * torch.exp(-math.log(10000) * order / half)  # (b, d/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (b, d)


class TimeEmbedding(nn.Module):
    """Sinusoids of the time step through a two-layer network."""

    def __init__(self, *, dim: int, out_dim: int):
        super().__init__()
        if dim % 2:
            raise ValueError(f"the time embedding needs an even width, got {dim}")
        self.dim = dim
        self.linear1 = nn.Linear(dim, out_dim)
        self.linear2 = nn.Linear(out_dim, out_dim)

    def forward(self, timestep: Tensor) -> Tensor:
        """(b,) -> (b, out_dim)."""
        waves = sinusoidal_embedding(timestep, self.dim).to(self.linear1.weight.dtype)
        return self.linear2(F.silu(self.linear1(waves)))


def unit(embed: Tensor) -> Tensor:
    """(b, d) -> (b, d) of length 1, in float32 at least."""
    return F.normalize(embed.to(torch.promote_types(embed.dtype, torch.float32)), dim=-1)


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself, or to a context of width `context_dim`."""

    def __init__(self, *, dim: int, num_heads: int, context_dim: int | None, dropout: float):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} heads")
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor | None = None, context_mask: Tensor | None = None) -> Tensor:
        """(b, i, d) queries, (b, j, context_dim) context or None for x itself, (b, j) mask -> (b, i, d)."""
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(y, "b i (h d) -> b h i d", h=self.num_heads) for y in (q, k, v))
        mask = None if context_mask is None else rearrange(context_mask, "b j -> b 1 1 j")
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (b, h, i, d)
        return self.dropout(self.to_out(rearrange(out, "b h i d -> b i (h d)")))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) on the first channels of x (..., i, d); angles (i, r), r <= d even.

    Channel k turns with channel k + r / 2 by `angles[:, k]`; both halves of `angles` are the same.
    """
    turned, rest = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    swapped = torch.cat([-second, first], dim=-1)
    return torch.cat([turned * angles.cos() + swapped * angles.sin(), rest], dim=-1)


class SelfAttention(nn.Module):
    """Multi-head self-attention; one matrix makes queries, keys and values; dropout on its weights."""

    def __init__(self, *, dim: int, num_heads: int, qkv_bias: bool, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        angles: Tensor | None = None,
    ) -> Tensor:
        """(b, i, d) -> (b, i, d); mask (b, 1, 1, i) or (b, 1, i, i), True = keep.

        causal: a place sees itself and those before it. angles: as for `rotate`; queries, keys and values
        turn alike.
        """
        qkv = rearrange(self.qkv(x), "b i (three h d) -> three b h i d", three=3, h=self.num_heads)
        q, k, v = qkv if angles is None else rotate(qkv, angles)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return self.proj(rearrange(x, "b h i d -> b i (h d)"))


class GEGLU(nn.Module):
    """Feed-forward with a GELU gate (arXiv 2002.05202)."""

    def __init__(self, *, dim: int, ff_dim: int, dropout: float):
        super().__init__()
        self.proj_in = nn.Linear(dim, 2 * ff_dim)  # the values, then the gates
        self.dropout = nn.Dropout(dropout)
        self.proj_out = nn.Linear(ff_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, i, d) -> (b, i, d)."""
        value, gate = self.proj_in(x).chunk(2, dim=-1)  # (b, i, ff_dim) each
        return self.proj_out(self.dropout(value * F.gelu(gate)))


class ResBlock(nn.Module):
    """Two 3x3 convolutions around an identity; a conditioning vector, if any, is added between them."""

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        embed_dim: int | None,
        norm_groups: int,
        norm_eps: float,
        dropout: float,
    ):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embed_proj = None if embed_dim is None else nn.Linear(embed_dim, out_channels)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embed: Tensor | None = None) -> Tensor:
        """(b, c, t, f), embed (b, embed_dim) if the block has an `embed_dim` -> (b, out_channels, t, f)."""
        in_place = not torch.is_grad_enabled()  # at the widest maps, what is kept decides the peak of memory
        h = self.conv1(F.silu(self.norm1(x), inplace=in_place))
        if self.embed_proj is not None:
            h = h + rearrange(self.embed_proj(F.silu(embed)), "b c -> b c 1 1")
        h = self.conv2(self.dropout(F.silu(self.norm2(h), inplace=in_place)))
        return h.add_(self.skip(x)) if in_place else self.skip(x) + h


class UpsampleConv(nn.Conv2d):
    """A map at twice the size, each value four times, through a 3x3 convolution.

    Each output sees two by two different values only, so that one transposed convolution with a 4x4 kernel
    does both, with 4 multiplications in the place of 9; so in inference on the CPU.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)
        self._sums: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """(b, c, t, f) -> (b, c, *size), `size` being (2 t, 2 f) or one less on either axis."""
        is_double = tuple(size) == (2 * x.shape[2], 2 * x.shape[3])
        if not is_double or x.shape[3] < NARROW or not is_plain_cpu(x):
            return super().forward(F.interpolate(x, size=tuple(size), mode="nearest"))
        return F.conv_transpose2d(x, self.kernel_sums(), self.bias, stride=2, padding=1)

    def kernel_sums(self) -> Tensor:
        """(in, out, 4, 4): the sums of the 3x3 kernel's values that a value of the small map meets; kept."""
        key = self.weight.data_ptr(), self.weight._version
        if self._sums is None or self._sums[0] != key:
            meets = self.weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
            sums = torch.einsum("oiyx,ay,bx->ioab", self.weight, meets, meets)
            self._sums = key, sums.contiguous(memory_format=torch.channels_last)
        return self._sums[1]


def is_plain_cpu(x: Tensor) -> bool:
    """Whether `x` is on a CPU with oneDNN, in plain inference: no gradient, no autocast, no compiler."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
    )


class Level(nn.Module):
    """The blocks of one resolution and the convolution that leaves it (None at a path's last level).

    It only holds them: the network says what each block is fed and how the maps are padded or enlarged.
    """

    def __init__(self, *, blocks: Iterable[nn.Module], resample: nn.Conv2d | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


class PackedLinear(nn.Module):
    """A linear layer for inference on the CPU, its weight in the order of oneDNN's kernels, which is kept.

    Reads the weight once a call, where the plain layer may sort it anew for each, and is not MKL's, which
    holds back on processors of other makers.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), PACKED_ROWS)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PackedPointwise(PackedLinear):
    """The same of a convolution with a 1x1 kernel, which moves nothing where channels come last in memory."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, t, f) -> (b, out, t, f)."""
        return rearrange(super().forward(rearrange(x, "b c t f -> b t f c")), "b t f c -> b c t f")


class PackedNarrowConv(PackedLinear):
    """A 3x3 convolution of maps that are one or two mel bins wide, as one matrix product of three lines.

    In so narrow a map a third of the kernel meets padding or more, and oneDNN's own loops run idle: the
    product is two to four times as fast.
    """

    def __init__(self, conv: nn.Conv2d, bins: int):
        if bins > 2:
            raise ValueError(f"bins={bins}: expected 1 or 2")
        weight = conv.weight.detach()
        out, c = weight.shape[:2]
        kernel = weight.new_empty(bins, out, 3, bins, c)
        for to in range(bins):
            for source in range(bins):  # of two bins each meets both
                kernel[to, :, :, source] = weight[..., source - to + 1].mT
        super().__init__(
            rearrange(kernel, "to out lines source c -> (to out) (lines source c)"),
            None if conv.bias is None else conv.bias.detach().repeat(bins),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, t, f) -> (b, out, t, f)."""
        lines = F.pad(rearrange(x, "b c t f -> b t (f c)"), (0, 0, 1, 1))
        length = x.shape[2]
        taps = torch.cat([lines[:, shift : shift + length] for shift in range(3)], dim=-1)
        return rearrange(super().forward(taps), "b t (f out) -> b out t f", f=x.shape[3])


def can_pack(weight: Tensor) -> bool:
    """Whether this torch has oneDNN's kernels for this weight's device and dtype."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack_linears(network: nn.Module) -> None:
    """Replaces every linear layer by a packed one, in place, one at a time, so that memory stays the same.

    So also convolutions with a 1x1 kernel.

    The network can be neither trained nor saved nor moved any more. Where this torch or this device has no
    such kernels, nothing is changed.
    """
    parents = [module for module in network.modules() if not isinstance(module, nn.Linear | nn.Conv2d)]
    for module in parents:  # a list of all modules would keep every replaced weight to the end
        for name in [name for name, _ in module.named_children()]:
            child = module.get_submodule(name)
            if not isinstance(child, nn.Linear | nn.Conv2d) or not can_pack(child.weight):
                continue
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, child.bias))
            elif child.kernel_size == (1, 1) and child.stride == (1, 1):
                kernel = rearrange(child.weight, "out c 1 1 -> out c")
                setattr(module, name, PackedPointwise(kernel, child.bias))
