"""transformers' CLVP (`ClvpModelForConditionalGeneration`): a CLVP and a SpeechLM without a text head.

Both are tables for `convert.rules` and recipes, with their ways back. transformers stores the rotary
frequencies, which are made anew for it, and GPT-2's matrices the other way round.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ldm_audio.convert.rules import Rule, cat_rows, prefixed, split_rows
from ldm_audio.errors import InputError
from ldm_audio.models.clvp import inverse_frequencies

CLVP_TARGET, TOWER_TARGET = "ldm_audio.models.clvp.CLVP", "ldm_audio.models.clvp.Tower"
SPEECH_LM_TARGET = "ldm_audio.models.speech_lm.SpeechLM"

# As released, and the defaults of transformers.
ROTARY_DIM = 32
DROPOUT = 0.1
TEXT_START, TEXT_STOP = 255, 0
SPEECH_LM_PREFIXES = ("conditioning_encoder.", "speech_decoder_model.")


def transpose(weight: Tensor) -> Tensor:
    """GPT-2 keeps its matrices, and the original codebook its vectors, the other way round."""
    return weight.t().contiguous()


def tower_rules(rotary_dim: int) -> list[Rule]:
    """transformers' `ClvpEncoder`."""
    layer, block = "layers.{i}", "blocks.{i}"
    return [
        Rule("rotary_pos_emb.inv_freq", (), inverse=partial(inverse_frequencies, rotary_dim)),
        Rule("token_embedding.weight", "token_embed.weight"),
        Rule(f"{layer}.input_rmsnorm.weight", f"{block}.norm1.weight"),
        Rule(
            tuple(f"{layer}.self_attn.{part}_proj.weight" for part in "qkv"),
            f"{block}.attention.qkv.weight",
            cat_rows,
            split_rows(3),
        ),
        Rule(f"{layer}.self_attn.out_proj.{{k:weight|bias}}", f"{block}.attention.proj.{{k}}"),
        Rule(f"{layer}.post_attention_rmsnorm.weight", f"{block}.norm2.weight"),
        Rule(f"{layer}.mlp.fc1.proj.{{k:weight|bias}}", f"{block}.ff.proj_in.{{k}}"),
        Rule(f"{layer}.mlp.fc2.{{k:weight|bias}}", f"{block}.ff.proj_out.{{k}}"),
        Rule("final_layer_norm.{k:weight|bias}", "norm.{k}"),
        Rule("projection.weight", "projection.weight"),
    ]


def clvp_rules(*, text_rotary_dim: int, speech_rotary_dim: int) -> list[Rule]:
    """The two towers and the scale, given how many channels of a head each rotates."""
    towers = [
        rule
        for kind, rotary_dim in (("text", text_rotary_dim), ("speech", speech_rotary_dim))
        for rule in prefixed(
            tower_rules(rotary_dim), source=f"{kind}_encoder_model.", target=f"{kind}_tower."
        )
    ]
    return [Rule("logit_scale", "logit_scale"), *towers]


