"""UNet, VAE and schedule of diffusers folders (`UNet2DConditionModel`, `AutoencoderKL`), there and back.

Our blocks are numbered like diffusers', so the rules hold for every size. The `*_arguments` functions read a
folder's `config.json`; a setting that ours does not have is an error that names its key. The `*_config`
functions write one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ldm_audio.convert.audioldm import TRANSFORMER_RULES, conv_to_linear, optionally, renamed
from ldm_audio.convert.rules import Rule, prefixed
from ldm_audio.convert.settings import (
    COUNT,
    COUNT_OR_LIST,
    FLAG,
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

UNET_RES_RULES = renamed(
    {"norm1": "norm1", "conv1": "conv1", "time_emb_proj": "embed_proj", "norm2": "norm2", "conv2": "conv2"}
) + renamed({"conv_shortcut": "skip"}, optional=True)

VAE_RES_RULES = renamed({"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}) + renamed(
    {"conv_shortcut": "skip"}, optional=True
)

DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")

# What diffusers assumes of a key that is missing from a config.json, and what ours can equal.
UNET_SETTINGS = {
    "in_channels": Setting(COUNT, 4, "in_channels"),
    "out_channels": Setting(COUNT, 4, "out_channels"),
    "down_block_types": Setting(several(one_of(DOWN_BLOCKS)), ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]),
    "up_block_types": Setting(several(one_of(UP_BLOCKS)), ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3),
    "block_out_channels": Setting(several(COUNT), [320, 640, 1280, 1280]),
    "layers_per_block": Setting(UNIFORM, 2),
    "norm_num_groups": Setting(COUNT, 32, "norm_groups"),
    "dropout": Setting(NUMBER, 0.0, "dropout"),
    "cross_attention_dim": Setting(COUNT_OR_LIST, 1280),
    "transformer_layers_per_block": Setting(UNIFORM, 1),
    "attention_head_dim": Setting(COUNT_OR_LIST, 8),
    "num_attention_heads": Setting(either(COUNT_OR_LIST, NOTHING), None),
    "class_embed_type": Setting(either(NOTHING, one_of(["simple_projection"])), None),
    "class_embeddings_concat": Setting(FLAG, False),
    "projection_class_embeddings_input_dim": Setting(either(COUNT, NOTHING), None),
    **fixed(
        {
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
    ),
}
VAE_SETTINGS = {
    "in_channels": Setting(COUNT, 3, "in_channels"),
    "out_channels": Setting(COUNT, 3),
    "block_out_channels": Setting(several(COUNT), [64]),
    "down_block_types": Setting(several(one_of(["DownEncoderBlock2D"])), ["DownEncoderBlock2D"]),
    "up_block_types": Setting(several(one_of(["UpDecoderBlock2D"])), ["UpDecoderBlock2D"]),
    "layers_per_block": Setting(COUNT, 1, "num_res_blocks"),
    "latent_channels": Setting(COUNT, 4, "latent_channels"),
    "norm_num_groups": Setting(COUNT, 32, "norm_groups"),
    "scaling_factor": Setting(NUMBER, 0.18215),
    **fixed(
        {
            "act_fn": "silu",
            "latents_mean": None,
            "latents_std": None,
            "mid_block_add_attention": True,
            "shift_factor": None,
            "use_post_quant_conv": True,
            "use_quant_conv": True,
        }
    ),
}
SCHEDULE_KINDS = {"scaled_linear": "scaled_linear", "linear": "linear"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SCHEDULE_SETTINGS = {
    "num_train_timesteps": Setting(COUNT, 1000, "num_timesteps"),
    "beta_start": Setting(NUMBER, 0.0001, "beta_start"),
    "beta_end": Setting(NUMBER, 0.02, "beta_end"),
    "beta_schedule": Setting(one_of(SCHEDULE_KINDS), "linear"),
    "prediction_type": Setting(one_of(PREDICTIONS), "epsilon"),
    **fixed({"trained_betas": None, "rescale_betas_zero_snr": False}),
}
# What sampling here does, as the released pipelines; a folder that says otherwise sounds different.
SAMPLED_AS = {"clip_sample": False, "thresholding": False, "steps_offset": 1, "set_alpha_to_one": False}


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
    values = read_settings(config, UNET_SETTINGS)
    widths = list(values["block_out_channels"])
    attention_levels = [kind != "DownBlock2D" for kind in values["down_block_types"]]
    if [kind != "UpBlock2D" for kind in values["up_block_types"]] != attention_levels[::-1]:
        raise InputError("up_block_types is not down_block_types the other way round")
    heads = values["num_attention_heads"] or values["attention_head_dim"]  # a number that is called a width
    context_dim = values["cross_attention_dim"]
    if not UNIFORM.fits(context_dim) and list(context_dim) != widths:
        raise InputError(f"cross_attention_dim={context_dim}: expected one number or block_out_channels")
    has_embed = values["class_embed_type"] is not None
    return {
        **to_ours(UNET_SETTINGS, values),
        "channels": widths[0],
        "channel_mults": _mults(widths),
        "num_res_blocks": single(values["layers_per_block"]),
        "attention_levels": attention_levels,
        "num_heads": [heads] * len(widths) if isinstance(heads, int) else list(heads),
        "transformer_depth": single(values["transformer_layers_per_block"]),
        "transformers_per_block": 1,
        "embed_dim": values["projection_class_embeddings_input_dim"] if has_embed else None,
        "embed_mode": "concat" if values["class_embeddings_concat"] else "add",
        # A width for each level is the way of AudioLDM's folders to say self-attention.
        "context_dim": None if context_dim == widths else single(context_dim),
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
    if arguments["embed_mode"] == "attend":
        raise InputError("embed_mode attend: the AudioLDM pipelines of diffusers have only concat and add")
    widths = _widths(arguments)
    attention_levels = list(arguments["attention_levels"])
    embed_dim, context_dim = arguments["embed_dim"], arguments["context_dim"]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        **to_theirs(UNET_SETTINGS, arguments),
        "down_block_types": ["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in attention_levels],
        "up_block_types": ["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in attention_levels[::-1]],
        "block_out_channels": widths,
        "layers_per_block": arguments["num_res_blocks"],
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
    values = read_settings(config, VAE_SETTINGS)
    if values["in_channels"] != values["out_channels"]:
        raise InputError(
            f"out_channels={values['out_channels']}: expected in_channels={values['in_channels']}"
        )
    widths = list(values["block_out_channels"])
    channels = {"channels": widths[0], "channel_mults": _mults(widths)}
    return {**to_ours(VAE_SETTINGS, values), **channels, "dropout": 0.0}


def latent_scale(config: Mapping[str, Any]) -> float:
    """What the latents of a folder with this `vae/config.json` are multiplied by."""
    return float(read_settings(config, VAE_SETTINGS)["scaling_factor"])


def vae_config(arguments: Mapping[str, Any], *, latent_scale: float) -> dict[str, Any]:
    """The `vae/config.json` of a VAE with these arguments; the other way of `vae_arguments`."""
    widths = _widths(arguments)
    return {
        "_class_name": "AutoencoderKL",
        **to_theirs(VAE_SETTINGS, arguments),
        "out_channels": arguments["in_channels"],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "scaling_factor": latent_scale,
    }


def schedule_arguments(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Arguments of `Schedule` for a `scheduler_config.json`, and what it says that sampling here does not do.

    Raises:
        InputError: names the key whose value our schedule has no equal of.
    """
    values = read_settings(config, SCHEDULE_SETTINGS)
    schedule = {
        **to_ours(SCHEDULE_SETTINGS, values),
        "kind": SCHEDULE_KINDS[values["beta_schedule"]],
        "prediction": PREDICTIONS[values["prediction_type"]],
    }
    others = {key: config.get(key, value) for key, value in SAMPLED_AS.items()}
    differing = [f"{key}={other}" for key, other in others.items() if not only(SAMPLED_AS[key]).fits(other)]
    return schedule, differing


