"""Our networks as folders that diffusers and transformers load: the conversions turned round.

Every tensor that both sides have is bit-equal. A setting that they do not have is an error that names it.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ldm_audio.convert import clap, clvp, diffusers, hifigan
from ldm_audio.convert.folders import PIPELINES
from ldm_audio.convert.rules import Rule, invert_rules
from ldm_audio.data.speech_tokenizer import SpeechTokenizer
from ldm_audio.data.tokenizers import Tokenizer
from ldm_audio.files import replacing, write_json

SECONDS = 10.24  # what an exported pipeline makes if it is asked for no length
FRAMES_PER_SECOND = 100  # of every released mel front end
UNKNOWN_SCALE = 1.0  # of the latents, where a VAE is exported alone
DIFFUSERS_FILE, TRANSFORMERS_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"

State = Mapping[str, Tensor]


def write_network(
    folder: Path, file: str, config: Mapping[str, Any], rules: list[Rule], state: State
) -> None:
    """A network's folder from its state and table."""
    write_tensors(folder, file, config, invert_rules(rules, state))


def write_tensors(folder: Path, file: str, config: Mapping[str, Any], tensors: State) -> None:
    """`config.json` and the weights beside it."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_json(folder / "config.json", config)
    with replacing(folder / file) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def export_unet(folder: Path, arguments: dict, state: State, *, sample_size: int = 256) -> None:
    """diffusers' UNet2DConditionModel; `sample_size` is its length in latent frames."""
    config = diffusers.unet_config(arguments, sample_size=sample_size)
    write_network(folder, DIFFUSERS_FILE, config, diffusers.unet_rules(), state)


def export_vae(folder: Path, arguments: dict, state: State, *, latent_scale: float = UNKNOWN_SCALE) -> None:
    """diffusers' AutoencoderKL."""
    config = diffusers.vae_config(arguments, latent_scale=latent_scale)
    write_network(folder, DIFFUSERS_FILE, config, diffusers.vae_rules(), state)


def export_vocoder(folder: Path, arguments: dict, state: State, *, sample_rate: int | None = None) -> None:
    """transformers' SpeechT5HifiGan."""
    sample_rate = sample_rate or FRAMES_PER_SECOND * prod(arguments["upsample_rates"])
    config = hifigan.speecht5_config(arguments, sample_rate=sample_rate)
    rules = hifigan.speecht5_rules(n_mels=arguments["n_mels"])
    write_network(folder, TRANSFORMERS_FILE, config, rules, state)


def export_clap(
    folder: Path, recipe: dict, state: State, *, text_only: bool = False, tokenizer: Tokenizer | None = None
) -> None:
    """transformers' ClapModel, or the half of it that there is; `text_only` leaves the audio half behind."""
    if text_only:
        recipe = recipe | {"audio_tower": None}
        state = {name: tensor for name, tensor in state.items() if not name.startswith("audio_")}
    has_audio, has_text = (recipe[f"{half}_tower"] is not None for half in ("audio", "text"))
    if has_audio and has_text:
        rules = clap.transformers_rules()
    else:
        rules = clap.transformers_audio_rules() if has_audio else clap.transformers_text_rules()
    write_network(folder, TRANSFORMERS_FILE, clap.transformers_config(recipe), rules, state)
    if has_audio:
        write_json(folder / "preprocessor_config.json", clap.preprocessor_config(recipe["front_end"]))
    if tokenizer is not None:
        export_tokenizer(folder, tokenizer)


def export_clvp(
    folder: Path,
    system: Mapping[str, Any],
    networks: Mapping[str, tuple[dict, State]],
    tokenizer: SpeechTokenizer,
) -> None:
    """transformers' ClvpModelForConditionalGeneration with processor; the text head is left behind.

    networks: by part, the recipe and the state of `clvp` and `speech_lm`.
    """
    (ranker, ranker_state), (speech_lm, speech_lm_state) = networks["clvp"], networks["speech_lm"]
    config = clvp.config_of(ranker, speech_lm, ending=system["ending"] or clvp.RELEASED_ENDING)
    kept = {name: tensor for name, tensor in speech_lm_state.items() if not name.startswith("text_head.")}
    tensors = invert_rules(clvp.clvp_rules(ranker), ranker_state)
    tensors |= invert_rules(clvp.speech_lm_rules(), kept)
    write_tensors(folder, TRANSFORMERS_FILE, config, tensors)
    write_json(folder / "preprocessor_config.json", clvp.preprocessor_config(system["mel"]))
    tokenizer.save_vocabulary(folder)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "ClvpTokenizer"})


def export_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """transformers' RobertaTokenizer, with the files of its present and of its former layout."""
    tokenizer.save(folder / "tokenizer.json")
    tokenizer.backend.model.save(str(folder))
    config = {"tokenizer_class": "RobertaTokenizer", "model_max_length": tokenizer.max_length}
    config |= {"add_prefix_space": False}
    write_json(folder / "tokenizer_config.json", config)


def export_pipeline(
    folder: Path,
    system: Mapping[str, Any],
    networks: Mapping[str, tuple[dict, State]],
    tokenizer: Tokenizer,
) -> None:
    """A diffusers pipeline: MusicLDM's where the system says so and has a whole CLAP, AudioLDM's otherwise.

    networks: by part, the recipe and the state of each.
    """
    (unet, unet_state), (vae, vae_state) = networks["unet"], networks["vae"]
    (vocoder, vocoder_state), (recipe, clap_state) = networks["vocoder"], networks["clap"]
    is_music = system.get("family") == "musicldm" and recipe["audio_tower"] is not None
    mel, downsample = system["mel"], 2 ** (len(vae["channel_mults"]) - 1)
    frames = SECONDS * mel["sample_rate"] / mel["hop_length"]
    export_unet(folder / "unet", unet, unet_state, sample_size=round(frames / downsample))
    export_vae(folder / "vae", vae, vae_state, latent_scale=system["latent_scale"])
    export_vocoder(folder / "vocoder", vocoder, vocoder_state, sample_rate=mel["sample_rate"])
    export_clap(folder / "text_encoder", recipe, clap_state, text_only=not is_music)
    write_json(folder / "scheduler" / "scheduler_config.json", diffusers.schedule_config(system["schedule"]))
    export_tokenizer(folder / "tokenizer", tokenizer)
    components = {
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "vocoder": ["transformers", "SpeechT5HifiGan"],
        "tokenizer": ["transformers", "RobertaTokenizer"],
        "text_encoder": ["transformers", "ClapModel" if is_music else "ClapTextModelWithProjection"],
    }
    if is_music:
        write_json(
            folder / "feature_extractor" / "preprocessor_config.json",
            clap.preprocessor_config(recipe["front_end"]),
        )
        components["feature_extractor"] = ["transformers", "ClapFeatureExtractor"]
    classes = {family: name for name, family in PIPELINES.items()}
    name = classes["musicldm" if is_music else "audioldm"]
    index = {"_class_name": name, "_diffusers_version": "0.33.1", **components}
    write_json(folder / "model_index.json", index)
