"""Layers that two or more networks share: time embedding, attention, feed-forward, res block, level.

All but `SelfAttention` match the blocks of latent diffusion (arXiv 2112.10752) as AudioLDM uses them. Axis
letters: b batch, c channels, d width, h heads, i queries, j keys, t latent frames, f mel bins.
"""

import math
from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

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
        h = self.conv1(F.silu(self.norm1(x)))
        if self.embed_proj is not None:
            h = h + rearrange(self.embed_proj(F.silu(embed)), "b c -> b c 1 1")
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


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

    Reads the weight once a call, where the plain layer may sort it anew for each.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_ROWS)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_linears(network: nn.Module) -> None:
    """Replaces every linear layer by a packed one, in place, one at a time, so that memory stays the same.

    The network can be neither trained nor saved nor moved any more. Where this torch or this device has no
    such kernels, nothing is changed.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child.weight.device.type == "cpu":
                setattr(module, name, PackedLinear(child))
