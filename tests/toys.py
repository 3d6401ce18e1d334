"""Tiny networks, data and objectives for the tests of everything that joins the parts.

Axes: b batch, s samples.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ldm_audio.audio.clap_mel import ClapMel
from ldm_audio.audio.mel import LogMel
from ldm_audio.audio.mixup import Mixup
from ldm_audio.audio.speech_mel import SpeechMel
from ldm_audio.data.speech_tokenizer import SpeechTokenizer, train_speech_bpe
from ldm_audio.data.tokenizers import Tokenizer, train_bpe
from ldm_audio.diffusion.schedule import Schedule
from ldm_audio.models.clap import CLAP
from ldm_audio.models.clvp import CLVP, Tower
from ldm_audio.models.discriminators import PatchDiscriminator, WaveDiscriminator
from ldm_audio.models.dvae import DVAE
from ldm_audio.models.hifigan import HiFiGAN
from ldm_audio.models.htsat import HTSAT
from ldm_audio.models.perceptual import MultiResolutionMel
from ldm_audio.models.roberta import Roberta
from ldm_audio.models.speech_lm import SpeechLM
from ldm_audio.models.unet import UNet
from ldm_audio.models.vae import VAE
from ldm_audio.objectives.base import Objective
from ldm_audio.objectives.clvp import CLVPObjective
from ldm_audio.objectives.contrastive import ContrastiveObjective
from ldm_audio.objectives.dvae import DVAEObjective
from ldm_audio.objectives.latent_diffusion import LatentDiffusionObjective
from ldm_audio.objectives.speech_lm import SpeechLMObjective
from ldm_audio.objectives.vae import VAEObjective
from ldm_audio.objectives.vocoder import VocoderObjective
from ldm_audio.pipelines.text_to_audio import TextToAudio

RATE = 16000
SAMPLES = 2560  # 16 mel frames
CAPTIONS = ("a dog barks", "rain on a roof", "a low hum", "a bell rings twice")

MEL = {
    "sample_rate": RATE, "n_fft": 512, "hop_length": 160, "win_length": 512, "n_mels": 16,
    "fmin": 0, "fmax": 8000, "framing": "hifigan",
}  # fmt: skip
VAE_RECIPE = {
    "_target_": "ldm_audio.models.vae.VAE", "in_channels": 1, "channels": 8, "channel_mults": [1, 2],
    "num_res_blocks": 1, "latent_channels": 4, "norm_groups": 4, "dropout": 0.0,
}  # fmt: skip
UNET_RECIPE = {
    "_target_": "ldm_audio.models.unet.UNet", "in_channels": 4, "out_channels": 4, "channels": 8,
    "channel_mults": [1, 2], "num_res_blocks": 1, "attention_levels": [False, True], "num_heads": [1, 2],
    "transformer_depth": 1, "transformers_per_block": 1, "embed_dim": 12, "embed_mode": "concat",
    "context_dim": None, "norm_groups": 4, "dropout": 0.0,
}  # fmt: skip
VOCODER_RECIPE = {
    "_target_": "ldm_audio.models.hifigan.HiFiGAN", "n_mels": 16, "channels": 8, "upsample_rates": [10, 8, 2],
    "upsample_kernels": [16, 16, 8], "resblock_kernels": [3], "resblock_dilations": [[1, 3]],
    "high_resolution": False,
}  # fmt: skip
CLAP_RECIPE = {
    "_target_": "ldm_audio.models.clap.CLAP", "joint_dim": 12,
    "front_end": {
        "_target_": "ldm_audio.audio.clap_mel.ClapMel", "sample_rate": RATE, "n_fft": 512, "hop_length": 160,
        "n_mels": 16, "fmin": 50, "fmax": 8000, "max_samples": 2400, "fusion": False, "filling": "repeatpad",
    },
    "audio_tower": {
        "_target_": "ldm_audio.models.htsat.HTSAT", "n_mels": 16, "spec_size": 32, "patch_size": 4,
        "patch_stride": 4, "dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4,
        "mlp_ratio": 2.0, "qkv_bias": True, "dropout": 0.0, "drop_path": 0.0, "fusion": None,
        "spec_augment": False,
    },
    "text_tower": {
        "_target_": "ldm_audio.models.roberta.Roberta", "vocab_size": 300, "dim": 16, "depth": 1,
        "num_heads": 2, "ff_dim": 16, "max_positions": 80, "pad_token": 1, "layer_norm_eps": 1e-5,
        "dropout": 0.0,
    },
}  # fmt: skip
SPEECH_MEL = {
    "sample_rate": RATE, "n_fft": 512, "hop_length": 160, "n_mels": 16, "fmin": 0, "fmax": 8000,
    "reference_samples": 1280, "norms": None,
}  # fmt: skip
DVAE_RECIPE = {
    "_target_": "ldm_audio.models.dvae.DVAE", "n_mels": 16, "channels": 8, "num_levels": 1,
    "num_res_blocks": 1, "num_tokens": 12, "codebook_dim": 4, "codebook_decay": 0.9,
}  # fmt: skip
TOWER_RECIPE = {
    "_target_": "ldm_audio.models.clvp.Tower", "vocab_size": 64, "dim": 16, "depth": 1, "num_heads": 1,
    "ff_dim": 16, "rotary_dim": 8, "joint_dim": 12, "norm": "floor", "dropout": 0.0,
}  # fmt: skip
CLVP_RECIPE = {
    "_target_": "ldm_audio.models.clvp.CLVP", "text_tower": TOWER_RECIPE, "speech_tower": TOWER_RECIPE,
}  # fmt: skip
SPEECH_LM_RECIPE = {
    "_target_": "ldm_audio.models.speech_lm.SpeechLM", "n_mels": 16, "dim": 16, "depth": 1, "num_heads": 2,
    "ff_dim": 32, "conditioning_depth": 1, "text_vocab_size": 64, "text_start": 63, "text_stop": 0,
    "num_tokens": 12, "max_text_positions": 40, "max_speech_positions": 20, "text_head": True,
    "dropout": 0.0,
}  # fmt: skip
SCHEDULE = {
    "num_timesteps": 1000, "beta_start": 0.0015, "beta_end": 0.0195, "kind": "scaled_linear",
    "prediction": "eps",
}  # fmt: skip


def arguments(recipe: dict) -> dict:
    return {key: value for key, value in recipe.items() if key != "_target_"}


def mel() -> LogMel:
    return LogMel(**MEL)


def vae() -> VAE:
    return with_recipe(VAE(**arguments(VAE_RECIPE)), VAE_RECIPE)


def unet() -> UNet:
    return with_recipe(UNet(**arguments(UNET_RECIPE)), UNET_RECIPE)


def vocoder() -> HiFiGAN:
    return with_recipe(HiFiGAN(**arguments(VOCODER_RECIPE)), VOCODER_RECIPE)


def clap() -> CLAP:
    network = CLAP(
        front_end=ClapMel(**arguments(CLAP_RECIPE["front_end"])),
        audio_tower=HTSAT(**arguments(CLAP_RECIPE["audio_tower"])),
        text_tower=Roberta(**arguments(CLAP_RECIPE["text_tower"])),
        joint_dim=CLAP_RECIPE["joint_dim"],
    )
    return with_recipe(network, CLAP_RECIPE)


def dvae() -> DVAE:
    return with_recipe(DVAE(**arguments(DVAE_RECIPE)), DVAE_RECIPE)


def frozen_dvae() -> DVAE:
    """The same at every call, its codebook (a buffer) too, as a part from a file is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise(dvae())


