"""CLAP's weights: the LAION release (`.pt`, also inside AudioLDM and MusicLDM) and transformers' `ClapModel`.

Both layouts are tables for `convert.rules` and a recipe, the config from which the network is built. LAION's
files hold no config: its sizes are read off the tensors, what they cannot tell is as released.

Dropped from LAION's: the STFT and mel kernels, the shift masks, the token-semantic and classifier heads, the
transforms of the unused `mlp_loss`. A way back is complete for transformers only; LAION's own loader would
want what was dropped.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm_audio.convert.rules import Rule, cat_rows, drop, prefixed, split_rows
from ldm_audio.errors import InputError
from ldm_audio.models.clap import INITIAL_LOGIT_SCALE
from ldm_audio.models.htsat import relative_position_index

LAION_ANCHOR = "audio_branch.bn0.weight"
ROBERTA_HEAD_DIM = 64
HTSAT_TARGET, ROBERTA_TARGET = "ldm_audio.models.htsat.HTSAT", "ldm_audio.models.roberta.Roberta"
HTSAT_TRAINING = {"dropout": 0.0, "drop_path": 0.1, "spec_augment": True}  # as in the released runs
LAION_FRONT_END = {
    "sample_rate": 48000,
    "n_fft": 1024,
    "hop_length": 480,
    "fmin": 50,
    "fmax": 14000,
    "max_samples": 480000,
    "filling": "repeatpad",
}


def keep_first(first: Tensor, *_: Tensor) -> Tensor:
    """Of a weight and the constants stored beside it, the weight."""
    return first


def with_positions(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Position embeddings (n, d) and the two constants that transformers stores with them, each (1, n)."""
    positions = torch.arange(len(weight), device=weight.device)[None]
    return weight, positions, torch.zeros_like(positions)


def with_index(table: Tensor) -> tuple[Tensor, Tensor]:
    """A window's bias table ((2 window - 1)**2, h) and the index into it that both originals store."""
    window = (math.isqrt(len(table)) + 1) // 2
    return table, relative_position_index(window, table.device).clone()


def roberta_rules() -> list[Rule]:
    """RoBERTa's own names, which both layouts have, to those of `models.roberta`."""
    embeddings, layer = "embeddings", "encoder.layer.{i}"
    positions = f"{embeddings}.position_embeddings.weight"
    constants = f"{embeddings}.position_ids", f"{embeddings}.token_type_ids"
    return [
        Rule(f"{embeddings}.word_embeddings.weight", "token_embed.weight"),
        Rule((positions, *constants), "position_embed.weight", keep_first, with_positions, optional=True),
        Rule(positions, "position_embed.weight", optional=True),
        *drop(*constants),
        Rule(f"{embeddings}.token_type_embeddings.weight", "type_embed"),
        Rule(f"{embeddings}.LayerNorm.{{k:weight|bias}}", "norm.{k}"),
        Rule(
            tuple(f"{layer}.attention.self.{part}.{{k:weight|bias}}" for part in ("query", "key", "value")),
            "blocks.{i}.attention.qkv.{k}",
            cat_rows,
            split_rows(3),
        ),
        Rule(f"{layer}.attention.output.dense.{{k:weight|bias}}", "blocks.{i}.attention.proj.{k}"),
        Rule(f"{layer}.attention.output.LayerNorm.{{k:weight|bias}}", "blocks.{i}.norm1.{k}"),
        Rule(f"{layer}.intermediate.dense.{{k:weight|bias}}", "blocks.{i}.mlp.0.{k}"),
        Rule(f"{layer}.output.dense.{{k:weight|bias}}", "blocks.{i}.mlp.2.{k}"),
        Rule(f"{layer}.output.LayerNorm.{{k:weight|bias}}", "blocks.{i}.norm2.{k}"),
        Rule("pooler.dense.{k:weight|bias}", "pooler.{k}"),
    ]


