"""RoBERTa text encoder (arXiv 1907.11692), the text tower of CLAP.

Must match transformers' `RobertaModel` and `ClapTextModel`: post-norm blocks, positions counted over the
real tokens, a tanh pooler on the first token. Departure: one token type, whose embedding is one vector.

Axes: b batch, d width, h heads, l text tokens.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm_audio.errors import InputError
from ldm_audio.layers import SelfAttention


class Block(nn.Module):
    """Post-norm transformer block: the norm follows the residual sum."""

    def __init__(self, *, dim: int, num_heads: int, ff_dim: int, layer_norm_eps: float, dropout: float):
        super().__init__()
        self.attention = SelfAttention(dim=dim, num_heads=num_heads, qkv_bias=True, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim, eps=layer_norm_eps)
        self.mlp = nn.Sequential(nn.Linear(dim, ff_dim), nn.GELU(), nn.Linear(ff_dim, dim))
        self.norm2 = nn.LayerNorm(dim, eps=layer_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(b, l, d), mask (b, 1, 1, l) True = keep -> (b, l, d)."""
        x = self.norm1(x + self.dropout(self.attention(x, mask)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class Roberta(nn.Module):
    """Text tokens to their hidden states and one pooled vector of width `out_dim`.

    max_positions counts the position embeddings; the first pad_token + 1 of them are not for real tokens, so
    a text may have max_positions - pad_token - 1 tokens (512 in RoBERTa-base). LayerNorm's epsilon differs
    between the originals (1e-5) and the folders converted to transformers (1e-12): take the source's.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        ff_dim: int,
        max_positions: int,
        pad_token: int,
        layer_norm_eps: float,
        dropout: float,
    ):
        super().__init__()
        numbers = {"vocab_size": vocab_size, "dim": dim, "depth": depth, "num_heads": num_heads}
        numbers |= {"ff_dim": ff_dim, "max_positions": max_positions, "pad_token": pad_token}
        for name, value in (numbers | {"layer_norm_eps": layer_norm_eps, "dropout": dropout}).items():
            if not isinstance(value, float | int):
                raise InputError(f"{name}={value!r}: expected a number")
        if dim % num_heads:
            raise InputError(f"dim={dim} is not divisible by num_heads={num_heads}")
        self.vocab_size = vocab_size
        self.pad_token = pad_token
        self.max_tokens = max_positions - pad_token - 1
        self.out_dim = dim
        self.activation_checkpointing = False

        self.token_embed = nn.Embedding(vocab_size, dim, padding_idx=pad_token)
        self.position_embed = nn.Embedding(max_positions, dim, padding_idx=pad_token)
        self.type_embed = nn.Parameter(torch.empty(1, dim))
        self.norm = nn.LayerNorm(dim, eps=layer_norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim=dim, num_heads=num_heads, ff_dim=ff_dim, layer_norm_eps=layer_norm_eps, dropout=dropout)
            for _ in range(depth)
        )
        self.pooler = nn.Linear(dim, dim)

        nn.init.normal_(self.type_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.token_embed.weight[pad_token] = 0
            self.position_embed.weight[pad_token] = 0

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Trade time for memory: recompute each block in the backward pass."""
        self.activation_checkpointing = enabled

    def repeated_blocks(self) -> list[nn.Module]:
        """The parts that a wrapper may treat one by one, in the order of forward."""
        return list(self.blocks)

    def forward(self, text_tokens: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(b, l) int64 tokens, (b, l) bool True = real token -> ((b, l, d) hidden, (b, d) pooled).

        Raises InputError for a text of more than `max_tokens` tokens.
        """
        if text_tokens.shape[1] > self.max_tokens:
            raise InputError(f"{text_tokens.shape[1]} text tokens: expected at most {self.max_tokens}")
        # Real tokens count up from pad_token + 1; padding stays on pad_token.
        positions = text_mask.cumsum(dim=1) * text_mask + self.pad_token  # (b, l)
        x = self.token_embed(text_tokens) + self.type_embed + self.position_embed(positions)
        x = self.dropout(self.norm(x))
        mask = rearrange(text_mask, "b l -> b 1 1 l")
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        return x, torch.tanh(self.pooler(x[:, 0]))
