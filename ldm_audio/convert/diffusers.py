"""UNet and VAE of diffusers folders: `UNet2DConditionModel` and `AutoencoderKL`, there and back.

Our blocks are numbered like diffusers', so the tables hold for every size. The `*_arguments` functions read a
folder's `config.json`; a setting that our networks do not have is an error that names its key. The `*_config`
functions write one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ldm_audio.convert.audioldm import TRANSFORMER_RULES, conv_to_linear, optionally, renamed
from ldm_audio.convert.rules import Rule, prefixed
from ldm_audio.errors import InputError

UNET_RES_RULES = renamed(
    {"norm1": "norm1", "conv1": "conv1", "time_emb_proj": "embed_proj", "norm2": "norm2", "conv2": "conv2"}
) + renamed({"conv_shortcut": "skip"}, optional=True)

VAE_RES_RULES = renamed({"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}) + renamed(
    {"conv_shortcut": "skip"}, optional=True
)

# What diffusers assumes of a key that is missing from a config.json.
UNET_DEFAULTS = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "dropout": 0.0,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "projection_class_embeddings_input_dim": None,
}
VAE_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [64],
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
}

# Settings that change the arithmetic: ours have only this value, which is also diffusers' default.
UNET_FIXED = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "use_linear_projection": False,
}
VAE_FIXED = {
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}


def unet_rules() -> list[Rule]:
    """diffusers' UNet -> ours."""
    rules = renamed(
        {
            "time_embedding.linear_{n}": "time_embed.linear{n}",
            "conv_in": "conv_in",
            "conv_norm_out": "norm_out",
            "conv_out": "conv_out",
        }
    )
    rules += renamed(
        {
            "class_embedding": "embed_proj",
            "down_blocks.{b}.downsamplers.0.conv": "down.{b}.resample",
            "up_blocks.{b}.upsamplers.0.conv": "up.{b}.resample",
        },
        optional=True,
    )
    for path in ("down", "up"):
        theirs, ours = f"{path}_blocks.{{b}}", f"{path}.{{b}}.blocks.{{l}}"
        rules += prefixed(UNET_RES_RULES, source=f"{theirs}.resnets.{{l}}.", target=f"{ours}.res.")
        rules += optionally(
            prefixed(
                TRANSFORMER_RULES, source=f"{theirs}.attentions.{{l}}.", target=f"{ours}.transformers.0."
            )
        )
    rules += prefixed(UNET_RES_RULES, source="mid_block.resnets.{l}.", target="mid.{l}.res.")
    return rules + prefixed(
        TRANSFORMER_RULES, source="mid_block.attentions.0.", target="mid.0.transformers.0."
    )


def vae_rules() -> list[Rule]:
    """diffusers' VAE -> ours, with the present or the old names of its attention (`query`, `proj_attn`)."""
    rules = renamed({"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"})
    for half, path in (("encoder", "down"), ("decoder", "up")):
        rules += renamed(
            {
                f"{half}.conv_in": f"{half}.conv_in",
                f"{half}.conv_norm_out": f"{half}.norm_out",
                f"{half}.conv_out": f"{half}.conv_out",
            }
        )
        rules += renamed(
            {f"{half}.{path}_blocks.{{i}}.{path}samplers.0.conv": f"{half}.{path}.{{i}}.resample"},
            optional=True,
        )
        theirs, ours = f"{half}.{path}_blocks.{{i}}.resnets.{{j}}.", f"{half}.{path}.{{i}}.blocks.{{j}}."
        rules += prefixed(VAE_RES_RULES, source=theirs, target=ours)
        rules += prefixed(VAE_RES_RULES, source=f"{half}.mid_block.resnets.0.", target=f"{half}.mid.0.")
        attention = f"{half}.mid_block.attentions.0."
        rules += prefixed(_vae_attention_rules(), source=attention, target=f"{half}.mid.1.")
        rules += prefixed(VAE_RES_RULES, source=f"{half}.mid_block.resnets.1.", target=f"{half}.mid.2.")
    return rules


def _vae_attention_rules() -> list[Rule]:
    rules = renamed({"group_norm": "norm"})
    for part, old in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "proj_attn")):
        present = "to_out.0" if part == "out" else f"to_{part}"
        rules += [
            Rule(f"{present}.weight", f"to_{part}.weight", conv_to_linear, conv_to_linear, optional=True),
            Rule(f"{present}.bias", f"to_{part}.bias", optional=True),
            Rule(f"{old}.weight", f"to_{part}.weight", conv_to_linear, optional=True),
            Rule(f"{old}.bias", f"to_{part}.bias", optional=True),
        ]
    return rules