def patch_embed_rules() -> list[Rule]:
    """`patch_embed.`, fusion included, which both layouts name alike."""
    fusion = "patch_embed.fusion_model"
    return [
        Rule("patch_embed.{part:proj|norm}.{k:weight|bias}", "patch_embed.{part}.{k}"),
        Rule("patch_embed.mel_conv2d.{k:weight|bias}", "patch_embed.local_proj.{k}", optional=True),
        Rule(f"{fusion}.local_att.{{i}}.{{k:*}}", "patch_embed.fuse.local_attention.{i}.{k}", optional=True),
        Rule(
            f"{fusion}.local_att2.{{i}}.{{k:*}}", "patch_embed.fuse.local_attention2.{i}.{k}", optional=True
        ),
        *(
            # Entry 0 of the originals' sequence is the pooling.
            Rule(
                f"{fusion}.global_att.{i + 1}.{{k:*}}",
                f"patch_embed.fuse.global_attention.{i}.{{k}}",
                optional=True,
            )
            for i in (0, 1, 3, 4)
        ),
        *drop(f"{fusion}.global_att2.{{rest:*}}"),
    ]


def bias_table_rule(attention: str) -> list[Rule]:
    """The bias table of the attention that an original names `attention`, its index stored or not."""
    table, index = f"{attention}.relative_position_bias_table", f"{attention}.relative_position_index"
    target = "stages.{i}.blocks.{j}.attention.bias_table"
    return [
        Rule((table, index), target, keep_first, with_index, optional=True),
        Rule(table, target, optional=True),
    ]


def laion_htsat_rules() -> list[Rule]:
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


def transformers_htsat_rules() -> list[Rule]:
    """transformers' `audio_model.audio_encoder.` to `models.htsat`."""
    block, ours = "layers.{i}.blocks.{j}", "stages.{i}.blocks.{j}"
    attention = f"{block}.attention.self"
    return [
        Rule("batch_norm.{k:*}", "mel_norm.{k}"),
        *patch_embed_rules(),
        Rule(f"{block}.layernorm_before.{{k:weight|bias}}", f"{ours}.norm1.{{k}}"),
        *bias_table_rule(attention),
        Rule(
            tuple(f"{attention}.{part}.{{k:weight|bias}}" for part in ("query", "key", "value")),
            f"{ours}.attention.qkv.{{k}}",
            cat_rows,
            split_rows(3),
        ),
        Rule(f"{block}.attention.output.dense.{{k:weight|bias}}", f"{ours}.attention.proj.{{k}}"),
        Rule(f"{block}.layernorm_after.{{k:weight|bias}}", f"{ours}.norm2.{{k}}"),
        Rule(f"{block}.intermediate.dense.{{k:weight|bias}}", f"{ours}.mlp.0.{{k}}"),
        Rule(f"{block}.output.dense.{{k:weight|bias}}", f"{ours}.mlp.3.{{k}}"),
        Rule("layers.{i}.downsample.{k:*}", "stages.{i}.merge.{k}", optional=True),
        Rule("norm.{k:weight|bias}", "norm.{k}"),
    ]


def laion_rules() -> list[Rule]:
    """LAION's state dict, bare: give `prefixed` what `laion_prefix` finds in front."""
    return [
        Rule("logit_scale_a", "logit_scale_audio"),
        Rule("logit_scale_t", "logit_scale_text"),
        *drop("{tower:audio|text}_transform.{rest:*}"),
        *prefixed(laion_htsat_rules(), source="audio_branch.", target="audio_tower."),
        *prefixed(roberta_rules(), source="text_branch.", target="text_tower."),
        Rule("{tower:audio|text}_projection.{i}.{k:weight|bias}", "{tower}_projection.{i}.{k}"),
    ]


def transformers_rules() -> list[Rule]:
    """transformers' `ClapModel`."""
    return [
        Rule("logit_scale_a", "logit_scale_audio"),
        Rule("logit_scale_t", "logit_scale_text"),
        *prefixed(transformers_htsat_rules(), source="audio_model.audio_encoder.", target="audio_tower."),
        *prefixed(roberta_rules(), source="text_model.", target="text_tower."),
        Rule("{tower:audio|text}_projection.linear1.{k:weight|bias}", "{tower}_projection.0.{k}"),
        Rule("{tower:audio|text}_projection.linear2.{k:weight|bias}", "{tower}_projection.2.{k}"),
    ]


