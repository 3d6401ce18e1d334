"""Folders that diffusers and transformers write: a pipeline of AudioLDM or MusicLDM, or one network."""

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_audio.convert import audioldm, clap, diffusers, hifigan
from ldm_audio.convert.parts import UNET, VAE, VOCODER, Part, Source, located, mel_settings
from ldm_audio.convert.rules import Rule
from ldm_audio.convert.stored import Tensors, open_folder, read_json
from ldm_audio.errors import InputError

PIPELINES = {"AudioLDMPipeline": "audioldm", "MusicLDMPipeline": "musicldm"}
COMPONENTS = ("unet", "vae", "vocoder", "text_encoder")
SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SCHEDULER_DEFAULTS = {
    "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "prediction_type": "epsilon", "trained_betas": None, "rescale_betas_zero_snr": False,
    "clip_sample": False, "thresholding": False, "steps_offset": 1, "set_alpha_to_one": False,
}  # fmt: skip
# What sampling here does, as the released pipelines; a folder that says otherwise sounds different.
SAMPLED_AS = {"clip_sample": False, "thresholding": False, "steps_offset": 1, "set_alpha_to_one": False}
ROBERTA_DEFAULTS = clap.TEXT_DEFAULTS | {"max_position_embeddings": 512}


def open_pipeline(folder: Path, *, heads: str) -> Source:
    """A diffusers pipeline's folder. `heads` is `config` or `original`, see `unet_folder`.

    Raises:
        InputError: another pipeline, a component that is missing, or a setting that has no equal here.
    """
    name = str(read_json(folder / "model_index.json").get("_class_name"))
    if name not in PIPELINES:
        raise InputError(f"{folder}: a {name}, expected {' or '.join(PIPELINES)}")
    if missing := [part for part in (*COMPONENTS, "scheduler") if not (folder / part).is_dir()]:
        raise InputError(f"{folder}: has no folder {', '.join(missing)}")
    found = {part: open_network(folder / part, heads=heads) for part in COMPONENTS}
    parts = {ours: part for source in found.values() for ours, part in source.parts.items()}
    if odd := {"unet", "vae", "vocoder", "clap"} ^ parts.keys():
        raise InputError(f"{folder}: its components are not those of a {name} ({', '.join(sorted(odd))})")

    vocoder = read_json(folder / "vocoder" / "config.json")
    schedule, cautions = read_schedule(folder / "scheduler" / "scheduler_config.json")
    rates = parts["vocoder"].recipe["upsample_rates"]
    with located(folder):
        system = {
            "mel": mel_settings(
                n_mels=parts["vocoder"].recipe["n_mels"],
                hop_length=prod(rates),
                sample_rate=vocoder.get("sampling_rate", 16000),
            ),
            "schedule": schedule,
            "latent_scale": float(read_json(folder / "vae" / "config.json").get("scaling_factor", 0.18215)),
            "family": PIPELINES[name],
        }
    tokenizer = folder / "tokenizer"
    return Source(
        kind=f"diffusers {name}",
        parts=parts,
        system=system,
        tokenizer=tokenizer if tokenizer.is_dir() else None,
        notes=[note for source in found.values() for note in source.notes],
        cautions=[caution for source in found.values() for caution in source.cautions] + cautions,
    )


