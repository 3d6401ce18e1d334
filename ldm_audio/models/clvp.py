"""CLVP: contrastive language-voice pretraining (arXiv 2305.07243), text and speech tokens in one space.

It tells how well a sequence of speech tokens says a text, so that candidates can be ranked. Must match the
release (`clvp2.pth`) and the two `ClvpEncoder` towers of transformers: rotary positions on queries, keys and
values alike, RMS norms without bias, a GELU gate in the feed-forward, the mean over places, one projection.

Departures: a mask also keeps padding out of the mean, as in the original's training; transformers counts it.
The towers hold no `inv_freq` buffer.

Axes: b batch, d width, h heads, l text tokens, t speech tokens.
"""

from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm_audio.errors import InputError
from ldm_audio.layers import GEGLU, SelfAttention, unit

Norm = Literal["eps", "floor"]

INITIAL_LOGIT_SCALE = 1.0  # transformers begins at ln(1 / 0.07) instead
NORM_EPS = 1e-5
NORM_FLOOR = 1e-8
ROTARY_BASE = 10000.0


def inverse_frequencies(rotary_dim: int) -> Tensor:
    """(rotary_dim / 2,) float32, how far each pair of channels turns from one place to the next."""
    return 1.0 / (ROTARY_BASE ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim))


@lru_cache(maxsize=8)
def rotary_angles(length: int, rotary_dim: int, device: torch.device) -> Tensor:
    """(length, rotary_dim) float32 angles of places 0 to length - 1, the two halves the same."""
    with torch.inference_mode(False):  # a tensor made under it could take no part in training
        angles = torch.arange(length)[:, None] * inverse_frequencies(rotary_dim)
        return torch.cat([angles, angles], dim=-1).to(device)


class RMSNorm(nn.Module):
    """x over its root mean square, times a weight.

    kind: how a zero x is kept from dividing by zero. `floor` bounds the root by 1e-8 from below, as the
    original; `eps` adds 1e-5 to the mean square, as transformers. They differ by 5e-6 / mean(x²).
    """

    def __init__(self, *, dim: int, kind: Norm):
        super().__init__()
        if kind not in ("eps", "floor"):
            raise InputError(f"norm={kind!r}: expected 'eps' or 'floor'")
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        if self.kind == "eps":
            return F.rms_norm(x, self.weight.shape, self.weight, NORM_EPS)
        root = x.square().mean(dim=-1, keepdim=True).sqrt()
        return x / root.clamp(min=NORM_FLOOR) * self.weight


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, *, dim: int, num_heads: int, ff_dim: int, norm: Norm, dropout: float):
        super().__init__()
        self.norm1 = RMSNorm(dim=dim, kind=norm)
        self.attention = SelfAttention(dim=dim, num_heads=num_heads, qkv_bias=False, dropout=dropout)
        self.norm2 = RMSNorm(dim=dim, kind=norm)
        self.ff = GEGLU(dim=dim, ff_dim=ff_dim, dropout=dropout)

    def forward(self, x: Tensor, mask: Tensor | None, angles: Tensor) -> Tensor:
        """(b, l, d), mask (b, 1, 1, l) True = keep, angles (l, r) -> (b, l, d)."""
        x = x + self.attention(self.norm1(x), mask, angles=angles)
        return x + self.ff(self.norm2(x))


class Tower(nn.Module):
    """Tokens of one kind to one vector of width `joint_dim`, not yet of length 1.

    rotary_dim: how many channels of each head carry the position.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        ff_dim: int,
        rotary_dim: int,
        joint_dim: int,
        norm: Norm,
        dropout: float,
    ):
        super().__init__()
        if dim % num_heads:
            raise InputError(f"dim={dim} is not divisible by num_heads={num_heads}")
        if rotary_dim % 2 or not 0 < rotary_dim <= dim // num_heads:
            raise InputError(f"rotary_dim={rotary_dim}: expected an even number up to {dim // num_heads}")
        self.vocab_size = vocab_size
        self.rotary_dim = rotary_dim
        self.activation_checkpointing = False

        self.token_embed = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(
            Block(dim=dim, num_heads=num_heads, ff_dim=ff_dim, norm=norm, dropout=dropout)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.projection = nn.Linear(dim, joint_dim, bias=False)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(b, l) int64 tokens, (b, l) bool True = keep (None keeps all) -> (b, joint_dim).

        Raises InputError for no tokens, or one outside the vocabulary.
        """
        if tokens.shape[1] == 0:
            raise InputError("no tokens: expected at least one a row")
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            odd = tokens[(tokens < 0) | (tokens >= self.vocab_size)][0]
            raise InputError(f"token {int(odd)}: expected 0 to {self.vocab_size - 1}")
        x = self.token_embed(tokens)  # (b, l, d)
        angles = rotary_angles(tokens.shape[1], self.rotary_dim, tokens.device).to(x.dtype)
        keys = None if mask is None else rearrange(mask, "b l -> b 1 1 l")
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, keys, angles, use_reentrant=False)
            else:
                x = block(x, keys, angles)
        return self.projection(masked_mean(self.norm(x), mask))


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """(b, l, d), (b, l) True = keep -> (b, d), the mean over the places kept."""
    if mask is None:
        return x.mean(dim=1)
    weight = rearrange(mask, "b l -> b l 1").to(x.dtype)
    return (x * weight).sum(dim=1) / weight.sum(dim=1)


class CLVP(nn.Module):
    """Two towers and the learned scale of the contrastive loss, kept as a logarithm."""

    def __init__(self, *, text_tower: Tower, speech_tower: Tower):
        super().__init__()
        self.text_tower = text_tower
        self.speech_tower = speech_tower
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Trade time for memory: recompute each block of the towers in the backward pass."""
        self.text_tower.activation_checkpointing = enabled
        self.speech_tower.activation_checkpointing = enabled

    def embed_text(self, text_tokens: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """(b, l) int64 tokens, (b, l) bool True = keep -> (b, joint_dim) of length 1."""
        return unit(self.text_tower(text_tokens, text_mask))

    def embed_speech(self, speech_tokens: Tensor, speech_mask: Tensor | None = None) -> Tensor:
        """(b, t) int64 tokens, (b, t) bool True = keep -> (b, joint_dim) of length 1."""
        return unit(self.speech_tower(speech_tokens, speech_mask))

    def forward(
        self,
        text_tokens: Tensor,
        speech_tokens: Tensor,
        text_mask: Tensor | None = None,
        speech_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens and masks of texts and of speech -> both embeddings, (b, joint_dim) of length 1 each."""
        return self.embed_text(text_tokens, text_mask), self.embed_speech(speech_tokens, speech_mask)

    def scores(
        self,
        text_tokens: Tensor,
        speech_tokens: Tensor,
        text_mask: Tensor | None = None,
        speech_mask: Tensor | None = None,
    ) -> Tensor:
        """As `forward` -> (b text, b speech) cosines times the scale: how well each speech says each text."""
        text_embed, speech_embed = self(text_tokens, speech_tokens, text_mask, speech_mask)
        return self.logit_scale.exp() * text_embed @ speech_embed.T
