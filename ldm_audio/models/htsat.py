"""HTSAT audio tower of CLAP: a Swin transformer over a folded log-mel spectrogram.

Implements HTS-AT (arXiv 2202.00874) as CLAP uses it (arXiv 2211.06687, section 3.2, feature fusion in
section 3.3); must match the `audio_branch` of the LAION release and transformers' `ClapAudioModel`.

A spectrogram of spec_size**2 / n_mels frames is cut into spec_size / n_mels equal lengths of time, which
are laid under each other to make a square image: row = length * n_mels + mel bin, column = time.

Departures: no token-semantic head (CLAP uses the mean over tokens alone); the fusion types that work on the
mel before the patches (`daf_1d`, `aff_1d`, `iaff_1d`) are left out, none was released; `iaff_2d` has no
`global_att2`, which the original builds and never calls; SpecAugment's stripes keep their proportion to the
image at other sizes. Nothing here is a buffer except the batch norms' statistics.

Axes: b batch, c channels, d width, f mel bins, h heads, n mel frames, y x rows and columns of the image or
of the grid of patches, w windows, p tokens of a window, k chunks of a long clip.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm_audio.distributed import BatchNorm2d
from ldm_audio.errors import InputError

Fusion = Literal["aff_2d", "iaff_2d", "daf_2d", "channel_map"]

NUM_STRIPES = 2  # SpecAugment: two stripes in time and two in frequency, as released
FUSION_REDUCTION = 4  # width of the attention inside a fusion block


@lru_cache(maxsize=64)
def relative_position_index(window: int, device: torch.device) -> Tensor:
    """(p, p) int64: the row of the bias table for a query (first axis) and a key of one window."""
    with torch.inference_mode(False):
        line = torch.arange(window, device=device)
        row, column = line.repeat_interleave(window), line.repeat(window)
        row_step = row[:, None] - row[None, :] + window - 1
        column_step = column[:, None] - column[None, :] + window - 1
        return row_step * (2 * window - 1) + column_step


@lru_cache(maxsize=64)
def shift_mask(grid: int, window: int, shift: int, device: torch.device) -> Tensor:
    """(w, p, p) float32: -100 where the cyclic shift brought two strangers into one window, else 0."""
    with torch.inference_mode(False):
        line = torch.arange(grid, device=device)
        region = (line >= grid - window).long() + (line >= grid - shift).long()
        regions = rearrange(
            3 * region[:, None] + region[None, :], "(y a) (x b) -> (y x) (a b)", a=window, b=window
        )
        strangers = regions[:, :, None] != regions[:, None, :]
        return strangers.float() * -100.0


def stripes(batch: int, length: int, limit: int, device: torch.device) -> Tensor:
    """(b, length) bool, True = keep: two stripes a row, each less than `limit` wide and drawn on its own."""
    width = (torch.rand(batch, NUM_STRIPES, 1, device=device) * limit).floor()
    start = (torch.rand(batch, NUM_STRIPES, 1, device=device) * (length - width)).floor()
    position = torch.arange(length, device=device)
    return ~((position >= start) & (position < start + width)).any(dim=1)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, drops the whole branch of an item at `rate`."""

    def __init__(self, *, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(b, ...) -> (b, ...), kept branches scaled by 1 / (1 - rate)."""
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


def attention_branch(dim: int) -> nn.Sequential:
    """Pointwise bottleneck that weighs the two inputs of a fusion block."""
    hidden = dim // FUSION_REDUCTION
    return nn.Sequential(
        nn.Conv2d(dim, hidden, 1),
        BatchNorm2d(hidden),
        nn.ReLU(),
        nn.Conv2d(hidden, dim, 1),
        BatchNorm2d(dim),
    )


def pool(x: Tensor) -> Tensor:
    """(b, d, y, x) -> (b, d, 1, 1) mean."""
    return x.mean(dim=(2, 3), keepdim=True)


class AttentionalFusion(nn.Module):
    """Attentional feature fusion (arXiv 2009.14082, equation 3), the released `aff_2d`: with the factor 2."""

    def __init__(self, *, dim: int):
        super().__init__()
        self.local_attention = attention_branch(dim)
        self.global_attention = attention_branch(dim)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(b, d, y, x) global and local patches -> (b, d, y, x)."""
        both = x + y
        weight = torch.sigmoid(self.local_attention(both) + self.global_attention(pool(both)))
        return 2 * x * weight + 2 * y * (1 - weight)


class IterativeFusion(nn.Module):
    """Attentional fusion done twice (arXiv 2009.14082, equation 4), `iaff_2d`: without the factor 2.

    The second pass goes through the first pass's global attention, as in the original.
    """

    def __init__(self, *, dim: int):
        super().__init__()
        self.local_attention = attention_branch(dim)
        self.global_attention = attention_branch(dim)
        self.local_attention2 = attention_branch(dim)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(b, d, y, x) global and local patches -> (b, d, y, x)."""
        both = x + y
        weight = torch.sigmoid(self.local_attention(both) + self.global_attention(pool(both)))
        mixed = x * weight + y * (1 - weight)
        weight = torch.sigmoid(self.local_attention2(mixed) + self.global_attention(pool(mixed)))
        return x * weight + y * (1 - weight)


class AdditiveFusion(nn.Module):
    """`daf_2d`: the plain sum."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(b, d, y, x) global and local patches -> (b, d, y, x)."""
        return x + y


class PatchEmbed(nn.Module):
    """Image to a grid of patches; with fusion, long clips add the patches of their three chunks."""

    def __init__(self, *, dim: int, patch_size: int, patch_stride: int, fusion: Fusion | None):
        super().__init__()
        padding = (patch_size - patch_stride) // 2
        channels = 4 if fusion == "channel_map" else 1
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_stride, padding)
        self.local_proj: nn.Conv2d | None = None
        if fusion in ("aff_2d", "iaff_2d", "daf_2d"):
            # Three times as wide in time: three chunks side by side are as wide as the whole clip.
            kernel, stride = (patch_size, 3 * patch_size), (patch_stride, 3 * patch_stride)
            self.local_proj = nn.Conv2d(1, dim, kernel, stride, padding)
        self.fuse: nn.Module | None = None
        if fusion == "aff_2d":
            self.fuse = AttentionalFusion(dim=dim)
        elif fusion == "iaff_2d":
            self.fuse = IterativeFusion(dim=dim)
        elif fusion == "daf_2d":
            self.fuse = AdditiveFusion()
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor, is_longer: Tensor) -> Tensor:
        """(b, c, y, x) images, (b,) bool -> (b, y, x, d) patches."""
        if self.fuse is None or self.local_proj is None:
            patches = self.proj(image)
        else:
            patches = self.proj(image[:, :1])
            rows = is_longer.nonzero().flatten()
            # Batch norm cannot train on the pooled values of a single clip: it is doubled, as originally.
            twice = self.training and len(rows) == 1
            if len(rows):
                pair = rows.repeat(2) if twice else rows
                fused = self.fuse(patches[pair], self.embed_chunks(image[pair, 1:], patches.shape[-1]))
                patches = patches.index_copy(0, rows, fused[: len(rows)].to(patches.dtype))
        return self.norm(rearrange(patches, "b d y x -> b y x d"))

    def embed_chunks(self, chunks: Tensor, width: int) -> Tensor:
        """(b, k, y, x) three chunks -> (b, d, y, x) patches side by side in time, zeros up to `width`."""
        local = self.local_proj(rearrange(chunks, "b k y x -> (b k) 1 y x"))
        local = rearrange(local, "(b k) d y x -> b d y (k x)", k=chunks.shape[1])
        return F.pad(local, (0, width - local.shape[-1]))


