"""Folders that diffusers and transformers write: a pipeline of AudioLDM or MusicLDM, or one network."""

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_audio.convert import audioldm, clap, clvp, diffusers, hifigan
from ldm_audio.convert.parts import UNET, VAE, VOCODER, Part, Source, located, mel_settings
from ldm_audio.convert.rules import Rule
from ldm_audio.convert.stored import Tensors, open_folder, read_json
from ldm_audio.errors import InputError

PIPELINES = {"AudioLDMPipeline": "audioldm", "MusicLDMPipeline": "musicldm"}
COMPONENTS = ("unet", "vae", "vocoder", "text_encoder")


def open_pipeline(folder: Path) -> Source:
    """A diffusers pipeline's folder.

    Raises:
        InputError: another pipeline, a component that is missing, or a setting that has no equal here.
    """
    name = str(read_json(folder / "model_index.json").get("_class_name"))
    if name not in PIPELINES:
        raise InputError(f"{folder}: a {name}, expected {' or '.join(PIPELINES)}")
    if missing := [part for part in (*COMPONENTS, "scheduler") if not (folder / part).is_dir()]:
        raise InputError(f"{folder}: has no folder {', '.join(missing)}")
    found = {part: open_network(folder / part) for part in COMPONENTS}
    parts = {ours: part for source in found.values() for ours, part in source.parts.items()}
    if odd := {"unet", "vae", "vocoder", "clap"} ^ parts.keys():
        raise InputError(f"{folder}: its components are not those of a {name} ({', '.join(sorted(odd))})")

    schedule_file, vocoder = folder / "scheduler" / "scheduler_config.json", parts["vocoder"].recipe
    with located(schedule_file):
        schedule, differing = diffusers.schedule_arguments(read_json(schedule_file))
    system = {
        "mel": mel_settings(
            n_mels=vocoder["n_mels"],
            hop_length=prod(vocoder["upsample_rates"]),
            sample_rate=hifigan.sample_rate(read_json(folder / "vocoder" / "config.json")),
        ),
        "schedule": schedule,
        "latent_scale": diffusers.latent_scale(read_json(folder / "vae" / "config.json")),
        "family": PIPELINES[name],
    }
    cautions = [f"{schedule_file}: {', '.join(differing)} is not followed"] if differing else []
    tokenizer = folder / "tokenizer"
    return Source(
        kind=f"diffusers {name}",
        parts=parts,
        system=system,
        tokenizer=tokenizer if tokenizer.is_dir() else None,
        notes=[note for source in found.values() for note in source.notes],
        cautions=[caution for source in found.values() for caution in source.cautions] + cautions,
    )


def open_network(folder: Path) -> Source:
    """One network's folder, told by `model_type` or `_class_name` of its `config.json`.

    Raises:
        InputError: a kind that is not known, or a setting that has no equal here.
    """
    config_file = folder / "config.json"
    config = read_json(config_file)
    kind = str(config.get("model_type") or config.get("_class_name"))
    if kind not in KINDS:
        raise InputError(f"{config_file}: {kind!r} is not one of {', '.join(KINDS)}")
    tensors, file = open_folder(folder)
    with located(config_file):
        source = KINDS[kind](folder, config, tensors)
    source.notes.append(f"{folder.name}/{file}")
    return source


def choose_heads(source: Source, heads: str) -> None:
    """Settles the heads of a diffusers UNet, of which its weights say nothing.

    The published folders say 8 at every level, which the original networks do not have. `config` takes what
    the folder says, with a caution where that differs; `original` takes the original's.

    Raises:
        InputError: `original` for a size that no original has.
    """
    unet = source.parts["unet"]
    original = audioldm.released_heads(unet.recipe["channels"], unet.recipe["channel_mults"])
    has_original = 0 not in original
    if heads == "original":
        if not has_original:
            raise InputError(
                f"{unet.origin}: heads=original: no original has {unet.recipe['channels']} channels"
            )
        unet.recipe["num_heads"] = original
    attending = zip(unet.recipe["attention_levels"], unet.recipe["num_heads"], original, strict=True)
    if has_original and any(attends and said != had for attends, said, had in attending):
        source.cautions.append(
            f"{unet.origin}: heads {unet.recipe['num_heads']} as its config says, where the original network "
            f"of this size has {original}; heads=original takes those"
        )