def transformers_text_rules() -> list[Rule]:
    """transformers' `ClapTextModelWithProjection` (in diffusers' AudioLDM) to the text half of a CLAP."""
    return [
        *prefixed(roberta_rules(), source="text_model.", target="text_tower."),
        Rule("text_projection.linear1.{k:weight|bias}", "text_projection.0.{k}"),
        Rule("text_projection.linear2.{k:weight|bias}", "text_projection.2.{k}"),
    ]


def transformers_audio_rules() -> list[Rule]:
    """transformers' `ClapAudioModelWithProjection` to the audio half of a CLAP."""
    return [
        *prefixed(transformers_htsat_rules(), source="audio_model.audio_encoder.", target="audio_tower."),
        Rule("audio_projection.linear1.{k:weight|bias}", "audio_projection.0.{k}"),
        Rule("audio_projection.linear2.{k:weight|bias}", "audio_projection.2.{k}"),
    ]


def initial_scale_rules() -> list[Rule]:
    """The two logit scales, which the halves of a CLAP come without, at their initial value."""
    return [Rule((), f"logit_scale_{tower}", initial_scale) for tower in ("audio", "text")]


def initial_scale() -> Tensor:
    return torch.tensor(INITIAL_LOGIT_SCALE)


def laion_prefix(names: Iterable[str]) -> str:
    """What stands before LAION's names: `module.` in its own files, more in a diffusion model's.

    Raises InputError where no name, or more than one, can be LAION's.
    """
    found = [name.removesuffix(LAION_ANCHOR) for name in names if name.endswith(LAION_ANCHOR)]
    if len(found) != 1:
        raise InputError(f"expected one tensor named ...{LAION_ANCHOR}, found {len(found)}")
    return found[0]


def laion_recipe(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config of a CLAP from the shapes of LAION's tensors (bare names).

    Read off: widths, depths, heads, window, patch, fusion, vocabulary. As released, since nothing tells them:
    a square image of 256, patches that do not overlap, the front end, heads of 64 in RoBERTa, its padding
    token 1 and its epsilon 1e-5, dropout in training. Raises InputError for other towers.
    """
    audio_tower = laion_audio_tower(shapes, "audio_branch.")
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
    front_end = {**LAION_FRONT_END, "n_mels": audio_tower["n_mels"], "fusion": fusion is not None}
    joint_dim = shape_of(shapes, "text_projection.0.weight")[0]
    return recipe(audio_tower, text_tower, front_end, joint_dim=joint_dim)


def laion_audio_tower(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, Any]:
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
        "fusion": laion_fusion(shapes.keys(), channels, prefix),
    }


def shape_of(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    """The shape of `name`; InputError where there is none."""
    if name not in shapes:
        raise InputError(f"no tensor named {name}: expected LAION's CLAP with an HTSAT and a RoBERTa tower")
    return shapes[name]


def laion_fusion(names: Collection[str], channels: int, prefix: str) -> str | None:
    """The fusion type from the names of LAION's tensors and the input channels of its patches."""
    if channels == 4:
        return "channel_map"
    patch_embed = f"{prefix}patch_embed"
    if f"{patch_embed}.fusion_model.local_att2.0.weight" in names:
        return "iaff_2d"
    if f"{patch_embed}.fusion_model.local_att.0.weight" in names:
        return "aff_2d"
    return "daf_2d" if f"{patch_embed}.mel_conv2d.weight" in names else None


# What `ClapConfig` leaves out of its JSON where it has this value, and where it must have it for us.
TEXT_DEFAULTS = {
    "vocab_size": 50265,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 514,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
}
AUDIO_DEFAULTS = {
    "num_mel_bins": 64,
    "spec_size": 256,
    "patch_size": 4,
    "patch_stride": [4, 4],
    "patch_embeds_hidden_size": 96,
    "depths": [2, 2, 6, 2],
    "num_attention_heads": [4, 8, 16, 32],
    "window_size": 8,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "enable_fusion": False,
    "fusion_type": None,
}
TEXT_FIXED = {"hidden_act": "gelu", "type_vocab_size": 1, "projection_hidden_act": "relu"}
AUDIO_FIXED = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "projection_hidden_act": "relu",
    "patch_embed_input_channels": 1,
    "enable_patch_layer_norm": True,
    "aff_block_r": 4,
}


