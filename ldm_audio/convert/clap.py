"""CLAP's weights as transformers stores them: `ClapModel`, its halves, and the RoBERTa that it begins with.

A layout is a table of rules and a recipe, the config from which the network is built; a setting that the
networks here do not have is an error. What LAION's own layout (`convert.laion`) shares stands here too.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm_audio.convert.rules import Rule, cat_rows, drop, prefixed, split_rows
from ldm_audio.convert.settings import (
    COUNT,
    FLAG,
    INDEX,
    NOTHING,
    NUMBER,
    UNIFORM,
    Setting,
    either,
    fixed,
    one_of,
    only,
    read_settings,
    several,
    single,
    to_ours,
    to_theirs,
)
from ldm_audio.errors import InputError
from ldm_audio.models.clap import INITIAL_LOGIT_SCALE
from ldm_audio.models.htsat import relative_position_index

HTSAT_TARGET, ROBERTA_TARGET = "ldm_audio.models.htsat.HTSAT", "ldm_audio.models.roberta.Roberta"
HTSAT_TRAINING = {"dropout": 0.0, "drop_path": 0.1, "spec_augment": True}  # as in the released runs


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


def transformers_rules() -> list[Rule]:
    """transformers' `ClapModel`."""
    scales = [Rule(f"logit_scale_{tower[0]}", f"logit_scale_{tower}") for tower in ("audio", "text")]
    return [*scales, *audio_half_rules(), *text_half_rules()]


def transformers_text_rules() -> list[Rule]:
    """transformers' `ClapTextModelWithProjection`, also AudioLDM's, to a CLAP without an audio tower."""
    return [*initial_scale_rules(), *text_half_rules()]


def transformers_audio_rules() -> list[Rule]:
    """transformers' `ClapAudioModelWithProjection` to a CLAP without a text tower."""
    return [*initial_scale_rules(), *audio_half_rules()]


def text_half_rules() -> list[Rule]:
    return [
        *prefixed(roberta_rules(), source="text_model.", target="text_tower."),
        *projection_rules("text_projection"),
    ]


def audio_half_rules() -> list[Rule]:
    return [
        *prefixed(transformers_htsat_rules(), source="audio_model.audio_encoder.", target="audio_tower."),
        *projection_rules("audio_projection"),
    ]


def projection_rules(name: str) -> list[Rule]:
    return [Rule(f"{name}.linear{i + 1}.{{k:weight|bias}}", f"{name}.{2 * i}.{{k}}") for i in (0, 1)]


def initial_scale_rules() -> list[Rule]:
    """The two logit scales, which the halves of a CLAP come without, at their initial value."""
    return [Rule((), f"logit_scale_{tower}", initial_scale) for tower in ("audio", "text")]


def initial_scale() -> Tensor:
    return torch.tensor(INITIAL_LOGIT_SCALE)


# What transformers assumes of a key that is missing from a config, and what ours can equal.
TEXT_SETTINGS = {
    "vocab_size": Setting(COUNT, 50265, "vocab_size"),
    "hidden_size": Setting(COUNT, 768, "dim"),
    "num_hidden_layers": Setting(COUNT, 12, "depth"),
    "num_attention_heads": Setting(COUNT, 12, "num_heads"),
    "intermediate_size": Setting(COUNT, 3072, "ff_dim"),
    "max_position_embeddings": Setting(COUNT, 514, "max_positions"),
    "pad_token_id": Setting(INDEX, 1, "pad_token"),
    "layer_norm_eps": Setting(NUMBER, 1e-12, "layer_norm_eps"),
    "hidden_dropout_prob": Setting(NUMBER, 0.1, "dropout"),
    **fixed({"hidden_act": "gelu", "type_vocab_size": 1, "projection_hidden_act": "relu"}),
}
# RoBERTa's own configs, which assume other things.
ROBERTA_SETTINGS = TEXT_SETTINGS | {
    "max_position_embeddings": Setting(COUNT, 512, "max_positions"),
    "type_vocab_size": Setting(only(1), 2),
}
AUDIO_SETTINGS = {
    "num_mel_bins": Setting(COUNT, 64, "n_mels"),
    "spec_size": Setting(COUNT, 256, "spec_size"),
    "patch_size": Setting(UNIFORM, 4),
    "patch_stride": Setting(UNIFORM, [4, 4]),
    "patch_embeds_hidden_size": Setting(COUNT, 96, "dim"),
    "depths": Setting(several(COUNT), [2, 2, 6, 2], "depths"),
    "num_attention_heads": Setting(several(COUNT), [4, 8, 16, 32], "num_heads"),
    "window_size": Setting(COUNT, 8, "window_size"),
    "mlp_ratio": Setting(NUMBER, 4.0, "mlp_ratio"),
    "qkv_bias": Setting(FLAG, True, "qkv_bias"),
    "enable_fusion": Setting(FLAG, False),
    "fusion_type": Setting(either(NOTHING, one_of(["aff_2d"])), None),  # both are aff_2d
    **fixed(
        {
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "projection_hidden_act": "relu",
            "patch_embed_input_channels": 1,
            "enable_patch_layer_norm": True,
            "flatten_patch_embeds": True,
            "aff_block_r": 4,
        }
    ),
}
JOINT_SETTINGS = {"projection_dim": Setting(COUNT, 512, "joint_dim")}
FRONT_END_SETTINGS = {
    "sampling_rate": Setting(COUNT, 48000, "sample_rate"),
    "fft_window_size": Setting(COUNT, 1024, "n_fft"),
    "hop_length": Setting(COUNT, 480, "hop_length"),
    "frequency_min": Setting(NUMBER, 50, "fmin"),  # as released; transformers' own default is 0
    "frequency_max": Setting(NUMBER, 14000, "fmax"),
    "padding": Setting(one_of(["repeatpad", "repeat", "pad"]), "repeatpad", "filling"),
    "max_length_s": Setting(COUNT, 10),
}