def unet_folder(folder: Path, config: dict, tensors: Tensors) -> Source:
    """diffusers' UNet."""
    recipe = {"_target_": UNET, **diffusers.unet_arguments(config)}
    part = Part(recipe, diffusers.unet_rules(), tensors, str(folder))
    return Source(kind="diffusers UNet2DConditionModel", parts={"unet": part})


def vae_folder(folder: Path, config: dict, tensors: Tensors) -> Source:
    """diffusers' AutoencoderKL."""
    recipe = {"_target_": VAE, **diffusers.vae_arguments(config)}
    part = Part(recipe, diffusers.vae_rules(), tensors, str(folder))
    return Source(kind="diffusers AutoencoderKL", parts={"vae": part})


def vocoder_folder(folder: Path, config: dict, tensors: Tensors) -> Source:
    """transformers' SpeechT5HifiGan."""
    arguments = hifigan.speecht5_arguments(config)
    rules = hifigan.speecht5_rules(n_mels=arguments["n_mels"])
    part = Part({"_target_": VOCODER, **arguments}, rules, tensors, str(folder))
    return Source(kind="transformers SpeechT5HifiGan", parts={"vocoder": part})


def clap_folder(folder: Path, config: dict, tensors: Tensors) -> Source:
    """transformers' ClapModel, or one half of it."""
    kind = config["model_type"]
    name, table, notes = CLAP_KINDS[kind]
    recipe = clap.transformers_recipe(config, preprocessor(folder), kind=kind)
    part = Part(recipe, table(), tensors, str(folder))
    return Source(
        kind=f"transformers {name}", parts={"clap": part}, tokenizer=vocabulary(folder), notes=list(notes)
    )


def clvp_folder(folder: Path, config: dict, tensors: Tensors) -> Source:
    """transformers' ClvpModelForConditionalGeneration: two networks and what makes a system of them."""
    recipes = clvp.recipes_of(config)
    names = [name for name in tensors if name.startswith(clvp.SPEECH_LM_PREFIXES)]
    speech_lm = tensors.chosen({name: name for name in names})
    parts = {
        "speech_lm": Part(recipes["speech_lm"], clvp.speech_lm_rules(), speech_lm, str(folder)),
        "clvp": Part(
            recipes["clvp"],
            clvp.clvp_rules(recipes["clvp"]),
            tensors.without(*clvp.SPEECH_LM_PREFIXES),
            str(folder),
        ),
    }
    system = {"pipeline": "text_to_speech_tokens"} | clvp.system_of(config, preprocessor(folder))
    cautions = []
    if system["mel"]["norms"] is None:
        cautions.append(f"{folder}: its front end has no mel_norms, as released models need")
    return Source(
        kind="transformers CLVP",
        parts=parts,
        system=system,
        tokenizer=vocabulary(folder),
        notes=["no text head: speech_lm predicts speech alone"],
        cautions=cautions,
    )


def roberta_folder(folder: Path, config: dict, tensors: Tensors) -> Source:
    """A RoBERTa trained on text, to start a CLAP's text tower from; its language-model head is dropped."""
    tower = clap.roberta_tower(config)
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


CLAP_KINDS = {
    "clap": ("ClapModel", clap.transformers_rules, ()),
    "clap_text_model": (
        "ClapTextModelWithProjection",
        clap.transformers_text_rules,
        ("CLAP's text half alone: it cannot rank candidates",),
    ),
    "clap_audio_model": (
        "ClapAudioModelWithProjection",
        clap.transformers_audio_rules,
        ("CLAP's audio half alone: it cannot embed texts",),
    ),
}
Reader = Callable[[Path, dict, Tensors], Source]
KINDS: dict[str, Reader] = {
    "UNet2DConditionModel": unet_folder,
    "AutoencoderKL": vae_folder,
    "speecht5_hifigan": vocoder_folder,
    **dict.fromkeys(CLAP_KINDS, clap_folder),
    "clvp": clvp_folder,
    "roberta": roberta_folder,
}