def speech_lm_rules() -> list[Rule]:
    """The rest of transformers' `ClvpModelForConditionalGeneration`: conditioning encoder and decoder."""
    encoder, decoder = "conditioning_encoder", "speech_decoder_model.model.decoder"
    layer, block = f"{decoder}.layers.{{i}}", "blocks.{i}"
    attention, clip_block = f"{encoder}.mel_attn_blocks.{{i}}", "conditioning.blocks.{i}"
    return [
        Rule(f"{encoder}.mel_conv.{{k:weight|bias}}", "conditioning.proj.{k}"),
        Rule(f"{encoder}.group_norms.{{i}}.{{k:weight|bias}}", f"{clip_block}.norm.{{k}}"),
        *qkv_rules(attention, f"{clip_block}.attention"),
        Rule(f"{encoder}.text_token_embedding.weight", "text_embed.weight"),
        Rule(f"{encoder}.text_position_embedding.weight", "text_position_embed.weight"),
        Rule(f"{decoder}.input_embeds_layer.weight", "speech_embed.weight"),
        Rule(f"{decoder}.position_embeds_layer.weight", "speech_position_embed.weight"),
        Rule(f"{layer}.input_layernorm.{{k:weight|bias}}", f"{block}.norm1.{{k}}"),
        *qkv_rules(f"{layer}.attn", f"{block}.attention"),
        Rule(f"{layer}.post_attention_layernorm.{{k:weight|bias}}", f"{block}.norm2.{{k}}"),
        *mlp_rules(f"{layer}.mlp", f"{block}.mlp"),
        Rule(f"{decoder}.layer_norm.{{k:weight|bias}}", "norm.{k}"),
        Rule("speech_decoder_model.final_norm.{k:weight|bias}", "final_norm.{k}"),
        Rule("speech_decoder_model.lm_head.{k:weight|bias}", "speech_head.{k}"),
    ]


def qkv_rules(theirs: str, ours: str) -> list[Rule]:
    """transformers' attention."""
    parts = tuple(f"{theirs}.{part}_proj.{{k:weight|bias}}" for part in "qkv")
    return [
        Rule(parts, f"{ours}.qkv.{{k}}", cat_rows, split_rows(3)),
        Rule(f"{theirs}.out_proj.{{k:weight|bias}}", f"{ours}.proj.{{k}}"),
    ]


def mlp_rules(theirs: str, ours: str) -> list[Rule]:
    """GPT-2's feed-forward, its matrices the other way round."""
    pairs = (("c_fc", "0"), ("c_proj", "2"))
    return [
        rule
        for name, number in pairs
        for rule in (
            Rule(f"{theirs}.{name}.weight", f"{ours}.{number}.weight", transpose, transpose),
            Rule(f"{theirs}.{name}.bias", f"{ours}.{number}.bias"),
        )
    ]


# What a `ClvpConfig` leaves out of its JSON where it has this value, and where it must have it for us.
TOWER_DEFAULTS = {
    "vocab_size": 256,
    "hidden_size": 768,
    "intermediate_size": 1536,
    "projection_dim": 768,
    "num_hidden_layers": 20,
    "num_attention_heads": 12,
    "dropout": DROPOUT,
}
TOWER_FIXED = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "use_rotary_embedding": True,
    "use_attention_bias": False,
    "summary_type": "mean",
}
DECODER_DEFAULTS = {
    "vocab_size": 8194,
    "max_position_embeddings": 608,
    "max_text_tokens": 404,
    "hidden_size": 1024,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "n_inner": None,
    "num_mel_attn_blocks": 6,
    "feature_size": 80,
    "resid_pdrop": DROPOUT,
    "bos_token_id": 8192,
    "eos_token_id": 8193,
}
DECODER_FIXED = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "use_attention_bias": True,
}


