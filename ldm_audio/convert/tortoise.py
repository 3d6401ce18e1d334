"""TorToise's own files: `autoregressive.pth`, `clvp2.pth` and `dvae.pth`.

Each is a table for `convert.rules` and a recipe. They hold no config: sizes are read off the tensors, and
what these cannot tell (heads of 64, the tokens that begin and end a text) is as released.

Dropped: the causal masks that old GPT-2 files hold, the rotary frequencies.
"""

import re
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from einops import rearrange
from torch import Tensor

from ldm_audio.convert.clvp import (
    CLVP_TARGET,
    DROPOUT,
    ROTARY_DIM,
    SPEECH_LM_TARGET,
    TEXT_START,
    TEXT_STOP,
    TOWER_TARGET,
    mlp_rules,
    transpose,
)
from ldm_audio.convert.rules import Rule, cat_rows, drop, prefixed, split_rows
from ldm_audio.convert.shapes import Shapes, count, shape_of
from ldm_audio.errors import InputError
from ldm_audio.models.clvp import inverse_frequencies

DVAE_TARGET = "ldm_audio.models.dvae.DVAE"

HEAD_DIM = 64
CODEBOOK_DECAY = 0.99


def as_matrix(weight: Tensor) -> Tensor:
    """A convolution of width 1 as a linear layer; a bias stays."""
    return weight.squeeze(-1) if weight.ndim == 3 else weight


def as_convolution(weight: Tensor) -> Tensor:
    return weight.unsqueeze(-1).clone() if weight.ndim == 2 else weight


def heads_outside(num_heads: int) -> Callable[[Tensor], Tensor]:
    """The original's rows [head][q, k, v][channel] to ours, [q, k, v][head][channel]."""

    def turn(qkv: Tensor) -> Tensor:
        return rearrange(as_matrix(qkv), "(h three d) ... -> (three h d) ...", h=num_heads, three=3)

    return turn


def heads_inside(num_heads: int) -> Callable[[Tensor], Tensor]:
    """The inverse of `heads_outside`."""

    def turn(qkv: Tensor) -> Tensor:
        turned = rearrange(qkv, "(three h d) ... -> (h three d) ...", h=num_heads, three=3)
        return as_convolution(turned)

    return turn


def speech_lm_rules(*, num_heads: int) -> list[Rule]:
    """`autoregressive.pth`; `num_heads` of the conditioning encoder, whose rows are sorted by head."""
    block = "gpt.h.{i}"
    attention = "conditioning_encoder.attn.{i}"
    turn, back = heads_outside(num_heads), heads_inside(num_heads)
    return [
        *drop(f"{block}.attn.bias", f"{block}.attn.masked_bias"),
        Rule("conditioning_encoder.init.{k:weight|bias}", "conditioning.proj.{k}"),
        Rule(f"{attention}.norm.{{k:weight|bias}}", "conditioning.blocks.{i}.norm.{k}"),
        Rule(f"{attention}.qkv.{{k:weight|bias}}", "conditioning.blocks.{i}.attention.qkv.{k}", turn, back),
        Rule(
            f"{attention}.proj_out.{{k:weight|bias}}",
            "conditioning.blocks.{i}.attention.proj.{k}",
            as_matrix,
            as_convolution,
        ),
        Rule("text_embedding.weight", "text_embed.weight"),
        Rule("text_pos_embedding.emb.weight", "text_position_embed.weight"),
        Rule("mel_embedding.weight", "speech_embed.weight"),
        Rule("mel_pos_embedding.emb.weight", "speech_position_embed.weight"),
        Rule(f"{block}.ln_{{j:1|2}}.{{k:weight|bias}}", "blocks.{i}.norm{j}.{k}"),
        Rule(f"{block}.attn.c_attn.weight", "blocks.{i}.attention.qkv.weight", transpose, transpose),
        Rule(f"{block}.attn.c_attn.bias", "blocks.{i}.attention.qkv.bias"),
        Rule(f"{block}.attn.c_proj.weight", "blocks.{i}.attention.proj.weight", transpose, transpose),
        Rule(f"{block}.attn.c_proj.bias", "blocks.{i}.attention.proj.bias"),
        *mlp_rules(f"{block}.mlp", "blocks.{i}.mlp"),
        Rule("gpt.ln_f.{k:weight|bias}", "norm.{k}"),
        Rule("final_norm.{k:weight|bias}", "final_norm.{k}"),
        Rule("text_head.{k:weight|bias}", "text_head.{k}"),
        Rule("mel_head.{k:weight|bias}", "speech_head.{k}"),
    ]