def read_schedule(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Arguments of `Schedule`, and in which settings that folder's sampling differs from ours."""
    config = SCHEDULER_DEFAULTS | read_json(path)
    for key, known in (("beta_schedule", SCHEDULES), ("prediction_type", PREDICTIONS)):
        if str(config[key]) not in known:
            raise InputError(f"{path}: {key} {config[key]!r} is not supported, only {', '.join(known)}")
    for key in ("trained_betas", "rescale_betas_zero_snr"):
        if config[key]:
            raise InputError(f"{path}: {key} is set, which is not supported")
    differing = [
        f"{key}={config[key]}"
        for key, ours in SAMPLED_AS.items()
        if config[key] != ours and (config[key] or ours)  # None and False both mean: without
    ]
    schedule = {
        "num_timesteps": config["num_train_timesteps"],
        "beta_start": config["beta_start"],
        "beta_end": config["beta_end"],
        "kind": SCHEDULES[config["beta_schedule"]],
        "prediction": PREDICTIONS[config["prediction_type"]],
    }
    return schedule, [f"{path}: {', '.join(differing)} is not followed"] if differing else []


def open_network(folder: Path, *, heads: str) -> Source:
    """One network's folder, told by `model_type` or `_class_name` of its `config.json`.

    Raises:
        InputError: a kind that is not known, or a setting that has no equal here.
    """
    config = read_json(folder / "config.json")
    kind = str(config.get("model_type") or config.get("_class_name"))
    if kind not in KINDS:
        raise InputError(f"{folder / 'config.json'}: {kind!r} is not one of {', '.join(KINDS)}")
    tensors, file = open_folder(folder)
    with located(folder):
        source = KINDS[kind](folder, config, tensors, heads)
    source.notes.append(f"{folder.name}/{file}")
    return source


def unet_folder(folder: Path, config: dict, tensors: Tensors, heads: str) -> Source:
    """diffusers' UNet. Its published folders have 8 heads everywhere, which the original networks have not:
    `heads="original"` takes the original's numbers instead of the config's."""
    arguments = diffusers.unet_arguments(config)
    original = audioldm.released_heads(arguments["channels"], arguments["channel_mults"])
    differing = [
        level
        for level, attends in enumerate(arguments["attention_levels"])
        if attends and arguments["num_heads"][level] != original[level]
    ]
    cautions = []
    if heads == "original":
        if 0 in original:
            raise InputError(f"heads=original: no original has {arguments['channels']} channels")
        arguments["num_heads"] = original
    elif differing and 0 not in original:
        cautions.append(
            f"{folder}: heads {arguments['num_heads']} as its config says, where the original network of "
            f"this size has {original}; heads=original takes those"
        )
    part = Part({"_target_": UNET, **arguments}, diffusers.unet_rules(), tensors, str(folder))
    return Source(kind="diffusers UNet2DConditionModel", parts={"unet": part}, cautions=cautions)


def vae_folder(folder: Path, config: dict, tensors: Tensors, heads: str) -> Source:
    """diffusers' AutoencoderKL."""
    recipe = {"_target_": VAE, **diffusers.vae_arguments(config)}
    part = Part(recipe, diffusers.vae_rules(), tensors, str(folder))
    return Source(kind="diffusers AutoencoderKL", parts={"vae": part})


def vocoder_folder(folder: Path, config: dict, tensors: Tensors, heads: str) -> Source:
    """transformers' SpeechT5HifiGan."""
    arguments = hifigan.speecht5_arguments(config, origin=str(folder / "config.json"))
    rules = hifigan.speecht5_rules(n_mels=arguments["n_mels"])
    part = Part({"_target_": VOCODER, **arguments}, rules, tensors, str(folder))
    return Source(kind="transformers SpeechT5HifiGan", parts={"vocoder": part})


def clap_folder(folder: Path, config: dict, tensors: Tensors, heads: str) -> Source:
    """transformers' ClapModel."""
    recipe = clap.transformers_recipe(config, preprocessor(folder))
    part = Part(recipe, clap.transformers_rules(), tensors, str(folder))
    return Source(kind="transformers ClapModel", parts={"clap": part}, tokenizer=vocabulary(folder))


def clap_text_folder(folder: Path, config: dict, tensors: Tensors, heads: str) -> Source:
    """transformers' ClapTextModelWithProjection: a CLAP without an audio tower."""
    settings = {"text_config": config, "projection_dim": config.get("projection_dim", 512)}
    recipe = clap.transformers_recipe(settings, {}) | {"audio_tower": None}
    rules = [*clap.transformers_text_rules(), *clap.initial_scale_rules()]
    return Source(
        kind="transformers ClapTextModelWithProjection",
        parts={"clap": Part(recipe, rules, tensors, str(folder))},
        tokenizer=vocabulary(folder),
        notes=["CLAP's text half alone: it cannot rank candidates"],
    )


def clap_audio_folder(folder: Path, config: dict, tensors: Tensors, heads: str) -> Source:
    """transformers' ClapAudioModelWithProjection: a CLAP without a text tower."""
    settings = {"audio_config": config, "projection_dim": config.get("projection_dim", 512)}
    recipe = clap.transformers_recipe(settings, preprocessor(folder)) | {"text_tower": None}
    rules = [*clap.transformers_audio_rules(), *clap.initial_scale_rules()]
    return Source(
        kind="transformers ClapAudioModelWithProjection",
        parts={"clap": Part(recipe, rules, tensors, str(folder))},
        notes=["CLAP's audio half alone: it cannot embed texts"],
    )


def roberta_folder(folder: Path, config: dict, tensors: Tensors, heads: str) -> Source:
    """A RoBERTa trained on text, to start a CLAP's text tower from; its language-model head is dropped."""
    tower = clap.roberta_tower(ROBERTA_DEFAULTS | config)
    tensors = tensors.below("roberta.") or tensors.without("lm_head.")
    rules, cautions = clap.roberta_rules(), []
    if "pooler.dense.weight" not in tensors:
        rules = [rule for rule in rules if not rule.sources[0].startswith("pooler.")]
        rules += random_pooler(tower["dim"])
        cautions.append(f"{folder}: holds no pooler, which begins at random")
    part = Part({"_target_": clap.ROBERTA_TARGET, **tower}, rules, tensors, str(folder))
    return Source(
        kind="transformers RoBERTa, a start for CLAP",
        parts={"clap.text_tower": part},
        tokenizer=vocabulary(folder),
        cautions=cautions,
    )


def random_pooler(dim: int) -> list[Rule]:
    """A pooler as RoBERTa initialises it, always the same one."""

    def weight() -> Tensor:
        return 0.02 * torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))

    return [Rule((), "pooler.weight", weight), Rule((), "pooler.bias", lambda: torch.zeros(dim))]


def preprocessor(folder: Path) -> dict[str, Any]:
    """The settings of CLAP's front end, which a pipeline keeps in a folder of their own."""
    for path in (folder, folder.parent / "feature_extractor"):
        if (path / "preprocessor_config.json").is_file():
            return read_json(path / "preprocessor_config.json")
    return {}


def vocabulary(folder: Path) -> Path | None:
    """The folder, if a tokenizer lies in it."""
    return folder if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file() else None


Reader = Callable[[Path, dict, Tensors, str], Source]
KINDS: dict[str, Reader] = {
    "UNet2DConditionModel": unet_folder,
    "AutoencoderKL": vae_folder,
    "speecht5_hifigan": vocoder_folder,
    "clap": clap_folder,
    "clap_text_model": clap_text_folder,
    "clap_audio_model": clap_audio_folder,
    "roberta": roberta_folder,
}