def transformers_recipe(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a CLAP from `config.json` and `preprocessor_config.json` of a transformers folder.

    Raises InputError for a setting that the networks here do not have.
    """
    text = {**TEXT_DEFAULTS, **config.get("text_config", {})}
    audio = {**AUDIO_DEFAULTS, **config.get("audio_config", {})}
    for name, given, fixed in (("text", text, TEXT_FIXED), ("audio", audio, AUDIO_FIXED)):
        for key, value in fixed.items():
            if given.get(key, value) != value:
                raise InputError(f"{name}_config.{key}={given[key]!r}: only {value!r} can be converted")
    if audio["enable_fusion"] and audio["fusion_type"] == "channel_map":
        raise InputError("audio_config.fusion_type='channel_map': transformers cannot run it itself")

    audio_tower = {
        "n_mels": audio["num_mel_bins"],
        "spec_size": audio["spec_size"],
        "patch_size": one_number(audio, "patch_size"),
        "patch_stride": one_number(audio, "patch_stride"),
        "dim": audio["patch_embeds_hidden_size"],
        "depths": list(audio["depths"]),
        "num_heads": list(audio["num_attention_heads"]),
        "window_size": audio["window_size"],
        "mlp_ratio": audio["mlp_ratio"],
        "qkv_bias": audio["qkv_bias"],
        # transformers builds the one fusion whatever `fusion_type` says.
        "fusion": "aff_2d" if audio["enable_fusion"] else None,
    }
    text_tower = roberta_tower(text)
    sample_rate = preprocessor.get("sampling_rate", 48000)
    front_end = {
        "sample_rate": sample_rate,
        "n_fft": preprocessor.get("fft_window_size", 1024),
        "hop_length": preprocessor.get("hop_length", 480),
        "n_mels": audio["num_mel_bins"],
        "fmin": preprocessor.get("frequency_min", 50),  # as released; transformers' own default is 0
        "fmax": preprocessor.get("frequency_max", 14000),
        "max_samples": preprocessor.get("max_length_s", 10) * sample_rate,
        "fusion": audio["enable_fusion"],
        "filling": preprocessor.get("padding", "repeatpad"),
    }
    return recipe(audio_tower, text_tower, front_end, joint_dim=config.get("projection_dim", 512))


def roberta_tower(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of a RoBERTa from its settings in a transformers config, defaults filled in."""
    return {
        "vocab_size": config["vocab_size"],
        "dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "ff_dim": config["intermediate_size"],
        "max_positions": config["max_position_embeddings"],
        "pad_token": config["pad_token_id"],
        "layer_norm_eps": config["layer_norm_eps"],
        "dropout": config["hidden_dropout_prob"],
    }


def recipe(
    audio_tower: dict[str, Any], text_tower: dict[str, Any], front_end: dict[str, Any], *, joint_dim: int
) -> dict[str, Any]:
    """A CLAP's config; the audio tower's behaviour in training is that of the released runs."""
    return {
        "_target_": "ldm_audio.models.clap.CLAP",
        "joint_dim": joint_dim,
        "front_end": {"_target_": "ldm_audio.audio.clap_mel.ClapMel", **front_end},
        "audio_tower": {"_target_": HTSAT_TARGET, **audio_tower, **HTSAT_TRAINING},
        "text_tower": {"_target_": ROBERTA_TARGET, **text_tower},
    }


def count(names: Iterable[str], pattern: str) -> int:
    """How many different numbers the one group of `pattern` takes among the names."""
    return len({found[1] for name in names if (found := re.fullmatch(pattern, name))})


def one_number(config: Mapping[str, Any], key: str) -> int:
    """A setting that may be a number or a pair of equal ones."""
    value = config[key]
    numbers = {value} if isinstance(value, int) else set(value)
    if len(numbers) != 1:
        raise InputError(f"audio_config.{key}={value!r}: only square ones can be converted")
    return numbers.pop()