def clvp_rules(*, depth: int) -> list[Rule]:
    """`clvp2.pth`, whose layers are attention and feed-forward in turn."""
    rules = [Rule("temperature", "logit_scale")]
    for kind in ("text", "speech"):
        rules += [
            Rule(f"{kind}_emb.weight", f"{kind}_tower.token_embed.weight"),
            Rule(f"to_{kind}_latent.weight", f"{kind}_tower.projection.weight"),
            *prefixed(tower_rules(depth), source=f"{kind}_transformer.transformer.", target=f"{kind}_tower."),
        ]
    return rules


def tower_rules(depth: int) -> list[Rule]:
    """One transformer of `clvp2.pth`."""
    frequencies = partial(inverse_frequencies, ROTARY_DIM)
    rules = [
        Rule("attn_layers.rotary_pos_emb.inv_freq", (), inverse=frequencies),
        Rule("norm.{k:weight|bias}", "norm.{k}"),
    ]
    for i in range(depth):
        attention, ff = (f"attn_layers.layers.{2 * i + part}" for part in (0, 1))
        parts = tuple(f"{attention}.1.wrap.to_{part}.weight" for part in "qkv")
        rules += [
            Rule(f"{attention}.0.0.g", f"blocks.{i}.norm1.weight"),
            Rule(parts, f"blocks.{i}.attention.qkv.weight", cat_rows, split_rows(3)),
            Rule(f"{attention}.1.wrap.to_out.{{k:weight|bias}}", f"blocks.{i}.attention.proj.{{k}}"),
            Rule(f"{ff}.0.0.g", f"blocks.{i}.norm2.weight"),
            Rule(f"{ff}.1.wrap.net.0.proj.{{k:weight|bias}}", f"blocks.{i}.ff.proj_in.{{k}}"),
            Rule(f"{ff}.1.wrap.net.3.{{k:weight|bias}}", f"blocks.{i}.ff.proj_out.{{k}}"),
        ]
    return rules


def dvae_rules(*, num_levels: int, num_res_blocks: int) -> list[Rule]:
    """`dvae.pth`, two sequences whose entries are counted."""
    last = num_levels + num_res_blocks
    rules = [
        Rule(f"encoder.{last}.{{k:weight|bias}}", "encoder_out.{k}"),
        Rule("decoder.0.{k:weight|bias}", "decoder_in.{k}"),
        Rule(f"decoder.{last + 1}.{{k:weight|bias}}", "decoder_out.{k}"),
        Rule("codebook.embed", "codebook.vectors", transpose, transpose),
        Rule("codebook.embed_avg", "codebook.sums", transpose, transpose),
        Rule("codebook.cluster_size", "codebook.counts"),
    ]
    for i in range(num_levels):
        up = num_res_blocks + 1 + i
        rules.append(Rule(f"encoder.{i}.0.{{k:weight|bias}}", f"down.{i}.{{k}}"))
        rules.append(Rule(f"decoder.{up}.0.conv.{{k:weight|bias}}", f"up.{i}.{{k}}"))
    for i in range(num_res_blocks):
        for half, entry in (("encoder", num_levels + i), ("decoder", 1 + i)):
            rules += [
                Rule(
                    f"{half}.{entry}.net.{2 * conv}.{{k:weight|bias}}",
                    f"{half}_blocks.{i}.conv{conv + 1}.{{k}}",
                )
                for conv in range(3)
            ]
    return rules


