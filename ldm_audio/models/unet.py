"""The latent UNet of AudioLDM (arXiv 2301.12503) and MusicLDM (arXiv 2308.01546).

Predicts noise (or velocity, or the clean latent) from a noisy latent `zt`, a time step, and up to two kinds
of condition: one vector `embed` for the whole clip (CLAP; "FiLM" in the original's words, though it is only
concatenated with or added to the time embedding), and a sequence `context` for cross-attention. Without a
context width, both attentions of a layer are self-attention, as in the released AudioLDM and MusicLDM. For
comparison the embed can be attended to instead, as a context of one token; no original does so.

Matches `openaimodel.UNetModel` of the AudioLDM repositories and diffusers' `UNet2DConditionModel`; like the
latter and unlike the former it takes latents of any length. Axis letters: b batch, c channels, d width,
t latent frames, f latent mel bins, l context tokens.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm_audio.layers import GEGLU, Attention, Level, ResBlock, TimeEmbedding, UpsampleConv, zero_init


class TransformerLayer(nn.Module):
    """Self-attention, attention to the context (or to itself again), feed-forward, each after a LayerNorm."""

    def __init__(self, *, dim: int, num_heads: int, context_dim: int | None, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim=dim, num_heads=num_heads, context_dim=None, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim=dim, num_heads=num_heads, context_dim=context_dim, dropout=dropout)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = GEGLU(dim=dim, ff_dim=4 * dim, dropout=dropout)

    def forward(self, x: Tensor, context: Tensor | None, context_mask: Tensor | None) -> Tensor:
        """(b, t·f, d), context (b, l, d) or None, mask (b, l) or None -> (b, t·f, d)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context, context_mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer layers over all positions of a feature map, frames outermost, as one residual branch."""

    def __init__(
        self,
        *,
        channels: int,
        num_heads: int,
        depth: int,
        context_dim: int | None,
        norm_groups: int,
        dropout: float,
    ):
        super().__init__()
        self.context_dim = context_dim
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)  # not the 1e-5 of the res blocks
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.layers = nn.ModuleList(
            TransformerLayer(dim=channels, num_heads=num_heads, context_dim=context_dim, dropout=dropout)
            for _ in range(depth)
        )
        self.proj_out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor | None, context_mask: Tensor | None) -> Tensor:
        """(b, c, t, f), context (b, l, d), mask (b, l) -> (b, c, t, f); both unused without `context_dim`."""
        if self.context_dim is None:
            context = context_mask = None
        h = rearrange(self.proj_in(self.norm(x)), "b c t f -> b (t f) c")
        for layer in self.layers:
            h = layer(h, context, context_mask)
        return x + self.proj_out(rearrange(h, "b (t f) c -> b c t f", f=x.shape[-1]))


class Block(nn.Module):
    """A res block, which starts as identity, and the transformers behind it (on levels with attention)."""

    def __init__(self, *, res: ResBlock, transformers: Iterable[SpatialTransformer]):
        super().__init__()
        self.res = res
        zero_init(res.conv2)
        self.transformers = nn.ModuleList(transformers)

    def forward(
        self, x: Tensor, condition: Tensor, context: Tensor | None, context_mask: Tensor | None
    ) -> Tensor:
        """(b, c, t, f), condition (b, d) -> (b, out_channels, t, f)."""
        x = self.res(x, condition)
        for transformer in self.transformers:
            x = transformer(x, context, context_mask)
        return x


class UNet(nn.Module):
    """Denoiser of mel latents; all sizes are arguments, one entry a level in the sequences.

    `attention_levels` says which levels have transformers (the middle always has), `num_heads` how many heads
    these have (the middle has the last level's). Of several `transformers_per_block`, the first stays
    self-attention and only the others see the context, as in the original's `extra_sa_layer`. `embed_mode` is
    `concat` or `add`, to the time embedding, or `attend`: the embed is the context, and there is no other.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        channels: int,
        channel_mults: Sequence[int],
        num_res_blocks: int,
        attention_levels: Sequence[bool],
        num_heads: Sequence[int],
        transformer_depth: int,
        transformers_per_block: int,
        embed_dim: int | None,
        embed_mode: str,
        context_dim: int | None,
        norm_groups: int,
        dropout: float,
    ):
        super().__init__()
        if not len(channel_mults) == len(attention_levels) == len(num_heads):
            raise ValueError(
                "one entry a level is needed: "
                f"{len(channel_mults)} channel_mults, {len(attention_levels)} attention_levels, "
                f"{len(num_heads)} num_heads"
            )
        if embed_mode not in ("concat", "add", "attend"):
            raise ValueError(f"embed_mode must be 'concat', 'add' or 'attend', got {embed_mode!r}")
        if embed_mode == "attend" and (embed_dim is None or context_dim is not None):
            raise ValueError(
                "embed_mode 'attend' needs an embed_dim and no context_dim, got "
                f"embed_dim {embed_dim} and context_dim {context_dim}"
            )
        self.embed_mode = embed_mode
        self.embed_dim = embed_dim
        self.context_dim = context_dim
        self._checkpointing = False

        time_dim = 4 * channels
        self.time_embed = TimeEmbedding(dim=channels, out_dim=time_dim)
        joins_time = embed_dim is not None and embed_mode != "attend"
        self.embed_proj = nn.Linear(embed_dim, time_dim) if joins_time else None
        if self.embed_proj is not None:
            nn.init.normal_(self.embed_proj.weight)  # unit-length embeds, so outputs of unit variance
        condition_dim = 2 * time_dim if joins_time and embed_mode == "concat" else time_dim

        res_block = partial(
            ResBlock, embed_dim=condition_dim, norm_groups=norm_groups, norm_eps=1e-5, dropout=dropout
        )
        transformer = partial(
            SpatialTransformer, depth=transformer_depth, norm_groups=norm_groups, dropout=dropout
        )
        context_dims = [embed_dim if embed_mode == "attend" else context_dim] * transformers_per_block
        if transformers_per_block > 1:
            context_dims[0] = None

        def block(in_width: int, out_width: int, heads: int | None) -> Block:
            """Without transformers where `heads` is None."""
            dims = [] if heads is None else context_dims
            return Block(
                res=res_block(in_channels=in_width, out_channels=out_width),
                transformers=[transformer(channels=out_width, num_heads=heads, context_dim=d) for d in dims],
            )

        widths = [channels * mult for mult in channel_mults]
        heads = [number if attends else None for number, attends in zip(num_heads, attention_levels)]
        last = len(widths) - 1
        width = channels
        skip_widths = [channels]
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)

        self.down = nn.ModuleList()
        for level in range(last + 1):
            blocks = []
            for _ in range(num_res_blocks):
                blocks.append(block(width, widths[level], heads[level]))
                width = widths[level]
                skip_widths.append(width)
            resample = None
            if level < last:
                resample = nn.Conv2d(width, width, 3, stride=2, padding=1)
                skip_widths.append(width)
            self.down.append(Level(blocks=blocks, resample=resample))

        self.mid = nn.ModuleList([block(width, width, num_heads[last]), block(width, width, None)])

        self.up = nn.ModuleList()  # deepest level first, as it runs
        for level in range(last, -1, -1):
            blocks = []
            for _ in range(num_res_blocks + 1):
                blocks.append(block(width + skip_widths.pop(), widths[level], heads[level]))
                width = widths[level]
            resample = UpsampleConv(width) if level > 0 else None
            self.up.append(Level(blocks=blocks, resample=resample))

        self.norm_out = nn.GroupNorm(norm_groups, width, eps=1e-5)
        self.conv_out = zero_init(nn.Conv2d(width, out_channels, 3, padding=1))

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Whether the backward pass recomputes the blocks' activations instead of keeping them."""
        self._checkpointing = enabled

    def repeated_blocks(self) -> list[nn.Module]:
        """The parts that a wrapper may treat one by one, in the order of forward."""
        down, up = ([block for level in levels for block in level.blocks] for levels in (self.down, self.up))
        return [*down, *self.mid, *up]

    def forward(
        self,
        zt: Tensor,
        timestep: Tensor,
        embed: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Noisy latent (b, c, t, f), time step (b,) -> prediction (b, out_channels, t, f).

        embed (b, embed_dim) is needed where the network has an `embed_dim`, context (b, l, context_dim) where
        it has a `context_dim`; context_mask (b, l) is True at the tokens to keep.
        """
        condition = self._condition(timestep, embed)  # (b, d)
        if (context is None) != (self.context_dim is None):
            given = "missing" if context is None else "given"
            raise ValueError(f"context_dim is {self.context_dim}, but context is {given}")
        if self.embed_mode == "attend":
            context = self.embed_dim**0.5 * embed.unsqueeze(1)  # (b, 1, d), of unit variance

        def run(block: Block, x: Tensor) -> Tensor:
            if self._checkpointing and torch.is_grad_enabled():
                return checkpoint(block, x, condition, context, context_mask, use_reentrant=False)
            return block(x, condition, context, context_mask)

        h = self.conv_in(zt)
        skips = [h]
        for level in self.down:
            for block in level.blocks:
                h = run(block, h)
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h)
                skips.append(h)

        for block in self.mid:
            h = run(block, h)

        for level in self.up:
            for block in level.blocks:
                h = run(block, torch.cat([h, skips.pop()], dim=1))
            if level.resample is not None:
                # Twice the size, or one less where halving rounded up: the skip knows.
                h = level.resample(h, skips[-1].shape[-2:])

        return self.conv_out(F.silu(self.norm_out(h)))

    def _condition(self, timestep: Tensor, embed: Tensor | None) -> Tensor:
        """(b,), (b, embed_dim) -> (b, d), what every res block sees: the time step and, if any, the clip."""
        if (embed is None) != (self.embed_dim is None):
            given = "missing" if embed is None else "given"
            raise ValueError(f"embed_dim is {self.embed_dim}, but embed is {given}")
        time = self.time_embed(timestep)
        if self.embed_proj is None:
            return time
        if self.embed_mode == "concat":
            return torch.cat([time, self.embed_proj(embed)], dim=-1)
        return time + self.embed_proj(embed)
