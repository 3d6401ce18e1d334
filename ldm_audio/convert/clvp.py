"""transformers' CLVP (`ClvpModelForConditionalGeneration`): a CLVP and a SpeechLM without a text head.

Both are tables for `convert.rules` and recipes, with their ways back. transformers stores the rotary
frequencies, which are made anew for it, and GPT-2's matrices the other way round.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ldm_audio.convert.rules import Rule, cat_rows, prefixed, split_rows
from ldm_audio.convert.settings import (
    COUNT,
    INDEX,
    NOTHING,
    NUMBER,
    Setting,
    either,
    fixed,
    read_settings,
    several,
    to_ours,
    to_theirs,
)
from ldm_audio.errors import InputError
from ldm_audio.models.clvp import inverse_frequencies

CLVP_TARGET, TOWER_TARGET = "ldm_audio.models.clvp.CLVP", "ldm_audio.models.clvp.Tower"
SPEECH_LM_TARGET = "ldm_audio.models.speech_lm.SpeechLM"

# As released, and the defaults of transformers.
ROTARY_DIM = 32
DROPOUT = 0.1
TEXT_START, TEXT_STOP = 255, 0
RELEASED_ENDING = (83, 45, 45, 248)  # silence, and what ends each of its sequences of speech tokens
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


def clvp_rules(recipe: Mapping[str, Any]) -> list[Rule]:
    """The two towers and the scale of a CLVP with this config."""
    towers = [
        rule
        for kind in ("text", "speech")
        for rule in prefixed(
            tower_rules(recipe[f"{kind}_tower"]["rotary_dim"]),
            source=f"{kind}_encoder_model.",
            target=f"{kind}_tower.",
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


# What transformers assumes of a key that is missing from a config, and what ours can equal.
TOWER_SETTINGS = {
    "vocab_size": Setting(COUNT, 256, "vocab_size"),
    "hidden_size": Setting(COUNT, 768, "dim"),
    "intermediate_size": Setting(COUNT, 1536, "ff_dim"),
    "projection_dim": Setting(COUNT, 768, "joint_dim"),
    "num_hidden_layers": Setting(COUNT, 20, "depth"),
    "num_attention_heads": Setting(COUNT, 12, "num_heads"),
    "dropout": Setting(NUMBER, DROPOUT, "dropout"),
    **fixed(
        {
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "use_rotary_embedding": True,
            "use_attention_bias": False,
            "summary_type": "mean",
        }
    ),
}
# Of the text tower's config, for the language model.
TEXT_SETTINGS = {
    "vocab_size": Setting(COUNT, 256, "text_vocab_size"),
    "bos_token_id": Setting(INDEX, TEXT_START, "text_start"),
    "eos_token_id": Setting(INDEX, TEXT_STOP, "text_stop"),
}
DECODER_SETTINGS = {
    "vocab_size": Setting(COUNT, 8194),
    "max_position_embeddings": Setting(COUNT, 608, "max_speech_positions"),
    "max_text_tokens": Setting(COUNT, 404, "max_text_positions"),
    "hidden_size": Setting(COUNT, 1024, "dim"),
    "num_hidden_layers": Setting(COUNT, 30, "depth"),
    "num_attention_heads": Setting(COUNT, 16, "num_heads"),
    "n_inner": Setting(either(COUNT, NOTHING), None),
    "num_mel_attn_blocks": Setting(COUNT, 6, "conditioning_depth"),
    "feature_size": Setting(COUNT, 80, "n_mels"),
    "resid_pdrop": Setting(NUMBER, DROPOUT, "dropout"),
    "bos_token_id": Setting(INDEX, 8192),
    "eos_token_id": Setting(INDEX, 8193),
    "decoder_fixing_codes": Setting(several(INDEX), list(RELEASED_ENDING)),
    **fixed({"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "use_attention_bias": True}),
}


PREPROCESSOR_SETTINGS = {
    "sampling_rate": Setting(COUNT, 22050, "sample_rate"),
    "n_fft": Setting(COUNT, 1024, "n_fft"),
    "hop_length": Setting(COUNT, 256, "hop_length"),
    "feature_size": Setting(COUNT, 80, "n_mels"),
    "mel_norms": Setting(either(several(NUMBER), NOTHING), None, "norms"),
    "default_audio_length": Setting(COUNT, 6),
}
MEL_RANGE = {"fmin": 0, "fmax": 8000}  # which transformers keeps in its code


def recipes_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The configs of `clvp` and `speech_lm` from a `config.json`.

    Raises InputError for a setting that the networks here do not have.
    """
    text, speech, decoder = (config.get(f"{name}_config") or {} for name in ("text", "speech", "decoder"))
    ends = read_settings(text, TEXT_SETTINGS, within="text_config.")
    values = read_settings(decoder, DECODER_SETTINGS, within="decoder_config.")
    num_tokens = values["vocab_size"] - 2
    if (values["bos_token_id"], values["eos_token_id"]) != (num_tokens, num_tokens + 1):
        raise InputError("decoder_config: its start and stop are not the last two tokens of its vocabulary")
    return {
        "clvp": {
            "_target_": CLVP_TARGET,
            "text_tower": tower_recipe(text, within="text_config."),
            "speech_tower": tower_recipe(speech, within="speech_config."),
        },
        "speech_lm": {
            "_target_": SPEECH_LM_TARGET,
            **to_ours(DECODER_SETTINGS, values),
            **to_ours(TEXT_SETTINGS, ends),
            "ff_dim": values["n_inner"] or 4 * values["hidden_size"],
            "num_tokens": num_tokens,
            "text_head": False,
        },
    }