def transformers_recipe(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], *, kind: str = "clap"
) -> dict[str, Any]:
    """The config of a CLAP from `config.json` and `preprocessor_config.json` of a transformers folder.

    kind: its `model_type`; `clap_text_model` and `clap_audio_model` are halves, whose settings stand on top.

    Raises:
        InputError: a setting that the networks here do not have.
    """
    whole = kind == "clap"
    texts, audios = (config.get(f"{half}_config", {}) if whole else config for half in ("text", "audio"))
    joint = to_ours(JOINT_SETTINGS, read_settings(config, JOINT_SETTINGS))
    text_tower = audio_tower = None
    if kind != "clap_audio_model":
        values = read_settings(texts, TEXT_SETTINGS, within="text_config." if whole else "")
        text_tower = to_ours(TEXT_SETTINGS, values)
    if kind != "clap_text_model":
        values = read_settings(audios, AUDIO_SETTINGS, within="audio_config." if whole else "")
        audio_tower = {
            **to_ours(AUDIO_SETTINGS, values),
            "patch_size": single(values["patch_size"]),
            "patch_stride": single(values["patch_stride"]),
            "fusion": "aff_2d" if values["enable_fusion"] else None,
        }
    values = read_settings(preprocessor, FRONT_END_SETTINGS)
    front_end = {
        **to_ours(FRONT_END_SETTINGS, values),
        "max_samples": values["max_length_s"] * values["sampling_rate"],
        "n_mels": audio_tower["n_mels"] if audio_tower else AUDIO_SETTINGS["num_mel_bins"].default,
        "fusion": audio_tower is not None and audio_tower["fusion"] is not None,
    }
    return recipe(audio_tower, text_tower, front_end, **joint)


def transformers_config(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a CLAP; the other way of `transformers_recipe`.

    Raises:
        InputError: a fusion that transformers does not have.
    """
    text, audio = recipe["text_tower"], recipe["audio_tower"]
    config = to_theirs(JOINT_SETTINGS, recipe)
    text_config = to_theirs(TEXT_SETTINGS, text) if text else {}
    audio_config = {}
    if audio:
        if audio["fusion"] not in (None, "aff_2d"):
            raise InputError(f"fusion {audio['fusion']}: transformers has only aff_2d")
        audio_config = {
            **to_theirs(AUDIO_SETTINGS, audio),
            "patch_size": audio["patch_size"],
            "patch_stride": [audio["patch_stride"]] * 2,
            "hidden_size": audio["dim"] * 2 ** (len(audio["depths"]) - 1),
            "enable_fusion": audio["fusion"] is not None,
        }
    if text and audio:
        parts = {"text_config": text_config, "audio_config": audio_config}
        return {"architectures": ["ClapModel"], "model_type": "clap", **config, **parts}
    half = "Text" if text else "Audio"
    kind = {"architectures": [f"Clap{half}ModelWithProjection"], "model_type": f"clap_{half.lower()}_model"}
    return kind | config | text_config | audio_config


def preprocessor_config(front_end: Mapping[str, Any]) -> dict[str, Any]:
    """The `preprocessor_config.json` of a CLAP's front end."""
    return {
        "feature_extractor_type": "ClapFeatureExtractor",
        **to_theirs(FRONT_END_SETTINGS, front_end),
        "feature_size": front_end["n_mels"],
        "max_length_s": front_end["max_samples"] // front_end["sample_rate"],
        "truncation": "fusion" if front_end["fusion"] else "rand_trunc",
    }


def roberta_tower(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of a RoBERTa from its own `config.json`."""
    return to_ours(ROBERTA_SETTINGS, read_settings(config, ROBERTA_SETTINGS))


def recipe(
    audio_tower: dict[str, Any] | None,
    text_tower: dict[str, Any] | None,
    front_end: dict[str, Any],
    *,
    joint_dim: int,
) -> dict[str, Any]:
    """A CLAP's config; the audio tower's behaviour in training is that of the released runs."""
    return {
        "_target_": "ldm_audio.models.clap.CLAP",
        "joint_dim": joint_dim,
        "front_end": {"_target_": "ldm_audio.audio.clap_mel.ClapMel", **front_end},
        "audio_tower": audio_tower and {"_target_": HTSAT_TARGET, **audio_tower, **HTSAT_TRAINING},
        "text_tower": text_tower and {"_target_": ROBERTA_TARGET, **text_tower},
    }
