"""CLAP's weights as LAION released them (`.pt`, also inside AudioLDM and MusicLDM), and HTSAT's before it.

The files hold no config: sizes are read off the tensors, what they cannot tell is as released.

Dropped: the STFT and mel kernels, the shift masks, the token-semantic and classifier heads, the transforms of
the unused `mlp_loss`. LAION's own loader would want them, so that there is no complete way back.
"""

import math
import re
from collections.abc import Collection, Iterable
from typing import Any

from ldm_audio.convert.clap import bias_table_rule, patch_embed_rules, recipe, roberta_rules
from ldm_audio.convert.rules import Rule, drop, prefixed
from ldm_audio.convert.shapes import Shapes, count, shape_of
from ldm_audio.errors import InputError

ANCHOR = "audio_branch.bn0.weight"
ROBERTA_HEAD_DIM = 64
FRONT_END = {
    "sample_rate": 48000,
    "n_fft": 1024,
    "hop_length": 480,
    "fmin": 50,
    "fmax": 14000,
    "max_samples": 480000,
    "filling": "repeatpad",
}


def htsat_rules() -> list[Rule]:
    """LAION's `audio_branch.` to `models.htsat`."""
    block, ours = "layers.{i}.blocks.{j}", "stages.{i}.blocks.{j}"
    return [
        *drop("{part:spectrogram_extractor|logmel_extractor|tscam_conv|head}.{rest:*}", f"{block}.attn_mask"),
        Rule("bn0.{k:*}", "mel_norm.{k}"),
        *patch_embed_rules(),
        Rule(f"{block}.{{norm:norm1|norm2}}.{{k:weight|bias}}", f"{ours}.{{norm}}.{{k}}"),
        *bias_table_rule(f"{block}.attn"),
        Rule(f"{block}.attn.{{part:qkv|proj}}.{{k:weight|bias}}", f"{ours}.attention.{{part}}.{{k}}"),
        Rule(f"{block}.mlp.fc1.{{k:weight|bias}}", f"{ours}.mlp.0.{{k}}"),
        Rule(f"{block}.mlp.fc2.{{k:weight|bias}}", f"{ours}.mlp.3.{{k}}"),
        Rule("layers.{i}.downsample.{k:*}", "stages.{i}.merge.{k}", optional=True),
        Rule("norm.{k:weight|bias}", "norm.{k}"),
    ]


def clap_rules() -> list[Rule]:
    """LAION's state dict, bare: give `prefixed` what `prefix_of` finds in front."""
    return [
        Rule("logit_scale_a", "logit_scale_audio"),
        Rule("logit_scale_t", "logit_scale_text"),
        *drop("{tower:audio|text}_transform.{rest:*}"),
        *prefixed(htsat_rules(), source="audio_branch.", target="audio_tower."),
        *prefixed(roberta_rules(), source="text_branch.", target="text_tower."),
        Rule("{tower:audio|text}_projection.{i}.{k:weight|bias}", "{tower}_projection.{i}.{k}"),
    ]


def prefix_of(names: Iterable[str]) -> str:
    """What stands before LAION's names: `module.` in its own files, more in a diffusion model's.

    Raises InputError where no name, or more than one, can be LAION's.
    """
    found = [name.removesuffix(ANCHOR) for name in names if name.endswith(ANCHOR)]
    if len(found) != 1:
        raise InputError(f"expected one tensor named ...{ANCHOR}, found {len(found)}")
    return found[0]


def clap_recipe(shapes: Shapes) -> dict[str, Any]:
    """The config of a CLAP from the shapes of LAION's tensors (bare names).

    Read off: widths, depths, heads, window, patch, fusion, vocabulary. As released, since nothing tells them:
    a square image of 256, patches that do not overlap, the front end, heads of 64 in RoBERTa, its padding
    token 1 and its epsilon 1e-5, dropout in training. Raises InputError for other towers.
    """
    audio_tower = audio_tower_of(shapes, "audio_branch.")
    fusion = audio_tower["fusion"]
    text = "text_branch."
    vocab_size, text_dim = shape_of(shapes, f"{text}embeddings.word_embeddings.weight")
    text_tower = {
        "vocab_size": vocab_size,
        "dim": text_dim,
        "depth": count(shapes, r"text_branch\.encoder\.layer\.(\d+)\..*"),
        "num_heads": text_dim // ROBERTA_HEAD_DIM,
        "ff_dim": shape_of(shapes, f"{text}encoder.layer.0.intermediate.dense.weight")[0],
        "max_positions": shape_of(shapes, f"{text}embeddings.position_embeddings.weight")[0],
        "pad_token": 1,
        "layer_norm_eps": 1e-5,
        "dropout": 0.1,
    }
    front_end = {**FRONT_END, "n_mels": audio_tower["n_mels"], "fusion": fusion is not None}
    joint_dim = shape_of(shapes, "text_projection.0.weight")[0]
    return recipe(audio_tower, text_tower, front_end, joint_dim=joint_dim)


def audio_tower_of(shapes: Shapes, prefix: str) -> dict[str, Any]:
    """The sizes of an HTSAT whose names begin with `prefix`, under LAION's names or those of its ancestor."""
    dim, channels, patch_size, _ = shape_of(shapes, f"{prefix}patch_embed.proj.weight")
    layers = re.escape(f"{prefix}layers.")
    tables = [
        shape_of(shapes, f"{prefix}layers.{i}.blocks.0.attn.relative_position_bias_table")
        for i in range(count(shapes, layers + r"(\d+)\..*"))
    ]
    first = f"{prefix}layers.0.blocks.0"
    (n_mels,) = shape_of(shapes, f"{prefix}bn0.weight")
    return {
        "n_mels": n_mels,
        "spec_size": 256,
        "patch_size": patch_size,
        "patch_stride": patch_size,
        "dim": dim,
        "depths": [count(shapes, rf"{layers}{i}\.blocks\.(\d+)\..*") for i in range(len(tables))],
        "num_heads": [heads for _, heads in tables],
        "window_size": (math.isqrt(tables[0][0]) + 1) // 2,
        "mlp_ratio": shape_of(shapes, f"{first}.mlp.fc1.weight")[0] / dim,
        "qkv_bias": f"{first}.attn.qkv.bias" in shapes,
        "fusion": fusion_of(shapes.keys(), channels, prefix),
    }


def fusion_of(names: Collection[str], channels: int, prefix: str) -> str | None:
    """The fusion type from the names of LAION's tensors and the input channels of its patches."""
    if channels == 4:
        return "channel_map"
    patch_embed = f"{prefix}patch_embed"
    if f"{patch_embed}.fusion_model.local_att2.0.weight" in names:
        return "iaff_2d"
    if f"{patch_embed}.fusion_model.local_att.0.weight" in names:
        return "aff_2d"
    return "daf_2d" if f"{patch_embed}.mel_conv2d.weight" in names else None
