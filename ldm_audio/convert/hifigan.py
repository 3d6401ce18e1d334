"""HiFi-GAN weights from elsewhere: transformers' `SpeechT5HifiGan` folders and original generator files.

An original file holds its tensors under the key `generator`, with weight norm split (`weight_g`, `weight_v`)
as it was trained; inside AudioLDM and MusicLDM checkpoints the same names stand below
`first_stage_model.vocoder.` with plain weights. All become the plain weights of `models.hifigan.HiFiGAN`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ldm_audio.convert.rules import Rule, fold_weight_norm, prefixed
from ldm_audio.convert.settings import (
    COUNT,
    REQUIRED,
    Kind,
    Setting,
    only,
    read_settings,
    several,
    to_ours,
    to_theirs,
)
from ldm_audio.errors import InputError

# What transformers assumes of a key that is missing from a config.json, and what ours can equal.
SPEECHT5_SETTINGS = {
    "model_in_dim": Setting(COUNT, 80, "n_mels"),
    "upsample_initial_channel": Setting(COUNT, 512, "channels"),
    "upsample_rates": Setting(several(COUNT), [4, 4, 4, 4], "upsample_rates"),
    "upsample_kernel_sizes": Setting(several(COUNT), [8, 8, 8, 8], "upsample_kernels"),
    "resblock_kernel_sizes": Setting(several(COUNT), [3, 7, 11], "resblock_kernels"),
    "resblock_dilation_sizes": Setting(several(several(COUNT)), [[1, 3, 5]] * 3, "resblock_dilations"),
    "leaky_relu_slope": Setting(only(0.1), 0.1),
    "normalize_before": Setting(only(False), True),
    "sampling_rate": Setting(COUNT, 16000),
}
# The JSON beside an original generator file, where every key is there.
GENERATOR_SETTINGS = {
    "num_mels": Setting(COUNT, REQUIRED, "n_mels"),
    **{
        key: Setting(setting.kind, REQUIRED, setting.ours)
        for key, setting in SPEECHT5_SETTINGS.items()
        if key.startswith(("upsample_", "resblock_"))
    },
    "resblock": Setting(Kind("1, the larger blocks", lambda value: str(value) == "1"), REQUIRED),
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


def speecht5_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `HiFiGAN` for a transformers `config.json`.

    Raises:
        InputError: names the key whose value `HiFiGAN` has no equal of; it does not normalise its input.
    """
    return to_ours(SPEECHT5_SETTINGS, read_settings(config, SPEECHT5_SETTINGS)) | {"high_resolution": False}


def speecht5_config(arguments: Mapping[str, Any], *, sample_rate: int) -> dict[str, Any]:
    """The `config.json` of a vocoder with these arguments; the other way of `speecht5_arguments`.

    Raises:
        InputError: a high-resolution vocoder, whose padding transformers does not have.
    """
    if arguments["high_resolution"]:
        raise InputError("a vocoder with high_resolution cannot be exported: SpeechT5HifiGan pads otherwise")
    return {
        "architectures": ["SpeechT5HifiGan"],
        "model_type": "speecht5_hifigan",
        **to_theirs(SPEECHT5_SETTINGS, arguments),
        "sampling_rate": sample_rate,
        "leaky_relu_slope": 0.1,
        "normalize_before": False,
    }


def sample_rate(config: Mapping[str, Any]) -> int:
    """Samples per second of a vocoder with this transformers `config.json`."""
    return read_settings(config, SPEECHT5_SETTINGS)["sampling_rate"]


def generator_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `HiFiGAN` for the JSON beside an original generator file.

    The 256-bin layout is taken for the high-resolution generator.

    Raises:
        InputError: names the key that is missing or unfit, such as `resblock` 2, the smaller blocks.
    """
    arguments = to_ours(GENERATOR_SETTINGS, read_settings(config, GENERATOR_SETTINGS))
    return arguments | {"high_resolution": arguments["n_mels"] == 256}


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