def tower_recipe(config: Mapping[str, Any], *, within: str) -> dict[str, Any]:
    """A tower's config from its settings in a transformers config, defaults filled in."""
    values = read_settings(config, TOWER_SETTINGS, within=within)
    return {
        "_target_": TOWER_TARGET,
        **to_ours(TOWER_SETTINGS, values),
        "rotary_dim": rotary_dim_of(values["projection_dim"], values["num_attention_heads"]),
        "norm": "eps",
    }


def rotary_dim_of(joint_dim: int, num_heads: int) -> int:
    """How many channels of a head transformers rotates."""
    return max(joint_dim // (2 * num_heads), ROTARY_DIM)


def system_of(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """What a system keeps beside its networks, from `config.json` and `preprocessor_config.json`."""
    decoder = read_settings(config.get("decoder_config") or {}, DECODER_SETTINGS, within="decoder_config.")
    values = read_settings(preprocessor, PREPROCESSOR_SETTINGS)
    mel = to_ours(PREPROCESSOR_SETTINGS, values) | MEL_RANGE
    mel["reference_samples"] = values["default_audio_length"] * values["sampling_rate"]
    return {"mel": mel, "ending": decoder["decoder_fixing_codes"], "cleaner": "english"}


def config_of(
    clvp: Mapping[str, Any], speech_lm: Mapping[str, Any], *, ending: Sequence[int] = RELEASED_ENDING
) -> dict[str, Any]:
    """The `config.json` of both; the other way of `recipes_of`.

    Raises:
        InputError: sizes that transformers does not have.
    """
    text, speech = clvp["text_tower"], clvp["speech_tower"]
    for name, tower in (("text", text), ("speech", speech)):
        if rotary_dim_of(tower["joint_dim"], tower["num_heads"]) != tower["rotary_dim"]:
            raise InputError(f"{name}_tower.rotary_dim={tower['rotary_dim']}: transformers has no such place")
    decoder = {
        "model_type": "clvp_decoder",
        **to_theirs(DECODER_SETTINGS, speech_lm),
        "vocab_size": speech_lm["num_tokens"] + 2,
        "n_inner": speech_lm["ff_dim"],
        "embd_pdrop": speech_lm["dropout"],
        "attention_dropout": speech_lm["dropout"],
        "bos_token_id": speech_lm["num_tokens"],
        "eos_token_id": speech_lm["num_tokens"] + 1,
        "decoder_fixing_codes": list(ending),
    }
    return {
        "architectures": ["ClvpModelForConditionalGeneration"],
        "model_type": "clvp",
        "projection_dim": text["joint_dim"],
        "text_config": tower_config(text) | to_theirs(TEXT_SETTINGS, speech_lm),
        "speech_config": tower_config(speech),
        "decoder_config": decoder,
    }


def tower_config(tower: Mapping[str, Any]) -> dict[str, Any]:
    """A tower's settings as transformers names them."""
    config = to_theirs(TOWER_SETTINGS, tower)
    return {"model_type": "clvp_encoder", **config, "attention_dropout": tower["dropout"]}


def preprocessor_config(mel: Mapping[str, Any]) -> dict[str, Any]:
    """The `preprocessor_config.json` of a front end.

    Raises:
        InputError: one that transformers does not have.
    """
    seconds, rest = divmod(mel["reference_samples"], mel["sample_rate"])
    if rest or any(mel[key] != value for key, value in MEL_RANGE.items()):
        raise InputError("mel: transformers has whole seconds of reference and bins from 0 to 8000 Hz alone")
    norms = mel["norms"] and list(mel["norms"])
    return to_theirs(PREPROCESSOR_SETTINGS, mel) | {
        "feature_extractor_type": "ClvpFeatureExtractor",
        "mel_norms": norms,
        "default_audio_length": seconds,
    }