def speech_lm_recipe(shapes: Shapes) -> dict[str, Any]:
    """The config of a SpeechLM from the shapes of `autoregressive.pth`."""
    dim, n_mels, _ = shape_of(shapes, "conditioning_encoder.init.weight")
    return {
        "_target_": SPEECH_LM_TARGET,
        "n_mels": n_mels,
        "dim": dim,
        "depth": count(shapes, r"gpt\.h\.(\d+)\..*"),
        "num_heads": heads_of(dim),
        "ff_dim": shape_of(shapes, "gpt.h.0.mlp.c_fc.weight")[1],
        "conditioning_depth": count(shapes, r"conditioning_encoder\.attn\.(\d+)\..*"),
        "text_vocab_size": shape_of(shapes, "text_embedding.weight")[0],
        "text_start": TEXT_START,
        "text_stop": TEXT_STOP,
        "num_tokens": shape_of(shapes, "mel_embedding.weight")[0] - 2,
        "max_text_positions": shape_of(shapes, "text_pos_embedding.emb.weight")[0],
        "max_speech_positions": shape_of(shapes, "mel_pos_embedding.emb.weight")[0],
        "text_head": True,
        "dropout": DROPOUT,
    }


def clvp_recipe(shapes: Shapes) -> dict[str, Any]:
    """The config of a CLVP from the shapes of `clvp2.pth`."""

    def tower(kind: str) -> dict[str, Any]:
        vocab_size, dim = shape_of(shapes, f"{kind}_emb.weight")
        layers = f"{kind}_transformer.transformer.attn_layers.layers"
        return {
            "_target_": TOWER_TARGET,
            "vocab_size": vocab_size,
            "dim": dim,
            "depth": count(shapes, re.escape(layers) + r"\.(\d+)\..*") // 2,
            "num_heads": heads_of(dim),
            "ff_dim": shape_of(shapes, f"{layers}.1.1.wrap.net.3.weight")[1],
            "rotary_dim": ROTARY_DIM,
            "joint_dim": shape_of(shapes, f"to_{kind}_latent.weight")[0],
            "norm": "floor",
            "dropout": DROPOUT,
        }

    return {"_target_": CLVP_TARGET, "text_tower": tower("text"), "speech_tower": tower("speech")}


def dvae_recipe(shapes: Shapes) -> dict[str, Any]:
    """The config of a DVAE from the shapes of `dvae.pth`."""
    channels, n_mels, _ = shape_of(shapes, "encoder.0.0.weight")
    codebook_dim, num_tokens = shape_of(shapes, "codebook.embed")
    return {
        "_target_": DVAE_TARGET,
        "n_mels": n_mels,
        "channels": channels,
        "num_levels": count(shapes, r"encoder\.(\d+)\.0\.weight"),
        "num_res_blocks": count(shapes, r"encoder\.(\d+)\.net\.0\.weight"),
        "num_tokens": num_tokens,
        "codebook_dim": codebook_dim,
        "codebook_decay": CODEBOOK_DECAY,
    }


def heads_of(dim: int) -> int:
    """Heads of 64 channels. InputError for another width."""
    if dim % HEAD_DIM:
        raise InputError(f"width {dim}: expected a multiple of {HEAD_DIM}, the width of a head")
    return dim // HEAD_DIM


def is_speech_lm(names: Collection[str]) -> bool:
    """Whether these are the tensors of `autoregressive.pth`."""
    return "mel_pos_embedding.emb.weight" in names


def is_clvp(names: Collection[str]) -> bool:
    """Whether these are the tensors of `clvp2.pth`."""
    return "to_speech_latent.weight" in names and "temperature" in names


def is_dvae(names: Collection[str]) -> bool:
    """Whether these are the tensors of `dvae.pth`."""
    return "codebook.embed" in names
