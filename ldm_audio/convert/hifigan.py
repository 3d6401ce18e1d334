"""HiFi-GAN weights from elsewhere: transformers' `SpeechT5HifiGan` folders and original generator files.

An original file holds its tensors under the key `generator`, with weight norm split (`weight_g`, `weight_v`)
as it was trained; inside AudioLDM and MusicLDM checkpoints the same names stand below
`first_stage_model.vocoder.` with plain weights. All become the plain weights of `models.hifigan.HiFiGAN`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ldm_audio.convert.rules import Rule, fold_weight_norm, prefixed
from ldm_audio.errors import InputError

# What transformers assumes of a key that is missing from a config.json.
SPEECHT5_DEFAULTS = {
    "model_in_dim": 80,
    "upsample_initial_channel": 512,
    "upsample_rates": [4, 4, 4, 4],
    "upsample_kernel_sizes": [8, 8, 8, 8],
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5]] * 3,
    "leaky_relu_slope": 0.1,
    "normalize_before": True,
}

RELEASED = (
    {
        "n_mels": 64,
        "channels": 1024,
        "upsample_rates": [5, 4, 2, 2, 2],
        "upsample_kernels": [16, 16, 8, 4, 4],
        "resblock_kernels": [3, 7, 11],
        "resblock_dilations": [[1, 3, 5]] * 3,
        "high_resolution": False,
    },
    {
        "n_mels": 256,
        "channels": 1536,
        "upsample_rates": [6, 5, 4, 2, 2],
        "upsample_kernels": [12, 10, 8, 4, 4],
        "resblock_kernels": [3, 7, 11, 15],
        "resblock_dilations": [[1, 3, 5]] * 4,
        "high_resolution": True,
    },
)


def generator_rules() -> list[Rule]:
    """Original generator names -> ours: equal but for weight norm, and for the prefixes that wrappers add."""
    rules = []
    for name in ("conv_pre", "ups.{i}", "resblocks.{i}.convs{j}.{k}", "conv_post"):
        rules += convolution_rules(name, name)
    return rules + prefixed(rules, source="_orig_mod.") + prefixed(rules, source="module.")


def speecht5_rules(*, n_mels: int) -> list[Rule]:
    """transformers' names -> ours; an export fills in the statistics `mean` and `scale`, which are unused."""
    rules = [
        Rule("mean", (), inverse=lambda: torch.zeros(n_mels)),
        Rule("scale", (), inverse=lambda: torch.ones(n_mels)),
    ]
    for theirs, ours in (
        ("conv_pre", "conv_pre"),
        ("upsampler.{i}", "ups.{i}"),
        ("resblocks.{i}.convs{j}.{k}", "resblocks.{i}.convs{j}.{k}"),
        ("conv_post", "conv_post"),
    ):
        rules += convolution_rules(theirs, ours)
    return rules


def convolution_rules(theirs: str, ours: str) -> list[Rule]:
    """Weight and bias of one convolution, the weight plain or split by either of torch's weight norms."""
    split = f"{theirs}.parametrizations.weight.original"
    return [
        Rule(f"{theirs}.{{kind:weight|bias}}", f"{ours}.{{kind}}", optional=True),
        Rule((f"{theirs}.weight_g", f"{theirs}.weight_v"), f"{ours}.weight", fold_weight_norm, optional=True),
        Rule((f"{split}0", f"{split}1"), f"{ours}.weight", fold_weight_norm, optional=True),
    ]


def speecht5_arguments(config: Mapping[str, Any], *, origin: str) -> dict[str, Any]:
    """A transformers config.json -> arguments of `HiFiGAN`. `origin` names the file in messages.

    Raises:
        InputError: the vocoder normalises its input or leaks by another slope, which `HiFiGAN` does not.
    """
    config = SPEECHT5_DEFAULTS | {key: config[key] for key in SPEECHT5_DEFAULTS if key in config}
    _refuse_others(config, {"normalize_before": False, "leaky_relu_slope": 0.1}, origin)
    return {
        "n_mels": config["model_in_dim"],
        "channels": config["upsample_initial_channel"],
        "upsample_rates": list(config["upsample_rates"]),
        "upsample_kernels": list(config["upsample_kernel_sizes"]),
        "resblock_kernels": list(config["resblock_kernel_sizes"]),
        "resblock_dilations": [list(dilations) for dilations in config["resblock_dilation_sizes"]],
        "high_resolution": False,
    }


