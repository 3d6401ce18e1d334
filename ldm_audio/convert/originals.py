"""Original checkpoints: AudioLDM's and MusicLDM's, LAION's CLAP, HTSAT's, VAE's, HiFi-GAN's, TorToise's.

None of them says what it is: kinds are told apart by names that only one of them has, sizes are read off the
shapes, and what neither tells is as released.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from ldm_audio.convert import audioldm, clap, hifigan, laion, tortoise
from ldm_audio.convert.parts import SCHEDULE, UNET, VAE, VOCODER, Part, Source, located, mel_settings
from ldm_audio.convert.rules import drop, few, plan
from ldm_audio.convert.stored import Tensors, read_json, state_dict
from ldm_audio.errors import InputError

CLAP_PREFIX = "cond_stage_model.model."
VOCODER_PREFIX = f"{audioldm.VAE_PREFIX}vocoder."
HTSAT_PREFIX = "sed_model."
EMA_COUNTERS = ("model_ema.decay", "model_ema.num_updates")
MUSICLDM_DIM = 128  # HTSAT-base beside a UNet of 128 channels: MusicLDM, where AudioLDM-S has HTSAT-tiny


def open_original(path: Path, content: object, *, ema: bool) -> Source:
    """The networks of an opened file. `ema` chooses between a diffusion model's averaged and raw weights.

    Raises:
        InputError: no kind that is known, or one whose tensors do not fit together.
    """
    if isinstance(content, Mapping) and isinstance(content.get("generator"), Mapping):
        return generator_file(path, state_dict(path, content["generator"]))
    state = state_dict(path, content)
    with located(path):
        return recognise(state, str(path), ema=ema)


def recognise(state: Tensors, origin: str, *, ema: bool) -> Source:
    """The kind of a state dict from its names."""
    if state.below(audioldm.UNET_PREFIX):
        return whole_checkpoint(state, origin, ema=ema)
    if state.below(HTSAT_PREFIX):
        return htsat_start(state.below(HTSAT_PREFIX), state, origin)
    if any(name.endswith(laion.ANCHOR) for name in state):
        return laion_clap(state, origin)
    if "encoder.conv_in.weight" in state and "post_quant_conv.weight" in state:
        return vae_file(state, origin)
    if found := tortoise_part(state, origin):
        return found
    if any(name.endswith(("conv_pre.weight", "conv_pre.weight_v")) for name in state):
        return generator_file(Path(origin), state)
    raise InputError(
        f"{origin}: no kind of weights that is known here; its {len(state)} tensors begin {few(state)}"
    )


def tortoise_part(state: Tensors, origin: str) -> Source | None:
    """One of TorToise's files, or None."""
    if tortoise.is_speech_lm(state):
        recipe = sizes(tortoise.speech_lm_recipe, state, origin)
        rules, name = tortoise.speech_lm_rules(num_heads=recipe["num_heads"]), "speech_lm"
    elif tortoise.is_clvp(state):
        recipe = sizes(tortoise.clvp_recipe, state, origin)
        rules, name = tortoise.clvp_rules(depth=recipe["text_tower"]["depth"]), "clvp"
    elif tortoise.is_dvae(state):
        recipe = sizes(tortoise.dvae_recipe, state, origin)
        blocks = {key: recipe[key] for key in ("num_levels", "num_res_blocks")}
        rules, name = tortoise.dvae_rules(**blocks), "dvae"
    else:
        return None
    return Source(kind=f"TorToise's {name}", parts={name: Part(recipe, rules, state, origin)})


def whole_checkpoint(state: Tensors, origin: str, *, ema: bool) -> Source:
    """`audioldm-*.ckpt` or `musicldm-ckpt.ckpt`: four networks, the averages of one, and `scale_factor`."""
    raw = state.below(audioldm.UNET_PREFIX)
    averages = {name: audioldm.ema_key(name) for name in raw}
    has_averages = any(name.startswith("model_ema.") for name in state)
    if ema and not has_averages:
        raise InputError(f"{origin}: holds no averaged weights (model_ema.*); take the others with raw")
    if has_averages and (missing := [key for key in averages.values() if key not in state]):
        raise InputError(f"{origin}: no averaged weights named {few(missing)}")
    taken = {*averages.values(), *EMA_COUNTERS} if has_averages else set()
    networks = (audioldm.UNET_PREFIX, audioldm.VAE_PREFIX, CLAP_PREFIX)
    rest = [name for name in state.without(*networks) if name not in taken]
    plan([*audioldm.SCHEDULE_BUFFERS, *drop("scale_factor")], rest, None, origin=origin)
    if "scale_factor" not in state:
        raise InputError(f"{origin}: no tensor named scale_factor, the scale of the latents")

    first_stage = state.below(audioldm.VAE_PREFIX)
    parts = {
        "unet": unet_part(state.chosen(averages) if ema else raw, f"{origin} (unet)"),
        "vae": vae_part(first_stage.without("vocoder."), f"{origin} (vae)"),
        "vocoder": vocoder_part(state.below(VOCODER_PREFIX), f"{origin} (vocoder)"),
        "clap": clap_part(state.below(CLAP_PREFIX), f"{origin} (clap)"),
    }
    generator, unet = parts["vocoder"].recipe, parts["unet"].recipe
    is_music = parts["clap"].recipe["audio_tower"]["dim"] == MUSICLDM_DIM == unet["channels"]
    return Source(
        kind=f"original {'MusicLDM' if is_music else 'AudioLDM'} checkpoint",
        parts=parts,
        system={
            "mel": mel_settings(n_mels=generator["n_mels"], hop_length=prod(generator["upsample_rates"])),
            "schedule": dict(SCHEDULE),
            "latent_scale": float(state["scale_factor"]),
            "family": "musicldm" if is_music else "audioldm",
        },
        notes=[
            f"the UNet's {'averaged' if ema else 'raw'} weights",
            f"heads {unet['num_heads']}, the original's for {unet['channels']} channels",
        ],
    )