class WindowAttention(nn.Module):
    """Self-attention inside each window, with a learned bias for each relative position."""

    def __init__(self, *, dim: int, num_heads: int, window: int, qkv_bias: bool, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.trunc_normal_(self.bias_table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(b, w, p, d) windows, additive mask (w, p, p) -> (b, w, p, d)."""
        num_windows = x.shape[1]
        bias = self.bias_table[relative_position_index(self.window, x.device)]  # (p, p, h)
        bias = repeat(bias, "p q h -> w h p q", w=num_windows)
        if mask is not None:
            bias = bias + mask[:, None]
        # Windows stand beside the heads, so that one bias serves the batch without being copied for it.
        q, k, v = rearrange(self.qkv(x), "b w p (three h d) -> three b (w h) p d", three=3, h=self.num_heads)
        bias = rearrange(bias, "w h p q -> 1 (w h) p q").to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = rearrange(x, "b (w h) p d -> b w p (h d)", w=num_windows)
        return self.dropout(self.proj(x))


class Block(nn.Module):
    """Swin block (arXiv 2103.14030, section 3.2): windows, cyclically shifted in every second block."""

    def __init__(
        self,
        *,
        dim: int,
        grid: int,
        num_heads: int,
        window: int,
        shift: int,
        mlp_ratio: float,
        qkv_bias: bool,
        dropout: float,
        drop_path: float,
    ):
        super().__init__()
        self.grid, self.window, self.shift = grid, window, shift
        hidden = int(mlp_ratio * dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attention = WindowAttention(
            dim=dim, num_heads=num_heads, window=window, qkv_bias=qkv_bias, dropout=dropout
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, dim),
            nn.Dropout(dropout),
        )
        self.drop_path = DropPath(rate=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(b, y, x, d) -> (b, y, x, d)."""
        x = x + self.drop_path(self.attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor) -> Tensor:
        """(b, y, x, d) -> (b, y, x, d): shift, cut into windows, attend, and back."""
        mask = None
        if self.shift:
            mask = shift_mask(self.grid, self.window, self.shift, x.device)
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        tiles = {"p": self.window, "q": self.window}
        windows = rearrange(x, "b (y p) (x q) d -> b (y x) (p q) d", **tiles)
        windows = self.attention(windows, mask)
        x = rearrange(windows, "b (y x) (p q) d -> b (y p) (x q) d", y=self.grid // self.window, **tiles)
        return x.roll((self.shift, self.shift), dims=(1, 2)) if self.shift else x


class PatchMerging(nn.Module):
    """Every 2 x 2 patches become one of twice the width."""

    def __init__(self, *, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, y, x, d) -> (b, y / 2, x / 2, 2 d); the columns of the 2 x 2 outer, the rows inner."""
        return self.reduction(self.norm(rearrange(x, "b (y p) (x q) d -> b y x (q p d)", p=2, q=2)))


class HTSAT(nn.Module):
    """Log-mel to one embedding.

    dim is the width of the first stage and doubles with each of the `depths`; the final width is `out_dim`.
    drop_path rises linearly from 0 over all blocks. A stage whose grid is no larger than the window attends
    over its whole grid and is never shifted. With `spec_augment`, training hides two stripes of time and two
    of frequency in each spectrogram. Random draws of training come from torch's global generators.

    Raises InputError, with the numbers, where the sizes do not divide.
    """

    def __init__(
        self,
        *,
        n_mels: int,
        spec_size: int,
        patch_size: int,
        patch_stride: int,
        dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int,
        mlp_ratio: float,
        qkv_bias: bool,
        dropout: float,
        drop_path: float,
        fusion: Fusion | None,
        spec_augment: bool,
    ):
        super().__init__()
        grids = stage_grids(
            n_mels=n_mels,
            spec_size=spec_size,
            patch_size=patch_size,
            patch_stride=patch_stride,
            window_size=window_size,
            num_stages=len(depths),
        )
        if len(num_heads) != len(depths):
            raise InputError(f"num_heads={list(num_heads)}: expected one for each of depths={list(depths)}")
        if fusion not in (None, "aff_2d", "iaff_2d", "daf_2d", "channel_map"):
            raise InputError(f"fusion={fusion!r}: expected None, aff_2d, iaff_2d, daf_2d or channel_map")
        self.n_mels = n_mels
        self.spec_size = spec_size
        self.fusion = fusion
        self.spec_augment = spec_augment
        self.in_channels = 4 if fusion else 1
        self.max_frames = spec_size * spec_size // n_mels
        self.out_dim = dim * 2 ** (len(depths) - 1)
        self.activation_checkpointing = False

        self.mel_norm = BatchNorm2d(n_mels)
        self.patch_embed = PatchEmbed(
            dim=dim, patch_size=patch_size, patch_stride=patch_stride, fusion=fusion
        )
        self.dropout = nn.Dropout(dropout)
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList()
        for i, (depth, heads, grid) in enumerate(zip(depths, num_heads, grids)):
            width = dim * 2**i
            if width % heads:
                raise InputError(f"stage {i}: width {width} is not divisible by {heads} heads")
            window = min(window_size, grid)
            blocks = [
                Block(
                    dim=width,
                    grid=grid,
                    num_heads=heads,
                    window=window,
                    shift=window // 2 if j % 2 and window < grid else 0,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    dropout=dropout,
                    drop_path=next(rates),
                )
                for j in range(depth)
            ]
            last = i == len(depths) - 1
            merge = nn.Identity() if last else PatchMerging(dim=width)
            self.stages.append(nn.ModuleDict({"blocks": nn.ModuleList(blocks), "merge": merge}))
        self.norm = nn.LayerNorm(self.out_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Trade time for memory: recompute each block in the backward pass."""
        self.activation_checkpointing = enabled

    def repeated_blocks(self) -> list[nn.Module]:
        """The parts that a wrapper may treat one by one, in the order of forward."""
        return [block for stage in self.stages for block in stage["blocks"]]

    def forward(self, mel: Tensor, is_longer: Tensor) -> Tensor:
        """(b, c, n, f) log-mel in dB, (b,) bool True = clip longer than the window -> (b, out_dim).

        c = 1, or with fusion 4: the whole clip, then its front, middle and back chunk. `is_longer` matters to
        the 2-D fusions only. In training at least one clip of a batch is fused, whether long or not, so that
        the fusion's parameters always have a gradient (as the original does).
        """
        self.check_input(mel, is_longer)
        if self.training and self.fusion and not is_longer.any():
            is_longer = is_longer.clone()
            is_longer[torch.randint(len(mel), (1,))] = True

        mel = rearrange(self.mel_norm(rearrange(mel, "b c n f -> b f n c")), "b f n c -> b c n f")
        if self.training and self.spec_augment:
            mel = self.hide_stripes(mel)
        x = self.patch_embed(self.fold(mel), is_longer)  # (b, y, x, d)
        x = self.dropout(x)
        for stage in self.stages:
            for block in stage["blocks"]:
                if self.activation_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            x = stage["merge"](x)
        return self.norm(x).mean(dim=(1, 2))  # (b, d)

    def check_input(self, mel: Tensor, is_longer: Tensor) -> None:
        """Raise InputError where the mel does not fit the image."""
        shape = tuple(mel.shape)
        if mel.ndim != 4 or shape[1] != self.in_channels or shape[3] != self.n_mels:
            raise InputError(f"mel {shape}: expected (b, {self.in_channels}, n, {self.n_mels})")
        if not 0 < shape[2] <= self.max_frames:
            raise InputError(f"mel {shape}: expected 1 to {self.max_frames} frames, got {shape[2]}")
        if tuple(is_longer.shape) != shape[:1] or is_longer.dtype != torch.bool:
            raise InputError(
                f"is_longer {is_longer.dtype} {tuple(is_longer.shape)}: expected bool ({shape[0]},)"
            )

    def hide_stripes(self, mel: Tensor) -> Tensor:
        """(b, c, n, f) -> same: SpecAugment (arXiv 1904.08779), zeros being the mean after `mel_norm`."""
        b, _, n, f = mel.shape
        # At the released sizes (64 bins, 1024 frames of image): stripes under 64 frames and under 8 bins.
        time = stripes(b, n, min(self.max_frames // 16, n), mel.device)
        frequency = stripes(b, f, max(f // 8, 1), mel.device)
        keep = rearrange(time, "b n -> b 1 n 1") & rearrange(frequency, "b f -> b 1 1 f")
        return mel * keep

    def fold(self, mel: Tensor) -> Tensor:
        """(b, c, n, f) -> (b, c, y, x) square image; frames are stretched to the full length first."""
        if mel.shape[2] < self.max_frames:
            size = (self.max_frames, self.n_mels)
            mel = F.interpolate(mel, size, mode="bicubic", align_corners=True)
        return rearrange(mel, "b c (y x) f -> b c (y f) x", y=self.spec_size // self.n_mels)


def stage_grids(
    *, n_mels: int, spec_size: int, patch_size: int, patch_stride: int, window_size: int, num_stages: int
) -> list[int]:
    """Patches along each side of the image, stage by stage; InputError where something does not divide."""
    if spec_size % n_mels:
        raise InputError(f"spec_size={spec_size}: expected a multiple of n_mels={n_mels}")
    if patch_size < patch_stride or (patch_size - patch_stride) % 2:
        raise InputError(
            f"patch_size={patch_size}: expected patch_stride={patch_stride} or more by an even number"
        )
    if spec_size % patch_stride:
        raise InputError(f"spec_size={spec_size}: expected a multiple of patch_stride={patch_stride}")
    grids = [spec_size // patch_stride]
    for stage in range(1, num_stages):
        if grids[-1] % 2:
            raise InputError(f"stage {stage - 1}: a grid of {grids[-1]} patches cannot be halved")
        grids.append(grids[-1] // 2)
    for stage, grid in enumerate(grids):
        if grid > window_size and grid % window_size:
            raise InputError(f"stage {stage}: {grid} patches do not divide into windows of {window_size}")
    return grids