def clvp() -> CLVP:
    towers = {name: Tower(**arguments(CLVP_RECIPE[name])) for name in ("text_tower", "speech_tower")}
    return with_recipe(CLVP(**towers), CLVP_RECIPE)


def speech_lm() -> SpeechLM:
    return with_recipe(SpeechLM(**arguments(SPEECH_LM_RECIPE)), SPEECH_LM_RECIPE)


def speech_tokenizer() -> SpeechTokenizer:
    return train_speech_bpe(CAPTIONS, vocab_size=60)


def with_recipe(network: nn.Module, recipe: dict) -> nn.Module:
    network.recipe = recipe
    return network


def tokenizer() -> Tokenizer:
    return train_bpe(CAPTIONS, vocab_size=300, max_length=77)


def randomise(network: nn.Module) -> nn.Module:
    """Every parameter at random, the zero-initialised ones too, at sizes that let each input through."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = 1.5 * noise / parameter[0].numel() ** 0.5
        elif parameter.ndim == 1:
            parameter.data = 0.2 * noise + float("norm" in name and name.endswith("weight"))
    return network


def mixup(**changes) -> Mixup:
    settings = {
        "name": "toy", "space": "audio", "prob": 1.0, "alpha": 5.0, "align": "downbeat", "tempo_width": 3.0,
        "tempo_match": "bucket", "octave_fold": False, "allow_self": False, "no_beats": "skip",
        "last_downbeat": True, "min_overlap": 5.12, "crop": "first", "premix": "none", "text": "anchor",
        "latent": "sample", "renorm": "none", "condition_tail": "trim",
    }  # fmt: skip
    return Mixup(**settings | changes)


def pipeline() -> TextToAudio:
    """Text to audio with random networks; a latent frame is 20 ms."""
    return TextToAudio(
        unet=randomise(unet()), vae=randomise(vae()), vocoder=randomise(vocoder()), clap=randomise(clap()),
        tokenizer=tokenizer(), schedule=Schedule(**SCHEDULE), mel=mel(), latent_scale=0.9,
    )  # fmt: skip


def patch_discriminator() -> PatchDiscriminator:
    return PatchDiscriminator(in_channels=1, channels=4, num_layers=1)


def wave_discriminator() -> WaveDiscriminator:
    return WaveDiscriminator(periods=[2, 3], period_channels=[2, 4], scale_channels=[2, 4], num_scales=1)


def vae_objective(**changes) -> VAEObjective:
    settings = {
        "mel": mel(), "vae": vae(), "discriminator": patch_discriminator(),
        "perceptual": MultiResolutionMel(scales=[1, 2]), "seed": 0, "segment_samples": SAMPLES,
        "kl_weight": 10.0, "perceptual_weight": 0.3, "adversarial_weight": 0.5, "adversarial_start": 0,
    }  # fmt: skip
    return VAEObjective(**settings | changes)


def vocoder_objective(**changes) -> VocoderObjective:
    settings = {
        "mel": mel(), "vocoder": vocoder(), "discriminator": wave_discriminator(), "seed": 0,
        "segment_samples": 1280, "mel_weight": 45.0, "feature_weight": 2.0, "adversarial_start": 0,
    }  # fmt: skip
    return VocoderObjective(**settings | changes)


def contrastive_objective(**changes) -> ContrastiveObjective:
    settings = {"clap": clap(), "tokenizer": tokenizer(), "mask_duplicates": True}
    return ContrastiveObjective(**settings | changes)


def diffusion_objective(**changes) -> LatentDiffusionObjective:
    settings = {
        "mel": mel(), "unet": unet(), "vae": randomise(vae()), "clap": randomise(clap()),
        "vocoder": randomise(vocoder()),
        "tokenizer": tokenizer(), "schedule": Schedule(**SCHEDULE), "seed": 0, "text_probability": 0.0,
        "condition_dropout": 0.1, "mixup": mixup(prob=0.0), "latent_scale": None, "allow_random_frozen": True,
    }  # fmt: skip
    return LatentDiffusionObjective(**settings | changes)


def dvae_objective(**changes) -> DVAEObjective:
    settings = {
        "mel": SpeechMel(**SPEECH_MEL), "dvae": dvae(), "seed": 0, "commitment_weight": 0.25,
        "restart_below": 0.1,
    }  # fmt: skip
    return DVAEObjective(**settings | changes)


def speech_lm_objective(**changes) -> SpeechLMObjective:
    settings = {
        "mel": SpeechMel(**SPEECH_MEL), "speech_lm": speech_lm(), "dvae": frozen_dvae(),
        "tokenizer": speech_tokenizer(), "text_weight": 0.5, "allow_random_frozen": True,
    }  # fmt: skip
    return SpeechLMObjective(**settings | changes)


def clvp_objective(**changes) -> CLVPObjective:
    settings = {
        "mel": SpeechMel(**SPEECH_MEL), "clvp": clvp(), "dvae": frozen_dvae(),
        "tokenizer": speech_tokenizer(), "seed": 0, "text_masking": 0.1, "speech_masking": 0.1,
        "mask_duplicates": True, "allow_random_frozen": True,
    }  # fmt: skip
    return CLVPObjective(**settings | changes)


OBJECTIVES = {
    "dvae": dvae_objective,
    "speech_lm": speech_lm_objective,
    "clvp": clvp_objective,
    "vae": vae_objective,
    "vocoder": vocoder_objective,
    "contrastive": contrastive_objective,
    "latent_diffusion": diffusion_objective,
}


def objective(name: str, **changes) -> Objective:
    """A toy objective, the same at every call."""
    torch.manual_seed(0)
    return OBJECTIVES[name](**changes)


def waveforms(items: Tensor) -> Tensor:
    """(b, s): two partials a row, different for every item number."""
    seconds = torch.arange(SAMPLES) / RATE
    low, high = 200.0 + 130.0 * (items[:, None] % 7), 900.0 + 410.0 * (items[:, None] % 5)
    return 0.4 * torch.sin(2 * math.pi * low * seconds) + 0.1 * torch.sin(2 * math.pi * high * seconds)


def batch(*items: int) -> dict:
    """The batch of these global item numbers."""
    numbers = torch.tensor(items)
    captions = [CAPTIONS[item % len(CAPTIONS)] for item in items]
    return {
        "waveform": waveforms(numbers),
        "num_samples": SAMPLES - 160 * (numbers % 3),
        "references": torch.stack([waveforms(numbers + 1), waveforms(numbers + 2)], dim=1)[..., :1280],
        "caption": captions,
        "item": numbers,
        "index": numbers % 4,
    }


class Batches:
    """`batches(step)`: endless batches of `size`, addressed by the step as the real loader's are."""

    def __init__(self, size: int, *, rank: int = 0, world_size: int = 1):
        self.size, self.rank, self.world_size = size, rank, world_size

    def __call__(self, step: int) -> Iterator[dict]:
        while True:
            first = (step * self.world_size + self.rank) * self.size
            yield batch(*range(first, first + self.size))
            step += 1


def cached(batches: Callable[[int], Iterator[dict]]) -> Callable[[int], Iterator[dict]]:
    """The same items as float64 latents, as `encode` writes them."""

    def latents(step: int) -> Iterator[dict]:
        return (latents_of(clips) for clips in batches(step))

    return latents


def latents_of(clips: dict) -> dict:
    """A batch of clips as float64 latents."""
    seeds = [torch.Generator().manual_seed(int(item)) for item in clips["item"]]
    mean, embed = (
        torch.stack([torch.randn(shape, generator=seed, dtype=torch.float64) for seed in seeds])
        for shape in ((4, 8, 8), (12,))
    )
    rest = {key: value for key, value in clips.items() if key != "waveform"}
    return rest | {"z_mean": mean, "z_std": 0.1 * mean.abs(), "audio_embed": embed}