def unet_part(tensors: Tensors, origin: str) -> Part:
    arguments = sizes(audioldm.unet_arguments, tensors, origin)
    names = ("num_res_blocks", "attention_levels", "transformers_per_block")
    rules = audioldm.unet_rules(**{name: arguments[name] for name in names})
    return Part({"_target_": UNET, **arguments}, rules, tensors, origin)


def vae_part(tensors: Tensors, origin: str) -> Part:
    arguments = sizes(audioldm.vae_arguments, tensors, origin)
    rules = audioldm.vae_rules(num_levels=len(arguments["channel_mults"]))
    return Part({"_target_": VAE, **arguments}, rules, tensors, origin)


def vocoder_part(tensors: Tensors, origin: str, *, arguments: dict[str, Any] | None = None) -> Part:
    arguments = arguments or hifigan.released_arguments(tensors.shapes, origin=origin)
    return Part({"_target_": VOCODER, **arguments}, hifigan.generator_rules(), tensors, origin)


def clap_part(tensors: Tensors, origin: str) -> Part:
    recipe = sizes(laion.clap_recipe, tensors, origin)
    return Part(recipe, laion.clap_rules(), tensors, origin)


def sizes(read_off, tensors: Tensors, origin: str) -> dict[str, Any]:
    """A network's config from the shapes of its tensors."""
    with located(origin):
        return read_off(tensors.shapes)


def laion_clap(state: Tensors, origin: str) -> Source:
    """LAION's `.pt`, with `module.` before its names where it was trained in parallel, or without."""
    prefix = laion.prefix_of(state)
    if other := [name for name in state if not name.startswith(prefix)]:
        raise InputError(f"{origin}: no rule takes {few(other)}")
    return Source(kind="LAION CLAP", parts={"clap": clap_part(state.below(prefix), origin)})


def htsat_start(tensors: Tensors, state: Tensors, origin: str) -> Source:
    """HTSAT as trained on AudioSet, to start a CLAP's audio tower from; its classifier is dropped."""
    if len(tensors) < len(state):
        raise InputError(f"{origin}: no rule takes {few(state.without(HTSAT_PREFIX))}")
    tower = sizes(lambda shapes: laion.audio_tower_of(shapes, ""), tensors, origin)
    recipe = {"_target_": clap.HTSAT_TARGET, **tower, **clap.HTSAT_TRAINING}
    part = Part(recipe, laion.htsat_rules(), tensors, origin)
    return Source(kind="HTSAT, a start for CLAP", parts={"clap.audio_tower": part})


def vae_file(state: Tensors, origin: str) -> Source:
    """An autoencoder's own file; the vocoder that some hold besides is taken too."""
    parts = {"vae": vae_part(state.without("vocoder."), f"{origin} (vae)")}
    if vocoder := state.below("vocoder."):
        parts["vocoder"] = vocoder_part(vocoder, f"{origin} (vocoder)")
    return Source(kind="original AudioLDM autoencoder", parts=parts)


def generator_file(path: Path, state: Tensors) -> Source:
    """A HiFi-GAN generator; its sizes from the JSON beside it, else from the released layouts."""
    for config in (path.with_suffix(".json"), path.parent / "config.json"):
        if config.is_file():
            with located(config):
                arguments = hifigan.generator_arguments(read_json(config))
            part = vocoder_part(state, str(path), arguments=arguments)
            return Source(
                kind="HiFi-GAN generator", parts={"vocoder": part}, notes=[f"sizes from {config.name}"]
            )
    return Source(kind="HiFi-GAN generator", parts={"vocoder": vocoder_part(state, str(path))})