def recipes_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The configs of `clvp` and `speech_lm` from a `config.json`.

    Raises InputError for a setting that the networks here do not have.
    """
    text = {**TOWER_DEFAULTS, "bos_token_id": TEXT_START, "eos_token_id": TEXT_STOP}
    text |= config.get("text_config") or {}
    speech = {**TOWER_DEFAULTS, **(config.get("speech_config") or {})}
    decoder = {**DECODER_DEFAULTS, **(config.get("decoder_config") or {})}
    for name, given, fixed in (
        ("text", text, TOWER_FIXED),
        ("speech", speech, TOWER_FIXED),
        ("decoder", decoder, DECODER_FIXED),
    ):
        for key, value in fixed.items():
            if given.get(key, value) != value:
                raise InputError(f"{name}_config.{key}={given[key]!r}: only {value!r} can be converted")
    num_tokens = decoder["vocab_size"] - 2
    if (decoder["bos_token_id"], decoder["eos_token_id"]) != (num_tokens, num_tokens + 1):
        raise InputError("decoder_config: its start and stop are not the last two tokens of its vocabulary")
    return {
        "clvp": {
            "_target_": CLVP_TARGET,
            "text_tower": tower_recipe(text),
            "speech_tower": tower_recipe(speech),
        },
        "speech_lm": {
            "_target_": SPEECH_LM_TARGET,
            "n_mels": decoder["feature_size"],
            "dim": decoder["hidden_size"],
            "depth": decoder["num_hidden_layers"],
            "num_heads": decoder["num_attention_heads"],
            "ff_dim": decoder["n_inner"] or 4 * decoder["hidden_size"],
            "conditioning_depth": decoder["num_mel_attn_blocks"],
            "text_vocab_size": text["vocab_size"],
            "text_start": text["bos_token_id"],
            "text_stop": text["eos_token_id"],
            "num_tokens": num_tokens,
            "max_text_positions": decoder["max_text_tokens"],
            "max_speech_positions": decoder["max_position_embeddings"],
            "text_head": False,
            "dropout": decoder["resid_pdrop"],
        },
    }


def tower_recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of a tower from its settings in a transformers config, defaults filled in."""
    return {
        "_target_": TOWER_TARGET,
        "vocab_size": config["vocab_size"],
        "dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "ff_dim": config["intermediate_size"],
        "rotary_dim": max(config["projection_dim"] // (2 * config["num_attention_heads"]), ROTARY_DIM),
        "joint_dim": config["projection_dim"],
        "norm": "eps",
        "dropout": config["dropout"],
    }


def config_of(clvp: Mapping[str, Any], speech_lm: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of both; the other way of `recipes_of`.

    Raises:
        InputError: sizes that transformers does not have.
    """
    text, speech = clvp["text_tower"], clvp["speech_tower"]
    for name, tower in (("text", text), ("speech", speech)):
        if tower_recipe(tower_config(tower))["rotary_dim"] != tower["rotary_dim"]:
            raise InputError(f"{name}_tower.rotary_dim={tower['rotary_dim']}: transformers has no such place")
    decoder = {
        "model_type": "clvp_decoder",
        "vocab_size": speech_lm["num_tokens"] + 2,
        "max_position_embeddings": speech_lm["max_speech_positions"],
        "max_text_tokens": speech_lm["max_text_positions"],
        "hidden_size": speech_lm["dim"],
        "num_hidden_layers": speech_lm["depth"],
        "num_attention_heads": speech_lm["num_heads"],
        "n_inner": speech_lm["ff_dim"],
        "num_mel_attn_blocks": speech_lm["conditioning_depth"],
        "feature_size": speech_lm["n_mels"],
        "resid_pdrop": speech_lm["dropout"],
        "embd_pdrop": speech_lm["dropout"],
        "attention_dropout": speech_lm["dropout"],
        "bos_token_id": speech_lm["num_tokens"],
        "eos_token_id": speech_lm["num_tokens"] + 1,
    }
    ends = {"bos_token_id": speech_lm["text_start"], "eos_token_id": speech_lm["text_stop"]}
    return {
        "architectures": ["ClvpModelForConditionalGeneration"],
        "model_type": "clvp",
        "projection_dim": text["joint_dim"],
        "text_config": tower_config(text) | ends,
        "speech_config": tower_config(speech),
        "decoder_config": decoder,
    }


def tower_config(tower: Mapping[str, Any]) -> dict[str, Any]:
    """A tower's settings as transformers names them."""
    return {
        "model_type": "clvp_encoder",
        "vocab_size": tower["vocab_size"],
        "hidden_size": tower["dim"],
        "num_hidden_layers": tower["depth"],
        "num_attention_heads": tower["num_heads"],
        "intermediate_size": tower["ff_dim"],
        "projection_dim": tower["joint_dim"],
        "dropout": tower["dropout"],
        "attention_dropout": tower["dropout"],
    }