def schedule_config(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """The `scheduler_config.json` of a schedule, to be sampled with DDIM as the published pipelines are.

    Raises:
        InputError: a kind of schedule that diffusers does not have.
    """
    kinds, predictions = ({ours: theirs for theirs, ours in t.items()} for t in (SCHEDULE_KINDS, PREDICTIONS))
    if schedule["kind"] not in kinds:
        raise InputError(f"schedule {schedule['kind']}: only {', '.join(kinds)} can be exported")
    return {
        "_class_name": "DDIMScheduler",
        **to_theirs(SCHEDULE_SETTINGS, schedule),
        "beta_schedule": kinds[schedule["kind"]],
        "prediction_type": predictions[schedule["prediction"]],
        **SAMPLED_AS,
        "timestep_spacing": "leading",
    }


def _mults(widths: Sequence[int]) -> list[int]:
    if any(width % widths[0] for width in widths):
        raise InputError(f"block_out_channels={list(widths)}: expected multiples of the first")
    return [width // widths[0] for width in widths]


def _widths(arguments: Mapping[str, Any]) -> list[int]:
    mults = arguments["channel_mults"]
    if mults[0] != 1:
        raise InputError(f"channel_mults {list(mults)}: diffusers needs the first to be 1")
    return [arguments["channels"] * mult for mult in mults]
