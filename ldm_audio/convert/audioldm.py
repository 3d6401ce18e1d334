"""UNet and VAE of original AudioLDM and MusicLDM checkpoints (`audioldm-*.ckpt`, `musicldm-ckpt.ckpt`).

The originals number their blocks through (`input_blocks.4.1`) and their decoder levels from the end, so these
tables are made for a given architecture, which `unet_arguments` and `vae_arguments` read from the shapes.
Names are without the prefix that they have in a whole checkpoint: `UNET_PREFIX`, `VAE_PREFIX`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ldm_audio.convert.rules import Rule, drop, prefixed
from ldm_audio.convert.shapes import Shapes, shape_of
from ldm_audio.errors import InputError

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."


def renamed(names: Mapping[str, str], *, optional: bool = False) -> list[Rule]:
    """One rule a pair of module names, for the weight and the bias of each."""
    return [
        Rule(f"{source}.{{kind:weight|bias}}", f"{target}.{{kind}}", optional=optional)
        for source, target in names.items()
    ]


def optionally(rules: Iterable[Rule]) -> list[Rule]:
    """The same rules, free to match nothing."""
    return [replace(rule, optional=True) for rule in rules]


def conv_to_linear(weight: Tensor) -> Tensor:
    """The weight of a 1x1 convolution (o, i, 1, 1), or of a linear layer (o, i), as the latter."""
    return weight.reshape(weight.shape[:2])


def linear_to_conv(weight: Tensor) -> Tensor:
    """(o, i) -> (o, i, 1, 1)."""
    return weight[:, :, None, None]


SCHEDULE_BUFFERS = drop(
    "logvar",
    "betas",
    "{name:alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod}",
    "{name:log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod}",
    "{name:posterior_variance|posterior_log_variance_clipped|posterior_mean_coef1|posterior_mean_coef2}",
)

TRANSFORMER_RULES = [
    Rule("transformer_blocks.{d}.attn{n}.to_{part:q|k|v}.weight", "layers.{d}.attn{n}.to_{part}.weight"),
    *renamed(
        {
            "norm": "norm",
            "proj_in": "proj_in",
            "transformer_blocks.{d}.norm{n}": "layers.{d}.norm{n}",
            "transformer_blocks.{d}.attn{n}.to_out.0": "layers.{d}.attn{n}.to_out",
            "transformer_blocks.{d}.ff.net.0.proj": "layers.{d}.ff.proj_in",
            "transformer_blocks.{d}.ff.net.2": "layers.{d}.ff.proj_out",
            "proj_out": "proj_out",
        }
    ),
]

UNET_RES_RULES = renamed(
    {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "embed_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
    }
) + renamed({"skip_connection": "skip"}, optional=True)

VAE_RES_RULES = renamed({"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}) + renamed(
    {"nin_shortcut": "skip"}, optional=True
)

VAE_ATTENTION_RULES = [
    *renamed({"norm": "norm"}),
    Rule("{part:q|k|v}.weight", "to_{part}.weight", conv_to_linear, linear_to_conv),
    Rule("{part:q|k|v}.bias", "to_{part}.bias"),
    Rule("proj_out.weight", "to_out.weight", conv_to_linear, linear_to_conv),
    Rule("proj_out.bias", "to_out.bias"),
]


def unet_rules(
    *, num_res_blocks: int, attention_levels: Sequence[bool], transformers_per_block: int
) -> list[Rule]:
    """Names of the original UNet -> ours, for a UNet with these numbers."""
    rules = renamed(
        {
            "time_embed.0": "time_embed.linear1",
            "time_embed.2": "time_embed.linear2",
            "input_blocks.0.0": "conv_in",
            "out.0": "norm_out",
            "out.2": "conv_out",
        }
    ) + renamed({"film_emb": "embed_proj"}, optional=True)

    def block(source: str, target: str, transformers: int) -> list[Rule]:
        found = prefixed(UNET_RES_RULES, source=f"{source}.0.", target=f"{target}.res.")
        for place in range(transformers):
            found += prefixed(
                TRANSFORMER_RULES, source=f"{source}.{place + 1}.", target=f"{target}.transformers.{place}."
            )
        return found

    last = len(attention_levels) - 1
    number = 1
    for level, attends in enumerate(attention_levels):
        for place in range(num_res_blocks):
            transformers = transformers_per_block if attends else 0
            rules += block(f"input_blocks.{number}", f"down.{level}.blocks.{place}", transformers)
            number += 1
        if level < last:
            rules += renamed({f"input_blocks.{number}.0.op": f"down.{level}.resample"})
            number += 1

    rules += block("middle_block", "mid.0", transformers_per_block)
    end = f"middle_block.{transformers_per_block + 1}."
    rules += prefixed(UNET_RES_RULES, source=end, target="mid.1.res.")

    number = 0
    for level, attends in enumerate(reversed(attention_levels)):
        transformers = transformers_per_block if attends else 0
        for place in range(num_res_blocks + 1):
            rules += block(f"output_blocks.{number}", f"up.{level}.blocks.{place}", transformers)
            number += 1
        if level < last:  # the convolution sits behind the level's last block, under that block's number
            upsampler = f"output_blocks.{number - 1}.{transformers + 1}.conv"
            rules += renamed({upsampler: f"up.{level}.resample"})
    return rules


def vae_rules(*, num_levels: int) -> list[Rule]:
    """Names of the original autoencoder -> ours; the discriminator and the loss networks are dropped."""
    rules = drop("loss.{path:*}") + renamed(
        {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    )
    for half in ("encoder", "decoder"):
        rules += renamed({f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "norm_out", "conv_out")})
        rules += prefixed(VAE_RES_RULES, source=f"{half}.mid.block_1.", target=f"{half}.mid.0.")
        rules += prefixed(VAE_ATTENTION_RULES, source=f"{half}.mid.attn_1.", target=f"{half}.mid.1.")
        rules += prefixed(VAE_RES_RULES, source=f"{half}.mid.block_2.", target=f"{half}.mid.2.")

    rules += prefixed(
        VAE_RES_RULES, source="encoder.down.{i}.block.{j}.", target="encoder.down.{i}.blocks.{j}."
    )
    if num_levels > 1:
        rules += renamed({"encoder.down.{i}.downsample.conv": "encoder.down.{i}.resample"})
    for level in range(num_levels):
        place = num_levels - 1 - level  # ours are in the order in which they run
        rules += prefixed(
            VAE_RES_RULES,
            source=f"decoder.up.{level}.block.{{j}}.",
            target=f"decoder.up.{place}.blocks.{{j}}.",
        )
        if level > 0:
            rules += renamed({f"decoder.up.{level}.upsample.conv": f"decoder.up.{place}.resample"})
    return rules


def ema_key(name: str) -> str:
    """The key that the averaged copy of the original UNet tensor `name` (no prefix) has in a checkpoint."""
    return "model_ema." + (UNET_PREFIX + name).removeprefix("model.").replace(".", "")


def unet_arguments(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `UNet` for an original UNet with these tensor shapes (names without prefix).

    How wide a head is does not show in the shapes, see `released_heads`. Dropout is 0.

    Raises:
        InputError: names the tensor that an original UNet has and `shapes` does not.
    """
    channels, in_channels = shape_of(shapes, "input_blocks.0.0.weight")[:2]
    num_levels = 1 + sum(name.endswith(".0.op.weight") for name in shapes)
    num_res_blocks = _count(shapes, "input_blocks.{}.0.in_layers.0.weight", start=1)
    firsts = [f"input_blocks.{1 + level * (num_res_blocks + 1)}" for level in range(num_levels)]
    widths = [shape_of(shapes, f"{first}.0.out_layers.3.weight")[0] for first in firsts]
    channel_mults = [width // channels for width in widths]
    condition_dim = shape_of(shapes, "middle_block.0.emb_layers.1.weight")[1]
    keys = [shape for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight")]
    context_dims = {inner for outer, inner in keys if inner != outer}  # none: attn2 is self-attention too
    if len(context_dims) > 1:
        raise InputError(f"contexts of several widths, {sorted(context_dims)}, are not supported")
    return {
        "in_channels": in_channels,
        "out_channels": shape_of(shapes, "out.2.weight")[0],
        "channels": channels,
        "channel_mults": channel_mults,
        "num_res_blocks": num_res_blocks,
        "attention_levels": [f"{first}.1.norm.weight" in shapes for first in firsts],
        "num_heads": released_heads(channels, channel_mults),
        "transformer_depth": _count(shapes, "middle_block.1.transformer_blocks.{}.norm1.weight"),
        "transformers_per_block": _count(shapes, "middle_block.{}.norm.weight", start=1),
        "embed_dim": shapes["film_emb.weight"][1] if "film_emb.weight" in shapes else None,
        "embed_mode": "concat" if condition_dim == 8 * channels else "add",
        "context_dim": context_dims.pop() if context_dims else None,
        "norm_groups": 32,
        "dropout": 0.0,
    }


def released_heads(channels: int, channel_mults: Sequence[int]) -> list[int]:
    """Heads a level as released: of 64 channels in L, whose UNet begins with 256, otherwise of 32."""
    head_channels = 64 if channels == 256 else 32
    return [channels * mult // head_channels for mult in channel_mults]


def vae_arguments(shapes: Shapes) -> dict[str, Any]:
    """Arguments of `VAE` for an original autoencoder with these tensor shapes (names without prefix).

    Raises:
        InputError: names the tensor that an original autoencoder has and `shapes` does not.
    """
    channels, in_channels = shape_of(shapes, "encoder.conv_in.weight")[:2]
    num_levels = _count(shapes, "encoder.down.{}.block.0.conv1.weight")
    return {
        "in_channels": in_channels,
        "channels": channels,
        "channel_mults": [
            shape_of(shapes, f"encoder.down.{level}.block.0.conv2.weight")[0] // channels
            for level in range(num_levels)
        ],
        "num_res_blocks": _count(shapes, "encoder.down.0.block.{}.conv1.weight"),
        "latent_channels": shape_of(shapes, "post_quant_conv.weight")[0],
        "norm_groups": 32,
        "dropout": 0.0,
    }


def _count(shapes: Shapes, template: str, *, start: int = 0) -> int:
    """How many names of the form `template` there are, numbered from `start` without a gap."""
    return next(count for count in range(len(shapes) + 1) if template.format(start + count) not in shapes)