def unet_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `UNet` for a folder's `unet/config.json`.

    The number of heads is what the config says: 8 at every level in the published folders, which the original
    checkpoints do not have (`convert.audioldm.unet_arguments`).

    Raises:
        InputError: names the key whose value our UNet has no equal of.
    """
    _check_fixed(config, UNET_FIXED)
    config = UNET_DEFAULTS | dict(config)
    widths = list(config["block_out_channels"])
    channel_mults = _mults(widths)
    attention_levels = [_is_attention(kind, "DownBlock2D") for kind in config["down_block_types"]]
    if [_is_attention(kind, "UpBlock2D") for kind in config["up_block_types"]] != attention_levels[::-1]:
        raise InputError("up_block_types is not down_block_types the other way round")
    heads = (
        config["num_attention_heads"] or config["attention_head_dim"]
    )  # diffusers calls the number a width
    context_dim = config["cross_attention_dim"]
    if not isinstance(context_dim, int):
        # The widths themselves: the way of AudioLDM's folders to say self-attention.
        context_dim = None if list(context_dim) == widths else _single(config, "cross_attention_dim")
    if config["class_embed_type"] not in (None, "simple_projection"):
        raise InputError(f"class_embed_type {config['class_embed_type']!r} is not supported")
    has_embed = config["class_embed_type"] is not None
    return {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "channels": widths[0],
        "channel_mults": channel_mults,
        "num_res_blocks": _single(config, "layers_per_block"),
        "attention_levels": attention_levels,
        "num_heads": [heads] * len(widths) if isinstance(heads, int) else list(heads),
        "transformer_depth": _single(config, "transformer_layers_per_block"),
        "transformers_per_block": 1,
        "embed_dim": config["projection_class_embeddings_input_dim"] if has_embed else None,
        "embed_mode": "concat" if config["class_embeddings_concat"] else "add",
        "context_dim": context_dim,
        "norm_groups": config["norm_num_groups"],
        "dropout": config["dropout"],
    }


def unet_config(arguments: Mapping[str, Any], *, sample_size: int) -> dict[str, Any]:
    """The `unet/config.json` of a UNet with these arguments; the other way of `unet_arguments`.

    Args:
        arguments: of `UNet`.
        sample_size: latent frames that the pipeline makes if it is asked for no length.

    Raises:
        InputError: names the argument whose value diffusers' UNet has no equal of.
    """
    if arguments["transformers_per_block"] != 1:
        raise InputError(
            f"transformers_per_block {arguments['transformers_per_block']}: diffusers has only 1"
        )
    widths = _widths(arguments)
    attention_levels = list(arguments["attention_levels"])
    embed_dim, context_dim = arguments["embed_dim"], arguments["context_dim"]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": arguments["in_channels"],
        "out_channels": arguments["out_channels"],
        "down_block_types": ["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in attention_levels],
        "up_block_types": ["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in attention_levels[::-1]],
        "block_out_channels": widths,
        "layers_per_block": arguments["num_res_blocks"],
        "norm_num_groups": arguments["norm_groups"],
        "dropout": arguments["dropout"],
        "cross_attention_dim": widths if context_dim is None else context_dim,
        "transformer_layers_per_block": arguments["transformer_depth"],
        "attention_head_dim": list(arguments["num_heads"]),
        "class_embed_type": None if embed_dim is None else "simple_projection",
        "class_embeddings_concat": embed_dim is not None and arguments["embed_mode"] == "concat",
        "projection_class_embeddings_input_dim": embed_dim,
    }


def vae_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `VAE` for a folder's `vae/config.json`; no dropout, which diffusers does not have.

    Raises:
        InputError: names the key whose value our VAE has no equal of.
    """
    _check_fixed(config, VAE_FIXED)
    config = VAE_DEFAULTS | dict(config)
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if set(config[key]) != {kind}:
            raise InputError(f"{key} {list(config[key])}: only {kind} is supported")
    if config["in_channels"] != config["out_channels"]:
        raise InputError(
            f"out_channels {config['out_channels']}: expected in_channels, {config['in_channels']}"
        )
    widths = list(config["block_out_channels"])
    return {
        "in_channels": config["in_channels"],
        "channels": widths[0],
        "channel_mults": _mults(widths),
        "num_res_blocks": config["layers_per_block"],
        "latent_channels": config["latent_channels"],
        "norm_groups": config["norm_num_groups"],
        "dropout": 0.0,
    }


def vae_config(arguments: Mapping[str, Any], *, latent_scale: float) -> dict[str, Any]:
    """The `vae/config.json` of a VAE with these arguments; the other way of `vae_arguments`."""
    widths = _widths(arguments)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": arguments["in_channels"],
        "out_channels": arguments["in_channels"],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "layers_per_block": arguments["num_res_blocks"],
        "latent_channels": arguments["latent_channels"],
        "norm_num_groups": arguments["norm_groups"],
        "scaling_factor": latent_scale,
    }


def _check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for key, expected in fixed.items():
        value = config.get(key, expected)
        if value != expected and (value or expected):  # None, False and 0 all mean: without
            raise InputError(f"{key} {value!r} is not supported, only {expected!r}")


def _is_attention(kind: str, plain: str) -> bool:
    if kind not in (plain, f"CrossAttn{plain}"):
        raise InputError(f"block type {kind!r} is not supported, only {plain} and CrossAttn{plain}")
    return kind != plain


def _single(config: Mapping[str, Any], key: str) -> int:
    """The one number that stands at `key`, alone or for every level."""
    values = {config[key]} if isinstance(config[key], int) else set(config[key])
    if len(values) != 1:
        raise InputError(f"{key} {config[key]}: the same number is needed at every level")
    return values.pop()


def _mults(widths: Sequence[int]) -> list[int]:
    if any(width % widths[0] for width in widths):
        raise InputError(f"block_out_channels {list(widths)} are not multiples of the first")
    return [width // widths[0] for width in widths]


def _widths(arguments: Mapping[str, Any]) -> list[int]:
    mults = arguments["channel_mults"]
    if mults[0] != 1:
        raise InputError(f"channel_mults {list(mults)}: diffusers needs the first to be 1")
    return [arguments["channels"] * mult for mult in mults]
