"""The autoregressive model of TorToise (arXiv 2305.07243, section 3): text and a voice to speech tokens.

Must match the release (`autoregressive.pth`) and transformers' `ClvpConditioningEncoder` and
`ClvpForCausalLM`: a GPT-2 over [voice, start text stop stop, start speech], each half with its own learned
positions, the voice without one, two layer norms in a row at the end. The voice is the mean over the
reference clips of what the conditioning encoder says at the first frame.

Departures: the clips are averaged here; dropout after the attention too, as the original has and
transformers has not; no causal mask is stored.

Axes: b batch, d width, f mel bins, h heads, l text tokens, n mel frames, r reference clips, t speech tokens.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm_audio.errors import InputError
from ldm_audio.layers import SelfAttention

NORM_EPS = 1e-5
INIT_STD = 0.02
SMALLEST_GROUPS = 4


def norm_groups(channels: int) -> int:
    """Groups of the conditioning encoder's norms: 32, fewer for few channels. InputError below 4."""
    groups = 8 if channels <= 16 else 16 if channels <= 64 else 32
    while channels % groups:
        groups //= 2
    if groups < SMALLEST_GROUPS:
        raise InputError(f"dim={channels}: expected a multiple of {SMALLEST_GROUPS}")
    return groups


class ConditioningBlock(nn.Module):
    """Group norm and attention among the frames of a clip, around an identity."""

    def __init__(self, *, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups(dim), dim, eps=NORM_EPS)
        self.attention = SelfAttention(dim=dim, num_heads=num_heads, qkv_bias=True, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(b, d, n) -> (b, d, n)."""
        attended = self.attention(rearrange(self.norm(x), "b d n -> b n d"))
        return x + rearrange(attended, "b n d -> b d n")


class ConditioningEncoder(nn.Module):
    """A clip's mel to one vector: the first frame's, after it has seen the others."""

    def __init__(self, *, n_mels: int, dim: int, depth: int, num_heads: int, dropout: float):
        super().__init__()
        self.proj = nn.Conv1d(n_mels, dim, 1)
        self.blocks = nn.ModuleList(
            ConditioningBlock(dim=dim, num_heads=num_heads, dropout=dropout) for _ in range(depth)
        )

    def forward(self, mel: Tensor) -> Tensor:
        """(b, f, n) normalised log-mel -> (b, d)."""
        x = self.proj(mel)
        for block in self.blocks:
            x = block(x)
        return x[..., 0]


class Cache:
    """Keys and values by block: those of the prefix, which all rows share, and those of each row's tokens.

    prefix: (2, h, l, d) a block. own: (2, b, h, max_tokens, d) a block, of which `length` tokens are there.
    """

    def __init__(self, prefix: list[Tensor], *, num_rows: int, max_tokens: int):
        _, heads, _, dim = prefix[0].shape
        self.prefix = prefix
        self.own = [kv.new_empty(2, num_rows, heads, max_tokens, dim) for kv in prefix]
        self.length = 0

    def attend(self, block: int, q: Tensor, kv: Tensor) -> Tensor:
        """Adds keys and values (2, b, h, d) of the newest token; its query (b, h, d) -> (b, h, d).

        The prefix's keys meet the queries of all rows in one product, and are never copied.
        """
        rows, heads, dim = q.shape
        own = self.own[block]
        own[:, :, :, self.length] = kv
        # Views with rows and heads joined: products of larger tensors would copy them first.
        keys, values = own.flatten(1, 2)[:, :, : self.length + 1]  # (b h, t, d) each
        prefix_keys, prefix_values = self.prefix[block]  # (h, l, d) each
        q = q * dim**-0.5
        to_prefix = torch.matmul(q.transpose(0, 1), prefix_keys.transpose(1, 2)).transpose(0, 1)  # (b, h, l)
        to_own = torch.bmm(q.reshape(rows * heads, 1, dim), keys.transpose(1, 2)).view(rows, heads, -1)
        weights = torch.cat([to_prefix, to_own], dim=-1).softmax(dim=-1)
        on_prefix, on_own = weights.split([to_prefix.shape[-1], to_own.shape[-1]], dim=-1)
        from_prefix = torch.matmul(on_prefix.transpose(0, 1), prefix_values).transpose(0, 1)  # (b, h, d)
        return from_prefix + torch.bmm(on_own.reshape(rows * heads, 1, -1), values).view(rows, heads, dim)

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from what row `rows[i]` was; for beams."""
        for own in self.own:
            own[:, :, :, : self.length] = own[:, rows, :, : self.length]


class Block(nn.Module):
    """Pre-norm transformer block of GPT-2."""

    def __init__(self, *, dim: int, num_heads: int, ff_dim: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attention = SelfAttention(dim=dim, num_heads=num_heads, qkv_bias=True, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(dim, ff_dim), nn.GELU(approximate="tanh"), nn.Linear(ff_dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(b, i, d) -> (b, i, d), each place from itself and those before it."""
        x = x + self.dropout(self.attention(self.norm1(x), causal=True))
        return x + self.dropout(self.mlp(self.norm2(x)))

    def prefill(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(1, i, d) -> what `forward` gives, and the keys and values (2, h, i, d / h) for the cache."""
        qkv = self.attention.qkv(self.norm1(x))
        qkv = rearrange(qkv, "1 i (three h d) -> three h i d", three=3, h=self.attention.num_heads)
        attended = F.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.attention.proj(rearrange(attended, "h i d -> 1 i (h d)"))
        return x + self.mlp(self.norm2(x)), qkv[1:]

    def step(self, x: Tensor, cache: Cache, block: int) -> Tensor:
        """(b, d) newest place -> (b, d), with those before it in the cache."""
        qkv = self.attention.qkv(self.norm1(x))
        qkv = rearrange(qkv, "b (three h d) -> three b h d", three=3, h=self.attention.num_heads)
        attended = cache.attend(block, qkv[0], qkv[1:])
        x = x + self.attention.proj(rearrange(attended, "b h d -> b (h d)"))
        return x + self.mlp(self.norm2(x))


@dataclass(frozen=True)
class SpeechLogits:
    """Of the next token: text (b, l, vocabulary), None without that head; speech (b, t, num_tokens + 2)."""

    text: Tensor | None
    speech: Tensor


class SpeechLM(nn.Module):
    """Speech tokens 0 to num_tokens - 1, then the start and the stop token, under a text and a voice.

    max_text_positions, max_speech_positions: how many positions each half has. text_head: whether the text is
    predicted as well, in training; the folders of transformers have no such head.
    """

    def __init__(
        self,
        *,
        n_mels: int,
        dim: int,
        depth: int,
        num_heads: int,
        ff_dim: int,
        conditioning_depth: int,
        text_vocab_size: int,
        text_start: int,
        text_stop: int,
        num_tokens: int,
        max_text_positions: int,
        max_speech_positions: int,
        text_head: bool,
        dropout: float,
    ):
        super().__init__()
        if dim % num_heads:
            raise InputError(f"dim={dim} is not divisible by num_heads={num_heads}")
        self.n_mels = n_mels
        self.num_tokens = num_tokens
        self.text_vocab_size = text_vocab_size
        self.text_start, self.text_stop = text_start, text_stop
        self.start, self.stop = num_tokens, num_tokens + 1
        self.max_text_tokens = max_text_positions - 3  # start and two stops
        self.max_speech_tokens = max_speech_positions - 1  # the last one generated is fed no more
        self.activation_checkpointing = False

        self.conditioning = ConditioningEncoder(
            n_mels=n_mels, dim=dim, depth=conditioning_depth, num_heads=num_heads, dropout=dropout
        )
        self.text_embed = nn.Embedding(text_vocab_size, dim)
        self.text_position_embed = nn.Embedding(max_text_positions, dim)
        self.speech_embed = nn.Embedding(num_tokens + 2, dim)
        self.speech_position_embed = nn.Embedding(max_speech_positions, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(dim=dim, num_heads=num_heads, ff_dim=ff_dim, dropout=dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.final_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.text_head = nn.Linear(dim, text_vocab_size) if text_head else None
        self.speech_head = nn.Linear(dim, num_tokens + 2)
        self.initialise(depth)

    def initialise(self, depth: int) -> None:
        """GPT-2's, and an identity for the conditioning blocks; heads and clip projection keep torch's."""
        for module in self.children():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
        for block in self.blocks:
            for linear in (block.attention.qkv, block.attention.proj, block.mlp[0], block.mlp[2]):
                nn.init.normal_(linear.weight, std=INIT_STD)
                nn.init.zeros_(linear.bias)
            for linear in (block.attention.proj, block.mlp[2]):
                nn.init.normal_(linear.weight, std=INIT_STD / math.sqrt(2 * depth))
        for block in self.conditioning.blocks:
            nn.init.zeros_(block.attention.proj.weight)
            nn.init.zeros_(block.attention.proj.bias)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Trade time for memory: recompute each block in the backward pass."""
        self.activation_checkpointing = enabled

    def embed_voice(self, mels: Tensor) -> Tensor:
        """(b, r, f, n) normalised log-mels of r clips of each voice -> (b, d)."""
        if mels.ndim != 4 or mels.shape[1] == 0 or mels.shape[2] != self.n_mels:
            raise InputError(f"reference mels {tuple(mels.shape)}: expected (b, r, {self.n_mels}, n), r > 0")
        clips = self.conditioning(rearrange(mels, "b r f n -> (b r) f n"))
        return reduce(clips, "(b r) d -> b d", "mean", r=mels.shape[1])

    def wrap_text(self, text_tokens: Tensor, *, num_stops: int) -> Tensor:
        """(b, l) -> (b, 1 + l + num_stops): start, text, stops. A stop is also what pads a shorter text.

        Released weights read texts of one stop in training and of two in generation.

        Raises InputError for a text that is too long, or a token outside the vocabulary.
        """
        if text_tokens.shape[1] > self.max_text_tokens:
            raise InputError(f"{text_tokens.shape[1]} text tokens: expected at most {self.max_text_tokens}")
        if text_tokens.numel() and not 0 <= text_tokens.min() <= text_tokens.max() < self.text_vocab_size:
            raise InputError(f"text tokens: expected each to be 0 to {self.text_vocab_size - 1}")
        return F.pad(F.pad(text_tokens, (1, 0), value=self.text_start), (0, num_stops), value=self.text_stop)

    def prefix(self, voice: Tensor, wrapped_text: Tensor) -> Tensor:
        """(b, d) voice, (b, l) text as `wrap_text` gives it -> (b, 1 + l, d), what speech follows."""
        places = torch.arange(wrapped_text.shape[1], device=wrapped_text.device)
        text = self.text_embed(wrapped_text) + self.text_position_embed(places)
        return torch.cat([rearrange(voice, "b d -> b 1 d"), text], dim=1)

    def embed_speech(self, tokens: Tensor) -> Tensor:
        """(b, t) start and speech tokens -> (b, t, d), at positions 0 to t - 1."""
        if tokens.shape[1] > self.speech_position_embed.num_embeddings:
            limit = self.speech_position_embed.num_embeddings
            raise InputError(f"{tokens.shape[1]} speech tokens: expected at most {limit}")
        if not 0 <= tokens.min() <= tokens.max() < self.num_tokens + 2:
            raise InputError(f"speech tokens: expected each to be 0 to {self.num_tokens + 1}")
        return self.speech_embed(tokens) + self.speech_position_embed.weight[: tokens.shape[1]]

    def hidden(self, x: Tensor) -> Tensor:
        """(b, i, d) embeddings -> (b, i, d) after both last norms."""
        x = self.dropout(x)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.final_norm(self.norm(x))

    def forward(self, voice: Tensor, wrapped_text: Tensor, speech_tokens: Tensor) -> SpeechLogits:
        """(b, d) voice, (b, l) text as `wrap_text` gives it, (b, t) speech tokens from the start token on.

        Place i of each result predicts what follows token i of its input.
        """
        prefix = self.prefix(voice, wrapped_text)
        x = self.hidden(torch.cat([prefix, self.embed_speech(speech_tokens)], dim=1))
        text, speech = x[:, 1 : prefix.shape[1]], x[:, prefix.shape[1] :]
        return SpeechLogits(self.text_head and self.text_head(text), self.speech_head(speech))

    def latents(self, voice: Tensor, wrapped_text: Tensor, speech_tokens: Tensor) -> Tensor:
        """(b, t) speech tokens without the start -> (b, t, d): the states that each token was predicted from.

        They are what TorToise's diffusion decoder turns into a mel.
        """
        inputs = F.pad(speech_tokens[:, :-1], (1, 0), value=self.start)
        prefix = self.prefix(voice, wrapped_text)
        x = self.hidden(torch.cat([prefix, self.embed_speech(inputs)], dim=1))
        return x[:, prefix.shape[1] :]

    def open_cache(self, prefix: Tensor, *, num_rows: int, max_tokens: int) -> Cache:
        """The cache of a prefix (1, l, d) for `num_rows` continuations of up to `max_tokens` tokens."""
        x, kept = prefix, []
        for block in self.blocks:
            x, keys_and_values = block.prefill(x)
            kept.append(keys_and_values)
        return Cache(kept, num_rows=num_rows, max_tokens=max_tokens)

    def step(self, tokens: Tensor, position: int, cache: Cache) -> Tensor:
        """(b,) newest tokens, at `position` -> (b, num_tokens + 2) logits of the next; the cache grows."""
        x = self.speech_embed(tokens) + self.speech_position_embed.weight[position]
        for number, block in enumerate(self.blocks):
            x = block.step(x, cache, number)
        cache.length += 1
        return self.speech_head(self.final_norm(self.norm(x)))