def speecht5_config(arguments: Mapping[str, Any], *, sample_rate: int) -> dict[str, Any]:
    """Arguments of `HiFiGAN` -> the config.json of a transformers folder, for export.

    Raises:
        InputError: a high-resolution vocoder, whose padding transformers does not have.
    """
    if arguments["high_resolution"]:
        raise InputError("a vocoder with high_resolution cannot be exported: SpeechT5HifiGan pads otherwise")
    return {
        "architectures": ["SpeechT5HifiGan"],
        "model_type": "speecht5_hifigan",
        "model_in_dim": arguments["n_mels"],
        "sampling_rate": sample_rate,
        "upsample_initial_channel": arguments["channels"],
        "upsample_rates": arguments["upsample_rates"],
        "upsample_kernel_sizes": arguments["upsample_kernels"],
        "resblock_kernel_sizes": arguments["resblock_kernels"],
        "resblock_dilation_sizes": arguments["resblock_dilations"],
        "initializer_range": 0.01,
        "leaky_relu_slope": 0.1,
        "normalize_before": False,
    }


def generator_arguments(config: Mapping[str, Any], *, origin: str) -> dict[str, Any]:
    """The JSON beside an original generator file -> arguments of `HiFiGAN`.

    The 256-bin layout is taken for the high-resolution generator. `origin` names the file in messages.

    Raises:
        InputError: a key is missing, or the generator uses the smaller residual blocks (`resblock` "2").
    """
    names = {
        "n_mels": "num_mels",
        "channels": "upsample_initial_channel",
        "upsample_rates": "upsample_rates",
        "upsample_kernels": "upsample_kernel_sizes",
        "resblock_kernels": "resblock_kernel_sizes",
        "resblock_dilations": "resblock_dilation_sizes",
    }
    if missing := [key for key in (*names.values(), "resblock") if key not in config]:
        raise InputError(f"{origin}: not the config of a HiFi-GAN generator, it lacks {', '.join(missing)}")
    _refuse_others({"resblock": str(config["resblock"])}, {"resblock": "1"}, origin)
    arguments = {ours: config[theirs] for ours, theirs in names.items()}
    return arguments | {"high_resolution": config["num_mels"] == 256}


def released_arguments(shapes: Mapping[str, Sequence[int]], *, origin: str) -> dict[str, Any]:
    """Arguments of `HiFiGAN` for a generator without a config, recognised by its shapes (original names).

    Shapes do not tell strides from kernels, so that only the released layouts can be known by them.

    Raises:
        InputError: not a generator, or not a layout that is known.
    """
    weight = {
        name.removesuffix(ending): tuple(shape)
        for ending in (".weight", ".weight_v", ".parametrizations.weight.original1")
        for name, shape in shapes.items()
        if name.endswith(ending)
    }
    first = next((shape for name, shape in weight.items() if name.endswith("conv_pre")), None)
    if first is None:
        raise InputError(f"{origin}: not a HiFi-GAN generator, it has no conv_pre")
    stages = sorted(
        (name, shape) for name, shape in weight.items() if name.rpartition(".")[0].endswith("ups")
    )
    kernels = [shape[2] for _, shape in stages]
    for arguments in RELEASED:
        if (
            first[:2] == (arguments["channels"], arguments["n_mels"])
            and kernels == arguments["upsample_kernels"]
        ):
            return dict(arguments)
    raise InputError(
        f"{origin}: {first[1]} mel bins, {first[0]} channels and kernels {kernels} are not a released "
        "generator; give the JSON config that belongs to it"
    )


def _refuse_others(config: Mapping[str, Any], supported: Mapping[str, Any], origin: str) -> None:
    for key, value in supported.items():
        if config[key] != value:
            raise InputError(f"{origin}: {key} is {config[key]}, only {value} is supported")
